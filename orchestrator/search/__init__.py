"""WHICH next. One file a searcher; this file holds the contract and the catalog.

To add a searcher: write one frozen pydantic class that has the members of `Searcher` in a new
file here, and give it a line in `SEARCHERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.parameters import Number
from orchestrator.pareto import Objective
from orchestrator.space import Space
from orchestrator.trial import TrialConfig, TrialStatus


@dataclass(frozen=True)
class Ask:
    """A configuration to try, and the numbers that drew it: by a parameter's place, see `Suggest`."""

    config: TrialConfig
    drawn: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """What a study is after. Limits are objectives with a bound that a point must keep."""

    objectives: tuple[Objective, ...] = ()
    limits: tuple[Objective, ...] = ()


class Search(Protocol):
    """A search at work. The k-th answer depends on the seed, on k and on what came before, only.

    `ask` gives a configuration that it has not given before, or None when there is no other or
    enough were given. `replay` takes an answer of an earlier run, recorded, as the next one.
    `tell` says what became of one: all its metrics, or None where there are none. Asks may be
    answered in any order, and some never.
    """

    def ask(self) -> Ask | None: ...
    def replay(self, ask: Ask) -> None: ...
    def tell(
        self, config: TrialConfig, values: Mapping[str, float] | None, status: TrialStatus
    ) -> None: ...


class Searcher(Protocol):
    """A frozen pydantic class: its fields are the options of the recipe's `search` section."""

    @property
    def num_trials(self) -> int | None:
        """At most so many are given; None for as many as there are."""

    def start(self, space: Space, *, seed: int, goal: Goal) -> Search: ...


from orchestrator.search.gp import Gp  # noqa: E402 (they need the contract above)
from orchestrator.search.grid import Grid  # noqa: E402
from orchestrator.search.nsga2 import Nsga2  # noqa: E402
from orchestrator.search.random import Random  # noqa: E402
from orchestrator.search.tpe import Tpe  # noqa: E402

SEARCHERS: dict[str, type[Searcher]] = {
    "grid": Grid,
    "random": Random,
    "tpe": Tpe,
    "nsga2": Nsga2,
    "gp": Gp,
}
