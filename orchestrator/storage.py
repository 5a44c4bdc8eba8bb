"""What workers share that have no file system in common: folders at a URI, whole and checked.

A folder's files are written below `files/` under a name that nobody else has, and last of all its
entry below `index/`: where they are, and their hashes. So it appears whole or not at all, nobody
changes what another one reads, and what was damaged on the way counts as not there. Credentials
are the environment's.
"""

from __future__ import annotations

import errno
import json
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from orchestrator.stages import folder_sha256
from orchestrator.trial import BadInput

T = TypeVar("T")

PATIENCE_S = 180.0  # with a storage that is away
PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
TRIES = 3  # to read what is replaced meanwhile
FINAL = (FileNotFoundError, PermissionError, FileExistsError, NotImplementedError, ImportError)
NEEDED = {"s3": "slimtune[s3]", "s3a": "slimtune[s3]", "gs": "gcsfs", "gcs": "gcsfs"}


class StorageAway(BadInput):
    """The storage does not answer; the same command goes on once it does."""


class Storage:
    """Copies, at any URI that fsspec knows, of folders below `root`, a worker's own for the study.

    `version` tells copies of one folder apart that were made of it at different times. Raises
    `StorageAway` where the storage is away for longer than `patience_s`.
    """

    def __init__(self, uri: str, root: Path, *, patience_s: float = PATIENCE_S) -> None:
        self.uri, self.root, self._patience_s = uri.rstrip("/"), root.absolute(), patience_s

    # -- folders ---------------------------------------------------------------------------------

    def send(self, folder: Path, *, version: str = "") -> None:
        """Put a copy there; from then on it can be fetched."""
        hashes = folder_sha256(folder)
        place = f"files/{self._name(folder)}/{secrets.token_hex(8)}"
        self._put({folder / name: f"{place}/{name}" for name in hashes})
        entry = json.dumps({"place": place, "sha256": hashes})
        self.write(self._entry(folder, version), entry.encode())

    def fetch(self, folder: Path, *, version: str = "") -> bool:
        """Put the copy, if there is one, in the place of the folder."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(TRIES):
            entry = self._read_entry(folder, version)
            if entry is None:
                return False
            part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
            try:
                if self._get(entry, part):
                    _replace(folder, part)
                    return True
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return False

    def below(self, folder: Path) -> list[Path]:
        """The folders right below one of which there are copies."""
        path = self._at(f"index/{self._name(folder)}")
        try:
            found = self._patiently(lambda: self._system.ls(path, detail=False))
        except FileNotFoundError:
            return []
        names = {PurePosixPath(str(each).rstrip("/")).name for each in found}
        return [folder / name for name in sorted(names) if not name.endswith(".json")]

    def read(self, folder: Path, name: str) -> bytes | None:
        """One file of a copy."""
        entry = self._read_entry(folder, "")
        return None if entry is None else self._read(f"{entry['place']}/{name}")

    def remove(self, folder: Path) -> None:
        """All copies of a folder and of what is below it."""
        for kind in ("index", "files"):  # who finds no entry does not look for files
            self._remove(f"{kind}/{self._name(folder)}")

    # -- files, as they are ----------------------------------------------------------------------

    def publish(self, paths: Iterable[Path]) -> None:
        """Put files below the root where anybody finds them: under their own names."""
        self._put({path: path.relative_to(self.root).as_posix() for path in paths})

    def withdraw(self, folder: Path) -> None:
        """Remove what was published below a folder."""
        self._remove(self._name(folder))

    def published(self, path: Path) -> bytes | None:
        """A published file, if there is one."""
        return self._read(self._name(path))

    def check(self) -> None:
        """Raise `BadInput` unless files can be written and read there."""
        name = f".probe-{secrets.token_hex(8)}"
        try:
            self.write(name, b"slimtune")
            self._remove(name)
        except (*FINAL, ValueError) as error:
            raise BadInput([f"storage: {self.uri} cannot be used: {error}."]) from error

    # -- what lies under it ----------------------------------------------------------------------

    @cached_property
    def _system(self) -> Any:
        """Raises `BadInput` for a URI that nothing here can open."""
        return open_uri(self.uri)[0]

    @cached_property
    def _base(self) -> str:
        return open_uri(self.uri)[1].rstrip("/")

    def _at(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _name(self, path: Path) -> str:
        return path.absolute().relative_to(self.root).as_posix()

    def _entry(self, folder: Path, version: str) -> str:
        return f"index/{self._name(folder)}/{version or 'whole'}.json"

    def _read_entry(self, folder: Path, version: str) -> dict[str, Any] | None:
        found = self._read(self._entry(folder, version))
        try:
            return None if found is None else dict(json.loads(found))
        except ValueError:  # it is being written
            return None

    def _read(self, name: str) -> bytes | None:
        try:
            return bytes(self._patiently(lambda: self._system.cat_file(self._at(name))))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """A small file, under its own name."""
        path = self._at(name)
        self._in_folders([path], lambda: self._system.pipe_file(path, content))

    def _put(self, files: dict[Path, str]) -> None:
        here, there = [str(path) for path in files], [self._at(name) for name in files.values()]
        self._in_folders(there, lambda: self._system.put(here, there))

    def _get(self, entry: dict[str, Any], folder: Path) -> bool:
        """Whether all that the entry names came, as it was sent."""
        names = list(entry["sha256"])
        there = [self._at(f"{entry['place']}/{name}") for name in names]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        here = [str(folder / name) for name in names]
        try:
            self._patiently(lambda: self._system.get(there, here))
        except FileNotFoundError:  # removed meanwhile
            return False
        return folder_sha256(folder) == entry["sha256"]

    def _in_folders(self, paths: list[str], write: Callable[[], object]) -> None:
        """Write files, where folders have to be made first if it is a file system that has such."""
        try:
            self._patiently(write)
        except FileNotFoundError:
            if self._system.async_impl:  # an object store: it is the bucket that is not there
                raise
            for parent in {path.rpartition("/")[0] for path in paths}:
                self._system.makedirs(parent, exist_ok=True)
            self._patiently(write)

    def _remove(self, name: str) -> None:
        try:
            self._patiently(lambda: self._system.rm(self._at(name), recursive=True))
        except FileNotFoundError:
            return

    def _patiently(self, do: Callable[[], T]) -> T:
        """`do`, and again after longer and longer pauses as long as the storage may come back.

        What goes wrong is told by each kind of storage in its own way.
        """
        until, pause = time.monotonic() + self._patience_s, PAUSE_S
        while True:
            try:
                return do()
            except (*FINAL, BadInput):
                raise
            except Exception as error:
                full = isinstance(error, OSError) and error.errno == errno.ENOSPC
                if full or time.monotonic() + pause > until:
                    why = " ".join(str(error).split()) or type(error).__name__
                    raise StorageAway([f"storage: {self.uri} cannot be used: {why}."]) from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)


def remove_folder(folder: Path, storage: Storage | None) -> None:
    """Remove a folder, and all copies of it where there is a storage."""
    if storage:
        storage.remove(folder)
    shutil.rmtree(folder, ignore_errors=True)


def open_uri(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it. Raises `BadInput`."""
    import fsspec

    protocol = uri.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except ImportError as error:
        needed = NEEDED.get(protocol, "the package of fsspec for it")
        problem = f"storage: {protocol}:// needs more here: pip install {needed}."
        raise BadInput([problem]) from error
    except ValueError as error:
        raise BadInput([f"storage: {uri} cannot be opened: {error}."]) from error
    return system, path


def _replace(folder: Path, made: Path) -> None:
    """Put a folder in the place of another, which may be read meanwhile."""
    made.chmod(0o755)
    try:
        made.rename(folder)
        return
    except OSError:
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        folder.rename(aside / "before")
        made.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
