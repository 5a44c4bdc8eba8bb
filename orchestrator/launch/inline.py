"""Trials one after another in this process: the whole contract with no cluster."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.launch import Note
from orchestrator.recipe import Recipe
from orchestrator.trial import Measurement, TrialConfig, TrialResult

if TYPE_CHECKING:
    from orchestrator.bench import Bench


class Inline:
    """Runs everything here. The worker's side is imported when the first work comes in."""

    def __init__(self, recipe: Recipe, folder: Path, *, device: str | None = None) -> None:
        self.recipe, self.folder, self.device = recipe, folder, device

    @cached_property
    def bench(self) -> Bench:
        from orchestrator.quiet import quiet

        quiet()
        from orchestrator.bench import Bench

        return Bench(self.recipe, self.folder, device=self.device)

    def facts(self) -> dict[str, Any]:
        return self.bench.facts()

    def baseline(self, model: str, note: Note) -> TrialResult:
        from orchestrator.run_trial import run_baseline

        return run_baseline(model, self.bench, note)

    def trial(self, config: TrialConfig, note: Note) -> TrialResult:
        from orchestrator.run_trial import run_trial

        return run_trial(config, self.bench, note)

    def test(self, folder: Path, config: TrialConfig) -> tuple[Measurement, str]:
        from orchestrator.run_trial import measure_test

        return measure_test(folder, config, self.bench)

    def close(self) -> None:
        self.__dict__.pop("bench", None)
