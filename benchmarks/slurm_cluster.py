"""A real Slurm of one's own, for tests and benchmarks: on this machine alone, or over several hosts.

It has neither cgroups nor accounting. A node may have more cores than its machine, and its jobs
run as the user who started it all. Commands of Slurm talk to it while it is up.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path

import psutil
from hosts import Hosts

NODES = ("node1", "node2")  # of this machine alone
STARTS_S, ENDS_S, JOB_S, LOOK_S = 30.0, 60.0, 900.0, 0.1
SLURMD_PORT = 6818  # where a node has an address of its own
LOST_S, NEVER_LOST_S = 10, 3600  # that a node is silent until it counts as lost
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")

CONFIGURATION = """
ClusterName=own
SlurmctldHost={host}({address})
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
SlurmdTimeout={lost_s}
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
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
MUNGE_FILES = {
    "key-file": "key",
    "socket": "socket",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}


class NoSlurm(Exception):
    """It is not installed, or does not start here; says why."""


@dataclass(frozen=True)
class Node:
    """A node of Slurm: its name, its host's, its address and its daemon's port."""

    name: str
    host: str
    address: str
    port: int

    @property
    def line(self) -> str:
        return (
            f"NodeName={self.name} NodeHostname={self.host} NodeAddr={self.address}"
            f" Port={self.port}"
        )


@dataclass(frozen=True)
class Slurm:
    """A cluster whose configuration and logs lie in `folder`."""

    folder: Path

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job, or of a task as `12_3`."""
        told = command("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", told))

    def status(self, number: str, *, limit_s: float = JOB_S) -> int:
        """The exit status of a job's script, once it has ended."""
        deadline = time.monotonic() + limit_s
        while (job := self.job(number))["JobState"] not in ENDED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is {job['JobState']} after {limit_s:.0f} s")
            time.sleep(LOOK_S)
        return int(job["ExitCode"].partition(":")[0])

    def cancel(self, number: str) -> None:
        command("scancel", number)

    def limit(self, number: str, *, minutes: int) -> None:
        """Give a job so many minutes from its start."""
        command("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")

    def end_all_jobs(self) -> None:
        """So that no process outlives the daemons that would end it."""
        subprocess.run(["scancel", "--quiet", "--user", getuser()])
        deadline = time.monotonic() + ENDS_S
        while command("squeue", "--noheader", "--format=%i").strip():
            if time.monotonic() > deadline:
                raise TimeoutError("jobs of Slurm do not end")
            time.sleep(LOOK_S)


def command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


def processes_of(number: str) -> list[psutil.Process]:
    """All processes that a job has started, wherever they are by now."""
    return [p for p in psutil.process_iter() if _environment(p).get("SLURM_JOB_ID") == number]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        gone = process.status() == psutil.STATUS_ZOMBIE
        return {} if gone else process.environ()
    except psutil.Error:
        return {}


# -- starting it -----------------------------------------------------------------------------------


@contextmanager
def slurm_here() -> Iterator[Slurm]:
    """Two nodes of four CPUs that are both this machine. Raises `NoSlurm`."""
    nodes = [Node(name, host_name(), "127.0.0.1", free_port()) for name in NODES]
    with _controller(nodes, "127.0.0.1", NEVER_LOST_S) as slurm, ExitStack() as stack:
        for node in nodes:
            stack.enter_context(_daemon(slurm.folder, "slurmd", *_options(node.name)))
        _until_idle(slurm.folder, [node.name for node in nodes])
        stack.callback(slurm.end_all_jobs)
        yield slurm


@contextmanager
def slurm_over(hosts: Hosts) -> Iterator[Slurm]:
    """A node of four CPUs on each host; jobs are submitted from this machine. Raises `NoSlurm`."""
    nodes = [Node(f"host{n}", f"host{n}", hosts.address(n), SLURMD_PORT) for n in hosts.numbers]
    with _controller(nodes, hosts.outside, LOST_S) as slurm:
        for number in hosts.numbers:
            start_node(hosts, number, slurm)
        _until_idle(slurm.folder, [node.name for node in nodes])
        try:
            yield slurm
        finally:
            slurm.end_all_jobs()
            for number in hosts.numbers:
                hosts.run(number, ["pkill", "--exact", "slurmd"])


def start_node(hosts: Hosts, number: int, slurm: Slurm) -> None:
    """The daemon of a host that has just come up."""
    started = [str(_program("slurmd")), *_options(f"host{number}")]
    hosts.start(number, started, log=slurm.folder / "slurmd.txt")


@contextmanager
def _controller(nodes: Sequence[Node], address: str, lost_s: int) -> Iterator[Slurm]:
    """What all nodes share, on this machine, and the way to it for commands."""
    for name in ("munged", "slurmctld", "slurmd", "sbatch"):
        if _program(name) is None:
            raise NoSlurm(f"{name} is not installed")
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(_configuration_is(_configure(folder, nodes, address, lost_s)))
        files = [f"--{name}={folder}/munge.{end}" for name, end in MUNGE_FILES.items()]
        stack.enter_context(_daemon(folder, "munged", "--foreground", "--force", *files))
        _wait_for(lambda: (folder / "munge.socket").exists(), folder / "munged.txt")
        stack.enter_context(_daemon(folder, "slurmctld", "-D", "-c"))
        yield Slurm(folder)


def _configure(folder: Path, nodes: Sequence[Node], address: str, lost_s: int) -> Path:
    """slurm.conf, and what it names."""
    for name in ("state", *(f"spool.{node.name}" for node in nodes)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    path = folder / "slurm.conf"
    text = CONFIGURATION.format(
        host=host_name(),
        address=address,
        port=free_port(),
        user=getuser(),
        folder=folder,
        lost_s=lost_s,
        first=free_port(),  # folders and ports of jobs go by their numbers; others may be here
        nodes="\n".join(node.line for node in nodes),
        names=",".join(node.name for node in nodes),
    )
    path.write_text(text)
    return path


@contextmanager
def _configuration_is(path: Path) -> Iterator[None]:
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(path)
    try:
        yield
    finally:
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


@contextmanager
def _daemon(folder: Path, name: str, *options: str) -> Iterator[None]:
    with (folder / f"{name}.txt").open("ab") as log:
        started = subprocess.Popen([str(_program(name)), *options], stdout=log, stderr=log)
    try:
        yield
    finally:
        started.terminate()
        started.wait(timeout=ENDS_S)


def _options(node: str) -> list[str]:
    """In the foreground, and with nothing of before."""
    return ["-D", "-c", "-N", node]


def _program(name: str) -> str | None:
    """A program of Slurm; those of its daemons are not on everybody's path."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


def _until_idle(folder: Path, nodes: Sequence[str]) -> None:
    asked = ["sinfo", "--noheader", "--states=idle", "--Node", "--format=%N"]

    def are_idle() -> bool:
        said = subprocess.run(asked, capture_output=True, text=True).stdout
        return set(said.split()) >= set(nodes)

    _wait_for(are_idle, folder / "slurmd.txt")


def _wait_for(look: Callable[[], bool], log: Path) -> None:
    """Raises `NoSlurm` with the reason that a log gives."""
    deadline = time.monotonic() + STARTS_S
    while not look():
        if time.monotonic() > deadline:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise NoSlurm(f"Slurm does not start: {''.join(last)}")
        time.sleep(LOOK_S)


def host_name() -> str:
    return socket.gethostname().partition(".")[0]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
