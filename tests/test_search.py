"""What every searcher keeps to, whichever the recipe names."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from params import slow_but

from orchestrator.pareto import Objective, hypervolume, normalise, within_limits
from orchestrator.plugins import name_of
from orchestrator.search import SEARCHERS, Ask, Goal, Search
from orchestrator.space import Space, draw, grid
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
SMOOTH = Space(
    model=("a",),
    prune={
        "choice": [
            "none",
            {"method": "magnitude", "sparsity": {"range": [0.05, 0.95], "num": 3}},
        ]
    },
    quantize={"choice": ["none", "W8A8", "W4A16"]},
    finetune={
        "max_steps": {"range": [10, 1000], "log": True, "num": 2},
        "learning_rate": {"range": [1e-6, 1e-2], "log": True, "num": 3},
        "weight_decay": {"range": [0, 0.3], "step": 0.1},
    },
)
GOAL = Goal(
    objectives=(
        Objective(name="accuracy", direction="max"),
        Objective(name="size_mb", direction="min"),
    ),
    limits=(Objective(name="latency_ms", direction="min", max=5.0),),
)
LEARNS_EARLY = {
    "tpe": {"num_startup_trials": 4},
    "nsga2": {"population_size": 4},
    "gp": {"num_startup_trials": 4},
}
QUICK = [name for name in SEARCHERS if name != "gp"]  # a step of it takes half a second
OUTCOMES = [
    ({"accuracy": 0.9, "size_mb": 3.0, "latency_ms": 1.0}, TrialStatus.COMPLETED),
    (None, TrialStatus.FAILED),
    ({"accuracy": math.nan, "size_mb": math.inf, "latency_ms": 1.0}, TrialStatus.COMPLETED),
    ({"latency_ms": 9.0}, TrialStatus.SKIPPED),
    ({"accuracy": 0.5}, TrialStatus.STOPPED),
    ({"size_mb": 1.0}, TrialStatus.COMPLETED),
]


def run(search: Search, *, tell: bool = True, most: int = 200) -> list[TrialConfig]:
    """Ask until there is nothing more, telling outcomes of all kinds."""
    asked: list[TrialConfig] = []
    while len(asked) < most and (ask := search.ask()) is not None:
        asked.append(ask.config)
        if tell:
            search.tell(ask.config, *OUTCOMES[len(asked) % len(OUTCOMES)])
    return asked


def started(
    name: str, *, seed: int = 0, num_trials: int = 100, space: Space = SPACE, goal: Goal = GOAL
) -> Search:
    return SEARCHERS[name](num_trials=num_trials).start(space, seed=seed, goal=goal)


def learning(name: str, *, seed: int = 0, goal: Goal = GOAL) -> Search:
    """A search of the smooth space that makes use of what it is told after a few results."""
    options = LEARNS_EARLY.get(name, {})
    return SEARCHERS[name](num_trials=200, **options).start(SMOOTH, seed=seed, goal=goal)


def measured(config: TrialConfig) -> dict[str, float]:
    """What a made-up model does: a few options matter, and quality is bought with size."""
    options, scheme = config.finetune, config.quantize["scheme"]
    sparsity = config.prune[0]["sparsity"] if config.prune else 0.0
    accuracy = 0.95 - 0.15 * sparsity**3 - {"none": 0.0, "W8A8": 0.01, "W4A16": 0.05}[scheme]
    accuracy -= 0.08 * math.log10(options["learning_rate"] / 2e-4) ** 2
    accuracy -= 0.1 * math.exp(-options["max_steps"] / 150) + 0.3 * options["weight_decay"]
    return {
        "accuracy": accuracy,
        "size_mb": 100 * (1 - sparsity) * {"none": 1, "W8A8": 0.25, "W4A16": 0.14}[scheme],
        "latency_ms": 10 * (1 - 0.6 * sparsity) * {"none": 1, "W8A8": 0.5, "W4A16": 0.9}[scheme],
    }


def outcome(config: TrialConfig) -> tuple[dict[str, float] | None, TrialStatus]:
    """What becomes of a configuration: most complete, some end in each of the other ways."""
    fate = int(config.id, 16) % 12
    return OUTCOMES[fate] if fate < len(OUTCOMES) else (measured(config), TrialStatus.COMPLETED)


Event = Ask | TrialConfig


def study(
    search: Search, *, num_asks: int, in_flight: int = 3, recorded: Sequence[Event] = ()
) -> list[Event]:
    """Asks and answered configurations in order, `in_flight` open at a time, after those recorded."""
    events, waiting = list(recorded), []
    for event in recorded:
        if isinstance(event, Ask):
            search.replay(as_recorded(event))
            waiting.append(event.config)
        else:
            search.tell(event, *outcome(event))
            waiting.remove(event)
    while sum(isinstance(event, Ask) for event in events) < num_asks:
        if len(waiting) < in_flight:
            ask = search.ask()
            assert ask is not None
            events.append(ask)
            waiting.append(ask.config)
        else:
            config = waiting.pop(len(events) % in_flight)
            events.append(config)
            search.tell(config, *outcome(config))
    return events


def as_recorded(ask: Ask) -> Ask:
    """The same after a way through a file."""
    config, drawn = json.loads(json.dumps([ask.config.model_dump(mode="json"), dict(ask.drawn)]))
    return Ask(TrialConfig.model_validate(config), drawn)


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
def test_it_finds_what_is_hardly_ever_drawn(name):
    seeds: object = 12
    for seed in reversed(range(12)):
        seeds = {"choice": [seed, seeds]}
    space = Space(model=("a",), seed=seeds)
    assert {config.seed for config in run(started(name, space=space))} == set(range(13))


@pytest.mark.parametrize("name", SEARCHERS)
def test_it_gives_no_more_than_was_asked_for(name):
    search = started(name, num_trials=3)
    assert len(run(search)) == 3
    assert search.ask() is None


@pytest.mark.parametrize("name", SEARCHERS)
def test_one_configuration_is_all_there_is_of_a_fixed_space(name):
    fixed = Space(model=("a",), prune="none", quantize="W8A8")
    assert len(run(started(name, space=fixed))) == 1


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_space_that_forbids_everything_ends_at_once(name):
    empty = Space(model=("a",), forbid=[{"prune.method": "none"}])
    assert run(started(name, space=empty)) == []


@pytest.mark.parametrize("name", SEARCHERS)
def test_it_asks_without_a_goal_and_without_results(name):
    """A dry run looks at what would be asked."""
    asked = run(started(name, goal=Goal(), num_trials=15), tell=False)
    assert len(set(asked)) == 15


@pytest.mark.parametrize("name", SEARCHERS)
def test_its_options_are_a_closed_frozen_class(name):
    searcher = SEARCHERS[name]()
    assert name_of(SEARCHERS, searcher) == name
    with pytest.raises(ValueError, match="frozen"):
        searcher.num_trials = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="num_trails"):
        SEARCHERS[name](num_trails=3)


@pytest.mark.parametrize("name", slow_but(SEARCHERS, *QUICK))
def test_a_study_that_was_killed_goes_on_as_if_it_had_not_been(name):
    """Several trials are open at any time, some fail, and the rest is equal to the last digit."""
    undisturbed = study(learning(name), num_asks=11)
    resumed = study(learning(name), num_asks=11, recorded=undisturbed[:14])
    assert resumed == undisturbed


@pytest.mark.parametrize("goal", [GOAL, Goal(GOAL.objectives[:1])], ids=["several", "one"])
@pytest.mark.parametrize("name", QUICK)
def test_whatever_the_moment_it_was_killed_at(name, goal):
    undisturbed = study(learning(name, seed=3, goal=goal), num_asks=22)
    for moment in range(1, len(undisturbed), 8):
        search = learning(name, seed=3, goal=goal)
        assert study(search, num_asks=22, recorded=undisturbed[:moment]) == undisturbed


@pytest.mark.parametrize("name", [name for name in SEARCHERS if name != "grid"])
def test_the_numbers_drawn_make_the_configuration_again(name):
    asks = [event for event in study(learning(name), num_asks=8) if isinstance(event, Ask)]
    for ask in asks:
        assert draw(SMOOTH, lambda place, _, ask=ask: ask.drawn[place]) == ask.config


@pytest.mark.parametrize("name", slow_but(SEARCHERS, *QUICK))
def test_a_batch_that_waits_for_results_has_no_two_alike(name):
    search = learning(name)
    study(search, num_asks=9, in_flight=1)
    batch = [search.ask() for _ in range(4)]
    assert len({ask.config for ask in batch if ask is not None}) == 4


@pytest.mark.parametrize("name", slow_but(SEARCHERS, *QUICK))
def test_results_of_others_and_second_results_change_nothing(name):
    undisturbed = study(learning(name), num_asks=9, in_flight=1)
    search = learning(name)
    reference = EVERYTHING[min(EVERYTHING)]
    for event in undisturbed:
        if isinstance(event, Ask):
            assert search.ask() == event
            search.tell(reference, {"accuracy": 1.0, "size_mb": 0.1}, TrialStatus.COMPLETED)
        else:
            search.tell(event, *outcome(event))
            search.tell(event, {"accuracy": 0.0, "size_mb": 9.0}, TrialStatus.COMPLETED)


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_wider_space_gives_what_is_new_and_nothing_twice(name):
    narrow = SPACE.model_copy(update={"model": ("a",)})
    search = started(name)
    asks = started(name, space=narrow)
    while (ask := asks.ask()) is not None:
        search.replay(as_recorded(ask))
    new = {config.id for config in run(search)}
    assert new == set(EVERYTHING) - {config.id for config in grid(narrow)}


@pytest.mark.parametrize("name", SEARCHERS)
def test_numbers_that_mean_something_else_by_now_are_not_taken_for_the_configuration(name):
    """The recipe lists its alternatives in another order than when they were asked."""
    space = SPACE.model_copy(update={"model": ("b", "a")})
    search, before = started(name, space=space), run(started(name, num_trials=4))
    asks = started(name, num_trials=4)
    for config in before:
        ask = asks.ask()
        assert ask is not None
        search.replay(ask)
        search.tell(config, *OUTCOMES[0])
    assert {config.id for config in run(search)} == set(EVERYTHING) - {c.id for c in before}


@pytest.mark.parametrize(
    ("name", "options", "num_asks", "num_seeds"),
    [
        ("tpe", {}, 48, 6),
        ("nsga2", {}, 60, 12),
        pytest.param("gp", {"num_startup_trials": 5}, 11, 2, marks=pytest.mark.slow),
    ],
)
def test_it_finds_a_better_front_than_random_and_learns_to_keep_the_limit(
    name, options, num_asks, num_seeds
):
    guided = [all_measured(name, seed, num_asks, **options) for seed in range(num_seeds)]
    chance = [all_measured("random", seed, num_asks) for seed in range(20)]
    assert np.mean([volume(m) for m in guided]) > 1.03 * np.mean([volume(m) for m in chance])
    late = [share_within_limits(m[num_asks // 2 :]) for m in guided]
    assert np.mean(late) > 0.1 + np.mean([share_within_limits(m) for m in chance])


def all_measured(name: str, seed: int, num_asks: int, **options: int) -> list[dict[str, float]]:
    """What a search finds whose trials all complete."""
    search = SEARCHERS[name](num_trials=num_asks, **options).start(SMOOTH, seed=seed, goal=GOAL)
    found = []
    while (ask := search.ask()) is not None:
        found.append(measured(ask.config))
        search.tell(ask.config, found[-1], TrialStatus.COMPLETED)
    return found


def volume(found: list[dict[str, float]]) -> float:
    kept = [metrics for metrics in found if within_limits(metrics, GOAL.limits)]
    return hypervolume(normalise(kept, GOAL.objectives), [-0.5, 100.0])


def share_within_limits(found: list[dict[str, float]]) -> float:
    return float(np.mean([within_limits(metrics, GOAL.limits) for metrics in found]))


def test_tpe_learns_from_trials_that_were_skipped_for_a_limit():
    """They were never trained, so there is nothing but the number that breaks the limit."""
    late = []
    for seed in range(4):
        search = learning("tpe", seed=seed)
        for number in range(40):
            ask = search.ask()
            assert ask is not None
            metrics, status = measured(ask.config), TrialStatus.COMPLETED
            if not within_limits(metrics, GOAL.limits):
                metrics, status = {"latency_ms": metrics["latency_ms"]}, TrialStatus.SKIPPED
            search.tell(ask.config, metrics, status)
            late += [status is TrialStatus.COMPLETED] if number >= 20 else []
    chance = [share_within_limits(all_measured("random", seed, 20)) for seed in range(10)]
    assert np.mean(late) > 0.2 + np.mean(chance)


@pytest.mark.parametrize("name", [name for name in SEARCHERS if name != "grid"])
def test_other_seeds_ask_for_other_configurations(name):
    assert run(started(name, seed=1)) != run(started(name, seed=2))


def test_random_draws_are_the_same_for_a_longer_search():
    """A study whose num_trials was raised goes on where it was."""
    short = run(started("random", num_trials=5))
    assert run(started("random", num_trials=12))[:5] == short


def test_random_ask_k_depends_on_the_seed_and_on_k_alone():
    undisturbed, other = run(learning("random"), most=6), run(learning("random", seed=9), most=5)
    search = learning("random")
    for config in other:
        search.replay(Ask(config))
    assert run(search, most=1) == undisturbed[5:]


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
