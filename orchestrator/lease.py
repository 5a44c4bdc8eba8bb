"""The driver's lease on a study: one writes at a time, and one that lost it writes no more.

A lease has a number that grows each time it is taken. Whether its driver is alive is looked up
where its process can be seen, and told by when it was last renewed where it cannot.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from orchestrator.database import Database, connect
from orchestrator.trial import BadInput

LEASE_S = 30.0
POLL_S = 0.5  # between looks at a lease that may be renewed
TABLE = """CREATE TABLE slimtune_leases (
    study TEXT PRIMARY KEY, number BIGINT NOT NULL, holder TEXT,
    taken DOUBLE PRECISION NOT NULL, renewed DOUBLE PRECISION NOT NULL)"""


class Held(Exception):
    """Another driver holds the study; says who, since when, and when it was last heard of."""


class LeaseLost(Exception):
    """Another driver has taken this study over."""


@dataclass(frozen=True)
class Holder:
    """A driver's process. `place` says which processes it can see, `began` when it was started."""

    host: str
    user: str
    pid: int
    place: str
    began: int | None

    @classmethod
    def me(cls) -> Self:
        return cls(socket.gethostname(), _user(), os.getpid(), place(), began(os.getpid()))

    def __str__(self) -> str:
        return f"{self.user} on {self.host} (process {self.pid})"


@dataclass(frozen=True)
class Lease:
    """A lease as it was at the time `now`; all times by the database's clock."""

    number: int
    holder: Holder
    taken: float
    renewed: float
    now: float

    @property
    def silent_s(self) -> float:
        """Seconds since its driver was last heard of."""
        return max(0.0, self.now - self.renewed)

    @property
    def is_seen(self) -> bool:
        """Whether its driver's process, if it is alive, can be seen from here."""
        return bool(self.holder.place) and self.holder.place == place()

    @property
    def is_alive(self) -> bool:
        if self.is_seen:
            return began(self.holder.pid) == self.holder.began
        return self.silent_s <= LEASE_S

    def sentence(self, study: str) -> str:
        """Who holds it, for a person who is kept waiting."""
        since = datetime.fromtimestamp(self.taken).strftime("%Y-%m-%d %H:%M:%S")
        told = (
            f"The study {study} is being run by {self.holder} since {since}, last heard of"
            f" {self.silent_s:.0f} s ago"
        )
        if self.is_seen:
            return f"{told}."
        return (
            f"{told}; unless it is heard of again, it can be taken over {LEASE_S:.0f} s after that."
        )


def place() -> str:
    """Which processes can be seen from here: the boot, the process namespace, the user."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()} {os.getuid()}"
    except OSError:
        return ""


def began(pid: int) -> int | None:
    """When a process was started, in clock ticks since the boot; None where none is alive."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # a process may have any name
    return None if fields[0] in "ZX" else int(fields[19])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())


def read(database: Database, study: str) -> Lease | None:
    """The lease, if a driver that may be alive holds it."""
    _, lease = _read(database, study)
    return lease if lease is not None and lease.is_alive else None


def take(database: Database, study: str, *, wait: Callable[[str], None] = lambda text: None) -> int:
    """Take the lease, and return its number. Raises `Held`.

    Of a driver that cannot be seen from here nobody knows whether it is alive until it renews its
    lease, or that runs out: `wait` is told once that this is waited for.
    """
    database.change(
        "INSERT INTO slimtune_leases VALUES (?, 0, NULL, 0, 0) ON CONFLICT DO NOTHING", (study,)
    )
    first: tuple[int, float] | None = None
    while True:
        (number, renewed), lease = _read(database, study)
        if lease is not None and lease.is_alive:
            if lease.is_seen or first not in (None, (number, renewed)):
                raise Held(lease.sentence(study))
            if first is None:
                wait(f"waiting whether {lease.holder} is heard of again")
            first = (number, renewed)
            time.sleep(POLL_S)
            continue
        # only as it was read: its holder may wake up meanwhile, and another driver be quicker
        taken = database.change(
            "UPDATE slimtune_leases SET number = number + 1, holder = ?, taken = epoch(),"
            " renewed = epoch() WHERE study = ? AND number = ? AND renewed = ?",
            (json.dumps(asdict(Holder.me())), study, number, renewed),
        )
        if taken:
            return number + 1


def _read(database: Database, study: str) -> tuple[tuple[int, float], Lease | None]:
    """What another driver would change, number and time of renewal, and the lease if one has it."""
    rows = database.rows(
        "SELECT number, renewed, holder, taken, epoch() FROM slimtune_leases WHERE study = ?",
        (study,),
    )
    if not rows:
        return (0, 0.0), None
    number, renewed, holder, taken, now = rows[0]
    if holder is None:
        return (number, renewed), None
    return (number, renewed), Lease(number, Holder(**json.loads(holder)), taken, renewed, now)


def renew(database: Database, study: str, number: int) -> None:
    """Hold a lease longer, and within a transaction until its end. Raises `LeaseLost`."""
    renewed = database.change(
        "UPDATE slimtune_leases SET renewed = epoch() WHERE study = ? AND number = ?",
        (study, number),
    )
    if not renewed:
        _, lease = _read(database, study)
        by = f" by {lease.holder}" if lease else ""
        raise LeaseLost(f"The study {study} was taken over{by}; this driver writes no more.")


def give_back(database: Database, study: str, number: int) -> None:
    """Let others take the lease, if it is still the one with this number."""
    database.change(
        "UPDATE slimtune_leases SET holder = NULL WHERE study = ? AND number = ?", (study, number)
    )


class Heartbeat(threading.Thread):
    """Renews a lease until it is lost or `end` is called, each time on a connection of its own."""

    def __init__(self, where: Path | str, study: str, number: int) -> None:
        super().__init__(name="ledger-heartbeat", daemon=True)
        self._where, self._study, self._number = where, study, number
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(LEASE_S / 6):
            try:
                self._beat()
            except LeaseLost:
                return

    def _beat(self) -> None:
        with (
            suppress(BadInput),  # what cannot be reached now may be reached the next time
            closing(connect(self._where, write=True)) as database,
        ):
            renew(database, self._study, self._number)

    def end(self) -> None:
        self._ended.set()
        self.join()
