"""What a trial costs beyond its work, by the way it is run: the same tiny trials everywhere.

    python benchmarks/trial_overhead.py [--quick] [--json FILE] [--trials 5]

Ways: a warm gang of our Ray engine; a fresh process a trial; a plain Ray Tune function; a Tune
function that runs a nested TorchTrainer. Each trial prunes, trains quantization-aware, exports and
measures a small BERT; all ways find the dense model made. With the extra `demo` a warm gang does so
with MiniLM too. Seconds are means a trial as the driver sees them, the first trial of a warm gang
left out; each trial has a shape of its own, so that each is timed; `other` is what is neither
optimizer steps, evaluation, timed runs nor export. Goals: `other` under 0.5 s for a warm gang, and
`other` and export together under 3 s for MiniLM.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from small_study import SMALL, demo_model, fresh_process, recipe_for, warm_gang

from orchestrator.recipe import Recipe
from orchestrator.resources import num_cores
from orchestrator.trial import TrialConfig, TrialStatus

Json = dict[str, Any]
Timed = tuple[float, list[Json]]  # seconds of all trials, and their results
Way = Callable[[Recipe, Sequence[TrialConfig]], Timed]
BENCHMARKS = Path(__file__).resolve().parent
STAGES = {
    "seconds_evaluation": ("quality", "check"),
    "seconds_latency": ("latency", "memory"),
    "seconds_export": ("export", "convert"),
}


def configs(recipe: Recipe, count: int, *, begin: int) -> list[TrialConfig]:
    """Trials that share nothing: each has a number of neurons of its own."""
    return [
        recipe.trial_config(
            model=recipe.models[0].id,
            prune={"method": "structured", "heads": 0.5, "neurons": 0.3 + 0.015 * (begin + i)},
            quantize={"scheme": "W8A8", "qat": True},
            finetune={"learning_rate": 1e-4, "max_steps": 20},
        )
        for i in range(count)
    ]


def run_here(recipe: Json, config: Json) -> Json:
    """One trial in this process, as a function of a Tune user would do it."""
    sys.path.insert(0, str(BENCHMARKS))
    import small_study

    return small_study.run_here(recipe, config)


# -- the ways ------------------------------------------------------------------------------------


def on_warm_gang(recipe: Recipe, trials: Sequence[TrialConfig]) -> Timed:
    """It makes the dense model too, which all ways use."""
    with warm_gang(recipe) as gang:
        gang.trial(*configs(recipe, 1, begin=0))
        began = time.perf_counter()
        results = [gang.trial(config).model_dump(mode="json") for config in trials]
        return time.perf_counter() - began, results


def fresh_processes(recipe: Recipe, trials: Sequence[TrialConfig]) -> Timed:
    began = time.perf_counter()
    results = [fresh_process(recipe, config) for config in trials]
    return time.perf_counter() - began, results


def tune_function(recipe: Recipe, trials: Sequence[TrialConfig]) -> Timed:
    from ray import tune

    written = recipe.resolved()

    def train(params: Json) -> None:
        tune.report({"loss": 0.0, "result": run_here(written, json.loads(params["config"]))})

    return _tuned(recipe, train, trials)


def tune_with_trainer(recipe: Recipe, trials: Sequence[TrialConfig]) -> Timed:
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    written, storage = recipe.resolved(), str(Path(recipe.output_dir).parent / "nested")

    def loop(params: Json) -> Json:
        return run_here(written, json.loads(params["config"]))

    def train(params: Json) -> None:
        trainer = TorchTrainer(
            loop,
            train_loop_config=params,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(storage_path=storage),
        )
        tune.report({"loss": 0.0, "result": trainer.fit().return_value})

    return _tuned(recipe, train, trials)


def _tuned(recipe: Recipe, train: Callable[[Json], None], trials: Sequence[TrialConfig]) -> Timed:
    """Trials one after another; their configurations go as text, which Tune leaves alone.

    Starting Ray is not counted.
    """
    import ray
    from ray import tune

    ray.init(num_cpus=max(2, num_cores()), log_to_driver=False)  # the nested one needs two
    texts = [config.model_dump_json() for config in trials]
    tuner = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={"config": tune.grid_search(texts)},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(verbose=0, storage_path=str(Path(recipe.output_dir).parent)),
    )
    began = time.perf_counter()
    found = tuner.fit()
    seconds = time.perf_counter() - began
    ray.shutdown()
    assert not found.errors, found.errors
    return seconds, [result.metrics["result"] for result in found]


# -- figures -------------------------------------------------------------------------------------


def row(engine: str, seconds: float, results: Sequence[Json]) -> Json:
    """Mean seconds a trial, in all and by what they went into."""
    for result in results:
        assert result["status"] == TrialStatus.COMPLETED, result["message"]
    details = [result["details"] for result in results]
    count = len(results)
    found = {
        "engine": engine,
        "seconds_total": seconds / count,
        "seconds_optimizer_steps": sum(d["training"]["seconds"] for d in details) / count,
    }
    for name, stages in STAGES.items():
        found[name] = sum(d["stage_seconds"].get(s, 0) for d in details for s in stages) / count
    known = sum(v for k, v in found.items() if k.startswith("seconds_") and k != "seconds_total")
    return found | {"seconds_other": found["seconds_total"] - known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two trials, the first two ways")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--trials", type=int, default=5)
    arguments = parser.parse_args()
    count = 2 if arguments.quick else arguments.trials
    rows = []
    with tempfile.TemporaryDirectory() as name:
        small = recipe_for(Path(name) / "small", SMALL)
        ways: dict[str, Way] = {
            "warm gang": on_warm_gang,
            "fresh process": fresh_processes,
            "Tune function": tune_function,
            "Tune with TorchTrainer": tune_with_trainer,
        }
        if arguments.quick:
            ways = dict(list(ways.items())[:2])
        for number, (way, run) in enumerate(ways.items()):
            rows.append(row(way, *run(small, configs(small, count, begin=1 + number * count))))
            print(json.dumps(rows[-1]), flush=True)
        if not arguments.quick and (model := demo_model()):
            minilm = recipe_for(Path(name) / "minilm", {"id": "minilm", "name": model})
            trials = configs(minilm, count, begin=1)
            rows.append(row("warm gang, MiniLM", *on_warm_gang(minilm, trials)))
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def show(rows: Sequence[Json]) -> None:
    table = Table("engine", "total", "steps", "evaluation", "latency", "export", "other")
    for found in rows:
        seconds = [f"{value:.2f}" for name, value in found.items() if name != "engine"]
        table.add_row(found["engine"], *seconds)
    Console().print(table)


if __name__ == "__main__":
    main()
