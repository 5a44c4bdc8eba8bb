"""Every path of a recipe is tried before the study, and what the study will cost follows from that."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_study
from rich.console import Console

from orchestrator import dry_run as trying
from orchestrator.cost import Cost, path_of
from orchestrator.dry_run import (
    distinct_paths,
    dry_run,
    dry_run_table,
    planned_configs,
    reasons_against,
)
from orchestrator.prune.tree import read_signature
from orchestrator.recipe import Recipe, make_recipe
from orchestrator.rehearsal import rehearse
from orchestrator.trial import TrialConfig, TrialResult, TrialStatus

UNEXPORTABLE = """
from typing import Literal
import torch
from orchestrator.prune.none import NoPruning, Untouched

class Branch(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum().item() > 0 else self.inner(2 * x)

class Branches(NoPruning):
    method: Literal["unexportable:Branches"] = "unexportable:Branches"

    def start(self, model, context):
        model.classifier = Branch(model.classifier)
        return Untouched()
"""


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dry run of a recipe of which some paths cannot work."""
    folder = tmp_path_factory.mktemp("dry")
    (folder / "unexportable.py").write_text(UNEXPORTABLE)
    narrow = {"method": "structured", "neurons": 0.375}  # 64 neurons become 40
    recipe = tiny_study.recipe(
        folder,
        allow_code=True,
        references={"dense_int8": False, "first_layers": [], "random_twin": False},
        space={
            "prune": {"choice": ["none", narrow, {"method": "unexportable:Branches"}]},
            "quantize": {"choice": ["W8A8", {"scheme": "W4A16", "group_size": 32}]},
            "finetune": {"learning_rate": 1e-3, "max_steps": 5},
            "forbid": [{"prune.method": "unexportable:Branches", "quantize.scheme": "W4A16"}],
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        found = dry_run(make_recipe(recipe), device="cpu")
    assert not (folder / "study").exists()
    return found


def row_of(tried: dict[str, Any], path: str) -> dict[str, Any]:
    return next(row for row in tried["paths"] if row["path"] == f"bert: {path}")


def printed(tried: dict[str, Any]) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(dry_run_table(tried))
    return console.file.getvalue()


@pytest.mark.slow
def test_paths_that_cannot_work_say_why_while_others_work(tried: dict[str, Any]) -> None:
    works = {row["path"].removeprefix("bert: "): row["works"] for row in tried["paths"]}
    assert works == {
        "dense": True,
        "none × W8A8": True,
        "none × W4A16": True,
        "structured × W8A8": True,
        "structured × W4A16": False,
        "unexportable:Branches × W8A8": False,
    }
    assert "32 does not divide the 40 inputs" in row_of(tried, "structured × W4A16")["why_not"]
    why_not = row_of(tried, "unexportable:Branches × W8A8")["why_not"]
    assert "the exporter refuses model.onnx: Could not guard on data-dependent" in why_not
    assert tried["works"] and tried["estimated_hours"] > 0


@pytest.mark.slow
def test_every_path_takes_two_steps_on_32_rows(tried: dict[str, Any]) -> None:
    for row in tried["paths"]:
        if row["works"]:
            assert row["training"]["steps"] == 2 and row["seconds"] > 0
            assert row["peak_memory_mb"] > 10
            assert {"export", "quality", "latency", "memory"} <= row["stage_seconds"].keys()
    assert row_of(tried, "dense")["training"]["epochs"] == 2  # of one batch of 32 rows


@pytest.mark.slow
def test_the_table_tells_every_path_and_its_reason(tried: dict[str, Any]) -> None:
    text = printed(tried)
    assert "device-hours" in text and "no: group size 32 does not divide" in text
    assert json.loads(json.dumps(tried)) == tried


def test_without_a_baseline_nothing_is_tried_and_no_cost_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: str, bench: Any, note: Any) -> TrialResult:
        config = TrialConfig(model=model)
        return TrialResult(
            trial_id="x", config=config, status=TrialStatus.FAILED, message="no [memory]"
        )

    monkeypatch.setattr("orchestrator.gang.run_baseline", fail)
    found = dry_run(make_recipe(tiny_study.recipe(tmp_path)), device="cpu")
    assert [row["path"] for row in found["paths"]] == ["bert: dense"]
    assert not found["works"] and found["estimated_hours"] is None
    assert "no: no [memory]" in printed(found)


@pytest.mark.parametrize(
    ("num_gpus", "device", "expected"), [(0, None, "cpu"), (1, "cpu", "cpu"), (1, None, "cuda:0")]
)
def test_a_gpu_that_is_not_here_is_stood_in_for_and_that_is_said(
    num_gpus: int, device: str | None, expected: str, tmp_path: Path
) -> None:
    recipe = make_recipe(tiny_study.recipe(tmp_path, target={"device": "cuda:0"}))
    trying = rehearse(recipe, device=device, num_gpus=num_gpus)
    assert trying.recipe.target.device == expected
    assert trying.substituted["bert"] == (
        "served on cpu instead of cuda:0" if expected == "cpu" else ""
    )
    assert trying.recipe.resources.engine == "inline"


@pytest.mark.parametrize(
    ("options", "num_gpus", "workers", "said"),
    [
        ({"gpus_per_trial": 4}, 4, 4, ""),
        ({"gpus_per_trial": 4}, 3, 2, "trained by 2 on cpu instead of 4 GPUs"),
        ({"gpus_per_trial": 4, "strategy": "zero3"}, 0, 2, "trained by 2 on cpu instead of 4 GPUs"),
        ({"workers_per_trial": 2}, 0, 2, ""),
        ({"workers_per_trial": 500}, 0, 2, "trained by 2 instead of 500"),
        ({"strategy": "fsdp2"}, 0, 1, ""),
    ],
)
def test_gangs_are_tried_with_as_many_workers_as_fit(
    options: dict[str, Any],
    num_gpus: int,
    workers: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestrator.rehearsal.num_cores", lambda: 2)
    recipe = make_recipe(tiny_study.recipe(tmp_path, resources={"engine": "ray", **options}))
    trying = rehearse(recipe, device=None, num_gpus=num_gpus)
    here = trying.recipe.resources.of("bert")
    assert here.num_workers == workers and trying.substituted["bert"] == said
    assert here.strategy_name == recipe.resources.of("bert").strategy_name
    assert trying.device == (None if num_gpus >= 4 else "cpu")
    assert trying.recipe.resources.engine == "ray"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_recipe_for_many_gpus_is_rehearsed_by_two_processes(tmp_path: Path) -> None:
    recipe = tiny_study.recipe(
        tmp_path,
        resources={"engine": "ray", "gpus_per_trial": 4, "strategy": "zero3"},
        references={"dense_int8": False, "first_layers": [], "random_twin": False},
        space={
            "prune": {"method": "magnitude", "sparsity": 0.5},
            "quantize": {
                "choice": [{"scheme": "W8A8", "qat": True}, {"scheme": "W4A16", "group_size": 48}]
            },
            "finetune": {"learning_rate": 1e-3, "max_steps": 5},
        },
    )
    found = dry_run(make_recipe(recipe), device="cpu")
    dense, trained, hopeless = found["paths"]
    for row in (dense, trained):
        assert row["works"] and row["training"]["steps"] == 2 and row["peak_memory_mb"] > 10
        assert row["substituted"] == "trained by 2 on cpu instead of 4 GPUs"
    assert not hopeless["works"] and "48" in hopeless["why_not"]
    assert found["works"] and found["estimated_hours"] > 0


# -- which configurations there are ---------------------------------------------------------------


def facts_of(recipe: Recipe) -> dict[str, Any]:
    """80 rows of 10 tokens, 16 of validation and 32 of test, for a BERT of 3 layers."""
    signature = read_signature(tiny_models.make("bert")).model_dump(mode="json")
    model = {"num_train": 80, "num_validation": 16, "mean_length": 10.0, "signature": signature}
    return {
        "models": {options.id: model for options in recipe.models},
        "num_rows": {"train": 80, "validation": 16, "test": 32},
    }


def a_recipe(folder: Path, **sections: Any) -> Recipe:
    return make_recipe(tiny_study.recipe(folder, **sections))


def test_references_and_the_random_twin_count_once_each(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path, references={"first_layers": [1, 2]})
    configs = planned_configs(recipe, facts_of(recipe))
    assert len({config.id for config in configs}) == len(configs) == 1 + 2 + 3 + 1
    importances = [m.get("importance") for config in configs for m in config.prune]
    assert importances.count("random") == 1


def test_a_path_is_tried_with_what_can_work_and_trains(tmp_path: Path) -> None:
    space = {
        "prune": {"method": "structured", "neurons": {"choice": [0.9, 0.2]}},  # 4 and 32 of 40
        "quantize": {"scheme": "W4A16", "group_size": 16},
        "finetune": {"max_steps": {"choice": [0, 5]}},
    }
    nothing = {"dense_int8": False, "first_layers": [], "random_twin": False}
    recipe = a_recipe(tmp_path, space=space, references=nothing)
    facts = facts_of(recipe)
    reasons = reasons_against(planned_configs(recipe, facts), recipe, facts)
    assert [reason is None for reason in reasons.values()] == [False, False, True, True]
    ((path, config),) = distinct_paths(reasons).items()
    assert path == path_of(config) == "bert: structured × W4A16"
    assert config.prune[0]["neurons"] == 0.2 and config.finetune["max_steps"] == 5


# -- what they cost ------------------------------------------------------------------------------

STAGES = {"load": 1.0, "prune": 2.0, "prepare": 0.0, "finetune": 3.0, "convert": 0.5}
STAGES |= {"export": 6.0, "check": 4.0, "quality": 8.0, "latency": 5.0, "memory": 7.0}
FIXED, SPEED = 1.0 + 0.5, 5.0 + 7.0
TRAINING = {"steps": 2, "seconds": 2.5, "position_seconds": 1e-3, "tokens": 320, "positions": 640}
# 8 of 32 rows had to be checked of 16; 16 validation and 32 test rows follow the 16 tried
SCORED = {"check": 4.0, "quality": 8.0 * (16 + 32) / 16}


class Costs:
    """What is asked of a recipe whose baseline and one path took known seconds in the dry run."""

    def __init__(self, folder: Path, finetune: dict[str, Any], **sections: Any) -> None:
        self.recipe = a_recipe(
            folder,
            space={"finetune": finetune, **sections.pop("space", {})},
            references={"dense_int8": False, "first_layers": [], "random_twin": False},
            measure={"num_check_inputs": 8},
            **sections,
        )
        self.configs = planned_configs(self.recipe, facts_of(self.recipe))
        dense = self.recipe.trial_config(model="bert", finetune={"max_steps": 10})
        self.baseline = self.row(dense)
        self.path = self.row(self.configs[0], export=0.5)
        self.workers_tried = 1

    def row(self, config: TrialConfig, **stages: float) -> dict[str, Any]:
        return {
            "path": path_of(config),
            "works": True,
            "config": config.model_dump(mode="json"),
            "stage_seconds": STAGES | stages,
            "training": TRAINING,
        }

    def cost(self) -> Cost:
        return Cost(
            self.recipe,
            facts_of(self.recipe),
            baselines={"bert": self.baseline},
            paths={self.path["path"]: self.path},
            num_tried=32,
            workers_tried={"bert": self.workers_tried},
        )

    def trial_s(self) -> float:
        """One trial, its shape exported and timed before."""
        cost = self.cost()
        cost.baseline_s("bert")
        cost.trial_s(self.configs[0].model_copy(update={"seed": 99}))
        return cost.trial_s(self.configs[0])


REST = FIXED + sum(SCORED.values()) + 0.5 + (3.0 - 2.5)  # 0.5 for the weights into a known graph


def test_training_is_paid_by_steps_and_by_the_positions_of_their_batches(tmp_path: Path) -> None:
    def steps_s(**options: Any) -> float:
        return Costs(tmp_path, {"max_steps": 5, **options}).trial_s() - REST - STAGES["prune"]

    one = 5 * 16 * 10 * 1e-3  # steps × rows × tokens
    assert steps_s(per_device_train_batch_size=16) == pytest.approx(one)
    assert steps_s(per_device_train_batch_size=64) == pytest.approx(4 * one)  # beyond 32 rows
    assert steps_s(per_device_train_batch_size=1000) == pytest.approx(5 * one)  # there are 80
    assert steps_s(per_device_train_batch_size=16, gradient_accumulation_steps=3) == pytest.approx(
        3 * one
    )
    assert steps_s(per_device_train_batch_size=16, group_by_length=False) == pytest.approx(
        2 * one
    )  # half of what was tried was padding
    assert steps_s(
        max_steps=None, num_train_epochs=2, per_device_train_batch_size=16
    ) == pytest.approx(2 * one)


def test_the_baseline_is_its_grid_and_the_winners_further_training(tmp_path: Path) -> None:
    grid = {"learning_rate": {"choice": [1e-4, 1e-3, 1e-2]}, "max_steps": 10}
    costs = Costs(
        tmp_path,
        {"max_steps": 4, "per_device_train_batch_size": 16},
        baseline={"finetune": grid | {"per_device_train_batch_size": 16}},
    )
    training = (3 * 10 + 4) * 16 * 10 * 1e-3
    scoring = 4 * 16 * 10 * 1e-3 / 3
    export = 6.0
    expected = training + scoring + FIXED + sum(SCORED.values()) + export + SPEED
    assert costs.cost().baseline_s("bert") == pytest.approx(expected)


@pytest.mark.parametrize(("units", "export"), [("layers", 5.5), ("neurons", 0.0)])
def test_a_graph_is_exported_once_a_depth_and_timed_once_a_shape(
    units: str, export: float, tmp_path: Path
) -> None:
    shares = {"choice": [0.3, 0.6]}
    prune = {"method": "structured", units: shares, "importance": "magnitude"}
    space = {"prune": prune, "seed": {"choice": [0, 1]}}
    costs = Costs(tmp_path, {"max_steps": 0}, space=space)
    cost = costs.cost()
    cost.baseline_s("bert")
    seconds = [cost.trial_s(config) for config in costs.configs]
    again = REST + STAGES["prune"]
    new = again + export + SPEED
    assert seconds == pytest.approx([new, again, new, again])


def test_importance_is_paid_by_its_batches_but_no_more_than_there_are_rows(tmp_path: Path) -> None:
    def prune_s(**options: Any) -> float:
        prune = {"method": "structured", "neurons": 0.5, **options}
        return Costs(tmp_path, {"max_steps": 0}, space={"prune": prune}).trial_s() - REST

    assert prune_s(importance="magnitude") == pytest.approx(2.0)
    assert prune_s(num_batches=1) == pytest.approx(2.0)  # 16 rows, all of them tried
    assert prune_s(num_batches=4) == pytest.approx(2.0 * 64 / 32)
    assert prune_s(num_batches=16) == pytest.approx(2.0 * 80 / 32)


def test_gradual_importance_is_paid_at_every_update(tmp_path: Path) -> None:
    gradual = {"method": "structured", "neurons": 0.5, "schedule": "gradual", "num_batches": 4}
    finetune = {"max_steps": 5, "learning_rate": 0.0, "per_device_train_batch_size": 16}
    once, often = (
        Costs(tmp_path, finetune, space={"prune": gradual | {"num_updates": n}}).trial_s()
        for n in (1, 3)
    )
    assert often - once == pytest.approx(2 * 64 * 10 * 1e-3)


def test_a_teacher_answers_once_for_all_trials_and_every_row(tmp_path: Path) -> None:
    finetune = {"max_steps": 0, "distillation": {}, "augmentation": {"copies": 3}}
    space = {"seed": {"choice": [0, 1]}}
    costs = Costs(tmp_path, finetune | {"max_steps": 1}, space=space)
    plain = costs.trial_s()
    costs.path["stage_seconds"] = costs.path["stage_seconds"] | {"answers": 3.0}
    cost = costs.cost()
    cost.baseline_s("bert")
    first, second = (cost.trial_s(config) for config in costs.configs)
    assert second == pytest.approx(plain)
    # 8 rows and 3 copies of each were answered, half of their positions padding
    assert first - second == pytest.approx(3.0 / 2 * (80 * 4) / 32)


def test_workers_share_training_and_wait_for_the_rest(tmp_path: Path) -> None:
    finetune = {"max_steps": 5, "per_device_train_batch_size": 16}
    training = 5 * 16 * 10 * 1e-3
    alone = Costs(tmp_path, finetune).trial_s() - training
    resources = {"engine": "ray", "gpus_per_trial": 4}
    costs = Costs(tmp_path, finetune, resources=resources)
    costs.workers_tried = 2
    assert costs.trial_s() == pytest.approx(2 * training + 4 * alone)


def test_training_is_paid_once_for_trials_that_share_it(tmp_path: Path) -> None:
    schemes = {"quantize": {"choice": ["W8A8", "W8A16"]}}
    costs = Costs(tmp_path, {"max_steps": 5, "per_device_train_batch_size": 16}, space=schemes)
    cost = costs.cost()
    cost.paths = dict.fromkeys(map(path_of, costs.configs), costs.path)
    cost.baseline_s("bert")
    first, second = (cost.trial_s(config) for config in costs.configs)
    assert first - second == pytest.approx(5 * 16 * 10 * 1e-3 + STAGES["prune"] + 0.5)


def test_a_larger_shape_of_the_same_path_trains_longer(tmp_path: Path) -> None:
    prune = {"method": "structured", "layers": {"choice": [0.67, 0.0]}, "importance": "magnitude"}
    finetune = {"max_steps": 5, "per_device_train_batch_size": 16}
    costs = Costs(tmp_path, finetune, space={"prune": prune})
    signature = read_signature(tiny_models.make("bert"))
    larger = signature.macs(length=10) / signature.keep({"encoder.layers": 1}).macs(length=10)
    cost = costs.cost()
    small, large = (cost.trial_s(config) for config in costs.configs)
    one = 5 * 16 * 10 * 1e-3
    assert large - small == pytest.approx((larger - 1) * one)


def test_the_study_is_its_baselines_and_the_trials_whose_path_works(tmp_path: Path) -> None:
    space = {"quantize": {"choice": ["none", "W8A8"]}, "seed": {"choice": [0, 1]}}
    costs = Costs(tmp_path, {"max_steps": 2}, space=space)
    cost = costs.cost()
    expected = cost.baseline_s("bert") + 2 * costs.trial_s()
    assert cost.study_s(costs.configs) == pytest.approx(expected)  # W8A8 was not tried
    costs.path["works"] = False
    assert costs.cost().study_s(costs.configs) == pytest.approx(costs.cost().baseline_s("bert"))


def test_a_dry_run_looks_at_a_bounded_number_of_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trying, "MAX_CONFIGS", 2)
    recipe = a_recipe(tmp_path, references={"dense_int8": False, "first_layers": []})
    assert len(planned_configs(recipe, facts_of(recipe))) == 2 + 1
