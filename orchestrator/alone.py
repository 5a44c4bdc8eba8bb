"""Latency is taken alone: whoever computes on a host steps aside while one process measures.

Two files of the host's temporary folder are locked by the kernel, which frees them when a process
dies. Whoever computes shares `busy`; whoever measures takes `wanted`, which turns away those who
come, and then `busy` for itself. It holds between all studies of a user on a host, with Ray or
without it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

POLL_S = 0.02


class Host:
    """This process among those that compute on one host; make one a process (`this_host`).

    Nobody waits longer than `patience_s` for others: then it goes on beside them.
    """

    def __init__(self, folder: Path, *, patience_s: float = 600.0) -> None:
        self.patience_s = patience_s
        self._wanted = _Lock(folder / f"slimtune-{os.getuid()}.wanted")
        self._busy = _Lock(folder / f"slimtune-{os.getuid()}.busy")
        self._works = False

    @contextmanager
    def working(self) -> Iterator[None]:
        """Compute beside others, and call `give_way` often. Waits while somebody measures."""
        self._works = True
        self._come_in()
        try:
            yield
        finally:
            self._works = False
            self._busy.release()

    def give_way(self) -> None:
        """Where somebody wants to measure, wait until that is over. Costs two system calls."""
        if not self._works:
            return
        if self._wanted.take(fcntl.LOCK_SH, patience_s=0):
            self._wanted.release()
        else:
            self._busy.release()
            self._come_in()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether nothing else computes here meanwhile; False where others did not give way in time."""
        works, self._works = self._works, False
        until = time.monotonic() + self.patience_s
        self._busy.release()  # two who both want to be alone would wait for each other
        try:
            yield self._wanted.take(fcntl.LOCK_EX, patience_s=self.patience_s) and self._busy.take(
                fcntl.LOCK_EX, patience_s=until - time.monotonic()
            )
        finally:
            self._busy.release()
            self._wanted.release()
            self._works = works
            if works:
                self._come_in()

    def _come_in(self) -> None:
        self._wanted.take(fcntl.LOCK_SH, patience_s=self.patience_s)
        self._busy.take(fcntl.LOCK_SH, patience_s=0)  # nobody has it alone without `wanted`
        self._wanted.release()


@cache
def this_host() -> Host:
    """The one of this process, whatever TMPDIR says, since jobs of one host may differ in it."""
    everyone = Path("/tmp")
    return Host(everyone if everyone.is_dir() else Path(tempfile.gettempdir()))


class _Lock:
    """One file that is locked, shared or not, through a descriptor of this process."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o600)

    def take(self, how: int, *, patience_s: float) -> bool:
        """Whether it was had in time. Polls, since a wait in the kernel has no limit."""
        until = time.monotonic() + patience_s
        while not self._try(how):
            if time.monotonic() >= until:
                return False
            time.sleep(POLL_S)
        return True

    def _try(self, how: int) -> bool:
        try:
            fcntl.flock(self._file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)
