"""WHICH next. One file a searcher; this file holds the contract and the catalog.

To add a searcher: write one frozen pydantic class that has the members of `Searcher` in a new
file here, and give it a line in `SEARCHERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from orchestrator.search.grid import Grid
from orchestrator.search.random import Random
from orchestrator.space import Space
from orchestrator.trial import TrialConfig, TrialStatus


class Search(Protocol):
    """A search at work. The k-th answer depends on the seed, on k and on what was told, only.

    `ask` gives a configuration that it has not given before, or None when there is no other or
    enough were given. `tell` says what became of one: its metrics, or None where there are none.
    """

    def ask(self) -> TrialConfig | None: ...
    def tell(
        self, trial_id: str, values: Mapping[str, float] | None, status: TrialStatus
    ) -> None: ...


class Searcher(Protocol):
    """A frozen pydantic class: its fields are the options of the recipe's `search` section."""

    @property
    def num_trials(self) -> int | None:
        """At most so many are given; None for as many as there are."""

    def start(self, space: Space, *, seed: int) -> Search: ...


SEARCHERS: dict[str, type[Searcher]] = {"grid": Grid, "random": Random}
