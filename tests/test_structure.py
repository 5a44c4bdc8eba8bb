"""Artifacts that differ in the values of weights alone are as fast as each other, and timed once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_models
import tiny_study
import torch
from transformers import PreTrainedModel

from orchestrator.bench import Bench
from orchestrator.measure.again import measure_in_study
from orchestrator.prune.tree import shrink
from orchestrator.quantize import QuantizeOptions
from orchestrator.quantize.convert import convert
from orchestrator.recipe import make_recipe
from orchestrator.run_trial import run_baseline, run_trial
from orchestrator.runtimes import RUNTIMES, Target
from orchestrator.trial import TrialStatus

pytestmark = pytest.mark.slow


def structure(model: PreTrainedModel, runtime: str, folder: Path, *, scheme: str = "none") -> str:
    """Of the artifact that is made of a model."""
    engine, options = RUNTIMES[runtime], QuantizeOptions(scheme=scheme)
    converted = convert(copy.deepcopy(model), engine.numerics(options, Target(runtime=runtime)))
    folder.mkdir()
    engine.export(converted, folder, kind="encoder", cache=folder.parents[1] / "cache")
    converted.config.save_pretrained(folder)
    return engine.structure(folder)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("scheme", ["none", "W8A8"])
def test_weights_make_no_difference_and_shapes_and_bits_do(
    runtime: str, scheme: str, tmp_path: Path
) -> None:
    model = tiny_models.make("bert", intermediate_size=64)
    first = structure(model, runtime, tmp_path / "first", scheme=scheme)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    assert structure(model, runtime, tmp_path / "second", scheme=scheme) == first
    other = "W8A16" if scheme == "W8A8" else "linear"
    assert structure(model, runtime, tmp_path / "third", scheme=other) != first
    shrink(model, {"encoder.0.neurons": list(range(8))})
    assert structure(model, runtime, tmp_path / "smaller", scheme=scheme) != first


def test_a_trial_of_a_known_structure_is_not_timed_again(tmp_path: Path) -> None:
    recipe = make_recipe(tiny_study.recipe(tmp_path))
    bench = Bench(recipe, tmp_path / "study")
    assert run_baseline("bert", bench, print).status is TrialStatus.COMPLETED
    results = []
    for rate in (1e-3, 2e-3):
        config = recipe.trial_config(
            model="bert",
            prune={"method": "structured", "neurons": 0.5},
            finetune={"learning_rate": rate, "max_steps": 2},
        )
        results.append(run_trial(config, bench, print))
    first, second = (result.details["stage_seconds"] for result in results)
    assert {"latency", "memory"} <= set(first) and not {"latency", "memory"} & set(second)
    metrics = [result.measurement.metrics for result in results]
    assert metrics[0]["latency_ms"] == metrics[1]["latency_ms"]

    artifact = bench.folder / "trials" / results[1].trial_id / "artifact"
    again = measure_in_study(artifact, recipe, bench.folder)
    assert again.metrics["latency_ms"] != metrics[1]["latency_ms"]  # asked for, it is taken anew
