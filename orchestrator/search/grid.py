"""Every configuration of the space, in the order in which the recipe writes them."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from orchestrator.search import Ask, Goal
from orchestrator.space import Space, grid
from orchestrator.trial import Frozen, TrialConfig, TrialStatus


class Grid(Frozen):
    """Choices are tried one by one; ranges at their `num` or `step` points."""

    num_trials: int | None = Field(None, ge=1)

    def start(self, space: Space, *, seed: int, goal: Goal) -> GridSearch:
        return GridSearch(space, self.num_trials)


class GridSearch:
    """Goes on past what was replayed, wherever in the grid that lies: the space may have grown."""

    def __init__(self, space: Space, num_trials: int | None) -> None:
        self._configs, self._num_trials = grid(space), num_trials
        self._seen: set[str] = set()

    def ask(self) -> Ask | None:
        if self._num_trials is not None and len(self._seen) >= self._num_trials:
            return None
        config = next((c for c in self._configs if c.id not in self._seen), None)
        if config is None:
            return None
        self._seen.add(config.id)
        return Ask(config)

    def replay(self, ask: Ask) -> None:
        self._seen.add(ask.config.id)

    def tell(
        self, config: TrialConfig, values: Mapping[str, float] | None, status: TrialStatus
    ) -> None:
        """Nothing is learnt from results."""
