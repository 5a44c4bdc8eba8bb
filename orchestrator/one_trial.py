"""One trial without a study's driver, on the processes that torchrun or accelerate launch have started.

    accelerate launch -m orchestrator.run_trial CONFIG.json
    torchrun --nproc-per-node 2 -m orchestrator.run_trial CONFIG.json --recipe R.yaml --strategy zero3

CONFIG.json is a trial's `config.json`, or some sections of one: what it leaves out has its default.
The study is the one above the file; `--recipe` names that of another, or of one that is new. Rank 0
prints the result as JSON. Exit status: 0 completed, 1 failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orchestrator.bench import Bench, Note
from orchestrator.manifest import NAME as MANIFEST
from orchestrator.manifest import open_study, write_manifest
from orchestrator.rebuild import recipe_of, study_above
from orchestrator.recipe import Recipe, load_recipe
from orchestrator.resources import GangOptions
from orchestrator.run_trial import run_baseline, run_trial
from orchestrator.study import read_result, write_result
from orchestrator.training import Crew, join_ranks
from orchestrator.trial import BadInput, TrialConfig, TrialResult, TrialStatus

COMPLETED, FAILED, BAD_INPUT = 0, 1, 2
PLACE = (("RANK", "0"), ("WORLD_SIZE", "1"))  # in the environment, and of a process alone


def main(arguments: list[str] | None = None) -> int:
    """The exit status of this rank."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.run_trial", description="Run one trial on all ranks."
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.json")
    parser.add_argument("--recipe", help="a recipe; without it the study above CONFIG.json")
    parser.add_argument("--strategy", help="how ranks share the training; see resources.strategy")
    asked = parser.parse_args(arguments)
    rank, size = (int(os.environ.get(name, value)) for name, value in PLACE)
    try:
        recipe = load_recipe(asked.recipe) if asked.recipe else _recipe_above(asked.config)
        config = read_config(asked.config, recipe)
        options = gang_options(recipe, config.model, size, os.environ, strategy=asked.strategy)
        open_study(Path(recipe.output_dir), recipe)
    except BadInput as error:
        for problem in error.problems if rank == 0 else ():
            print(f"✗ {problem}", file=sys.stderr)
        return BAD_INPUT
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    bench = Bench(recipe, Path(recipe.output_dir), device=device)
    if options.strategy_name != "single":
        waits = recipe.resources.collective_timeout_s
        join_ranks(device, bench.folder, timeout_s=waits)
        bench.crew = Crew(lambda model: options)
        if rank > 0:
            bench.crew.follow(bench)
            return COMPLETED
    return _lead(config, bench)


def _lead(config: TrialConfig, bench: Bench) -> int:
    try:
        result = run_with_baseline(config, bench, _print)
    except BadInput as error:
        for problem in error.problems:
            print(f"✗ {problem}", file=sys.stderr)
        return BAD_INPUT
    finally:
        if bench.crew is not None and not bench.crew.is_broken:
            bench.crew.dismiss()
    print(result.model_dump_json(indent=1), flush=True)
    if bench.crew is not None and bench.crew.is_broken:
        os._exit(FAILED)  # the others wait for this rank: whoever started them ends them
    return COMPLETED if result.status is TrialStatus.COMPLETED else FAILED


def _print(stage: str) -> None:
    print(f"  {stage}", file=sys.stderr, flush=True)


def run_with_baseline(config: TrialConfig, bench: Bench, note: Note) -> TrialResult:
    """The trial, and before it what no trial of its study has made yet; written down as a study does.

    A failed dense baseline is the result.
    """
    dense = baseline_once(config.model, bench, note)
    if dense.status is not TrialStatus.COMPLETED:
        return dense
    result = run_trial(config, bench, note)
    write_result(result, bench.folder / "trials" / config.id)
    return result


def baseline_once(model: str, bench: Bench, note: Note) -> TrialResult:
    """The dense baseline; the first worker that asks makes it, others wait. The manifest comes first."""
    recipe, folder = bench.recipe, bench.folder
    baseline = recipe.baseline_folder(folder, model)
    with bench.stages.holding("baseline"):
        if not (folder / MANIFEST).is_file():
            write_manifest(folder, recipe, bench.facts())
        known = read_result(baseline)
        if known is not None and known.status is TrialStatus.COMPLETED:
            return known
        dense = run_baseline(model, bench, note)
        write_result(dense, baseline)
        return dense


def _recipe_above(path: Path) -> Recipe:
    home = study_above(path)
    if home is None:
        raise BadInput([f"no study lies above {path}; name its recipe with --recipe."])
    return recipe_of(home)


def read_config(path: Path, recipe: Recipe) -> TrialConfig:
    """The configuration in a file, with defaults for what it leaves out. Raises `BadInput`."""
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(sections, dict):
            raise ValueError("it has to be an object with sections of a configuration")
        models = [options.id for options in recipe.models]
        sections.setdefault("model", models[0])
        if sections["model"] not in models:
            raise ValueError(f"model {sections['model']} is not in the recipe, which has {models}")
        return recipe.trial_config(**sections)
    except OSError as error:
        raise BadInput([f"{path} cannot be read: {error.strerror}."]) from error
    except (ValueError, TypeError) as error:
        raise BadInput([f"{path}: {error}."]) from error


def gang_options(
    recipe: Recipe, model: str, size: int, environ: Mapping[str, str], *, strategy: str | None
) -> GangOptions:
    """How `size` ranks train: as asked for, as accelerate launch was told, or as the recipe says.

    Raises `BadInput`.
    """
    own = recipe.resources.of(model)
    chosen: dict[str, Any] = {"strategy": own.strategy, "offload": own.offload}
    chosen["deepspeed"] = own.deepspeed
    try:
        chosen |= _of_accelerate(environ)
        if strategy is not None:
            chosen["strategy"] = strategy
        return GangOptions(workers_per_trial=size, **chosen)
    except (OSError, ValueError) as error:
        raise BadInput(
            [f"{size} ranks, strategy {chosen['strategy']}: {_reason(error)}."]
        ) from error


def _of_accelerate(environ: Mapping[str, str]) -> dict[str, Any]:
    """What accelerate launch says in the environment of the processes that it starts."""
    if environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        all_of_it = environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"
        offload = ("optimizer", "parameters") if all_of_it else ()
        return {"strategy": "fsdp2", "offload": offload, "deepspeed": None}
    if environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return {}
    stage, config = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"), None
    if file := environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""):
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        stage = str(config.get("zero_optimization", {}).get("stage", stage))
    named = {"optimizer": "OPTIMIZER", "parameters": "PARAM"}
    offload = tuple(
        what
        for what, name in named.items()
        if environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE") == "cpu"
    )
    return {"strategy": f"zero{stage}", "offload": offload, "deepspeed": config}


def _reason(error: ValueError) -> str:
    errors = getattr(error, "errors", list)()
    told = (str(each["msg"]).removeprefix("Value error, ") for each in errors)
    return "; ".join(told) or str(error)
