"""What Tune has chosen becomes one configuration of the recipe, or is told what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study

from orchestrator.param_space import configure, in_short
from orchestrator.recipe import Recipe, load_recipe, make_recipe
from orchestrator.trial import BadInput, Infeasible

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tiny_study.recipe(tmp_path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_what_a_search_asks_for_survives_being_said_in_short(path: Path) -> None:
    recipe = load_recipe(path)
    for config in recipe.asked():
        short = in_short(config, recipe)
        assert configure(recipe, short).id == config.id
        assert configure(recipe, config.model_dump(mode="json")).id == config.id
        assert len(short["finetune"]) < len(config.finetune)


def test_a_key_replaces_what_the_recipe_says_and_leaves_the_rest(recipe: Recipe) -> None:
    given = {
        "prune": "none",
        "quantize": "W8A8",
        "quantize.qat": True,
        "finetune": {"max_steps": np.int64(7)},
    }
    config = configure(recipe, given)
    assert config.prune == () and config.quantize["qat"] is True
    assert config.finetune["max_steps"] == 7 and type(config.finetune["max_steps"]) is int
    assert config.finetune["learning_rate"] == 1e-3


def test_an_option_reaches_every_method_that_has_it(recipe: Recipe) -> None:
    methods = [
        {"method": "structured", "heads": 0.5},
        {"method": "magnitude", "sparsity": 0.5},
    ]
    given = {"prune": methods, "prune.neurons": 0.25, "quantize": "none"}
    structured, magnitude = configure(recipe, given).prune
    assert structured["neurons"] == 0.25 and "neurons" not in magnitude


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"finetune.learning_rat": 1}, "did you mean `finetune.learning_rate`? Choices: finetune"),
        ({"optimizer": "sgd"}, "`optimizer` is not a path of a configuration. Choices: finetune"),
        ({"model": "gpt"}, "model `gpt` is not in the recipe. Choices: bert."),
        ({"quantize": "W8A8"}, "the recipe's space leaves `prune` open"),
        ({}, "the recipe's space leaves `prune`, `quantize` open"),
    ],
)
def test_what_cannot_be_meant_is_told(recipe: Recipe, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadInput) as told:
        configure(recipe, given)
    assert problem in str(told.value)


@pytest.mark.parametrize(
    "given",
    [
        {"prune": "none", "quantize": "none"},  # the recipe forbids it
        {"prune": {"method": "structured", "heads": 1.5}, "quantize": "none"},
        {"prune": "none", "quantize": "W8A8", "finetune.learning_rate": -1.0},
    ],
)
def test_what_cannot_work_is_infeasible(recipe: Recipe, given: dict[str, Any]) -> None:
    with pytest.raises(Infeasible):
        configure(recipe, given)
