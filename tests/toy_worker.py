"""A worker that imports no torch: a work's `model` says what it does."""

from __future__ import annotations

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

    # -- verbs -----------------------------------------------------------------------------------

    def answer(self, argument: str) -> None: ...

    def meet(self, other: str) -> None:
        """Until the work of that name runs at the same time."""
        (self.folder / f"met {os.getpid()}").touch()
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("met *"))) < int(other):
            assert time.monotonic() < deadline, "nobody came"
            time.sleep(0.02)

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
