"""What has happened in a study: append-only events, durable one by one, readable meanwhile."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Kind = Literal["asked", "started", "finished", "measured", "given_up"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, study TEXT NOT NULL, trial TEXT NOT NULL,
    attempt INTEGER NOT NULL, kind TEXT NOT NULL, payload TEXT NOT NULL)
"""


class Ledger:
    """The events of one study in SQLite (WAL mode), each committed to disk before the call returns."""

    def __init__(self, folder: Path, study: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.study = study
        self._db = sqlite3.connect(folder / "ledger.sqlite3", timeout=30, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(SCHEMA)

    def append(self, kind: Kind, trial: str, *, attempt: int = 1, **payload: Any) -> None:
        """Add one event; `payload` is JSON values."""
        self._db.execute(
            "INSERT INTO events (time, study, trial, attempt, kind, payload) VALUES (?,?,?,?,?,?)",
            (time.time(), self.study, trial, attempt, kind, json.dumps(payload)),
        )

    def events(self, kind: Kind | None = None) -> Iterator[dict[str, Any]]:
        """Events in the order they were added, of one kind or of all."""
        rows = self._db.execute(
            "SELECT time, trial, attempt, kind, payload FROM events "
            "WHERE study = ? AND (? IS NULL OR kind = ?) ORDER BY id",
            (self.study, kind, kind),
        )
        for at, trial, attempt, name, payload in rows:
            event = {"time": at, "trial": trial, "attempt": attempt, "kind": name}
            yield event | {"payload": json.loads(payload)}

    def attempts(self, trial: str) -> int:
        """How often a trial was started."""
        return sum(event["trial"] == trial for event in self.events("started"))

    def close(self) -> None:
        """Release the file."""
        self._db.close()
