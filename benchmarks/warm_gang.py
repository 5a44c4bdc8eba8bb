"""Whether a warm gang stays what it was: many trials of mixed kinds on one, beside fresh processes.

    python benchmarks/warm_gang.py [--quick] [--json FILE] [--trials 100]

Trials of a small BERT go through one gang in turn: pruned in every way, trained quantization-aware,
distilled, with made-up rows, diverging. Reported are the worker's memory after each trial, and for
the last trial of each kind whether a fresh process, which finds nothing but the dense model, comes
to the same losses and to the same bytes of the model's file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from small_study import SMALL, fresh_process, recipe_for, warm_gang

from orchestrator.artifact import verify
from orchestrator.recipe import Recipe
from orchestrator.trial import TrialConfig, TrialStatus

Json = dict[str, Any]
HALF = {"method": "structured", "heads": 0.5, "neurons": 0.5}
KINDS: dict[str, Json] = {
    "int8 after training": {"quantize": "W8A8"},
    "QAT": {"quantize": {"scheme": "W8A8", "qat": True}},
    "4-bit QAT": {"quantize": {"scheme": "W4A16", "qat": True}},
    "Taylor, QAT": {"prune": HALF, "quantize": {"scheme": "W8A8", "qat": True}},
    "gradual": {"prune": {**HALF, "schedule": "gradual", "num_updates": 3}},
    "magnitude": {"prune": {"method": "magnitude", "sparsity": 0.5}},
    "2:4": {"prune": {"method": "n_m"}},
    "layers": {"prune": {"method": "structured", "layers": 0.5}},
    "vocabulary": {"prune": {"method": "vocabulary", "vocab_size": 280}},
    "distilled": {"prune": HALF, "finetune": {"distillation": {"alpha": 0.5}}},
    "distilled by layers": {"finetune": {"distillation": {"alpha": 1.0, "hidden": 10.0}}},
    "made-up rows": {"finetune": {"distillation": {}, "augmentation": {"copies": 1}}},
    "diverging": {"finetune": {"learning_rate": 1e30}},
}


def trials(recipe: Recipe, count: int) -> list[tuple[str, TrialConfig]]:
    """Kinds in turn, each time with another seed."""
    asked = []
    for number, (kind, sections) in enumerate(islice(cycle(KINDS.items()), count)):
        finetune = {"learning_rate": 1e-3, "max_steps": 20} | sections.get("finetune", {})
        config = recipe.trial_config(
            model="bert", **(sections | {"finetune": finetune}), seed=number
        )
        asked.append((kind, config))
    return asked


def outcome(recipe: Recipe, result: Json) -> tuple[Any, ...]:
    """What a trial came to: losses, and the hash of the model's file; or its reason."""
    if result["status"] != TrialStatus.COMPLETED:
        return result["status"], result["reason"]
    artifact = Path(recipe.output_dir) / "trials" / result["trial_id"] / "artifact"
    return result["details"]["training"]["losses"], verify(artifact)["sha256"]["model.onnx"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="six trials, two of them compared")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--trials", type=int, default=100)
    arguments = parser.parse_args()
    count = 6 if arguments.quick else arguments.trials
    with tempfile.TemporaryDirectory() as name:
        recipe = recipe_for(Path(name) / "warm", SMALL)
        asked = trials(recipe, count)
        with warm_gang(recipe) as gang:
            warm = [gang.trial(config).model_dump(mode="json") for _, config in asked]
            memory_mb = gang.memory_mb
        last = {kind: number for number, (kind, _) in enumerate(asked)}
        compared = dict(list(last.items())[: 2 if arguments.quick else None])
        equal = {
            kind: outcome(recipe, warm[number]) == in_fresh_process(recipe, asked[number][1])
            for kind, number in compared.items()
        }
    report = {
        "num_trials": count,
        "num_completed": sum(result["status"] == TrialStatus.COMPLETED for result in warm),
        "memory_mb_first": memory_mb[0],
        "memory_mb_after_each_kind": memory_mb[min(count, len(KINDS)) - 1],
        "memory_mb_last": memory_mb[-1],
        "memory_mb_highest": max(memory_mb),
        "equal_to_fresh_process": equal,
    }
    for key, value in report.items():
        print(f"{key:28} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report | {"memory_mb": memory_mb}, indent=1) + "\n")


def in_fresh_process(recipe: Recipe, config: TrialConfig) -> tuple[Any, ...]:
    """What the trial comes to elsewhere, where of all stages only the dense model is there."""
    for stage in (Path(recipe.output_dir) / "stages").iterdir():
        if not stage.name.startswith("dense-"):
            shutil.rmtree(stage)
    return outcome(recipe, fresh_process(recipe, config))


if __name__ == "__main__":
    main()
