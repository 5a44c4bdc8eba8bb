"""A study's own folder on one machine, for workers that share no file system with others.

Workers of a machine share it. Each holds a lock that the kernel frees when it dies; a folder that
nobody holds any more can go.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from orchestrator.trial import content_hash

KEPT_S = 86400.0  # that a folder stays after the last who used it
_held: list[int] = []  # locks of this process, until it ends


def scratch_name(storage: str, folder: str) -> str:
    """What the folder of a study is called on each machine."""
    return content_hash([storage, folder])


def take(name: str) -> Path:
    """The folder of that name, held by this process as long as it lives; old ones of others go."""
    home = _home()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(home / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH)
    os.utime(lock)
    _held.append(lock)
    for other in home.glob("*.lock"):
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > KEPT_S:
                remove(other.stem)
    folder = home / name
    folder.mkdir(exist_ok=True)
    return folder


def remove(name: str, *, patience_s: float = 0.0) -> bool:
    """Whether the folder is gone: it stays where somebody still holds it after `patience_s`."""
    path = _home() / f"{name}.lock"
    if not path.exists():
        return True
    lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    until = time.monotonic() + patience_s
    try:
        while not _is_free(lock):
            if time.monotonic() >= until:
                return False
            time.sleep(0.1)
        shutil.rmtree(_home() / name, ignore_errors=True)
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(lock)


def _home() -> Path:
    return Path(tempfile.gettempdir()) / f"slimtune-{os.getuid()}.scratch"


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
