"""However many ranks train together, and whatever each holds: a trial comes to the same result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
import torch

from orchestrator.batches import dealt_out, num_calls
from orchestrator.compiled import missing_compiler
from orchestrator.one_trial import gang_options
from orchestrator.ranks import Ranks
from orchestrator.recipe import make_recipe
from orchestrator.resources import GangOptions
from orchestrator.trial import BadInput

ROOT = Path(__file__).parents[1]
UNITS = {"method": "structured", "heads": 0.5, "neurons": 0.5}
MASK = {"method": "magnitude", "sparsity": 0.5}
GRADUAL = {"schedule": "gradual", "num_updates": 4, "end": 0.8}
TRIALS: dict[str, Any] = {
    "dense": {},
    "masks": {"prune": [MASK]},
    "gradual, by Taylor": {"prune": [{**MASK, **GRADUAL, "importance": "taylor"}]},
    "units": {"prune": [UNITS]},
    "gradual units": {"prune": [{**UNITS, **GRADUAL}]},
    "vocabulary": {"prune": [{"method": "vocabulary", "vocab_size": 300}]},
    "W8A8 QAT": {"quantize": {"scheme": "W8A8", "qat": True, "qat_start": 0.3}},
    "W4A16 QAT": {"quantize": {"scheme": "W4A16", "qat": True, "group_size": 16}},
    "all": {
        "prune": [MASK],
        "quantize": {"scheme": "W8A8", "qat": True},
        "finetune": {"distillation": {"hidden": 0.5}},
    },
    "accumulated": {"finetune": {"gradient_accumulation_steps": 2}},
    "frozen": {"finetune": {"freeze": ["embeddings"]}},
}
AGAIN = ("masks", "W4A16 QAT", "all", "frozen")  # also with layers that compute again
for name in AGAIN:
    options = TRIALS[name].get("finetune", {}) | {"gradient_checkpointing": True}
    TRIALS[f"{name}, again"] = TRIALS[name] | {"finetune": options}
COMPILED = {
    "all": {**TRIALS["all"], "finetune": {**TRIALS["all"]["finetune"], "torch_compile": True}}
}
MISSING = missing_compiler(torch.device("cpu"))
ROUNDED = {"W8A8 QAT": 1e-3, "W4A16 QAT": 1e-3, "all": 1e-3}  # rounding amplifies 1e-7
ROUNDED |= {"W4A16 QAT, again": 1e-3, "all, again": 1e-3}


def start(
    folder: Path,
    strategy: str,
    size: int,
    *,
    names: Iterable[str] = TRIALS,
    die_at: int = 0,
    among: dict[str, Any] = TRIALS,
) -> dict[str, Any]:
    trials = folder / "trials.json"
    trials.write_text(json.dumps({name: among[name] for name in names}))
    arguments = [str(folder), strategy, str(trials), *([str(die_at)] if die_at else [])]
    run_ranks(
        "rank_trials.py", *arguments, size=0 if strategy == "single" else size, dies=bool(die_at)
    )
    return {} if die_at else json.loads((folder / "results.json").read_text())


def run_ranks(script: str, *arguments: str, size: int = 2, dies: bool = False) -> None:
    """A script of this folder, on so many ranks; 0 is a process without ranks."""
    command = [sys.executable]
    if size:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command += [str(ROOT / "tests" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode != 0) == dies, done.stderr[-4000:]


def losses(result: dict[str, Any]) -> np.ndarray:
    return np.array([loss for _, loss in result["details"]["training"]["losses"]])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("single")
    return start(folder, "single", 1) | {"data": folder / "data.csv"}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "size"),
    [("ddp", 3), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)],
)
def test_every_compression_comes_to_the_same_under_every_strategy(
    alone: dict[str, Any], tmp_path: Path, strategy: str, size: int
) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    shutil.copy(alone["data"], tmp_path)
    together = start(tmp_path, strategy, size)
    for name in ("baseline", *TRIALS):
        one, other = alone[name], together[name]
        assert other["status"] == "completed", (name, other["message"])
        if name != "baseline":
            np.testing.assert_allclose(
                losses(other), losses(one), rtol=ROUNDED.get(name, 1e-5), err_msg=name
            )
            assert other["details"]["prune"] == one["details"]["prune"], name
            training = one["details"]["training"]
            assert other["details"]["training"]["tokens"] == training["tokens"], name
            assert len(other["details"]["peak_memory_mb_by_rank"]) == size
        for metric in ("accuracy", "size_mb", "num_params"):
            expected = one["measurement"]["metrics"][metric]
            assert other["measurement"]["metrics"][metric] == pytest.approx(expected), name


@pytest.mark.distributed
@pytest.mark.slow
def test_twenty_trainings_in_turn_leave_nothing_on_any_rank(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run_ranks("rank_repeats.py", str(tmp_path))
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses) == 20
    np.testing.assert_allclose(losses, np.broadcast_to(losses[0], (20, 2)), rtol=1e-5)
    for rank in range(2):
        said = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert {json.dumps(each["alive"]) for each in said} == {json.dumps(said[0]["alive"])}
        assert not {n for n in said[0]["alive"] if "DeepSpeed" in n or "AdamW" in n}
        # a model that stayed would be 9 or 18 MB each time
        assert said[-1]["rss_mb"] - said[4]["rss_mb"] < 40, [each["rss_mb"] for each in said]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"torch.compile needs {MISSING}")
@pytest.mark.parametrize("strategy", ["fsdp2"])
def test_compiled_layers_come_to_the_same_under_every_strategy(
    alone: dict[str, Any], tmp_path: Path, strategy: str
) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    shutil.copy(alone["data"], tmp_path)
    result = start(tmp_path, strategy, 2, names=COMPILED, among=COMPILED)["all"]
    assert result["status"] == "completed", result["message"]
    np.testing.assert_allclose(losses(result), losses(alone["all"]), rtol=ROUNDED["all"])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first", "then"),
    [
        ("gradual, by Taylor", ("zero3", 2), ("single", 1)),
        ("W8A8 QAT", ("zero3", 2), ("fsdp2", 2)),
        ("masks", ("single", 1), ("zero3", 2)),
        ("all", ("fsdp2", 2), ("zero1", 2)),
    ],
)
def test_an_interrupted_training_goes_on_under_another_strategy_as_if_undisturbed(
    alone: dict[str, Any],
    tmp_path: Path,
    name: str,
    first: tuple[str, int],
    then: tuple[str, int],
) -> None:
    if "zero" in f"{first} {then}":
        pytest.importorskip("deepspeed")
    shutil.copy(alone["data"], tmp_path)
    start(tmp_path, *first, names=[name], die_at=20)
    [kept] = tmp_path.glob("study/stages/.going-*")
    assert [path.name for path in kept.iterdir()] == ["step-20"]
    assert {path.suffix for path in kept.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    result = start(tmp_path, *then, names=[name])[name]
    assert result["status"] == "completed", result["message"]
    training = result["details"]["training"]
    assert (training["resumed_at"], training["steps"]) == (20, 30)
    expected = alone[name]["details"]["training"]
    assert training["tokens"] == expected["tokens"]
    np.testing.assert_allclose(losses(result), losses(alone[name]), rtol=ROUNDED.get(name, 1e-5))
    assert result["details"]["prune"] == alone[name]["details"]["prune"]
    metrics, whole = result["measurement"]["metrics"], alone[name]["measurement"]["metrics"]
    assert metrics["accuracy"] == pytest.approx(whole["accuracy"])
    assert metrics["size_mb"] == whole["size_mb"]
    assert not kept.exists()


# -- who takes what ------------------------------------------------------------------------------


def batches(counts: list[int]) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """One batch a count of rows, of which row i is i everywhere."""
    found, first = [], 0
    for count in counts:
        rows = np.arange(first, first + count)
        found.append((rows, {"input_ids": rows[:, None], "labels": rows % 2}))
        first += count
    return found


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("counts", [[8], [8, 3], [8, 8, 1, 5], [1]])
def test_ranks_share_out_every_row_once_and_make_as_many_calls(
    counts: list[int], size: int, pieces: int
) -> None:
    dealt = [dealt_out(iter(batches(counts)), Ranks(rank, size), pieces) for rank in range(size)]
    assert {len(micros) for micros in dealt} == {num_calls(len(counts), Ranks(0, size), pieces)}
    taken = [int(row) for micros in dealt for m in micros if m.share for row in m.indices]
    assert sorted(taken) == list(range(sum(counts)))
    assert sum(m.share for micros in dealt for m in micros) == pytest.approx(1.0)
    for micros in dealt:
        for micro in micros:
            assert micro.arrays["input_ids"][:, 0].tolist() == micro.indices.tolist()
            assert len(micro.indices) > 0


# -- what a recipe may ask for -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus_per_trial": 4, "strategy": "single"}, "`strategy: single` is for one worker"),
        ({"gpus_per_trial": 4, "workers_per_trial": 2}, "a worker has one GPU"),
        ({"strategy": "ddp", "offload": ["optimizer"]}, "`strategy: ddp` cannot offload optimizer"),
        ({"strategy": "zero2", "offload": ["optimizer", "parameters"]}, "cannot offload"),
        ({"strategy": "fsdp2", "offload": ["optimizer"]}, "offloads both the optimizer and"),
        ({"strategy": "zero3", "offload": ["parameters"]}, "are offloaded with the optimizer"),
        ({"strategy": "fsdp2", "deepspeed": {}}, "`deepspeed` is for zero1, zero2 and zero3"),
        (
            {"strategy": "zero2", "deepspeed": {"zero_optimization": {"stage": 3}}},
            "has zero_optimization.stage 3, but strategy is zero2",
        ),
        (
            {"strategy": "zero2", "deepspeed": {"optimizer": {}, "bf16": {}}},
            "may not have optimizer, bf16",
        ),
        ({"strategy": "zero2", "deepspeed": "absent.json"}, "cannot read absent.json"),
    ],
)
def test_options_that_contradict_each_other_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GangOptions(**options)


def test_a_trial_is_started_as_accelerate_launch_was_told(tmp_path: Path) -> None:
    recipe = make_recipe(tiny_study.recipe(tmp_path))
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))

    def found(size: int, strategy: str | None = None, **environ: str) -> GangOptions:
        return gang_options(recipe, "bert", size, environ, strategy=strategy)

    assert found(1).strategy_name == "single"
    assert found(2).strategy_name == "ddp"
    assert found(2, "fsdp2").strategy_name == "fsdp2"
    assert found(2, ACCELERATE_USE_FSDP="true").strategy_name == "fsdp2"
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true"}
    stage = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert found(2, **deepspeed, **stage).strategy_name == "zero3"
    offload = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    assert found(2, **deepspeed, **stage, **offload).offload == ("optimizer",)
    with pytest.raises(BadInput, match="absent.json"):
        found(2, **deepspeed, ACCELERATE_DEEPSPEED_CONFIG_FILE="absent.json")
    named = found(2, **deepspeed, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))
    assert named.strategy_name == "zero1" and named.deepspeed is not None
    with pytest.raises(BadInput, match="2 ranks, strategy single: `strategy: single` is for one"):
        found(2, "single")
