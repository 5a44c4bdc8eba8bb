"""Configurations at random: every alternative of a choice equally likely, ranges uniform on their scale."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from orchestrator.space import Space, draw
from orchestrator.trial import Frozen, Infeasible, TrialConfig, TrialStatus

MAX_DRAWS = 1000  # so many repeats or forbidden draws in a row end the search


class Random(Frozen):
    """Draws without repeats; the space counts as exhausted after 1,000 draws that gave nothing new."""

    num_trials: int = Field(20, ge=1)

    def start(self, space: Space, *, seed: int) -> RandomSearch:
        return RandomSearch(space, self.num_trials, seed)


class RandomSearch:
    def __init__(self, space: Space, num_trials: int, seed: int) -> None:
        self._space, self._num_trials, self._seed = space, num_trials, seed
        self._seen: set[str] = set()

    def ask(self) -> TrialConfig | None:
        if len(self._seen) == self._num_trials:
            return None
        rng = np.random.default_rng([self._seed, len(self._seen)])
        for _ in range(MAX_DRAWS):
            try:
                config = draw(self._space, lambda _, parameter: parameter.sample(rng))
            except Infeasible:
                continue
            if config.id not in self._seen:
                self._seen.add(config.id)
                return config
        return None

    def tell(self, trial_id: str, values: Mapping[str, float] | None, status: TrialStatus) -> None:
        """Nothing is learnt from results."""
