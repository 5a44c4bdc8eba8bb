"""Several hosts on one machine, for tests and benchmarks of clusters; needs Linux and root.

A host is a set of kernel namespaces: its network, processes, name and shared memory are its own.
Files are those of the machine, as on a file system that all hosts share; apart are /tmp/ray, the two
files by which who measures is alone on a host, and a folder more where one is asked for.
Hosts hang on a switch, which is one more network namespace. All of it ends with the process that
made it, however that ends: a namespace lives as long as its first process, and that one ends when
nobody holds its standard input any more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
NETWORK = "198.18.{}.{}"  # a range that is set apart for test beds
OUTSIDE, NUM_NETWORKS = 254, 200
RAY_PORT, DASHBOARD_PORT = 6379, 8265

# Of processes that a host starts first. `up` on standard output says that all of it is done.
SWITCH = """
ip link add bridge type bridge
ip link set bridge up
echo up
exec cat
"""
HOST = """
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mkdir -p -m 1777 /tmp/ray
mount --bind "$2/$1" /tmp/ray
if [ "$5" ]; then mount --bind "$2/$1.apart" "$5"; fi
for lock in slimtune-0.wanted slimtune-0.busy; do
  touch "/tmp/$lock" "$2/$1.$lock"
  mount --bind "$2/$1.$lock" "/tmp/$lock"
done
ip link set lo up
exec "$3" -c "$4"
"""
FIRST_PROCESS = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans leave no zombies
print("up", flush=True)
sys.stdin.read()
"""

# A node counts as lost after a few seconds; Ray's own settings take a minute for a cut link.
RAY_NOTICES_LOSS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
# For who takes no host away: on a busy machine one may be silent for a while.
RAY_IS_PATIENT = {"RAY_health_check_failure_threshold": "60"}


class NoHosts(Exception):
    """This machine, or this user, can make none; says why."""


class Hosts:
    """Hosts 1 to `count`, up inside the `with`, which raises `NoHosts` where none can be made.

    This machine reaches them at `address`, and they each other by the names host1, host2, … too.
    `folder` has their logs, host1.log and so on. `apart` is a folder that each host has for itself;
    `own` says where this machine sees it.
    """

    def __init__(self, count: int, *, apart: Path | None = None) -> None:
        self.numbers, self._apart = range(1, count + 1), apart
        self._first: dict[int, subprocess.Popen[str]] = {}  # of each host that is up

    def __enter__(self) -> Self:
        check_that_hosts_can_be_made()
        self._temporary = tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self._switch = _started(["unshare", "--net", "sh", "-ec", SWITCH])
        try:
            self._network = self._claim_network()
            lines = ["127.0.0.1 localhost", *(f"{self.address(n)} host{n}" for n in self.numbers)]
            (self.folder / "hosts").write_text("\n".join(lines) + "\n")
            for number in self.numbers:
                self.power_on(number)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def address(self, number: int) -> str:
        return NETWORK.format(self._network, number)

    def own(self, number: int) -> Path:
        return self.folder / f"host{number}.apart"

    @property
    def outside(self) -> str:
        """The address by which hosts reach this machine."""
        return self.address(OUTSIDE)

    # -- processes -------------------------------------------------------------------------------

    def start(
        self,
        number: int,
        command: Sequence[str | Path],
        *,
        log: Path | None = None,
        **settings: str,
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host; `settings` are added to its environment.

        What it says goes to `log`. It ends with its host: a signal does not reach it from outside.
        """
        with (log or self.folder / f"host{number}.log").open("ab") as file:
            return subprocess.Popen(
                [*self._enter(number), *map(str, command)],
                env=environment(**settings),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def run(
        self, number: int, command: Sequence[str | Path], *, limit_s: float = 120, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """What became of a command on a host, which is killed after `limit_s` seconds."""
        limited = ["timeout", "--kill-after=5", str(limit_s), *map(str, command)]
        return subprocess.run(
            [*self._enter(number), *limited],
            env=environment(**settings),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def _enter(self, number: int) -> list[str]:
        """How a command line begins that runs on a host."""
        target = ["--target", str(self._pid(number)), f"--wd={Path.cwd()}"]
        return ["nsenter", *NAMESPACES, *target, "--"]

    def _pid(self, number: int) -> int:
        """Its first process, as this machine counts."""
        [first] = psutil.Process(self._first[number].pid).children()
        return first.pid

    # -- power and links -------------------------------------------------------------------------

    def power_on(self, number: int) -> None:
        """With nothing running on it."""
        name = f"host{number}"
        for folder in (self.folder / name, self.own(number)):
            folder.mkdir(exist_ok=True)
        apart = ["unshare", *NAMESPACES, "--mount-proc", "--fork", "--kill-child"]
        arguments = [name, self.folder, sys.executable, FIRST_PROCESS, self._apart or ""]
        first = _started([*apart, "sh", "-ec", HOST, "sh", *arguments])
        self._first[number] = first
        self._plug_in(number, pid=self._pid(number))

    def power_off(self, number: int) -> None:
        """At once: no process gets to say anything, and no connection is closed."""
        self._at_switch(
            "ip", "link", "delete", f"host{number}"
        )  # else the kernel does it, some day
        self._kill(number)

    def cut(self, number: int) -> None:
        """The link of a host, which stays on: nothing comes through."""
        self._at_switch("ip", "link", "set", f"host{number}", "down")

    def mend(self, number: int) -> None:
        self._at_switch("ip", "link", "set", f"host{number}", "up")

    def _kill(self, number: int) -> None:
        """All that runs there: the kernel does that before the first process is gone."""
        first = self._first.pop(number)
        for process in psutil.Process(first.pid).children():
            process.kill()
        _wait(first)

    def _claim_network(self) -> int:
        """A number that no other user of this class has, plugged into the switch."""
        outside = ["peer", "name", "outside", "netns", str(self._switch.pid)]
        for number in range(NUM_NETWORKS):
            name = f"hosts{number}"
            made = ["ip", "link", "add", name, "type", "veth", *outside]
            done = subprocess.run(made, capture_output=True, text=True)
            if done.returncode == 0:
                self._at_switch("ip", "link", "set", "outside", "up", "master", "bridge")
                _do("ip", "address", "add", f"{NETWORK.format(number, OUTSIDE)}/24", "dev", name)
                _do("ip", "link", "set", name, "up")
                return number
            if "exists" not in done.stderr:
                break
        raise NoHosts(f"no network can be made for hosts: {done.stderr.strip()}")

    def _plug_in(self, number: int, *, pid: int) -> None:
        name = f"host{number}"
        card = f"02:00:00:00:00:{number:02x}"  # the same whenever it is on: others remember it
        peer = ["peer", "name", "eth0", "address", card, "netns", str(pid)]
        self._at_switch("ip", "link", "add", name, "type", "veth", *peer)
        self._at_switch("ip", "link", "set", name, "up", "master", "bridge")
        inside = ["nsenter", "--net", "--target", str(pid), "ip"]
        _do(*inside, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
        _do(*inside, "link", "set", "eth0", "up")

    def _at_switch(self, *command: str) -> None:
        _do("nsenter", "--net", "--target", str(self._switch.pid), *command)

    def _end(self) -> None:
        """Whatever of it there is."""
        for number in list(self._first):
            self._kill(number)
        self._switch.kill()
        _wait(self._switch)
        if "_network" in self.__dict__:  # the kernel would free it too, somewhat later
            subprocess.run(["ip", "link", "delete", f"hosts{self._network}"], capture_output=True)
        self._temporary.cleanup()

    # -- Ray -------------------------------------------------------------------------------------

    @property
    def ray_address(self) -> str:
        return f"{self.address(1)}:{RAY_PORT}"

    def start_ray(
        self, *numbers: int, num_cpus: int = 1, dashboard: bool = False, **settings: str
    ) -> None:
        """A node of Ray on each of these hosts, or on all; host 1 has the head, which comes first.

        `settings` are those of its processes, and of workers that it starts.
        """
        with_head = ["--head", f"--port={RAY_PORT}", f"--include-dashboard={dashboard}"]
        with_head += [f"--dashboard-host={self.address(1)}", f"--dashboard-port={DASHBOARD_PORT}"]
        numbers = numbers or tuple(self.numbers)
        for head in (True, False):
            options = with_head if head else [f"--address={self.ray_address}"]
            options = [*options, f"--num-cpus={num_cpus}", "--object-store-memory=80000000"]
            started = {
                n: self._start_ray(n, options, settings) for n in numbers if (n == 1) is head
            }
            for number, process in started.items():
                if process.wait(timeout=200):
                    said = (self.folder / f"host{number}.log").read_text()
                    raise RuntimeError(f"Ray does not start on host {number}: {said[-2000:]}")

    def give_notice(self, number: int, *, seconds: int) -> None:
        """Tell Ray that a host is about to be taken away; whether it is then is another matter."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
        why = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the price has risen"]
        when = f"--deadline-remaining-seconds={seconds}"
        done = self.run(number, [*command, f"--address={self.ray_address}", *why, when])
        if done.returncode:
            raise RuntimeError(f"no notice can be given of host {number}: {done.stderr}")

    def _start_ray(
        self, number: int, options: Sequence[str], settings: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        own_address = f"--node-ip-address={self.address(number)}"
        return self.start(number, [*command, own_address], **settings)


def environment(**settings: str) -> dict[str, str]:
    """Of whatever runs on hosts, Ray and its drivers alike."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ray |= RAY_NOTICES_LOSS
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # as where it is activated
    return kept | ray | {"PYTHONPATH": str(REPOSITORY), "PATH": path} | settings


def check_that_hosts_can_be_made() -> None:
    """Raises `NoHosts`."""
    if sys.platform != "linux" or os.getuid() != 0:
        raise NoHosts("several hosts on one machine need Linux and root")
    with _nothing_missing():
        tried = ["unshare", *NAMESPACES, "--mount-proc", "--fork", "ip", "link", "set", "lo", "up"]
        _do(*tried)
        _do("nsenter", "--version")


@contextmanager
def _nothing_missing() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NoHosts(f"several hosts on one machine need `{error.filename}`") from error
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip().splitlines()[-1]
        raise NoHosts(f"no hosts can be made here: {why}") from error


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _started(command: Sequence[Any]) -> subprocess.Popen[str]:
    """A process that says when it is up, and ends when this one does."""
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for this process, which ends the others
    )
    assert process.stdout
    said = process.stdout.readline().strip()
    if said != "up":
        _wait(process)
        raise NoHosts(f"no hosts can be made here: {said}")
    return process


def _wait(process: subprocess.Popen[str]) -> None:
    """Until it is gone, and close its pipes."""
    for pipe in (process.stdin, process.stdout):
        assert pipe
        pipe.close()
    process.wait(timeout=30)
