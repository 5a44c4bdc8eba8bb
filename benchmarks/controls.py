"""Whether pruning, QAT and distillation do what they are for: each against its control.

    python benchmarks/controls.py [--quick] [--json FILE] [--task stdlib|sst2] [--seeds 3]
                                  [--data FOLDER] [--model FOLDER] [--only TEXT]

`stdlib` is the small Llama of recipes/quickstart.yaml and needs nothing. `sst2` is MiniLM (by
default the one that the extra `demo` brings) on a folder with train.tsv and dev.tsv: sentence TAB
label, no header; dev is the test split, validation is cut off train.

The two arms of a control start at one dense checkpoint and take the same number of optimizer
steps on the same batches; the seed changes the batches' order, dropout and what is random about
an arm. Quality is that of the artifacts on the test split, as onnxruntime serves them. The
difference (first arm minus second) is a mean over seeds, its 95 % interval a bootstrap over the
examples, paired; how far seeds differ stands beside it. It is a tie where the interval holds 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from small_study import demo_model

from orchestrator.artifact import read_predictions, verify
from orchestrator.bench import Bench
from orchestrator.measure.fingerprint import fingerprint
from orchestrator.recipe import Recipe, load_recipe
from orchestrator.report.wording import describe
from orchestrator.run_trial import measure_test, run_baseline, run_trial
from orchestrator.tasks import Record
from orchestrator.tasks.statistics import matched, percentile_interval, resample
from orchestrator.trial import TrialConfig, TrialResult, TrialStatus

RECIPES = Path(__file__).parents[1] / "recipes"
Answers = tuple[list[Record], str]
Result = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """Sections of a trial's configuration; `finetune` goes before the options that arms share."""

    name: str
    prune: Any = "none"
    quantize: Any = "none"
    finetune: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Control:
    """Two arms, of which `better` should win."""

    name: str
    better: Arm
    worse: Arm


HALF = {"method": "structured", "heads": 0.5, "neurons": 0.5}  # by Taylor
MASK = {"method": "magnitude", "sparsity": 0.5}
RANDOM = {"importance": "random"}
W8A8, W4A16 = {"scheme": "W8A8"}, {"scheme": "W4A16", "group_size": 32}
QAT = {"qat": True}
DISTILL = {"distillation": {"alpha": 0.8, "temperature": 2.0}}
BY_ANSWERS = {"distillation": {"alpha": 1.0, "temperature": 10.0}}
BY_LAYERS = {"distillation": {"alpha": 1.0, "temperature": 10.0, "hidden": 30.0}}
CONTROLS = [
    Control("50 % of weights", Arm("magnitude", MASK), Arm("random", MASK | RANDOM)),
    Control("50 % of heads and neurons", Arm("Taylor", HALF), Arm("random", HALF | RANDOM)),
    Control("W8A8", Arm("QAT", quantize=W8A8 | QAT), Arm("post-training", quantize=W8A8)),
    Control("W4A16", Arm("QAT", quantize=W4A16 | QAT), Arm("post-training", quantize=W4A16)),
    Control("distillation", Arm("on", HALF, finetune=DISTILL), Arm("off", HALF)),
    Control(
        "distillation by layers",
        Arm("layers and answers", HALF, finetune=BY_LAYERS),
        Arm("answers", HALF, finetune=BY_ANSWERS),
    ),
]

# At learning rate 0 there is nothing but what pruning and rounding do before the first step.
STILL, UNTRAINED = {"learning_rate": 0.0}, {"max_steps": 0}
UNCHANGED = [
    Control("rate 0", Arm("after", finetune=STILL), Arm("before", finetune=UNTRAINED)),
    Control(
        "rate 0, mask and W8A8 QAT",
        Arm("after", MASK, W8A8 | QAT, STILL),
        Arm("before", MASK, W8A8, UNTRAINED),
    ),
]


# -- running -------------------------------------------------------------------------------------


class Arms:
    """Trains, serves and scores arms, each at most once a seed; all share `finetune`."""

    def __init__(self, bench: Bench, finetune: dict[str, Any]) -> None:
        self.bench, self.recipe, self.finetune = bench, bench.recipe, finetune
        self.model = self.recipe.models[0].id
        self._answers: dict[TrialConfig, Answers] = {}
        check(run_baseline(self.model, bench, lambda stage: None), "dense")

    def answers(self, arm: Arm, seed: int) -> Answers:
        """The artifact's records of the test split, and the SHA-256 of its model file."""
        config = self.recipe.trial_config(
            model=self.model,
            prune=arm.prune,
            quantize=arm.quantize,
            finetune=self.finetune | arm.finetune,
            seed=seed,
        )
        if config not in self._answers:
            self._answers[config] = self._run(config)
        return self._answers[config]

    def _run(self, config: TrialConfig) -> Answers:
        what = describe(config.model_dump(mode="json") | {"seed": 0}) + f", seed {config.seed}"
        result = run_trial(config, self.bench, lambda stage: None)
        check(result, what)
        artifact = self.bench.folder / "trials" / config.id / "artifact"
        measurement, _ = measure_test(artifact, config, self.bench)
        reached = measurement.metrics[self.recipe.task.quality]
        print(f"{what}: {reached:.4g} in {result.device_seconds:.0f} s", flush=True)
        weights = verify(artifact)["sha256"]["model.onnx"]
        answers = read_predictions(artifact, "test"), weights
        shutil.rmtree(artifact)
        return answers


def check(result: TrialResult, what: str) -> None:
    if result.status is not TrialStatus.COMPLETED:
        raise SystemExit(f"{what}: {result.reason}: {result.message}")


def run_control(control: Control, arms: Arms, seeds: Sequence[int]) -> Result:
    """Which arm of a control is better, and how sure that is."""
    metric = arms.recipe.task.quality
    better = [arms.answers(control.better, seed)[0] for seed in seeds]
    worse = [arms.answers(control.worse, seed)[0] for seed in seeds]
    return {
        "name": control.name,
        "better": control.better.name,
        "worse": control.worse.name,
        "metric": metric,
        **compare(better, worse, sign=arms.recipe.sign(metric)),
    }


def run_unchanged(control: Control, arms: Arms, seed: int) -> Result:
    """Whether the served model is the same, to the last bit, before and after training."""
    result = run_control(control, arms, [seed])
    records, weights = arms.answers(control.better, seed)
    records_before, weights_before = arms.answers(control.worse, seed)
    equal = {
        "weights_equal": weights == weights_before,
        "answers_equal": records == records_before,
    }
    return result | equal | {"verdict": "unchanged" if all(equal.values()) else "CHANGED"}


# -- statistics ----------------------------------------------------------------------------------


def compare(better: Sequence[list[Record]], worse: Sequence[list[Record]], *, sign: int) -> Result:
    """Difference of two arms, each a list of records a seed, all over the same rows.

    `sign` is 1 where more is better, else -1. Raises ValueError unless the rows are the same.
    """
    once = np.ones(len(better[0]), dtype=int)
    counts = np.vstack([once, resample(once)])  # the rows as they are, then their resamples
    first, second = (
        np.array([quality(matched(better[0], records), counts) for records in arm])
        for arm in (better, worse)
    )
    differences = (first - second).mean(axis=0)
    value, low, high = percentile_interval(differences[0], differences[1:])
    return {
        "quality_better": float(first[:, 0].mean()),
        "quality_worse": float(second[:, 0].mean()),
        "difference": value,
        "interval": [low, high],
        "per_seed": (first - second)[:, 0].tolist(),
        "num_examples": len(once),
        "verdict": "tie" if low <= 0 <= high else "win" if sign * value > 0 else "loss",
    }


def quality(records: Sequence[Record], counts: np.ndarray) -> np.ndarray:
    """Accuracy or perplexity where row r counts `counts[i, r]` times, [i]."""
    if "nll" in records[0]:
        totals = counts @ np.array([[row["nll"], row["num_tokens"]] for row in records])
        return np.exp(totals[:, 0] / totals[:, 1])
    correct = np.array([np.argmax(row["logits"]) == row["label"] for row in records])
    return counts @ correct / counts.sum(axis=1)


# -- what is trained on what ---------------------------------------------------------------------

# Since no trial of the recipe's own space trains, all arms start where the dense model ends.
ARMS_ALONE = [
    "space={finetune: {max_steps: 0}}",
    "search={name: grid}",
    "measure={max_seconds: 0.01, num_inputs: 2, num_check_inputs: 16}",
]
HALVABLE = ["model.config.num_key_value_heads=2"]
TINY = [
    "model.config={model_type: llama, hidden_size: 64, intermediate_size: 128,"
    " num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}",
    "model.tokenizer.vocab_size=512",
    "task.block_size=64",
    "task.max_files=40",
    "task.max_eval_blocks=64",
    "baseline.finetune.max_steps=40",
]


def stdlib(arguments: argparse.Namespace, folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and how arms train."""
    size = TINY if arguments.quick else HALVABLE
    written = [*ARMS_ALONE, *size, f"output_dir={folder}"]
    recipe = load_recipe(RECIPES / "quickstart.yaml", written)
    steps = 15 if arguments.quick else 120
    return recipe, recipe.baseline.finetune | {"learning_rate": 1e-3, "max_steps": steps}


def sst2(arguments: argparse.Namespace, folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and how arms train."""
    model = arguments.model or demo_model()
    if model is None:
        raise SystemExit("no model: give --model FOLDER, or pip install 'slimtune[demo]'")
    written = [
        *ARMS_ALONE,
        f"output_dir={folder}",
        f"model.name={model}",
        f"task.data={arguments.data}",
        "task.train=train.tsv",
        "task.test=dev.tsv",
        "task.validation_share=0.05",
        "baseline.finetune={learning_rate: 1e-4, per_device_train_batch_size: 32}",
        f"baseline.finetune.max_steps={4 if arguments.quick else 400}",
    ]
    recipe = load_recipe(RECIPES / "sst2-minilm.yaml", written)
    return recipe, recipe.baseline.finetune | {"max_steps": 2 if arguments.quick else 120}


# -- reporting -----------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> Table:
    shown = Table("control", "arms", "difference [95 %]", "by seed", "verdict")
    for result in results:
        low, high = result["interval"]
        shown.add_row(
            result["name"],
            f"{result['better']} {result['quality_better']:.4g},"
            f" {result['worse']} {result['quality_worse']:.4g}",
            f"{result['difference']:+.3g} [{low:+.3g}, {high:+.3g}]",
            " ".join(f"{difference:+.3g}" for difference in result["per_seed"]),
            result["verdict"],
        )
    return shown


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="stdlib: under a minute; shows little")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--task", choices=["stdlib", "sst2"], default="stdlib")
    parser.add_argument("--data", type=Path, help="sst2: folder with train.tsv and dev.tsv")
    parser.add_argument("--model", type=Path, help="sst2: folder of a model; default MiniLM")
    parser.add_argument("--seeds", type=int, help="how many; default 3, with --quick 1")
    parser.add_argument("--only", default="", help="controls whose name has this text in it")
    arguments = parser.parse_args(words)
    if arguments.task == "sst2" and arguments.data is None:
        parser.error("--task sst2 needs --data FOLDER, with train.tsv and dev.tsv in it")
    return arguments


def main() -> None:
    arguments = parse()
    started = time.perf_counter()
    seeds = range(arguments.seeds or (1 if arguments.quick else 3))
    with tempfile.TemporaryDirectory() as folder:
        read = sst2 if arguments.task == "sst2" else stdlib
        recipe, finetune = read(arguments, Path(folder))
        arms = Arms(Bench(recipe, Path(folder)), finetune)
        results = [run_unchanged(c, arms, seeds[0]) for c in UNCHANGED if arguments.only in c.name]
        results += [run_control(c, arms, seeds) for c in CONTROLS if arguments.only in c.name]
    Console(width=max(110, Console().width)).print(table(results))
    if arguments.json:
        report = {
            "task": arguments.task,
            "finetune": finetune,
            "num_seeds": len(seeds),
            "controls": results,
            "seconds": time.perf_counter() - started,
            "fingerprint": fingerprint(),
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
