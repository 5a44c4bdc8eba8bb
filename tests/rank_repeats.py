"""Twenty trainings in turn on the same ranks, each under another strategy than the one before; a script.

    torchrun --nproc-per-node 2 tests/rank_repeats.py FOLDER

Every rank writes FOLDER/rank-<n>.json: after each training the size of its process and what is
alive of models, optimizers and engines.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from orchestrator.quiet import quiet

quiet()

import tiny_study  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402

from orchestrator.bench import Bench  # noqa: E402
from orchestrator.finetune import FinetuneOptions  # noqa: E402
from orchestrator.gang import Clean, give_memory_back, rss_mb  # noqa: E402
from orchestrator.recipe import make_recipe  # noqa: E402
from orchestrator.resources import GangOptions  # noqa: E402
from orchestrator.training import Assignment, Crew, join_ranks, train  # noqa: E402

STRATEGIES = ("zero3", "fsdp2", "ddp", "zero2", "zero1")
REPEATS = 4
LARGER = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}  # 18 MB a model


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sections = tiny_study.recipe(folder)
    sections["model"]["config"] |= LARGER | {"num_hidden_layers": 2}
    recipe = make_recipe(sections)
    bench = Bench(recipe, folder / "study", device="cpu")
    join_ranks("cpu", folder, timeout_s=600)
    clean, said = Clean(), []
    clean.keep_group()

    def look() -> None:
        clean.restore()
        give_memory_back()
        said.append({"rss_mb": rss_mb(), "alive": alive()})

    options = [GangOptions(workers_per_trial=2, strategy=s) for s in STRATEGIES * REPEATS]
    crew = bench.crew = Crew(lambda model: options[len(said)])
    if crew.ranks.rank > 0:
        crew.follow(bench, after_each=look)
    else:
        losses = [lead(bench, look) for _ in options]
        (folder / "losses.json").write_text(json.dumps(losses))
        crew.dismiss()
    (folder / f"rank-{crew.ranks.rank}.json").write_text(json.dumps(said))


def lead(bench: Bench, look: Any) -> list[float]:
    base = bench.base("bert")
    torch.manual_seed(0)
    model = bench.task.auto_class().from_config(base.model.config).eval()
    finetune = FinetuneOptions(max_steps=2, bf16=False, logging_steps=1)
    assignment = Assignment(model="bert", finetune=finetune, seed=0)
    report, _ = train(model, assignment, bench, tokenizer=base.tokenizer)
    del model
    look()
    return [loss for _, loss in report.losses]


def alive() -> dict[str, int]:
    """What holds weights or their state, by the name of its class; rank 0 keeps the base model."""
    kinds = (torch.nn.Module, torch.optim.Optimizer, Accelerator)
    found = Counter(type(o).__name__ for o in gc.get_objects() if issubclass(type(o), kinds))
    wanted = ("Bert", "FSDP", "DeepSpeed", "AdamW", "Accelerat", "Distributed")
    return {name: count for name, count in found.items() if name.startswith(wanted)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
