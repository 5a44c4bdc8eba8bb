"""Tree-structured Parzen estimator: tries where good configurations are denser than others."""

from __future__ import annotations

from pydantic import Field

from orchestrator.search import Goal, Search
from orchestrator.space import Space
from orchestrator.trial import Frozen


class Tpe(Frozen):
    """For several objectives (Ozaki et al. 2022), with limits; knows parameters under conditions.

    Random until `num_startup_trials` have completed or were stopped. Configurations that are being
    tried count as bad, so that parallel ones differ.
    """

    num_trials: int = Field(20, ge=1)
    num_startup_trials: int = Field(10, ge=1)

    def start(self, space: Space, *, seed: int, goal: Goal) -> Search:
        from optuna.samplers import TPESampler

        from orchestrator.search.optuna import OptunaSearch

        return OptunaSearch(
            space,
            lambda seed: TPESampler(
                seed=seed, n_startup_trials=self.num_startup_trials, constant_liar=True
            ),
            num_trials=self.num_trials,
            num_draws=16,
            seed=seed,
            goal=goal,
        )
