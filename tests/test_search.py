"""What every searcher keeps to, whichever the recipe names."""

from __future__ import annotations

import math

import pytest

from orchestrator.plugins import name_of
from orchestrator.search import SEARCHERS, Search
from orchestrator.space import Space, grid
from orchestrator.trial import TrialConfig, TrialStatus

SPACE = Space(
    model=("a", "b"),
    prune={
        "choice": ["none", {"method": "structured", "heads": {"choice": [0.25, 0.5]}}],
    },
    quantize={"choice": ["none", {"scheme": "W8A8", "qat": {"choice": [False, True]}}]},
    finetune={"max_steps": {"range": [1, 2]}},
    forbid=[{"prune.method": "none", "quantize.scheme": "none"}],
)
EVERYTHING = {config.id: config for config in grid(SPACE)}
OUTCOMES = [
    ({"accuracy": 0.9, "size_mb": 3.0}, TrialStatus.COMPLETED),
    (None, TrialStatus.FAILED),
    ({"accuracy": math.nan, "size_mb": math.inf}, TrialStatus.COMPLETED),
    (None, TrialStatus.SKIPPED),
]


def run(search: Search, *, tell: bool = True, most: int = 200) -> list[TrialConfig]:
    """Ask until there is nothing more, telling outcomes of all kinds."""
    asked: list[TrialConfig] = []
    while len(asked) < most and (config := search.ask()) is not None:
        asked.append(config)
        if tell:
            values, status = OUTCOMES[len(asked) % len(OUTCOMES)]
            search.tell(config.id, values, status)
    return asked


def started(name: str, *, seed: int = 0, num_trials: int = 100, space: Space = SPACE) -> Search:
    return SEARCHERS[name](num_trials=num_trials).start(space, seed=seed)


@pytest.mark.parametrize("name", SEARCHERS)
def test_it_stays_in_the_space_and_never_repeats(name):
    asked = [config.id for config in run(started(name))]
    assert set(asked) <= set(EVERYTHING)
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("name", SEARCHERS)
def test_it_finds_all_of_a_small_space_and_then_ends(name):
    search = started(name)
    assert {config.id for config in run(search)} == set(EVERYTHING)
    assert search.ask() is None


@pytest.mark.parametrize("name", SEARCHERS)
def test_it_gives_no_more_than_was_asked_for(name):
    search = started(name, num_trials=3)
    assert len(run(search)) == 3
    assert search.ask() is None


@pytest.mark.parametrize("name", SEARCHERS)
def test_the_same_seed_gives_the_same_configurations(name):
    assert run(started(name, seed=7)) == run(started(name, seed=7))


@pytest.mark.parametrize("name", SEARCHERS)
def test_one_configuration_is_all_there_is_of_a_fixed_space(name):
    fixed = Space(model=("a",), prune="none", quantize="W8A8")
    assert len(run(started(name, space=fixed))) == 1


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_space_that_forbids_everything_ends_at_once(name):
    empty = Space(model=("a",), forbid=[{"prune.method": "none"}])
    assert run(started(name, space=empty)) == []


@pytest.mark.parametrize("name", SEARCHERS)
def test_its_options_are_a_closed_frozen_class(name):
    searcher = SEARCHERS[name]()
    assert name_of(SEARCHERS, searcher) == name
    with pytest.raises(ValueError, match="frozen"):
        searcher.num_trials = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="num_trails"):
        SEARCHERS[name](num_trails=3)


def test_random_answers_depend_on_the_seed():
    assert run(started("random", seed=1)) != run(started("random", seed=2))


def test_random_draws_are_the_same_for_a_longer_search():
    """A study whose num_trials was raised goes on where it was."""
    short = run(started("random", num_trials=5))
    assert run(started("random", num_trials=12))[:5] == short


def test_random_covers_a_continuous_range():
    space = Space(
        model=("a",),
        finetune={"max_steps": 5, "learning_rate": {"range": [1e-5, 1e-2], "log": True}},
    )
    rates = [config.finetune["learning_rate"] for config in run(started("random", space=space))]
    assert len(set(rates)) == 100
    assert 30 < sum(rate < 3.2e-4 for rate in rates) < 70


def test_the_grid_goes_in_the_order_of_the_recipe():
    assert [config.id for config in run(started("grid"))] == list(EVERYTHING)
