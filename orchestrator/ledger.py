"""What has happened in a study: append-only events, durable one by one, readable meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from orchestrator import lease, offers
from orchestrator.database import VERSION_TABLE, Database, Unreachable, connect
from orchestrator.lease import Held, Lease, LeaseLost
from orchestrator.trial import BadInput

__all__ = ["Event", "Held", "Kind", "Lease", "LeaseLost", "Ledger"]

Kind = Literal["asked", "started", "stage", "rung", "finished", "measured", "given_up", "lost"]

T = TypeVar("T")

VERSION = 3
PATIENCE_S, RETRY_S = 120.0, 1.0  # with a server that restarts
PAGE = 1000  # events read at once
SCHEMA = (
    lease.TABLE,
    """CREATE TABLE slimtune_events (
        study TEXT NOT NULL, id BIGINT NOT NULL, time DOUBLE PRECISION NOT NULL, key TEXT NOT NULL,
        attempt INTEGER NOT NULL, kind TEXT NOT NULL, lease BIGINT NOT NULL, payload TEXT NOT NULL,
        PRIMARY KEY (study, id))""",
    offers.GUESTS,
    offers.OFFERS,
    "CREATE INDEX slimtune_events_by_key ON slimtune_events (study, key, kind, attempt)",
    "CREATE INDEX slimtune_events_by_kind ON slimtune_events (study, kind, id)",
    f"CREATE TABLE {VERSION_TABLE} (version INTEGER NOT NULL)",
    f"INSERT INTO {VERSION_TABLE} VALUES ({VERSION})",
)


@dataclass(frozen=True)
class Event:
    """One thing that happened to `key`: a trial's id, or `baseline:<model>`.

    `id` counts a study's events from 1, `time` is in seconds since 1970, `lease` is the number of
    the lease under which it was written.
    """

    id: int
    time: float
    key: str
    attempt: int
    kind: Kind
    lease: int
    payload: dict[str, Any]


class Ledger:
    """The events of one study, in SQLite in a folder or at a `postgresql://` URL.

    Anyone may read while the driver that has taken the lease writes; a server that restarts
    meanwhile is waited for. Raises `BadInput` where the ledger cannot be used, is damaged, or is of
    another version.
    """

    def __init__(self, where: Path | str, study: str) -> None:
        self.study = study
        self.lease: int | None = None
        self._written = 0  # the last event, as the driver that has the lease knows it
        self._where = where
        self._heartbeat: lease.Heartbeat | None = None
        self._database = _open(where, write=False)

    def take(self, *, wait: Callable[[str], None] = lambda text: None) -> int:
        """Take the driver's lease, begin the ledger if there is none, and return the lease's number.

        The lease of a driver that is dead, or was not heard of for too long, is taken over; `wait`
        is told where it takes a while to know. Raises `Held`.
        """
        assert self.lease is None, "the lease is taken once"
        self._close()
        self._database = _open(self._where, write=True)
        assert self._database is not None
        self.lease = lease.take(self._database, self.study, wait=wait)
        self._written = self._last_id(self._database)
        self._heartbeat = lease.Heartbeat(self._where, self.study, self.lease)
        self._heartbeat.start()
        return self.lease

    def release(self) -> None:
        """Let another driver take the lease."""
        if self.lease is None:
            return
        assert self._database is not None and self._heartbeat is not None
        self._heartbeat.end()
        with suppress(BadInput):  # a lease that cannot be given back runs out
            lease.give_back(self._database, self.study, self.lease)
        self.lease = self._heartbeat = None

    def held(self) -> Lease | None:
        """The lease, if a driver that may be alive holds it."""
        database = self._readable()
        return lease.read(database, self.study) if database else None

    def append(self, kind: Kind, key: str, /, *, attempt: int = 1, **payload: Any) -> int | None:
        """Add one event and return its id; it is on the disk by then. `payload` is JSON values.

        A `finished` is refused, with None, where this attempt of the key or a later one has
        finished. Raises `LeaseLost`.
        """
        assert self.lease is not None and self._database is not None, "take the lease first"
        row = (key, attempt, kind, self.lease, json.dumps(payload))
        before = self._written
        event_id = self._patiently(lambda database: self._append(database, row, after=before))
        self._written = event_id or before
        return event_id

    def _append(self, database: Database, row: tuple[Any, ...], *, after: int) -> int | None:
        """Add a row after the one with id `after`, if it was not added before an answer was lost."""
        key, attempt, kind, held, _ = row
        with database.transaction():
            lease.renew(database, self.study, held)
            last = self._last_id(database)
            if last == after + 1:
                return last
            if kind == "finished" and self._latest(database, key, "finished") >= attempt:
                return None
            database.change(
                "INSERT INTO slimtune_events VALUES (?, ?, epoch(), ?, ?, ?, ?, ?)",
                (self.study, last + 1, *row),
            )
        return last + 1

    def _patiently(self, do: Callable[[Database], T]) -> T:
        """Ask the database, and again on a new connection as long as its server may come back."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._database = self._database or _open(self._where, write=self.lease is not None)
                assert self._database is not None
                return do(self._database)
            except Unreachable:
                if time.monotonic() >= until:
                    raise
                self._close()
                time.sleep(RETRY_S)

    def events(self, kind: Kind | None = None, *, after: int = 0) -> Iterator[Event]:
        """Events after the one with id `after`, in their order, of one kind or of all.

        Those that are there when it begins.
        """
        if self._readable() is None:
            return
        last = self._patiently(self._last_id)
        while page := self._patiently(partial(self._page, kind=kind, after=after, last=last)):
            yield from page
            after = page[-1].id

    def attempts(self, key: str) -> int:
        """The last attempt of a key that was started or has finished; 0 for none."""
        if self._readable() is None:
            return 0
        return self._patiently(lambda d: self._latest(d, key, "started", "finished"))

    def close(self) -> None:
        """Give back the lease and the connection."""
        self.release()
        self._close()

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
        self._database = None

    def _readable(self) -> Database | None:
        """A connection to what is there by now, if anything is."""
        self._database = self._database or _open(self._where, write=False)
        return self._database

    def _latest(self, database: Database, key: str, *kinds: Kind) -> int:
        """The highest attempt of a key's events of these kinds; 0 for none."""
        rows = database.rows(
            "SELECT COALESCE(MAX(attempt), 0) FROM slimtune_events"
            f" WHERE study = ? AND key = ? AND kind IN ({', '.join('?' * len(kinds))})",
            (self.study, key, *kinds),
        )
        return int(rows[0][0])

    def _last_id(self, database: Database) -> int:
        rows = database.rows(
            "SELECT COALESCE(MAX(id), 0) FROM slimtune_events WHERE study = ?", (self.study,)
        )
        return int(rows[0][0])

    def _page(self, database: Database, *, kind: Kind | None, after: int, last: int) -> list[Event]:
        """The next events, a bounded number."""
        only, kinds = (" AND kind = ?", [kind]) if kind else ("", [])
        rows = database.rows(
            "SELECT id, time, key, attempt, kind, lease, payload FROM slimtune_events"
            f" WHERE study = ? AND id > ? AND id <= ?{only} ORDER BY id LIMIT {PAGE}",
            [self.study, after, last, *kinds],
        )
        return [Event(*(*fields, json.loads(payload))) for *fields, payload in rows]


def _open(where: Path | str, *, write: bool) -> Database | None:
    """The ledger that is there, or that is begun to be written; None where there is none to read."""
    database = connect(where, write=write)
    try:
        if write and database.version() is None:
            _create(database)
        version = database.version()
        if version not in (None, VERSION):
            problem = "is of another version of slimtune; choose another folder or database"
            raise BadInput([f"The ledger {database.name} {problem}."])
    except BaseException:
        database.close()
        raise
    if version is None:
        database.close()
        return None
    return database


def _create(database: Database) -> None:
    try:
        with database.transaction():
            for statement in SCHEMA:
                database.change(statement)
    except Exception:
        if database.version() is None:  # else another driver was quicker
            raise
