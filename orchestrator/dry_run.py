"""Every distinct path of a recipe once, small: what works here, what does not, what the study will cost.

A path is prune methods × scheme × runtime. It takes two optimizer steps on 32 rows and is then
exported and measured like a real trial, in a folder that is thrown away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from orchestrator.facts import Json
from orchestrator.plan import num_steps
from orchestrator.recipe import Recipe
from orchestrator.references import dense_int8, first_layers
from orchestrator.signature import Signature
from orchestrator.space import infeasible
from orchestrator.trial import TrialConfig, TrialResult, TrialStatus

if TYPE_CHECKING:
    from orchestrator.bench import Bench

ROWS, STEPS = 32, 2
MAX_CONFIGS = 2000  # so many are looked through for paths
BASELINE_PATH = "dense"


def dry_run(recipe: Recipe, *, device: str | None = None) -> Json:
    """Try every path. `works` is whether the baseline and at least one path did."""
    from orchestrator.quiet import quiet

    quiet()
    from orchestrator.bench import Bench

    with tempfile.TemporaryDirectory(prefix="slimtune-dry-") as folder:
        here, substituted = on_this_device(recipe, device)
        bench = Bench(here, Path(folder), device=device, rows_limit=ROWS, steps_limit=STEPS)
        facts = bench.facts()
        here.check_facts(facts)
        configs = list(all_configs(here, facts))
        rows = [_try_baseline(model.id, bench, substituted) for model in here.models]
        if all(row["works"] for row in rows):
            for path, config in distinct_paths(configs).items():
                rows.append(_try(path, config, bench, facts, substituted))
        works = all(row["works"] for row in rows[: len(here.models)])
        works = works and any(row["works"] for row in rows[len(here.models) :])
        hours = estimate_s(here, configs, rows, facts) / 3600
    return {"study": recipe.name, "paths": rows, "works": works, "estimated_hours": hours}


def on_this_device(recipe: Recipe, device: str | None) -> tuple[Recipe, str]:
    """The recipe with a target that this machine has, and what was put in its place."""
    wanted = recipe.target.device
    if not wanted.startswith("cuda") or (device or wanted).startswith("cuda"):
        return recipe, ""
    target = recipe.target.model_copy(update={"device": "cpu"})
    return recipe.model_copy(update={"target": target}), f"served on cpu instead of {wanted}"


def all_configs(recipe: Recipe, facts: Json) -> Iterator[TrialConfig]:
    """References and what the searcher would ask, up to a bound."""
    for model in recipe.models:
        signature = Signature.model_validate(facts["models"][model.id]["signature"])
        arguments = (recipe, model.id, signature)
        yield from (config for _, config in dense_int8(*arguments))
        yield from (config for _, config in first_layers(*arguments))
    search = recipe.search.start(recipe.space, seed=recipe.seed)
    yield from islice(iter(search.ask, None), MAX_CONFIGS)


def path_of(config: TrialConfig) -> str:
    """The path that a configuration takes."""
    methods = " + ".join(method["method"] for method in config.prune) or "none"
    scheme = config.quantize["scheme"]
    training = " QAT" if config.quantize["qat"] else ""
    tables = " + embeddings" if config.quantize["embeddings"] else ""
    return f"{config.model}: {methods} × {scheme}{training}{tables}"


def distinct_paths(configs: Iterable[TrialConfig]) -> dict[str, TrialConfig]:
    """One configuration a path, the first; one that trains rather than one that does not."""
    paths: dict[str, TrialConfig] = {}
    for config in configs:
        path = path_of(config)
        if path not in paths or paths[path].finetune["max_steps"] == 0:
            paths.setdefault(path, config)
            if config.finetune["max_steps"] != 0:
                paths[path] = config
    return paths


def _try_baseline(model: str, bench: Bench, substituted: str) -> Json:
    from orchestrator.run_trial import run_baseline

    path = f"{model}: {BASELINE_PATH}"
    return _row(path, run_baseline(model, bench, _ignore), substituted)


def _try(path: str, config: TrialConfig, bench: Bench, facts: Json, substituted: str) -> Json:
    from orchestrator.run_trial import run_trial

    signature = Signature.model_validate(facts["models"][config.model]["signature"])
    config, instead = _servable(config, signature, bench.recipe)
    reason = infeasible(config, signature, bench.recipe)
    if reason is not None:
        return {"path": path, "works": False, "why_not": reason, "substituted": substituted}
    note = ", ".join(filter(None, (substituted, instead)))
    return _row(path, run_trial(config, bench, _ignore), note)


def _servable(config: TrialConfig, signature: Signature, recipe: Recipe) -> tuple[TrialConfig, str]:
    """A 4-bit scheme that this device does not serve is tried with 8 bits, and that is said."""
    wanted = config.quantize["scheme"]
    if wanted != "W4A16" or infeasible(config, signature, recipe) is None:
        return config, ""
    other = config.model_copy(update={"quantize": config.quantize | {"scheme": "W8A16"}})
    if infeasible(other, signature, recipe) is not None:
        return config, ""
    return other, f"W8A16 instead of {wanted}"


def _ignore(text: str) -> None:
    """Nobody looks on."""


def _row(path: str, result: TrialResult, substituted: str) -> Json:
    row: Json = {
        "path": path,
        "works": result.status is TrialStatus.COMPLETED,
        "why_not": result.message,
        "seconds": result.device_seconds,
        "peak_memory_mb": result.details.get("peak_training_memory_mb"),
        "substituted": substituted,
        "stage_seconds": result.details.get("stage_seconds", {}),
    }
    candidates = result.details.get("candidates")  # of the baseline
    training = candidates[0] if candidates else result.details.get("training")
    if training:
        row["step_s"] = training["step_seconds"]
    return row


# -- what the whole study will cost --------------------------------------------------------------


def estimate_s(recipe: Recipe, configs: list[TrialConfig], rows: list[Json], facts: Json) -> float:
    """Device-seconds of the study, from the seconds that each path's stages took here.

    Training grows with steps; quality and the comparison of trained with served grow with rows;
    a graph is exported once a shape; latency and memory take what they take.
    """
    by_path = {row["path"]: row for row in rows if row["works"]}
    total, shapes = 0.0, set()
    for model in recipe.models:
        dense = by_path.get(f"{model.id}: {BASELINE_PATH}")
        if dense is None:
            return float("nan")
        steps = [
            num_steps(o, facts["models"][model.id]["num_train"])
            for o in recipe.baseline_budgets(model.id)
        ]
        total += sum(steps) * dense["step_s"] + _fixed_s(dense, recipe, facts["models"][model.id])
    for config in configs:
        row = by_path.get(path_of(config))
        if row is None:
            continue
        model_facts = facts["models"][config.model]
        total += _fixed_s(row, recipe, model_facts)
        total += num_steps(config.finetune, model_facts["num_train"]) * row.get("step_s", 0.0)
        shape = str(config.prune)
        if shape in shapes:
            total -= row["stage_seconds"]["export"]
        shapes.add(shape)
    return total


def _fixed_s(row: Json, recipe: Recipe, facts: Json) -> float:
    """Seconds of everything but the optimizer steps, at the study's number of rows."""
    seconds: dict[str, float] = row["stage_seconds"]
    checks = min(recipe.measure.num_check_inputs, facts["num_validation"])
    grows = {
        "check": checks / min(ROWS, checks),
        "quality": facts["num_validation"] / min(ROWS, facts["num_validation"]),
    }
    fixed = {stage: value for stage, value in seconds.items() if stage != "finetune"}
    return float(sum(value * grows.get(stage, 1.0) for stage, value in fixed.items()))


def dry_run_table(tried: Json) -> Table:
    """The paths as people read them."""
    title = (
        f"{tried['study']}: the whole study takes about {tried['estimated_hours']:.2g} device-hours"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("path", "works", "seconds", "peak MB", "substituted"):
        table.add_column(name, justify="right" if name in ("seconds", "peak MB") else "left")
    for row in tried["paths"]:
        works = "[green]yes[/]" if row["works"] else f"[red]no[/]: {row['why_not']}"
        table.add_row(row["path"], works, *_numbers(row), row["substituted"])
    return table


def _numbers(row: Json) -> tuple[Any, Any]:
    memory = row.get("peak_memory_mb")
    seconds = row.get("seconds")
    return (
        f"{seconds:.1f}" if seconds is not None else "",
        f"{memory:.0f}" if memory is not None else "",
    )
