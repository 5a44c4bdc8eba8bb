"""Trials of a tiny study in this process, as one rank of those that torchrun has started; a script.

    torchrun --nproc-per-node 2 tests/rank_trials.py FOLDER STRATEGY TRIALS.json

writes FOLDER/results.json. `TRIALS.json` holds sections of configurations by name.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from orchestrator.quiet import quiet

quiet()

import tiny_study  # noqa: E402
import torch  # noqa: E402

from orchestrator.bench import Bench  # noqa: E402
from orchestrator.recipe import make_recipe  # noqa: E402
from orchestrator.resources import GangOptions  # noqa: E402
from orchestrator.run_trial import run_baseline, run_trial  # noqa: E402
from orchestrator.training import Crew, join_ranks  # noqa: E402


def main(folder: Path, strategy: str, trials: Path) -> None:
    torch.set_num_threads(1)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    plain = {"learning_rate": 2e-3, "max_steps": 30, "dropout": 0.0, "bf16": False}
    recipe = make_recipe(tiny_study.recipe(folder, baseline={"finetune": plain}))
    bench = Bench(recipe, folder / "study", device="cpu")
    if strategy != "single":
        join_ranks("cpu")
        options = GangOptions(workers_per_trial=size, strategy=strategy)  # type: ignore[arg-type]
        bench.crew = Crew(lambda model: options)
        if int(os.environ["RANK"]) > 0:
            bench.crew.follow(bench)
            return
    results = {"baseline": run_baseline("bert", bench, lambda stage: None)}
    for name, sections in json.loads(trials.read_text()).items():
        finetune = plain | {"per_device_train_batch_size": 8, "logging_steps": 1}
        sections = sections | {"finetune": finetune | sections.get("finetune", {})}
        config = recipe.trial_config(model="bert", **sections)
        results[name] = run_trial(config, bench, lambda stage: None)
    if bench.crew is not None:
        bench.crew.dismiss()
    said = {name: result.model_dump(mode="json") for name, result in results.items()}
    (folder / "results.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
