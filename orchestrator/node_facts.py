"""What a machine says of itself, and what it sees of the others; run on each node of a cluster."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.measure.fingerprint import environment
from orchestrator.storage import Storage, open_uri

Json = dict[str, Any]
MARKS = ".doctor"  # a folder in the study's, where every node leaves its mark
CONNECT_S = 2.0
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAY_AUTH_MODE", "HF_HUB_OFFLINE")


class Examiner:
    """On one machine: what it is like, and whether it sees storage and the other machines."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("", 0))

    def facts(self, place: str | None, name: str) -> Json:
        """What it is like. Leaves a mark called `name` in the study's folder, or at its storage's URI."""
        return {
            "host": platform.node(),
            "python": platform.python_version(),
            "packages": _packages(),
            "cores": environment()["cores"],
            "memory_gb": environment()["memory_gb"],
            "gpus": _gpus(),
            "disk_free_gb": _free_gb(tempfile.gettempdir()),
            "shm_free_gb": _free_gb("/dev/shm"),
            "storage": _mark(place, name),
            "has_uri": place is not None and "://" in place,
            "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
            "port": self._listener.getsockname()[1],
            "clock": time.time(),
        }

    def sees(
        self, place: str | None, names: Sequence[str], places: Mapping[str, tuple[str, int]]
    ) -> Json:
        """Of the marks called `names` those that are missing here; of `places` those out of reach."""
        here = _marks(place) if place else set()
        unreachable = [name for name, place in places.items() if not _connects(place)]
        missing = sorted(set(names) - here) if place else []
        return {"missing": missing, "unreachable": unreachable}


def _packages() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"slimtune": __version__}
    for name in (*environment()["packages"], "ray", "deepspeed", "safetensors", "tokenizers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _gpus() -> list[str]:
    """Each with its driver's version, as `NVIDIA H100, 570.1`."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def _free_gb(folder: str) -> float | None:
    path = Path(folder)
    return round(shutil.disk_usage(path).free / 1e9, 1) if path.exists() else None


def _mark(place: str | None, name: str) -> str:
    """Why no mark can be left, "" where one was."""
    if place is None:
        return ""
    if "://" in place:
        return _mark_at(place, name)
    if not (Path(place) / MARKS).is_dir():
        return "is not there"
    try:
        (Path(place) / MARKS / name).write_text(platform.node())
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


def _mark_at(uri: str, name: str) -> str:
    root = Path(MARKS).absolute()
    try:
        Storage(f"{uri}/{MARKS}", root, patience_s=0).write(name, platform.node().encode())
    except Exception as error:  # as many kinds as there are storages
        return f"cannot be written: {error}"
    return ""


def _marks(place: str) -> set[str]:
    """The names of all that are seen from here."""
    if "://" not in place:
        return {mark.name for mark in (Path(place) / MARKS).glob("*")}
    with suppress(Exception):
        system, path = open_uri(f"{place}/{MARKS}")
        return {str(mark).rpartition("/")[2] for mark in system.ls(path, detail=False)}
    return set()


def remove_marks(uri: str) -> None:
    """All that were left at a storage's URI."""
    system, path = open_uri(f"{uri}/{MARKS}")
    system.rm(path, recursive=True)


def _connects(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, CONNECT_S).close()
    except OSError:
        return False
    return True
