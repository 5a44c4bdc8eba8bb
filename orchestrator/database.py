"""SQLite and PostgreSQL behind the same SQL; what differs between the two is here alone.

In statements `?` marks a value and `epoch()` is the database's clock, in seconds since 1970.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from orchestrator.trial import BadInput

FILE, VERSION_TABLE = "ledger.sqlite3", "slimtune_schema"
TIMEOUT_S = 30  # for an answer to a connection
LOCKED_S = 180  # a disk that is away for a minute holds up whoever has the lock
Rows = list[tuple[Any, ...]]

DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
UNUSABLE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}


class Unreachable(BadInput):
    """The server does not answer, or ended the connection; it may be back soon."""


class Database(Protocol):
    """One connection. Raises `BadInput` where the database cannot be used, as `Unreachable` where
    another connection may be had later.

    `name` is for messages and holds no password.
    `version` is that of the tables that are there: None for none, 0 for those of something else.
    `change` returns how many rows it changed. What happens in a `transaction` happens whole or not
    at all, and is on the disk when it ends.
    """

    @property
    def name(self) -> str: ...
    def version(self) -> int | None: ...
    def rows(self, statement: str, values: Sequence[Any] = ()) -> Rows: ...
    def change(self, statement: str, values: Sequence[Any] = ()) -> int: ...
    def transaction(self) -> AbstractContextManager[None]: ...
    def close(self) -> None: ...


def connect(where: Path | str, *, write: bool) -> Database:
    """Connect to a `postgresql://` URL, or to the file in a folder. A reader changes nothing."""
    if isinstance(where, str) and where.startswith(("postgresql://", "postgres://")):
        return Postgres(where, write=write)
    return Sqlite(Path(where) / FILE, write=write)


class Sqlite:
    """A file on this machine, in WAL mode: one process writes while others read."""

    def __init__(self, path: Path, *, write: bool) -> None:
        self._path, self.name = path, str(path)
        with self._explained():
            self._connection = sqlite3.connect(
                self._uri(write), uri=True, timeout=LOCKED_S, isolation_level=None
            )
            self._connection.create_function("epoch", 0, time.time)
            if write:
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute("PRAGMA synchronous=FULL")

    def _uri(self, write: bool) -> str:
        folder = self._path.parent
        if write:
            folder.mkdir(parents=True, exist_ok=True)
        elif not self._path.exists():
            return ":memory:"  # as empty as what is not there
        mode = "mode=rwc" if write else "mode=ro"
        log = self._path.with_name(f"{self._path.name}-wal")
        if not write and not log.exists() and not os.access(folder, os.W_OK):
            mode += "&immutable=1"  # nobody writes, and the index of a log cannot be made here
        return f"{self._path.absolute().as_uri()}?{mode}"

    def version(self) -> int | None:
        tables = self.rows("SELECT name FROM sqlite_master WHERE type = 'table'")
        if not tables:
            return None
        return _version(self) if (VERSION_TABLE,) in tables else 0

    def rows(self, statement: str, values: Sequence[Any] = ()) -> Rows:
        with self._explained():
            return self._connection.execute(statement, values).fetchall()

    def change(self, statement: str, values: Sequence[Any] = ()) -> int:
        with self._explained():
            return self._connection.execute(statement, values).rowcount

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Failures of the file, rather than of a statement, as `BadInput`."""
        try:
            yield
        except OSError as error:
            self._refuse("cannot be made", error)
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of it is detail
            if code in DAMAGED:
                self._refuse("is damaged", error)
            if code in UNUSABLE:
                self._refuse("cannot be used", error)
            raise

    def _refuse(self, why: str, error: Exception) -> NoReturn:
        raise BadInput([f"The ledger {self.name} {why}: {error}."]) from error


class Postgres:
    """A server, for drivers and readers on several machines. Needs psycopg."""

    def __init__(self, url: str, *, write: bool) -> None:
        try:
            import psycopg
        except ImportError as error:
            problem = "A ledger in PostgreSQL needs psycopg: pip install 'slimtune[postgresql]'."
            raise BadInput([problem]) from error
        self._psycopg = psycopg
        parameters = self._parameters(url)
        self.name = f"{parameters.get('host', 'this machine')}/{parameters.get('dbname', '')}"
        with self._explained():
            self._connection = psycopg.connect(**parameters, autocommit=True)
            self._connection.execute("SET synchronous_commit = on")
            if not write:
                self._connection.execute("SET default_transaction_read_only = on")

    def _parameters(self, url: str) -> dict[str, Any]:
        """What to connect with. An error never quotes the URL, which may hold a password."""
        from psycopg.conninfo import conninfo_to_dict

        try:
            given = conninfo_to_dict(url)
        except self._psycopg.Error:
            given = {"host": "@"}
        # where a password has an @ or a / in it, libpq takes part of it for one of these
        named = f"{given.get('host', '')}{given.get('dbname', '')}"
        if "@" in named or not str(given.get("port", "0")).replace(",", "").isdigit():
            problem = (
                "The ledger's postgresql:// URL cannot be read; in a password, write @ as %40,"
                " / as %2F, : as %3A and % as %25."
            )
            raise BadInput([problem]) from None
        kept_open = {"keepalives_idle": 60}  # through firewalls, while a trial takes hours
        return {"connect_timeout": TIMEOUT_S, "application_name": "slimtune", **kept_open, **given}

    def version(self) -> int | None:
        there = self.rows("SELECT to_regclass(?)", (VERSION_TABLE,)) != [(None,)]
        return _version(self) if there else None

    def rows(self, statement: str, values: Sequence[Any] = ()) -> Rows:
        with self._explained():
            return self._connection.execute(_in_postgres(statement), values).fetchall()

    def change(self, statement: str, values: Sequence[Any] = ()) -> int:
        with self._explained():
            return self._connection.execute(_in_postgres(statement), values).rowcount

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._explained(), self._connection.transaction():
            yield

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Failures of the server, rather than of a statement, as `BadInput`."""
        errors = self._psycopg.errors
        try:
            yield
        except (
            self._psycopg.OperationalError,
            errors.InsufficientPrivilege,
            errors.ReadOnlySqlTransaction,
        ) as error:
            told = " ".join(str(error).split())
            away = isinstance(error, self._psycopg.OperationalError)
            kind = Unreachable if away else BadInput
            raise kind([f"The ledger on {self.name} cannot be used: {told}."]) from error


def _in_postgres(statement: str) -> bytes:
    clock = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"
    return statement.replace("?", "%s").replace("epoch()", clock).encode()


def _version(database: Database) -> int:
    return int(database.rows(f"SELECT version FROM {VERSION_TABLE}")[0][0])
