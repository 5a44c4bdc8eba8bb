"""Content-addressed results of stages: the same inputs are never worked on twice.

A result is a folder named by the hash of all that went into it. It appears whole or not at all,
and what is read back is checked against the hashes written with it. Of several workers that want
the same result one makes it, and the others wait for it. Workers that share no file system find it
in the study's storage.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.trial import content_hash

if TYPE_CHECKING:
    from orchestrator.storage import Storage

Claim = Callable[[str], AbstractContextManager[None]]

SEAL = "stage.json"
GOING = ".going-"  # how names of folders begin from which an interrupted training goes on
POLL_S = 0.05


def unclaimed(name: str) -> AbstractContextManager[None]:
    """Where nobody else can want to make it."""
    return nullcontext()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_sha256(folder: Path, *, leave_out: frozenset[str] = frozenset()) -> dict[str, str]:
    """SHA-256 of each file below `folder`, by relative POSIX path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: file_sha256(path) for name, path in names.items() if name not in leave_out}


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` by `text` so that a reader sees the old or the new file, never a part.

    A `durable` file is on the disk, whatever the machine does next, before this returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        if durable:
            os.fsync(stream.fileno())
    temporary.replace(path)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed workers have left in a folder of stages, but for the checkpoints of
    trainings that are still to be gone on with."""
    for left in folder.glob(".*"):
        name = left.name.removeprefix(GOING)
        if name == left.name or (folder / name / SEAL).exists():
            shutil.rmtree(left, ignore_errors=True)


def checkpoints(folder: Path, storage: Storage | None = None) -> list[str]:
    """Of trainings that are still to be gone on with, in a folder of stages or in its storage."""
    found = set(folder.glob(f"{GOING}*/step-*"))
    if storage:
        going = [path for path in storage.below(folder) if path.name.startswith(GOING)]
        found.update(step for path in going for step in storage.below(path))
    return sorted(path.relative_to(folder).as_posix() for path in found)


class Stages:
    """The folder of stage results of one study (or of several that share it).

    What is made is sent to `storage`, and looked for there. A `claim` on a result's name holds off
    workers that do not see this folder's locks. `while_waiting` is called again and again as long as
    another worker makes what is wanted here.
    """

    def __init__(
        self,
        folder: Path,
        *,
        storage: Storage | None = None,
        claim: Claim = unclaimed,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.storage = folder, storage
        self._claim, self._while_waiting = claim, while_waiting
        self._elsewhere: dict[str, bytes | None] = {}  # seals of what is in the storage alone

    def find(self, stage: str, inputs: dict[str, Any], *, version: int) -> Path | None:
        """The folder of an intact result for these inputs, if there is one."""
        folder = self._folder_of(stage, inputs, version)
        return folder if self._is_there(folder) else None

    def each(self, stage: str) -> Iterator[tuple[dict[str, Any], int]]:
        """Inputs and version of every result of a stage; `find` says whether it is intact."""
        for text in self._seals(stage):
            with suppress(ValueError, KeyError):
                seal = json.loads(text)
                yield seal["inputs"], seal["version"]

    def reach(self, path: Path) -> Path:
        """A path in this folder that another worker has told of, with what is there."""
        result = self.folder / path.relative_to(self.folder).parts[0]
        if self.storage and not path.exists() and not self.storage.fetch(path):
            self.storage.fetch(result)
        return path

    def once(
        self, stage: str, inputs: dict[str, Any], build: Callable[[Path], None], *, version: int
    ) -> Path:
        """The folder that `build(folder)` filled for these inputs, built only if it is not there.

        `version` is raised by hand when the meaning of the stage changes. A damaged result is
        built again.
        """
        folder = self._folder_of(stage, inputs, version)
        if self._is_there(folder):
            return folder
        with self.holding(folder.name):
            if self._is_there(folder):  # another worker has made it meanwhile
                return folder
            temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{stage}-"))
            try:
                build(temporary)
                self._seal(temporary, stage, inputs, version)
                self._place(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            if self.storage:
                self.storage.send(folder)
        return folder

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Only one of all workers is inside at a time."""
        with self.holding_here(name), self._claim(name):
            yield

    @contextmanager
    def holding_here(self, name: str) -> Iterator[None]:
        """Only one of the workers that see this folder is inside at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _held(self.folder / f".{name}.lock", self._while_waiting):
            yield

    def beside(self, stage: str, inputs: dict[str, Any], *, version: int) -> Path:
        """A folder for what is not a result yet; whoever builds it removes it."""
        return self.folder / f"{GOING}{self._folder_of(stage, inputs, version).name}"

    def _folder_of(self, stage: str, inputs: dict[str, Any], version: int) -> Path:
        key = content_hash({"stage": stage, "version": version, "inputs": inputs})
        return self.folder / f"{stage}-{key}"

    def _place(self, made: Path, folder: Path) -> None:
        """Let a result appear; an intact one that another worker has placed meanwhile stays."""
        try:
            made.rename(folder)
        except OSError:
            if self._intact(folder):
                return
            self._put_aside(folder)
            made.rename(folder)

    def _put_aside(self, damaged: Path) -> None:
        aside = Path(tempfile.mkdtemp(dir=self.folder, prefix=".damaged-"))
        with suppress(FileNotFoundError):  # another worker was faster
            damaged.rename(aside / "result")
        shutil.rmtree(aside, ignore_errors=True)

    def _seal(self, folder: Path, stage: str, inputs: dict[str, Any], version: int) -> None:
        seal = {"stage": stage, "version": version, "inputs": inputs}
        seal["sha256"] = folder_sha256(folder)
        (folder / SEAL).write_text(json.dumps(seal, indent=1))

    def _seals(self, stage: str) -> Iterator[str | bytes]:
        """Of every result of a stage, here or in the storage."""
        for path in sorted(self.folder.glob(f"{stage}-*/{SEAL}")):
            with suppress(OSError):
                yield path.read_text()
        for folder in self.storage.below(self.folder) if self.storage else ():
            name = folder.name
            if not name.startswith(f"{stage}-") or folder.exists():
                continue
            if name not in self._elsewhere and self.storage:
                self._elsewhere[name] = self.storage.read(folder, SEAL)
            yield self._elsewhere[name] or ""

    def _is_there(self, folder: Path) -> bool:
        """Whether there is an intact result, which is brought here from the storage."""
        if self._intact(folder):
            return True
        return self.storage is not None and self.storage.fetch(folder) and self._intact(folder)

    def _intact(self, folder: Path) -> bool:
        try:
            seal = json.loads((folder / SEAL).read_text())
        except (OSError, ValueError):
            return False
        return bool(seal["sha256"] == folder_sha256(folder, leave_out=frozenset({SEAL})))


@contextmanager
def _held(path: Path, while_waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file at `path`, which is gone afterwards. The kernel frees a dead worker's.

    On a file system without locks nothing is held: then the same may be made twice.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            while_waiting()
            time.sleep(POLL_S)
            continue
        except OSError:
            pass
        if _is_at(path, file):
            break
        os.close(file)  # the one before has deleted it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False
