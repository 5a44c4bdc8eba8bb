"""What the control plane costs: simulated trials on simulated gangs, and no-op trials on real ones.

    python benchmarks/control_plane.py [--quick] [--json FILE] [--searcher random] [--trials N]

The simulated part runs the real study loop, searcher and ledger on a virtual clock, with made-up
outcomes: wall seconds, memory of the driver, milliseconds of bookkeeping a trial early and late
(the searcher's own beside it), size of the ledger, and the time to take it all in again. The real
part sends no-op works through warm Ray gangs, beside as many plain Ray Tune function trials.
Goals: bookkeeping under 5 ms a trial, and flat.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.launch.virtual import Virtual
from orchestrator.recipe import Recipe, make_recipe
from orchestrator.search import Search
from orchestrator.study import Study
from orchestrator.trial import Measurement, Result, TrialConfig, TrialResult, TrialStatus, Work

BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SPACE: dict[str, Any] = {
    "prune": {
        "choice": [
            "none",
            {"method": "magnitude", "sparsity": {"range": [0.1, 0.9]}},
            {"method": "structured", "neurons": {"range": [0.1, 0.9]}},
        ]
    },
    "quantize": {"choice": ["none", {"scheme": "W8A8", "qat": {"choice": [True, False]}}]},
    "finetune": {"learning_rate": {"range": [1e-5, 1e-3], "log": True}, "max_steps": 100},
}


def recipe_for(folder: Path, searcher: str, num_trials: int) -> Recipe:
    data = folder / "data.csv"
    data.write_text("text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(40)))
    return make_recipe(
        {
            "name": "control-plane",
            "output_dir": str(folder / "study"),
            "model": {
                "id": "bert",
                "config": BERT,
                "tokenizer": {"train": "bpe", "vocab_size": 300},
            },
            "task": {"name": "text_classification", "data": str(data)},
            "objectives": ["accuracy", "size_mb", "latency_ms"],
            "space": SPACE,
            "search": {"name": searcher, "num_trials": num_trials},
            "references": {"dense_int8": False, "first_layers": [], "random_twin": False},
        }
    )


def surrogate(work: Work) -> tuple[float, Result]:
    """Seconds and outcome of a work, made up from its configuration."""
    if work.kind == "test":
        return 1.0, (Measurement(metrics={}), "")
    if work.kind == "timings":
        return 1.0, {}
    config = work.config or TrialConfig(model=work.model)
    digest = hashlib.sha256(config.id.encode()).digest()
    seconds, accuracy, size, latency = np.frombuffer(digest, dtype=np.uint64) / 2**64
    metrics = {
        "accuracy": float(0.5 + 0.4 * accuracy),
        "size_mb": float(1 + size),
        "latency_ms": float(1 + latency),
    }
    return 60 + 540 * float(seconds), TrialResult(
        trial_id=config.id,
        config=config,
        status=TrialStatus.COMPLETED,
        measurement=Measurement(metrics=metrics),
        device_seconds=60 + 540 * float(seconds),
    )


class Stopwatch:
    """How long each call of a function takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return self.function(*arguments)
        finally:
            self.seconds.append(time.perf_counter() - began)


class Timed(Virtual):
    """Notes when each trial is started, by the real clock."""

    def __init__(self, **options: Any) -> None:
        super().__init__(surrogate, **options)
        self.started: list[float] = []

    def start(self, work: Work) -> None:
        self.started.append(time.perf_counter())
        super().start(work)


def simulate(folder: Path, searcher: str, num_trials: int, num_gangs: int) -> dict[str, Any]:
    """One simulated study, and the same command again on what it left."""
    from orchestrator.facts import facts_of

    recipe = recipe_for(folder, searcher, num_trials)
    facts = facts_of(recipe)
    launcher = Timed(facts=facts, num_gangs=num_gangs)
    study = Study(recipe, launcher=launcher)
    watches = watch_search(study)
    began = time.perf_counter()
    study.run()
    wall = time.perf_counter() - began
    a_trial = np.diff(launcher.started)
    tenth = max(1, len(a_trial) // 10)
    own = sum(sum(watch.seconds) for watch in watches)
    ledger = sum(p.stat().st_size for p in (folder / "study" / "ledger").iterdir())
    began = time.perf_counter()
    Study(recipe, launcher=Timed(facts=facts, num_gangs=num_gangs)).run()
    return {
        "searcher": searcher,
        "num_trials": num_trials,
        "num_gangs": num_gangs,
        "simulated_seconds": launcher.now(),
        "wall_seconds": wall,
        "driver_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "ms_a_trial_early": 1e3 * float(np.median(a_trial[:tenth])),
        "ms_a_trial_late": 1e3 * float(np.median(a_trial[-tenth:])),
        "searcher_ms_a_trial": 1e3 * own / num_trials,
        "ledger_mb": ledger / 1e6,
        "resume_seconds": time.perf_counter() - began,
    }


def watch_search(study: Study) -> list[Stopwatch]:
    """Stopwatches around the searcher's `ask` and `tell`, put there when the search starts."""
    watches: list[Stopwatch] = []
    recall = study._recall

    def recall_and_watch() -> None:
        recall()
        search: Search = study._search
        for name in ("ask", "tell"):
            watch = Stopwatch(getattr(search, name))
            watches.append(watch)
            setattr(search, name, watch)

    study._recall = recall_and_watch  # type: ignore[method-assign]
    return watches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute, fewer trials")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--searcher", default="random")
    parser.add_argument("--trials", type=int, help="default 10,000; with --quick 500")
    parser.add_argument("--gangs", type=int, default=64)
    arguments = parser.parse_args()
    num_trials = arguments.trials or (500 if arguments.quick else 10_000)
    with tempfile.TemporaryDirectory() as folder:
        report = {
            "simulated": simulate(Path(folder), arguments.searcher, num_trials, arguments.gangs)
        }
    for name, value in report["simulated"].items():
        print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
