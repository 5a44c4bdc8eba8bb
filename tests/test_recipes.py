"""Every recipe that is shipped loads, offers something, and says the same to whoever reads it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.recipe import Recipe, load_recipe

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_it_loads_and_offers_trials(name):
    recipe = load_recipe(FOLDER / name)
    assert recipe.name == Path(name).stem
    assert recipe.output_dir == f"runs/{recipe.name}"
    assert recipe.num_trials() >= 2
    assert all(recipe.baseline_grid(model.id) for model in recipe.models)


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_same_recipe_after_a_manifest(name):
    recipe = load_recipe(FOLDER / name)
    assert Recipe.from_resolved(recipe.resolved()).resolved() == recipe.resolved()


@pytest.mark.parametrize("name", RECIPES)
def test_its_objectives_pull_in_different_directions(name):
    names = {objective.name for objective in load_recipe(FOLDER / name).objectives}
    assert len(names) >= 3


def test_the_quickstart_needs_no_hub_and_has_few_trials():
    recipe = load_recipe(FOLDER / "quickstart.yaml")
    assert recipe.task.data == "python_stdlib"
    assert all(model.name is None for model in recipe.models)
    assert 6 <= recipe.num_trials() <= 8
    assert any(c.prune and c.quantize["qat"] for c in recipe.asked())


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (
            "sst2-minilm.yaml",
            ["model.name=a/folder", "task.data=b", "task.train=train.tsv", "task.test=dev.tsv"],
        ),
        ("shakespeare-stories260k.yaml", ["model.name=a/folder", "task.data=b/input.txt"]),
    ],
)
def test_the_overrides_its_first_lines_name_are_valid(name, overrides):
    text = (FOLDER / name).read_text(encoding="utf-8").split("\nname:")[0]
    assert all(f"{override.partition('=')[0]}=" in text for override in overrides)
    recipe = load_recipe(FOLDER / name, overrides)
    assert recipe.models[0].name == "a/folder"
