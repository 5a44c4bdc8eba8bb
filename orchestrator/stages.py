"""Content-addressed results of stages: the same inputs are never worked on twice.

A result is a folder named by the hash of all that went into it. It appears whole or not at all,
and what is read back is checked against the hashes written with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.trial import content_hash

SEAL = "stage.json"


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


class Stages:
    """The folder of stage results of one study (or of several that share it)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(
        self, stage: str, inputs: dict[str, Any], build: Callable[[Path], None], *, version: int
    ) -> Path:
        """The folder that `build(folder)` filled for these inputs, built only if it is not there.

        `version` is raised by hand when the meaning of the stage changes. A damaged result is
        built again.
        """
        key = content_hash({"stage": stage, "version": version, "inputs": inputs})
        folder = self.folder / f"{stage}-{key}"
        if self._intact(folder):
            return folder
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{stage}-"))
        try:
            build(temporary)
            self._seal(temporary, stage, inputs)
            self._place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

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

    def _seal(self, folder: Path, stage: str, inputs: dict[str, Any]) -> None:
        seal = {"stage": stage, "inputs": inputs, "sha256": folder_sha256(folder)}
        (folder / SEAL).write_text(json.dumps(seal, indent=1))

    def _intact(self, folder: Path) -> bool:
        try:
            seal = json.loads((folder / SEAL).read_text())
        except (OSError, ValueError):
            return False
        return bool(seal["sha256"] == folder_sha256(folder, leave_out=frozenset({SEAL})))
