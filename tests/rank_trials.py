"""Trials of a tiny study in this process, as one rank of those that torchrun has started; a script.

    torchrun --nproc-per-node 2 tests/rank_trials.py FOLDER STRATEGY TRIALS.json [DIE_AT]

writes FOLDER/results.json. `TRIALS.json` holds sections of configurations by name. At DIE_AT steps
of a trial rank 0 is gone all of a sudden.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from orchestrator.quiet import quiet

quiet()

import tiny_study  # noqa: E402
import torch  # noqa: E402

from orchestrator.bench import Bench  # noqa: E402
from orchestrator.checkpoint import Saver  # noqa: E402
from orchestrator.recipe import make_recipe  # noqa: E402
from orchestrator.resources import GangOptions  # noqa: E402
from orchestrator.run_trial import run_baseline, run_trial  # noqa: E402
from orchestrator.training import Crew, join_ranks  # noqa: E402


def die_after(step: int) -> None:
    """Once the checkpoint of that step is written."""
    save = Saver.save

    def save_and_die(self: Saver, at: int, *arguments: Any) -> None:
        save(self, at, *arguments)
        if at == step and int(os.environ.get("RANK", "0")) == 0:
            os._exit(9)

    Saver.save = save_and_die  # type: ignore[method-assign]


def main(folder: Path, strategy: str, trials: Path, die_at: int = 0) -> None:
    torch.set_num_threads(1)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    plain = {"learning_rate": 2e-3, "max_steps": 30, "dropout": 0.0, "bf16": False}
    sections = {"baseline": {"finetune": plain}, "resources": {"save_steps": 10}}
    recipe = make_recipe(tiny_study.recipe(folder, **sections))
    bench = Bench(recipe, folder / "study", device="cpu")
    if strategy != "single":
        join_ranks("cpu", folder, timeout_s=300)
        options = GangOptions(workers_per_trial=size, strategy=strategy)  # type: ignore[arg-type]
        bench.crew = Crew(lambda model: options)
        if int(os.environ["RANK"]) > 0:
            bench.crew.follow(bench)
            return
    results = {"baseline": run_baseline("bert", bench, lambda stage: None)}
    if die_at:
        die_after(die_at)
    for name, sections in json.loads(trials.read_text()).items():
        finetune = plain | {"per_device_train_batch_size": 8, "logging_steps": 1}
        sections = sections | {"finetune": finetune | sections.get("finetune", {})}
        config = recipe.trial_config(model="bert", **sections)
        results[name] = run_trial(config, bench, lambda stage: None)
    if bench.crew is not None:
        assert not bench.crew.is_broken, results
        bench.crew.dismiss()
    said = {name: result.model_dump(mode="json") for name, result in results.items()}
    (folder / "results.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))
