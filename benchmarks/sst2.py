"""How much smaller and faster MiniLM gets on SST-2 for at most a point of accuracy, over seeds.

    python benchmarks/sst2.py --data FOLDER [--model FOLDER] [--seeds 3] [--output-dir runs]
                              [--quick] [--json FILE]

FOLDER holds train.tsv and dev.tsv: sentence TAB label, no header; dev is the test split and
validation is cut off train. The study of recipes/sst2-minilm.yaml with seed 0 chooses: among the
points that are `--times` smaller and faster than the dense model in the same runtime, the one with
the best accuracy on validation. The other seeds repeat that configuration beside a dense model of
their own. The loss on test is paired by sentence; its one-sided 95 % bound is a bootstrap over
sentences, and the seeds' own losses stand beside it. Studies are resumed, not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from small_study import demo_model

from orchestrator.artifact import read_predictions
from orchestrator.recipe import load_recipe
from orchestrator.study import Study

RECIPE = Path(__file__).parents[1] / "recipes" / "sst2-minilm.yaml"
QUICK = [
    "baseline.finetune.max_steps=4",
    "references.dense_int8=false",
    "baseline.finetune.learning_rate=1e-4",
    "space.finetune.max_steps=4",
    "space.finetune.augmentation=null",
    "space.prune=[{method: vocabulary, vocab_size: 23000}, {method: structured, heads: 0.5}]",
    "measure.max_seconds=1",
    "task.max_length=16",
]
Point = dict[str, Any]


def main() -> None:
    arguments = parse()
    times = 1.0 if arguments.quick else arguments.times
    first = run(arguments, 0, [])
    chosen = choose(first, times)
    seeds = [first]
    others = range(1, 1 if arguments.quick else arguments.seeds)
    seeds += [run(arguments, seed, only(chosen)) for seed in others]
    result = compare(arguments, seeds, chosen)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--model", default=demo_model() or "sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--times", type=float, default=6.0, help="smaller and faster than dense")
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def study_folder(arguments: argparse.Namespace, seed: int) -> Path:
    kind = "sst2-quick" if arguments.quick else "sst2"
    return arguments.output_dir / f"{kind}-seed{seed}"


def run(arguments: argparse.Namespace, seed: int, overrides: list[str]) -> dict[str, Any]:
    """front.json of one seed's study."""
    own = [
        f"model.name={arguments.model}",
        f"task.data={arguments.data}",
        "task.train=train.tsv",
        "task.test=dev.tsv",
        "task.columns=[sentence, label]",
        f"seed={seed}",
        f"output_dir={study_folder(arguments, seed)}",
        "references.first_layers=[]",
        "references.random_twin=false",
        "resources.engine=inline",
    ]
    quick = QUICK if arguments.quick else []
    return Study(load_recipe(RECIPE, [*own, *quick, *overrides])).run()


def choose(front: dict[str, Any], times: float) -> Point:
    """The best on validation among searched points that are `times` smaller and faster."""
    dense = front["baseline"]["metrics"]
    fits = [
        point
        for point in front["points"]
        if point["role"] == "trial"
        and dense["size_mb"] / point["metrics"]["size_mb"] >= times
        and point["metrics"]["speedup"] >= times
    ]
    if not fits:
        raise SystemExit(f"no point is {times:g} times smaller and faster than the dense model")
    return max(fits, key=lambda p: p["metrics"]["accuracy"])


def only(chosen: Point) -> list[str]:
    """Overrides that leave one configuration of the space."""
    prune = json.dumps(chosen["config"]["prune"])
    return [f"space.prune={prune}"]


def compare(
    arguments: argparse.Namespace, fronts: list[dict[str, Any]], chosen: Point
) -> dict[str, Any]:
    """Dense minus compressed on test, by sentence and seed, with what it bought."""
    rows, losses = [], []
    for seed, front in enumerate(fronts):
        folder, dense = study_folder(arguments, seed), front["baseline"]
        prune = chosen["config"]["prune"]
        point = next(p for p in front["points"] if p["config"]["prune"] == prune)
        right = [correct(folder / p["artifact"]) for p in (dense, point)]
        losses.append(right[0] - right[1])
        rows.append(
            {
                "seed": seed,
                "dense_test": right[0].mean(),
                "test": right[1].mean(),
                "loss_points": 100 * losses[-1].mean(),
                "smaller": dense["metrics"]["size_mb"] / point["metrics"]["size_mb"],
                "size_mb": point["metrics"]["size_mb"],
                "faster": point["metrics"]["speedup"],
                "faster_interval": point["intervals"]["speedup"],
                "latency_ms": point["metrics"]["latency_ms"],
                "validation": point["metrics"]["accuracy"],
                "dense_validation": dense["metrics"]["accuracy"],
            }
        )
    loss = np.mean(losses, axis=0)  # [sentences]
    picks = np.random.default_rng(0).integers(0, len(loss), (10_000, len(loss)))
    return {
        "chosen": chosen["config"],
        "seeds": rows,
        "loss_points": 100 * float(loss.mean()),
        "loss_points_bound": 100 * float(np.percentile(loss[picks].mean(axis=1), 95)),
        "num_examples": len(loss),
        "fingerprint": fronts[0]["fingerprint"],
    }


def correct(artifact: Path) -> np.ndarray:
    """1 for each test sentence that the artifact names right, in order of their ids."""
    records = sorted(read_predictions(artifact, "test"), key=lambda record: record["id"])
    assert records, f"{artifact} has no predictions of the test split"
    return np.array([float(np.argmax(r["logits"]) == r["label"]) for r in records])


def show(result: dict[str, Any]) -> None:
    table = Table(title="SST-2, chosen on validation", title_justify="left")
    names = ("seed", "dense test", "test", "loss, points", "smaller", "faster")
    for name in names:
        table.add_column(name, justify="right")
    for row in result["seeds"]:
        low, high = row["faster_interval"]
        table.add_row(
            str(row["seed"]),
            f"{row['dense_test']:.4f}",
            f"{row['test']:.4f}",
            f"{row['loss_points']:+.2f}",
            f"{row['smaller']:.2f}×",
            f"{row['faster']:.2f}× ({low:.2f} … {high:.2f})",
        )
    console = Console()
    console.print(table)
    bound, loss = result["loss_points_bound"], result["loss_points"]
    console.print(f"loss over seeds {loss:+.2f} points; at most {bound:.2f} with 95 % confidence")


if __name__ == "__main__":
    main()
