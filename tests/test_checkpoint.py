"""Trials that share their training do it once, and get what each would have got alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_study

from orchestrator.artifact import verify
from orchestrator.bench import Bench
from orchestrator.notice import Notice
from orchestrator.recipe import make_recipe
from orchestrator.run_trial import run_baseline, run_trial
from orchestrator.trial import Preempted, TrialResult, TrialStatus

pytestmark = pytest.mark.slow

GRADUAL = {"method": "structured", "neurons": 0.5, "heads": 0.5, "schedule": "gradual"}
SHRUNK = [
    {"method": "vocabulary", "vocab_size": 300},
    GRADUAL,
    {"method": "magnitude", "sparsity": 0.3},
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A worker that has trained the dense model of the tiny study."""
    folder = tmp_path_factory.mktemp("study")
    made = Bench(make_recipe(tiny_study.recipe(folder)), folder / "study")
    assert run_baseline("bert", made, print).status is TrialStatus.COMPLETED
    return made


def run(bench: Bench, **sections: Any) -> tuple[TrialResult, str]:
    """A trial's result, and the SHA-256 of the graph that it serves."""
    finetune = {"learning_rate": 1e-3, "max_steps": 6}
    config = bench.recipe.trial_config(model="bert", **({"finetune": finetune} | sections))
    result = run_trial(config, bench, print)
    assert result.status is TrialStatus.COMPLETED, result.message
    return result, verify(bench.folder / "trials" / config.id / "artifact")["sha256"]["model.onnx"]


def forget(bench: Bench) -> None:
    """Every trained model, as if no trial had run before."""
    for folder in bench.stages.folder.glob("trained-*"):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()


@pytest.mark.parametrize("quantize", ["W8A8", {"scheme": "W8A8", "qat": True, "embeddings": True}])
def test_a_trained_model_is_taken_from_disk_as_it_was(bench: Bench, quantize: Any) -> None:
    _, alone = run(bench, prune=SHRUNK, quantize=quantize)
    result, again = run(bench, prune=SHRUNK, quantize=quantize)
    assert again == alone
    assert "finetune" not in result.details["stage_seconds"]
    assert result.details["training"]["steps"] == 6


def test_trials_that_differ_only_after_training_share_it(bench: Bench) -> None:
    first, _ = run(bench, prune=GRADUAL)
    shared, sha256 = run(bench, prune=GRADUAL, quantize="W8A8")
    assert "finetune" in first.details["stage_seconds"]
    assert "finetune" not in shared.details["stage_seconds"]
    forget(bench)
    alone, own = run(bench, prune=GRADUAL, quantize="W8A8")
    assert "finetune" in alone.details["stage_seconds"] and own == sha256


def test_a_damaged_checkpoint_is_made_again(bench: Bench) -> None:
    forget(bench)
    _, sha256 = run(bench, prune=GRADUAL)
    (weights,) = bench.stages.folder.glob("trained-*/model.safetensors")
    damaged = bytearray(Path(weights).read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    result, again = run(bench, prune=GRADUAL)
    assert "finetune" in result.details["stage_seconds"] and again == sha256


def test_on_notice_a_training_writes_a_checkpoint_from_which_it_goes_on(bench: Bench) -> None:
    forget(bench)
    _, alone = run(bench, prune=GRADUAL)
    forget(bench)
    config = bench.recipe.trial_config(
        model="bert", prune=GRADUAL, finetune={"learning_rate": 1e-3, "max_steps": 6}
    )
    with pytest.raises(Preempted, match="step 1 of 6"):
        run_trial(config, bench, lambda stage: bench.notice.give() if stage == "finetune" else None)
    assert not (bench.folder / "trials" / config.id / "artifact").exists()
    bench.notice = Notice()
    result, again = run(bench, prune=GRADUAL)
    assert result.details["training"]["resumed_at"] == 1 and again == alone


STEADY = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
PRUNED = [
    {"method": "structured", "neurons": 0.5},
    {"method": "magnitude", "sparsity": 0.3},
]


@pytest.mark.parametrize(
    "sections",
    [
        {"prune": PRUNED, "quantize": {"scheme": "W8A8", "qat": True}},
        {"finetune": {"distillation": {"alpha": 1.0, "hidden": 1.0}, "dropout": 0.2}},
        {"finetune": {"gradient_accumulation_steps": 2, "freeze": ["word_embeddings"]}},
    ],
    ids=["pruned and rounded", "taught", "accumulated"],
)
def test_a_longer_training_goes_on_from_a_shorter_one_as_if_it_had_not_stopped(
    bench: Bench, sections: dict[str, Any]
) -> None:
    def trained(max_steps: int) -> tuple[dict[str, Any], str]:
        finetune = STEADY | sections.get("finetune", {}) | {"max_steps": max_steps}
        result, sha256 = run(bench, **(sections | {"finetune": finetune}))
        return result.details["training"], sha256

    forget(bench)
    whole, alone = trained(13)
    assert (whole["steps"], whole["steps_before"]) == (13, 0)
    forget(bench)
    trained(3)
    trained(8)
    longer, again = trained(13)
    assert (longer["steps"], longer["steps_before"]) == (13, 8)
    assert again == alone


@pytest.mark.parametrize(
    "sections",
    [
        {"finetune": {"lr_scheduler_type": "linear"}},
        {"finetune": {"warmup_ratio": 0.1}},
        {"prune": GRADUAL},
        {"quantize": {"scheme": "W8A8", "qat": True, "qat_start": 0.5}},
    ],
)
def test_what_hangs_on_the_length_of_a_training_begins_anew(
    bench: Bench, sections: dict[str, Any]
) -> None:
    forget(bench)
    for max_steps in (3, 6):
        finetune = STEADY | sections.get("finetune", {}) | {"max_steps": max_steps}
        result, _ = run(bench, **(sections | {"finetune": finetune}))
    assert result.details["training"]["steps_before"] == 0
