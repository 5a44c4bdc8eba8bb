"""How Optuna is kept: silent, and out of the way of whoever else uses it."""

from __future__ import annotations

import logging
import warnings

import optuna
import pytest

from orchestrator.pareto import Objective
from orchestrator.search import SEARCHERS, Goal
from orchestrator.space import Space
from orchestrator.trial import TrialStatus

SPACE = Space(model=("a",), finetune={"max_steps": {"range": [1, 9]}})
GOAL = Goal(objectives=(Objective(name="accuracy", direction="max"),))


@pytest.mark.parametrize("name", ["tpe", "nsga2", "gp"])
def test_it_says_nothing_and_leaves_the_settings_of_others(name, capfd):
    optuna.logging.set_verbosity(logging.INFO)
    with warnings.catch_warnings(action="error"):
        filters = list(warnings.filters)
        search = SEARCHERS[name]().start(SPACE, seed=0, goal=GOAL)
        while (ask := search.ask()) is not None:
            search.tell(ask.config, {"accuracy": float("inf")}, TrialStatus.COMPLETED)
        assert warnings.filters == filters
    assert optuna.logging.get_verbosity() == logging.INFO
    assert capfd.readouterr() == ("", "")
