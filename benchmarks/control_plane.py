"""What the control plane costs: simulated trials on simulated gangs, and no-op trials on real ones.

    python benchmarks/control_plane.py [--quick] [--json FILE] [--searcher random]
                                       [--trials 10000] [--gangs 64] [--real-trials 500]

The simulated part runs the real study loop, searcher and ledger on a virtual clock, with made-up
outcomes: wall seconds, memory of the driver, milliseconds of bookkeeping a trial early and late
(the searcher's own beside it), size of the ledger, and the time to take it all in again. The real
part is a whole study of no-op trials on warm Ray gangs, one a core, beside as many trials of a plain
Ray Tune function, with a new actor a trial (its default) and with actors that are kept. Goals:
bookkeeping under 5 ms a trial, and flat.
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

from orchestrator.facts import facts_of
from orchestrator.launch.ray_gangs import RayGangs
from orchestrator.launch.virtual import Virtual
from orchestrator.recipe import Recipe, make_recipe
from orchestrator.resources import num_cores
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


def recipe_for(folder: Path, searcher: str, num_trials: int, **resources: Any) -> Recipe:
    folder.mkdir()
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
            "resources": resources,
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


# -- real gangs ----------------------------------------------------------------------------------


class NoOp:
    """A worker that makes its outcomes up at once."""

    def __init__(self, *, recipe: dict[str, Any], **others: Any) -> None:
        self.recipe = recipe

    def facts(self) -> dict[str, Any]:
        return facts_of(Recipe.from_resolved(self.recipe))

    def do(self, work: Work, note: Callable[[str], None]) -> Result:
        return surrogate(work)[1]

    def reset(self) -> None: ...

    def rss_mb(self) -> float:
        return 0.0


def on_gangs(folder: Path, num_trials: int) -> dict[str, Any]:
    """A study of no-op trials; starting Ray and the gangs is timed apart."""
    recipe = recipe_for(
        folder, "random", num_trials, max_gangs=num_cores(), recycle_after=num_trials + 10
    )
    launcher = RayGangs(recipe, folder / "study", worker="benchmarks.control_plane:NoOp")
    try:
        began = time.perf_counter()
        launcher.facts()
        start = time.perf_counter() - began
        began = time.perf_counter()
        Study(recipe, launcher=launcher).run()
        return row("slimtune, warm gangs", num_trials, time.perf_counter() - began, start)
    finally:
        launcher.close()


def on_tune(folder: Path, num_trials: int, *, reuse_actors: bool) -> dict[str, Any]:
    """As many trials of a function that reports one number."""
    import ray
    from ray import tune

    began = time.perf_counter()
    ray.init(num_cpus=num_cores(), include_dashboard=False, log_to_driver=False)
    start = time.perf_counter() - began

    def train(config: dict[str, Any]) -> None:
        tune.report({"loss": config["x"]})

    tuner = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={"x": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(num_samples=num_trials, reuse_actors=reuse_actors),
        run_config=tune.RunConfig(verbose=0, storage_path=str(folder)),
    )
    began = time.perf_counter()
    assert not tuner.fit().errors
    seconds = time.perf_counter() - began
    ray.shutdown()
    kind = "kept actors" if reuse_actors else "new actors"
    return row(f"Ray Tune, {kind}", num_trials, seconds, start)


def row(engine: str, num_trials: int, seconds: float, start: float) -> dict[str, Any]:
    return {
        "engine": engine,
        "num_trials": num_trials,
        "start_seconds": start,
        "wall_seconds": seconds,
        "trials_a_second": num_trials / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute, fewer trials")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--searcher", default="random")
    parser.add_argument("--trials", type=int, help="default 10,000; with --quick 500")
    parser.add_argument("--gangs", type=int, default=64)
    parser.add_argument("--real-trials", type=int, help="default 500; with --quick 10")
    arguments = parser.parse_args()
    num_trials = arguments.trials or (500 if arguments.quick else 10_000)
    real_trials = arguments.real_trials or (10 if arguments.quick else 500)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulated = simulate(folder / "simulated", arguments.searcher, num_trials, arguments.gangs)
        show(simulated)
        rows = [on_gangs(folder / "real", real_trials)]
        rows += [on_tune(folder, real_trials, reuse_actors=reuse) for reuse in (False, True)]
    for found in rows:
        show(found)
    report = {"simulated": simulated, "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def show(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
    print()


if __name__ == "__main__":
    main()
