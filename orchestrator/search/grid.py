"""Every configuration of the space, in the order in which the recipe writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from pydantic import Field

from orchestrator.space import Space, grid
from orchestrator.trial import Frozen, TrialConfig, TrialStatus


class Grid(Frozen):
    """Choices are tried one by one; ranges at their `num` or `step` points."""

    num_trials: int | None = Field(None, ge=1)

    def start(self, space: Space, *, seed: int) -> GridSearch:
        return GridSearch(islice(grid(space), self.num_trials))


class GridSearch:
    def __init__(self, configs: Iterator[TrialConfig]) -> None:
        self._configs = configs

    def ask(self) -> TrialConfig | None:
        return next(self._configs, None)

    def tell(self, trial_id: str, values: Mapping[str, float] | None, status: TrialStatus) -> None:
        """Nothing is learnt from results."""
