"""A trial tells how it stands while it trains, to who may stop it; that changes nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_study

from orchestrator.bench import Bench
from orchestrator.recipe import make_recipe
from orchestrator.run_trial import run_baseline, run_trial
from orchestrator.rungs import Rungs, Standing
from orchestrator.trial import Stopped, TrialStatus


def told(*, count: int, num_steps: int, logging_steps: int) -> list[tuple[int, int, float]]:
    heard: list[Standing] = []
    telling = Rungs(count, heard.append).during(lambda: 0.5)
    telling.on_step(0, num_steps)
    for step in range(1, num_steps + 1):
        if step % logging_steps == 0 or step == num_steps:
            telling.on_log(step, num_steps, float(step))
        telling.on_step(step, num_steps)
    assert all(standing.quality == 0.5 for standing in heard)
    return [(standing.rung, standing.step, standing.loss) for standing in heard]


def test_rungs_are_even_and_the_last_is_the_result_itself() -> None:
    assert told(count=4, num_steps=8, logging_steps=1) == [(1, 2, 2.0), (2, 4, 4.0), (3, 6, 6.0)]
    assert told(count=1, num_steps=8, logging_steps=1) == []


def test_a_rung_is_told_once_there_is_a_loss() -> None:
    assert told(count=4, num_steps=9, logging_steps=5) == [(2, 5, 5.0)]


@pytest.mark.slow
def test_being_asked_changes_nothing_and_being_stopped_leaves_nothing(tmp_path: Path) -> None:
    finetune = {"learning_rate": 1e-3, "max_steps": 8, "logging_steps": 1, "dropout": 0.1}
    recipe = make_recipe(tiny_study.recipe(tmp_path, space={"finetune": finetune}))
    prune = {"method": "magnitude", "sparsity": 0.5, "schedule": "gradual"}
    config = recipe.trial_config(
        model="bert", prune=prune, quantize={"scheme": "W8A8", "qat": True}, finetune=finetune
    )
    bench = Bench(recipe, tmp_path / "study")
    assert run_baseline("bert", bench, print).status is TrialStatus.COMPLETED

    def stop() -> None:
        raise Stopped("enough")

    bench.rungs = Rungs(4, print, stop)
    result = run_trial(config, bench, print)
    assert result.status is TrialStatus.STOPPED and result.message == "enough"
    assert list(bench.stages.each("trained")) == []
    assert [path for path in bench.stages.folder.glob(".*") if path.is_dir()] == []
    assert not (bench.folder / "trials" / config.id / "artifact").exists()

    heard: list[Standing] = []
    bench.rungs = Rungs(4, heard.append)
    first = run_trial(config, bench, print)
    for trained in bench.stages.folder.glob("trained-*"):
        shutil.rmtree(trained)
    bench.rungs = None
    second = run_trial(config, bench, print)
    assert [standing.rung for standing in heard] == [1, 2, 3]
    assert all(0 < (standing.quality or 0) <= 1 for standing in heard)
    assert first.details["training"]["losses"] == second.details["training"]["losses"]
    for name in ("accuracy", "download_mb", "sparsity"):
        assert first.measurement.metrics[name] == second.measurement.metrics[name]
