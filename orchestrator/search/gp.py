"""Gaussian processes: tries where the front is expected to grow most. For few, expensive trials."""

from __future__ import annotations

from pydantic import Field

from orchestrator.search import Goal, Search
from orchestrator.space import Space
from orchestrator.trial import Frozen


class Gp(Frozen):
    """Expected hypervolume improvement (Daulton et al. 2020) times the chance to keep the limits.

    Random until `num_startup_trials` have completed; it then expects something of those that are
    being tried. Parameters under conditions are drawn at random. An ask takes seconds after some
    hundred trials, and longer the more are being tried. Loads torch and scipy.
    """

    num_trials: int = Field(20, ge=1)
    num_startup_trials: int = Field(10, ge=1)

    def start(self, space: Space, *, seed: int, goal: Goal) -> Search:
        from optuna.samplers import GPSampler

        from orchestrator.search.optuna import OptunaSearch

        return OptunaSearch(
            space,
            lambda seed: GPSampler(
                seed=seed,
                n_startup_trials=self.num_startup_trials,
                warn_independent_sampling=False,
            ),
            num_trials=self.num_trials,
            num_draws=4,  # each takes a fit
            seed=seed,
            goal=goal,
        )
