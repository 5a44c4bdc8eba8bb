"""Real servers for tests: a PostgreSQL and an S3 of one's own, started and ended with the tests."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.storage import open_uri

UNPRIVILEGED = ("postgres", "nobody")  # PostgreSQL refuses to run as root
STARTS_S = 60
NETWORKS = "198.18.0.0/15"  # of hosts that are namespaces of this machine


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of an empty PostgreSQL that asks no password; hosts of namespaces reach it too."""
    prefix = as_another_user() if os.getuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    if prefix:
        shutil.chown(folder, prefix[2])
    try:
        yield from serve(prefix, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgresql(postgresql_server: str) -> str:
    """The URL of a schema of its own on the server, with nothing in it."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
    schema = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}")
    return f"{postgresql_server}?options=-csearch_path%3D{schema}"


def serve(prefix: list[str], folder: Path) -> Iterator[str]:
    port, data = free_port(), folder / "data"
    initdb, server = [*prefix, found("initdb")], [*prefix, found("pg_ctl"), "-D", str(data)]
    run([*initdb, "-D", str(data), "-U", "tester", "-A", "trust", "-E", "UTF8", "-N"])
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write(f"host all all {NETWORKS} trust\n")
    options = f"-p {port} -k {folder} -c listen_addresses=* -c max_connections=30"
    start = ["start", "-w", "-t", str(STARTS_S), "-l", str(folder / "log"), "-o", options]
    run([*server, *start])
    try:
        yield f"postgresql://tester@127.0.0.1:{port}/postgres"
    finally:
        run([*server, "stop", "-m", "immediate"])


def as_another_user() -> list[str]:
    """How a command line begins that runs as somebody who is not root."""
    for user in UNPRIVILEGED:
        prefix = ["runuser", "-u", user, "--"]
        if shutil.which("runuser") and subprocess.run([*prefix, "true"]).returncode == 0:
            return prefix
    pytest.skip("PostgreSQL does not run as root, and no other user can be had")


def found(name: str) -> str:
    """A program of PostgreSQL, where it is on the path or where Debian keeps it."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    path = shutil.which(name) or (str(debian[-1]) if debian else None)
    if path is None:
        pytest.skip("PostgreSQL is not installed")
    return path


def run(command: list[str]) -> None:
    """Run a command, or skip the test for the reason it gives."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/")
    if done.returncode:
        pytest.skip(f"PostgreSQL does not start: {done.stdout.decode().strip().splitlines()[-1]}")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    """A server of S3's protocol, which forgets all when the tests end."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="0.0.0.0", port=free_port(), verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a bucket of its own; the environment says where, and has the credentials."""
    _, port = s3_server.get_host_and_port()
    for name, value in s3_environment("127.0.0.1", port).items():
        monkeypatch.setenv(name, value)
    bucket = f"s3://bucket-{uuid.uuid4().hex}"
    open_uri(bucket)[0].mkdir(bucket)
    return bucket


def s3_environment(host: str, port: int) -> dict[str, str]:
    """What a process has to be started with to use the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "of-no-worth",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
