"""A worker that imports no torch: a work's `model` says what it does."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.artifact import DamagedArtifact
from orchestrator.trial import BadInput, Work


class ToyWorker:
    """`verb argument`, answered with what this process is and was told."""

    def __init__(
        self, *, recipe: dict[str, Any], folder: str, device: str | None, threads: int
    ) -> None:
        self.recipe, self.folder = recipe, Path(folder)
        self.about = {"pid": os.getpid(), "device": device, "threads": threads}
        self.num_resets, self.size_mb = 0, 100.0
        self.is_broken = False

    def facts(self) -> dict[str, Any]:
        if problems := self.recipe.get("problems"):
            raise BadInput(problems)
        for deadly in self.folder.glob("deadly *"):  # once each
            deadly.unlink()
            os._exit(1)
        return {**self.about, "omp": os.environ["OMP_NUM_THREADS"]}

    def do(self, work: Work, note: Callable[[str], None]) -> Any:
        verb, _, argument = work.model.partition(" ")
        note(verb)
        getattr(self, verb)(argument)
        return {**self.about, "num_resets": self.num_resets}

    def reset(self) -> None:
        self.num_resets += 1

    def rss_mb(self) -> float:
        return self.size_mb

    def follow(self) -> None:
        """As a rank behind the first: say what it was told, and do as rank 0 does until it ends."""
        told = {n: os.environ.get(n) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
        path = self.folder / f"rank {told['RANK']}.json"
        path.with_suffix(".part").write_text(json.dumps({**told, "pid": os.getpid()}))
        path.with_suffix(".part").rename(path)
        time.sleep(600)

    # -- verbs -----------------------------------------------------------------------------------

    def answer(self, argument: str) -> None: ...

    def meet(self, other: str) -> None:
        """Until the work of that name runs at the same time."""
        (self.folder / f"met {os.getpid()}").touch()
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("met *"))) < int(other):
            assert time.monotonic() < deadline, "nobody came"
            time.sleep(0.02)

    def wait(self, file: str) -> None:
        """Until the file is there."""
        (self.folder / f"{file} is waited for").touch()
        deadline = time.monotonic() + 60
        while not (self.folder / file).exists():
            assert time.monotonic() < deadline, f"no {file}"
            time.sleep(0.02)

    def make(self, argument: str) -> None:
        """A result that others may want too: `NAME`, or `NAME and die` with it half made."""
        name, _, dies = argument.partition(" ")
        with self.claim(name):  # type: ignore[attr-defined]  # which Ray's worker gives it
            with (self.folder / name).open("a") as log:
                log.write("begins\n")
            time.sleep(0.5)
            if dies:
                os._exit(1)
            with (self.folder / name).open("a") as log:
                log.write("ends\n")

    def hang(self, argument: str) -> None:
        (self.folder / "pid").write_text(str(os.getpid()))
        child = subprocess.Popen(["sleep", "600"])
        (self.folder / "child").write_text(str(child.pid))
        (self.folder / "hangs").touch()
        time.sleep(600)

    def damaged(self, message: str) -> None:
        raise DamagedArtifact(message)

    def grow(self, size_mb: str) -> None:
        self.size_mb = float(size_mb)

    def die(self, argument: str) -> None:
        os._exit(1)
