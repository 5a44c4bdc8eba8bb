"""All that became of a study's configurations so far, and what that says about the next ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from orchestrator import front as fronts
from orchestrator import pareto
from orchestrator.front import Outcome
from orchestrator.recipe import Recipe
from orchestrator.signature import Signature
from orchestrator.space import infeasible, predict
from orchestrator.trial import TrialConfig

Split = tuple[list[Outcome], list[Outcome], list[Outcome]]


class Outcomes:
    """Outcomes by trial id, in the order in which they came; `baselines` by model too."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.baselines: dict[str, Outcome] = {}
        self._by_id: dict[str, Outcome] = {}
        self._best = np.empty((0, len(recipe.objectives)))  # the front so far, to be minimised
        self._ids: list[str] = []
        self._volume: float | None = 0.0
        self._is_stale = False  # a point of the front so far has changed
        self.largest_mb = 0.0  # of all artifacts

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, trial_id: str) -> Outcome | None:
        return self._by_id.get(trial_id)

    def add(self, outcome: Outcome) -> None:
        """Take in an outcome; one of the same trial is replaced."""
        key = outcome.result.trial_id
        self.largest_mb = max(self.largest_mb, outcome.metrics.get("size_mb", 0.0))
        self._by_id[key] = outcome
        if outcome.role == "baseline":
            self.baselines[outcome.result.config.model] = outcome
            self._volume = None  # it is in units of this one
        if key in self._ids:
            self._is_stale = True
        elif not self._is_stale:
            self._enter(outcome)

    def split(self) -> Split:
        """Completed trials as (front, dominated, over a limit)."""
        return fronts.split_outcomes(list(self), self.recipe.objectives, self.recipe.limits)

    def ruled_out(self, config: TrialConfig, signature: Signature) -> str | None:
        """Why a configuration need not be trained: it cannot work, breaks a limit, or is dominated at best."""
        reason = infeasible(config, signature, self.recipe)
        if reason is not None:
            return reason
        known = predict(config, signature, self.recipe)
        return self._over_limit(known) or self._dominated_at_best(config, known)

    @property
    def hypervolume(self) -> float:
        """Of the front so far, in units of the first dense baseline; 0 before there is one."""
        self._refresh()
        if self._volume is None:
            front = [self._by_id[key] for key in self._ids]
            dense = next(iter(self.baselines.values()), None)
            self._volume = (
                fronts.hypervolume(front, dense.metrics, self.recipe.objectives, self._reference)
                if dense is not None and dense.completed
                else 0.0
            )
        return self._volume

    # -- the front so far ------------------------------------------------------------------------

    @cached_property
    def _reference(self) -> dict[str, float]:
        return pareto.reference_point(self.recipe.objectives)

    def _refresh(self) -> None:
        """Where a point of the front has changed, what it had ruled out may be on it after all."""
        if not self._is_stale:
            return
        self._best, self._ids, self._volume = self._best[:0], [], None
        for outcome in self:
            self._enter(outcome)
        self._is_stale = False

    def _enter(self, outcome: Outcome) -> None:
        """Put a completed point on the front so far, unless another one dominates it."""
        if not outcome.completed:
            return
        if not pareto.within_limits(outcome.metrics, self.recipe.limits):
            return
        point = pareto.normalise([outcome.metrics], self.recipe.objectives)[0]
        if not np.isfinite(point).all() or self._dominates(point):
            return
        stays = ~((point <= self._best).all(axis=1) & (point < self._best).any(axis=1))
        self._best = np.vstack([self._best[stays], point])
        kept = [key for key, stay in zip(self._ids, stays, strict=True) if stay]
        self._ids = [*kept, outcome.result.trial_id]
        self._volume = None

    def _dominates(self, point: np.ndarray) -> bool:
        """Whether a point of the front so far dominates this one."""
        better = (self._best <= point).all(axis=1) & (self._best < point).any(axis=1)
        return bool(better.any())

    def _over_limit(self, known: dict[str, float]) -> str | None:
        for limit in self.recipe.limits:
            if limit.name in known and not limit.allows(known[limit.name]):
                value = f"{known[limit.name]:.4g}"
                return f"its {limit.name} of {value} breaks the limit before training"
        return None

    def _dominated_at_best(self, config: TrialConfig, known: dict[str, float]) -> str | None:
        """Ruled out when a finished trial is at least as good as dense, at no more of any known cost.

        Needs every other objective to be known from the shape.
        """
        quality = self.recipe.task.quality
        costs = [o for o in self.recipe.objectives if o.name != quality]
        if not all(o.name in known for o in costs):
            return None
        self._refresh()
        best = {quality: self.baselines[config.model].metrics[quality]} | known
        if self._dominates(pareto.normalise([best], self.recipe.objectives)[0]):
            return f"a finished trial dominates it even at the dense model's {quality}"
        return None


def folder_of(outcome: Outcome, study: Path) -> str:
    """Where the outcome's artifact lies, relative to the study."""
    assert outcome.result.artifact is not None
    return (outcome.folder / outcome.result.artifact).relative_to(study).as_posix()
