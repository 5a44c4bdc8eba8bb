"""Trials one after another in this process: the whole contract with no cluster."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.launch import Done, Event, Lost, Told
from orchestrator.measure.fingerprint import fingerprint
from orchestrator.recipe import Recipe
from orchestrator.trial import Reason, Work

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.bench import Bench


class Inline:
    """Runs everything here. The worker's side is imported when the first work comes in."""

    def __init__(
        self, recipe: Recipe, folder: Path, *, device: str | None = None, **limits: int
    ) -> None:
        self.recipe, self.folder, self.device, self.limits = recipe, folder, device, limits
        self.hear: Callable[[Told], None] = lambda told: None
        self._work: Work | None = None

    @cached_property
    def bench(self) -> Bench:
        from orchestrator.quiet import quiet

        quiet()
        from orchestrator.bench import Bench

        limits: dict[str, Any] = dict(self.limits)
        return Bench(self.recipe, self.folder, device=self.device, **limits)

    def facts(self) -> dict[str, Any]:
        return self.bench.facts()

    def has(self, kind: str) -> bool:
        return fingerprint() == kind

    def free(self) -> int:
        return 0 if self._work else 1

    def start(self, work: Work) -> None:
        self._work = work

    def wait(self, timeout: float | None = None) -> list[Event]:
        """Does the work that was started, if there is one."""
        work, self._work = self._work, None
        if work is None:
            return []
        bench = self.bench
        from orchestrator.artifact import DamagedArtifact
        from orchestrator.gang import perform

        try:
            return [Done(work, perform(work, bench, lambda s: self.hear(Told(work, s))))]
        except DamagedArtifact as error:
            return [Lost(work, Reason.ERROR, str(error), again=False)]

    def waiting(self) -> dict[str, str]:
        return {}

    def now(self) -> float:
        return time.time()

    def close(self) -> None:
        self.__dict__.pop("bench", None)
