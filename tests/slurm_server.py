"""A real Slurm of one's own: two nodes that are both this machine, without cgroups or accounting."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from servers import free_port
from waiting import until

NODES = ("node1", "node2")
STARTS_S = 30
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
T = TypeVar("T")

# A node has more cores than the machine may have: a job of two nodes leaves room for another.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
FirstJobId={first}
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
KillWait=5
Waittime=0
NodeName=DEFAULT CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 State=UNKNOWN
{nodes}
PartitionName=tests Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """The cluster whose configuration is `path`, on which SLURM_CONF is set."""

    path: Path

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job, or of a task as `12_3`."""
        told = command("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", told))

    def status(self, number: str) -> int:
        """The exit status of a job's script, once it has ended."""
        job = until(lambda: self._ended(number), what=f"the end of job {number}")
        return int(job["ExitCode"].partition(":")[0])

    def _ended(self, number: str) -> dict[str, str] | None:
        job = self.job(number)
        return job if job["JobState"] in ENDED else None

    def cancel(self, number: str) -> None:
        command("scancel", number)

    def limit(self, number: str, *, minutes: int) -> None:
        """Give a job so many minutes from its start."""
        command("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")


def processes_of(number: str) -> list[psutil.Process]:
    """All processes that a job has started, wherever they are by now."""
    return [p for p in psutil.process_iter() if _environment(p).get("SLURM_JOB_ID") == number]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        gone = process.status() == psutil.STATUS_ZOMBIE
        return {} if gone else process.environ()
    except psutil.Error:
        return {}


def command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


@pytest.fixture(scope="module", name="slurm")
def slurm_of_ones_own() -> Iterator[Slurm]:
    """Slurm with two nodes of four CPUs; skipped where it is not installed or does not start."""
    for name in ("munged", "slurmctld", "slurmd", "sbatch"):
        if program(name) is None:
            pytest.skip(f"{name} is not installed")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        path = configure(folder)
        patch.setenv("SLURM_CONF", str(path))
        start_daemons(stack, folder)
        stack.callback(end_all_jobs)
        yield Slurm(path)


def configure(folder: Path) -> Path:
    """slurm.conf, and what it names."""
    host = socket.gethostname().partition(".")[0]
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}"
        for name in NODES
    ]
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    path = folder / "slurm.conf"
    names = ",".join(NODES)
    first = free_port()  # folders and ports of jobs go by their numbers; another Slurm may be here
    settings = {"host": host, "port": free_port(), "user": getuser(), "folder": folder}
    path.write_text(
        CONFIGURATION.format(nodes="\n".join(nodes), names=names, first=first, **settings)
    )
    return path


def start_daemons(stack: ExitStack, folder: Path) -> None:
    """munged, slurmctld and a slurmd for each node, ended with `stack`."""
    files = [f"--{name}={folder}/munge.{end}" for name, end in MUNGE_FILES.items()]
    stack.enter_context(daemon(folder, "munged", "--foreground", "--force", *files))
    wait_for(lambda: (folder / "munge.socket").exists(), folder / "munged.txt")
    stack.enter_context(daemon(folder, "slurmctld", "-D", "-c"))
    for name in NODES:
        stack.enter_context(daemon(folder, "slurmd", "-D", "-c", "-N", name))
    wait_for(lambda: len(idle_nodes()) == len(NODES), folder / "slurmd.txt")


MUNGE_FILES = {
    "key-file": "key",
    "socket": "socket",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}


@contextmanager
def daemon(folder: Path, name: str, *options: str) -> Iterator[None]:
    with (folder / f"{name}.txt").open("ab") as log:
        started = subprocess.Popen([str(program(name)), *options], stdout=log, stderr=log)
    try:
        yield
    finally:
        started.terminate()
        started.wait(timeout=STARTS_S)


def program(name: str) -> str | None:
    """A program of Slurm; those of its daemons are not on everybody's path."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


def wait_for(look: Callable[[], bool], log: Path) -> None:
    """Wait until Slurm is there, or skip for the reason that its log gives."""
    deadline = time.monotonic() + STARTS_S
    while not look():
        if time.monotonic() > deadline:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            pytest.skip(f"Slurm does not start: {''.join(last)}")
        time.sleep(0.1)


def idle_nodes() -> set[str]:
    asked = ["sinfo", "--noheader", "--states=idle", "--Node", "--format=%N"]
    return set(subprocess.run(asked, capture_output=True, text=True).stdout.split())


def end_all_jobs() -> None:
    """So that no process outlives the daemons that would end it."""
    listed = ["squeue", "--noheader", "--format=%i"]
    subprocess.run(["scancel", "--quiet", "--user", getuser()])
    until(lambda: not command(*listed).strip(), what="all jobs to end", seconds=30)
