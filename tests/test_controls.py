"""The statistics of benchmarks/controls.py, and its arms from start to finish on a tiny study."""

from __future__ import annotations

from pathlib import Path

import controls
import numpy as np
import pytest
import tiny_study

from orchestrator.bench import Bench
from orchestrator.recipe import make_recipe
from orchestrator.tasks import Record
from orchestrator.tasks.causal_lm import CausalLm
from orchestrator.tasks.text_classification import TextClassification


def classified(correct: np.ndarray) -> list[Record]:
    """Rows of class 1 that are answered rightly or not."""
    return [
        {"id": str(row), "label": 1, "logits": [0.0, 1.0] if right else [1.0, 0.0]}
        for row, right in enumerate(correct)
    ]


def blocks(nll: np.ndarray) -> list[Record]:
    return [{"id": str(row), "nll": value, "num_tokens": 10} for row, value in enumerate(nll)]


def test_one_seed_gives_the_difference_and_interval_that_the_task_gives() -> None:
    rng = np.random.default_rng(0)
    good, bad = classified(rng.random(200) < 0.9), classified(rng.random(200) < 0.7)
    found = controls.compare([good], [bad], sign=1)
    value, low, high = TextClassification(data="none").paired_difference(good, bad)
    assert found["difference"] == pytest.approx(value)
    assert found["interval"] == pytest.approx([low, high], abs=0.02)  # other draws

    good, bad = blocks(rng.uniform(10, 20, 200)), blocks(rng.uniform(15, 25, 200))
    found = controls.compare([good], [bad], sign=-1)
    expected = CausalLm(data="none").paired_difference(good, bad)
    assert [found["difference"], *found["interval"]] == pytest.approx(expected)


def test_differences_are_averaged_over_seeds_row_by_row() -> None:
    better = [classified(np.arange(10) < count) for count in (9, 7, 5)]
    worse = [classified(np.arange(10) < count) for count in (6, 7, 2)]
    worse[2].reverse()  # rows are matched by id
    found = controls.compare(better, worse, sign=1)
    assert found["per_seed"] == pytest.approx([0.3, 0.0, 0.3])
    assert found["difference"] == pytest.approx(0.2)
    assert (found["quality_better"], found["quality_worse"]) == pytest.approx((0.7, 0.5))


def test_verdicts_follow_the_interval_and_the_metric_s_direction() -> None:
    low, high = blocks(np.full(50, 10.0)), blocks(np.full(50, 12.0))
    assert controls.compare([low], [high], sign=-1)["verdict"] == "win"
    assert controls.compare([high], [low], sign=-1)["verdict"] == "loss"
    assert controls.compare([low], [low], sign=-1)["verdict"] == "tie"
    once = classified(np.arange(50) < 40)
    assert controls.compare([once], [classified(np.arange(50) < 39)], sign=1)["verdict"] == "tie"
    assert controls.compare([once], [classified(np.arange(50) < 10)], sign=1)["verdict"] == "win"


def test_arms_on_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="same rows"):
        controls.compare([blocks(np.ones(3))], [blocks(np.ones(4))], sign=-1)


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> controls.Arms:
    folder = tmp_path_factory.mktemp("controls")
    sections = {
        "objectives": ["accuracy", "size_mb"],
        "space": {"finetune": {"max_steps": 0}},
        "measure": {"max_seconds": 0.01, "num_inputs": 2, "num_check_inputs": 4},
    }
    bench = Bench(make_recipe(tiny_study.recipe(folder, **sections)), folder / "study")
    return controls.Arms(bench, {"learning_rate": 1e-3, "max_steps": 2})


@pytest.mark.slow
@pytest.mark.parametrize("control", controls.UNCHANGED, ids=lambda control: control.name)
def test_learning_rate_0_changes_no_bit_of_what_is_served(
    arms: controls.Arms, control: controls.Control
) -> None:
    found = controls.run_unchanged(control, arms, 0)
    assert found["weights_equal"] and found["answers_equal"] and found["verdict"] == "unchanged"


@pytest.mark.slow
def test_training_is_noticed(arms: controls.Arms) -> None:
    trained = controls.Control("trained", controls.Arm("after"), controls.UNCHANGED[0].worse)
    assert controls.run_unchanged(trained, arms, 0)["verdict"] == "CHANGED"


@pytest.mark.slow
def test_an_arm_runs_once_a_seed_and_every_control_fills_the_table(arms: controls.Arms) -> None:
    distillation = controls.CONTROLS[-1]
    before = set(arms._answers)
    results = [controls.run_control(distillation, arms, [0]) for _ in range(2)]
    assert results[0] == results[1] and len(set(arms._answers) - before) == 2
    assert controls.table(results).row_count == 2


@pytest.mark.parametrize("quick", [[], ["--quick"]])
@pytest.mark.parametrize("task", ["stdlib", "sst2"])
def test_arms_alone_train_so_that_all_start_at_one_checkpoint(
    tmp_path: Path, task: str, quick: list[str]
) -> None:
    words = ["--task", task, "--data", str(tmp_path), "--model", str(tmp_path), *quick]
    recipe, finetune = getattr(controls, task)(controls.parse(words), tmp_path)
    assert finetune["max_steps"] > 0 == recipe.largest_budget()["max_steps"]
    assert len(recipe.baseline_grid(recipe.models[0].id)) == 1
