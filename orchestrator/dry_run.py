"""Every distinct path of a recipe once, small: what works here, what does not, what the study will cost.

A path is prune methods × scheme × runtime. It takes two optimizer steps on 32 rows and is then
exported and measured like a real trial, in a folder that is thrown away. A trial for many GPUs is
trained by as many processes as fit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from orchestrator.cost import Cost, path_of
from orchestrator.facts import Json
from orchestrator.finetune import FinetuneOptions
from orchestrator.launch import Done, Launcher, make_launcher
from orchestrator.recipe import Recipe
from orchestrator.references import dense_int8, first_layers, random_twin
from orchestrator.rehearsal import rehearse
from orchestrator.signature import Signature
from orchestrator.space import infeasible, trains
from orchestrator.storage import Storage
from orchestrator.trial import TrialConfig, TrialResult, TrialStatus, Work

ROWS, STEPS = 32, 2
MAX_CONFIGS = 2000  # so many are looked through for paths


def dry_run(recipe: Recipe, *, device: str | None = None) -> Json:
    """Try every path. `works` is whether the baselines and at least one path did.

    `estimated_hours` is None where a baseline did not.
    """
    import torch

    started = time.perf_counter()
    trying = rehearse(recipe, device=device, num_gpus=torch.cuda.device_count())
    with (
        _thrown_away(trying.recipe) as (trying_recipe, folder),
        closing(_launcher(trying_recipe, folder, trying.device)) as launcher,
    ):
        facts = launcher.facts()
        recipe.check_facts(facts)
        setup_s = time.perf_counter() - started
        said = trying.substituted
        baselines = {m.id: _try_baseline(m.id, launcher, said[m.id]) for m in recipe.models}
        works = all(row["works"] for row in baselines.values())
        reasons = reasons_against(planned_configs(recipe, facts), recipe, facts)
        rows = {
            path: _try(path, config, reasons[config], launcher, said[config.model])
            for path, config in distinct_paths(reasons).items()
            if works
        }
    workers = {m: trying.recipe.resources.of(m).num_workers for m in said}
    cost = Cost(
        recipe, facts, baselines=baselines, paths=rows, num_tried=ROWS, workers_tried=workers
    )
    can_work = [config for config, reason in reasons.items() if reason is None]
    return {
        "study": recipe.name,
        "paths": [*baselines.values(), *rows.values()],
        "works": works and any(row["works"] for row in rows.values()),
        "estimated_hours": (setup_s + cost.study_s(can_work)) / 3600 if works else None,
    }


@contextmanager
def _thrown_away(recipe: Recipe) -> Iterator[tuple[Recipe, Path]]:
    """A folder, and the recipe with a storage of its own, that are gone afterwards.

    On a cluster the folder is beside the study's, which all nodes see.
    """
    beside = None
    if recipe.resources.engine == "ray" and recipe.resources.address != "local":
        parents = Path(recipe.output_dir).absolute().parents
        beside = next(path for path in parents if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".slimtune-dry-", dir=beside) as name:
        folder = Path(name)
        if recipe.storage is None:
            yield recipe, folder
            return
        uri = f"{recipe.storage.rstrip('/')}/{folder.name}"
        try:
            yield recipe.model_copy(update={"storage": uri}), folder
        finally:
            Storage(recipe.storage, folder.parent).withdraw(folder)


def _launcher(recipe: Recipe, folder: Path, device: str | None) -> Launcher:
    return make_launcher(recipe, folder, device=device, rows_limit=ROWS, steps_limit=STEPS)


def planned_configs(recipe: Recipe, facts: Json) -> list[TrialConfig]:
    """References and what the searcher would ask, up to a bound, each once, in the study's order."""
    configs = list(dict.fromkeys(_asked(recipe, facts)))
    twins = random_twin(configs) if recipe.references.random_twin else []
    return list(dict.fromkeys([*configs, *twins]))


def _asked(recipe: Recipe, facts: Json) -> Iterator[TrialConfig]:
    for model in recipe.models:
        arguments = (recipe, model.id, _signature(model.id, facts))
        yield from (config for _, config in dense_int8(*arguments))
        yield from (config for _, config in first_layers(*arguments))
    yield from islice(recipe.asked(), MAX_CONFIGS)


def reasons_against(
    configs: Sequence[TrialConfig], recipe: Recipe, facts: Json
) -> dict[TrialConfig, str | None]:
    """Why a configuration cannot work as the recipe has it, None where nothing speaks against it."""
    signatures = {model.id: _signature(model.id, facts) for model in recipe.models}
    return {config: infeasible(config, signatures[config.model], recipe) for config in configs}


def distinct_paths(reasons: Mapping[TrialConfig, str | None]) -> dict[str, TrialConfig]:
    """One configuration a path: the first that can work and trains, as far as there is one."""
    paths: dict[str, TrialConfig] = {}
    for config, reason in reasons.items():
        rival = paths.setdefault(path_of(config), config)
        if _rank(config, reason) < _rank(rival, reasons[rival]):
            paths[path_of(config)] = config
    return paths


def _rank(config: TrialConfig, reason: str | None) -> tuple[bool, bool]:
    return reason is not None, not trains(FinetuneOptions(**config.finetune))


def _signature(model: str, facts: Json) -> Signature:
    return Signature.model_validate(facts["models"][model]["signature"])


def _try_baseline(model: str, launcher: Launcher, substituted: str) -> Json:
    work = Work("baseline", f"baseline:{model}", model=model)
    return _row(f"{model}: dense", TrialConfig(model=model), work, launcher, substituted)


def _try(
    path: str, config: TrialConfig, reason: str | None, launcher: Launcher, substituted: str
) -> Json:
    if reason is None:
        work = Work("trial", config.id, config=config)
        return _row(path, config, work, launcher, substituted)
    return _failed(path, config, reason, "")


def _row(path: str, config: TrialConfig, work: Work, launcher: Launcher, substituted: str) -> Json:
    """What came of a work."""
    launcher.start(work)
    (event,) = launcher.wait()
    if isinstance(event, Done):
        assert isinstance(event.result, TrialResult)
        return _tried(path, event.result, substituted)
    return _failed(path, config, event.message, substituted)


def _failed(path: str, config: TrialConfig, why: str, substituted: str) -> Json:
    values = config.model_dump(mode="json")
    told = {"path": path, "works": False, "why_not": why}
    return told | {"substituted": substituted, "config": values}


def _tried(path: str, result: TrialResult, substituted: str) -> Json:
    details = result.details
    trained = [line for line in details.get("candidates", ()) if "diverged" not in line]
    return {
        "path": path,
        "works": result.status is TrialStatus.COMPLETED,
        "why_not": result.message,
        "seconds": result.device_seconds,
        "peak_memory_mb": max(
            details.get("peak_memory_mb_by_rank") or [details.get("peak_training_memory_mb", 0)]
        )
        or None,
        "substituted": substituted,
        "config": result.config.model_dump(mode="json"),
        "stage_seconds": details.get("stage_seconds", {}),
        "training": trained[0] if trained else details.get("training"),
    }


def dry_run_table(tried: Json) -> Table:
    """The paths as people read them."""
    hours = tried["estimated_hours"]
    title = f"{tried['study']}: the whole study takes about {hours or 0:.2g} device-hours"
    if hours is None:
        title = f"{tried['study']}: no trial can be judged without its dense baseline"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("path", "works", "seconds", "peak MB", "substituted"):
        table.add_column(name, justify="right" if name in ("seconds", "peak MB") else "left")
    for row in tried["paths"]:
        works = "[green]yes[/]" if row["works"] else f"[red]no[/]: {escape(row['why_not'])}"
        table.add_row(row["path"], works, *_numbers(row), row["substituted"])
    return table


def _numbers(row: Json) -> tuple[Any, Any]:
    memory = row.get("peak_memory_mb")
    seconds = row.get("seconds")
    return (
        f"{seconds:.1f}" if seconds is not None else "",
        f"{memory:.0f}" if memory is not None else "",
    )
