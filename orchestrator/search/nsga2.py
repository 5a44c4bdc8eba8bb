"""NSGA-II: generations of configurations, each bred from the best of those before."""

from __future__ import annotations

from pydantic import Field

from orchestrator.search import Goal, Search
from orchestrator.space import Space
from orchestrator.trial import Frozen


class Nsga2(Frozen):
    """Non-dominated sorting and crowding (Deb et al. 2002), limits before objectives.

    Random until `population_size` have completed. Parameters under conditions are not inherited
    but drawn at random. Wants some hundred trials.
    """

    num_trials: int = Field(20, ge=1)
    population_size: int = Field(10, ge=2)

    def start(self, space: Space, *, seed: int, goal: Goal) -> Search:
        from optuna.samplers import NSGAIISampler

        from orchestrator.search.optuna import OptunaSearch

        return OptunaSearch(
            space,
            lambda seed: NSGAIISampler(seed=seed, population_size=self.population_size),
            num_trials=self.num_trials,
            num_draws=16,
            seed=seed,
            goal=goal,
        )
