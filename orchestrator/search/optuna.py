"""What the searchers that are samplers of Optuna have in common: a study in memory, asked and told.

Optuna is loaded with this module, hence only when such a searcher starts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState

from orchestrator.parameters import Choice, Number, Range
from orchestrator.search import Ask, Goal
from orchestrator.search.random import draw_ask, draw_new
from orchestrator.space import Space, draw
from orchestrator.trial import Infeasible, TrialConfig, TrialStatus

DIRECTIONS = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}


@contextmanager
def _silence() -> Iterator[None]:
    """Optuna says nothing meanwhile, neither in its log nor as warnings."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


class OptunaSearch:
    """A search by the sampler that `make_sampler` builds from a seed, anew for every ask.

    A trial enters the study in `replay` alone, whether just drawn or recorded, so that a study
    that was replayed equals the one that was interrupted. What the sampler draws on the way ends
    as failed, which no sampler looks at. After `num_draws` of them that gave nothing new, the
    configuration is a random one.
    """

    def __init__(
        self,
        space: Space,
        make_sampler: Callable[[int], BaseSampler],
        *,
        num_trials: int,
        num_draws: int,
        seed: int,
        goal: Goal,
    ) -> None:
        self._space, self._make_sampler, self._goal = space, make_sampler, goal
        self._num_trials, self._num_draws, self._seed = num_trials, num_draws, seed
        self._seen: set[str] = set()
        self._running: dict[str, Trial] = {}
        directions = [DIRECTIONS[objective.direction] for objective in goal.objectives]
        directions = directions or [StudyDirection.MINIMIZE]  # it wants one, though none is told
        with _silence():
            self._study = optuna.create_study(directions=directions, sampler=make_sampler(seed))

    def ask(self) -> Ask | None:
        if len(self._seen) >= self._num_trials:
            return None
        rng = np.random.default_rng([self._seed, len(self._seen)])
        with _silence():
            ask = self._suggested(int(rng.integers(2**32)))
        ask = ask or draw_new(self._space, rng, self._seen)
        if ask is not None:
            self.replay(ask)
        return ask

    def _suggested(self, seed: int) -> Ask | None:
        """The sampler's first draw that is new; those before it count as running, to be avoided."""
        self._study.sampler = self._make_sampler(seed)
        trials: list[Trial] = []
        new = None
        while new is None and len(trials) < self._num_draws:
            trials.append(self._study.ask())
            ask = draw_ask(self._space, partial(_suggest, trials[-1]))
            new = ask if ask is not None and ask.config.id not in self._seen else None
        for trial in trials:
            self._study.tell(trial, state=TrialState.FAIL)
        return new

    def replay(self, ask: Ask) -> None:
        """Where the numbers mean something else by now, it is only never asked again."""
        if ask.config.id in self._seen:
            return
        self._seen.add(ask.config.id)
        located = self._located(ask)
        if located is None:
            return
        distributions, values = located
        with _silence():
            self._study.enqueue_trial(values)
            trial = self._study.ask(distributions)
            _join_generation(self._study, trial)
        self._running[ask.config.id] = trial

    def _located(self, ask: Ask) -> tuple[dict[str, BaseDistribution], dict[str, Number]] | None:
        """The parameters of an ask and their values as Optuna knows them.

        None where its numbers do not make its configuration: the space was changed since, or
        there are none, since it was what was left of a grid.
        """
        distributions: dict[str, BaseDistribution] = {}
        values: dict[str, Number] = {}

        def recall(place: str, parameter: Choice | Range) -> Number:
            values[place] = _to_optuna(parameter, ask.drawn[place])
            distributions[place] = _distribution(parameter)
            return _from_optuna(parameter, values[place])

        try:
            config = draw(self._space, recall)
        except (KeyError, ValueError, Infeasible):
            return None
        return (distributions, values) if config.id == ask.config.id else None

    def tell(
        self, config: TrialConfig, values: Mapping[str, float] | None, status: TrialStatus
    ) -> None:
        """Only the first result counts of what was asked here; others, such as references, do not.

        Optuna's "pruned" is what was stopped or is known to break a limit, with no full result:
        `tpe` ranks it last or by how far it breaks the limit, `nsga2` and `gp` leave it out.
        """
        trial = self._running.pop(config.id, None)
        if trial is None:
            return
        values = {name: value for name, value in (values or {}).items() if math.isfinite(value)}
        excesses = self._excesses(values)
        needed = {objective.name for objective in (*self._goal.objectives, *self._goal.limits)}
        state, result = TrialState.FAIL, None
        if status is TrialStatus.COMPLETED and self._goal.objectives and needed <= values.keys():
            state = TrialState.COMPLETE
            result = [values[objective.name] for objective in self._goal.objectives]
        elif status is TrialStatus.STOPPED or any(excess > 0 for excess in excesses.values()):
            state = TrialState.PRUNED
        with _silence():
            for name, excess in excesses.items():
                trial.set_constraint(name, excess)
            self._study.tell(trial, result, state)

    def _excesses(self, values: Mapping[str, float]) -> dict[str, float]:
        """How far known values are beyond their limits, as shares of these; negative within."""
        excesses = {}
        for limit in self._goal.limits:
            for bound, sign in ((limit.max, 1), (limit.min, -1)):
                if bound is not None and limit.name in values:
                    excess = sign * (values[limit.name] - bound) / (abs(bound) or 1.0)
                    excesses[f"{limit.name} {sign}"] = excess
        return excesses


def _join_generation(study: optuna.Study, trial: Trial) -> None:
    """Let NSGA-II count a trial to its generation, and choose the parents of that, when it is asked.

    It does so while it samples, which a recorded trial has behind it.
    """
    if isinstance(study.sampler, NSGAIISampler):
        frozen = study.get_trials(deepcopy=False)[trial.number]
        generation = study.sampler.get_trial_generation(study, frozen)
        study.sampler.get_parent_population(study, generation)


# -- parameters as Optuna knows them -------------------------------------------------------------


def _points(parameter: Choice | Range) -> tuple[Number, ...] | None:
    """The values of a parameter that Optuna knows by their position, None where by themselves."""
    listed = isinstance(parameter, Choice) or parameter.step is not None
    return parameter.grid() if listed else None


def _distribution(parameter: Choice | Range) -> BaseDistribution:
    points = _points(parameter)
    if isinstance(parameter, Choice):
        return CategoricalDistribution(parameter.grid())
    if points is not None:
        return IntDistribution(0, len(points) - 1)
    low, high = parameter.range
    if parameter.whole:
        return IntDistribution(int(low), int(high), log=parameter.log)
    return FloatDistribution(low, high, log=parameter.log)


def _to_optuna(parameter: Choice | Range, number: Number) -> Number:
    """Raises ValueError for a number that the parameter does not have."""
    points = _points(parameter)
    if points is not None:
        return points.index(number)
    assert isinstance(parameter, Range)
    if parameter.nearest(number) != number:
        raise ValueError(f"needs a number within {parameter.range}, got {number}")
    return number


def _from_optuna(parameter: Choice | Range, value: Number) -> Number:
    points = _points(parameter)
    if points is not None:
        return points[int(value)]
    assert isinstance(parameter, Range)
    return parameter.nearest(value)


def _suggest(trial: Trial, place: str, parameter: Choice | Range) -> Number:
    """The sampler's answer, as a number of the parameter."""
    value: Number
    match _distribution(parameter):
        case IntDistribution() as whole:
            value = trial.suggest_int(place, whole.low, whole.high, log=whole.log)
        case FloatDistribution() as real:
            value = trial.suggest_float(place, real.low, real.high, log=real.log)
        case _:
            value = trial.suggest_categorical(place, parameter.grid())
    return _from_optuna(parameter, value)
