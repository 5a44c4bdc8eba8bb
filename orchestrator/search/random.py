"""Configurations at random: every alternative of a choice equally likely, ranges uniform on their scale."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from pydantic import Field

from orchestrator.parameters import Choice, Number, Range, Suggest
from orchestrator.search import Ask, Goal
from orchestrator.space import Space, draw, grid
from orchestrator.trial import Frozen, Infeasible, TrialConfig, TrialStatus

MAX_DRAWS = 1000  # after so many repeats or forbidden draws in a row the grid says what is left
MAX_COMBINATIONS = 10_000  # of the grid are looked at


class Random(Frozen):
    """Draws without repeats, until the space is exhausted."""

    num_trials: int = Field(20, ge=1)

    def start(self, space: Space, *, seed: int, goal: Goal) -> RandomSearch:
        return RandomSearch(space, self.num_trials, seed)


class RandomSearch:
    def __init__(self, space: Space, num_trials: int, seed: int) -> None:
        self._space, self._num_trials, self._seed = space, num_trials, seed
        self._seen: set[str] = set()

    def ask(self) -> Ask | None:
        if len(self._seen) >= self._num_trials:
            return None
        rng = np.random.default_rng([self._seed, len(self._seen)])
        ask = draw_new(self._space, rng, self._seen)
        if ask is not None:
            self.replay(ask)
        return ask

    def replay(self, ask: Ask) -> None:
        self._seen.add(ask.config.id)

    def tell(
        self, config: TrialConfig, values: Mapping[str, float] | None, status: TrialStatus
    ) -> None:
        """Nothing is learnt from results."""


def draw_new(space: Space, rng: np.random.Generator, seen: Collection[str]) -> Ask | None:
    """A random configuration whose id is not among `seen`, None when the space is exhausted.

    That is found exactly where every range has grid points and they make at most 10,000
    combinations; elsewhere 1,000 draws that gave nothing new are taken for it.
    """
    for _ in range(MAX_DRAWS):
        ask = draw_ask(space, lambda _, parameter: parameter.sample(rng))
        if ask is not None and ask.config.id not in seen:
            return ask
    try:
        left = (c for c in grid(space, most=MAX_COMBINATIONS) if c.id not in seen)
        return next((Ask(config) for config in left), None)
    except ValueError:
        return None


def draw_ask(space: Space, suggest: Suggest) -> Ask | None:
    """What a searcher's answers make, with the answers; None where that is infeasible."""
    drawn: dict[str, Number] = {}

    def note(place: str, parameter: Choice | Range) -> Number:
        drawn[place] = suggest(place, parameter)
        return drawn[place]

    try:
        return Ask(draw(space, note), drawn)
    except Infeasible:
        return None
