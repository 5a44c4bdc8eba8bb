"""What is wrong with a recipe: each check yields the problems it finds, where they are written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.finetune import FinetuneOptions
from orchestrator.metrics import DIRECTIONS, SHARES, metrics_of
from orchestrator.parameters import variants
from orchestrator.plugins import find, is_code, name_of
from orchestrator.problems import Place, Problem, describe, nearest
from orchestrator.resources import GangOptions
from orchestrator.runtimes import RUNTIMES
from orchestrator.search.grid import Grid
from orchestrator.space import Space
from orchestrator.space_checks import grid_problems, space_problems
from orchestrator.tasks import TASKS


def plugin_of(
    section: Any, key: str, catalog: Mapping[str, Any], problems: list[Problem], *, consent: bool
) -> Any:
    """The plug-in that a section names, with its options; None after noting why there is none."""
    section = {"name": section} if isinstance(section, str) else section
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        problems.append(((key, "name"), f"is missing{nearest('', catalog)}"))
        return None
    options = {name: value for name, value in section.items() if name != "name"}
    try:
        what = "searcher" if key == "search" else key
        kind = find(catalog, section["name"], what=what, consent=consent)
        return kind(**options)
    except LookupError as error:
        problems.append(((key, "name"), str(error)))
    except ValidationError as error:
        told = describe(error, kind, options, what=section["name"])
        problems += [((key, *place), text) for place, text in told]
    return None


def models_of(written: Any) -> list[Any]:
    """The models as a list, each with an id: the last part of its name, or what it is."""
    models = written if isinstance(written, list) else [written] if written else []
    return [_with_id(model) if isinstance(model, dict) else model for model in models]


def _with_id(model: dict[str, Any]) -> dict[str, Any]:
    config = model.get("config")
    name = str(model.get("name") or (config.get("model_type") if isinstance(config, dict) else ""))
    return {"id": re.sub(r"[^\w.-]", "-", Path(name).name or "model"), **model}


def same_ids(models: list[Any]) -> Iterator[Problem]:
    ids = [model.get("id") for model in models if isinstance(model, dict)]
    for i, name in enumerate(ids):
        if name in ids[:i]:
            yield ("model", i, "id"), f"has to differ between models, got `{name}` twice."


def objectives_of(written: Mapping[str, Any], problems: list[Problem]) -> list[Any]:
    """Objectives with their directions; a recipe says the direction only of metrics of its own."""
    asked = written.get("objectives", [])
    objectives = []
    for i, item in enumerate(asked if isinstance(asked, list) else [asked]):
        objective = {"name": item} if isinstance(item, str) else item
        known = DIRECTIONS.get(str(objective.get("name"))) if isinstance(objective, dict) else None
        if known is not None and objective.get("direction", known) != known:
            text = f"of {objective['name']} is {known}, got {objective['direction']!r}."
            problems.append((("objectives", i, "direction"), text))
        if isinstance(objective, dict) and (known is not None or not _own_metrics(written)):
            objective = {**objective, "direction": known or "min"}
        objectives.append(objective)
    return objectives


def _own_metrics(written: Mapping[str, Any]) -> bool:
    """Whether a command or a task of the user's own measures, and so may give any metric."""
    target, task = written.get("target"), written.get("task")
    name = task.get("name") if isinstance(task, dict) else task
    return is_code(str(name)) or (isinstance(target, dict) and bool(target.get("command")))


def limits_of(written: Any, problems: list[Problem]) -> list[Any]:
    """`{metric: {min, max}}` as objectives that carry limits."""
    if not isinstance(written, dict):
        problems.append((("limits",), f"has to map metrics to {{min, max}}, got {written!r}."))
        return []
    limits = []
    for name, limit in written.items():
        place = ("limits", name)
        if not isinstance(limit, dict) or not limit or set(limit) - {"min", "max"}:
            problems.append((place, f"has to be {{min: …}}, {{max: …}} or both, got {limit!r}."))
        elif not all(type(value) in (int, float) for value in limit.values()):
            problems.append((place, f"has to hold numbers, got {limit!r}."))
        elif limit.get("min", -math.inf) > limit.get("max", math.inf):
            problems.append((place, f"has to have min <= max, got {limit!r}."))
        elif name in DIRECTIONS and not _can_be_met(name, **limit):
            bounds = "between 0 and 1" if name in SHARES else "at least 0"
            problems.append((place, f"can be met by no model: it is {bounds}, got {limit!r}."))
        else:
            limits.append({"name": name, "direction": DIRECTIONS.get(name, "min"), **limit})
    return limits


def _can_be_met(metric: str, *, min: float = 0.0, max: float = math.inf) -> bool:
    """Whether there are values of a metric within a limit."""
    return max >= 0 and (metric not in SHARES or min <= 1)


def space_of(section: Any, models: list[Any], seed: Any, problems: list[Problem]) -> Any:
    """The space with the offered models in it; with an unknown key noted, what is left of it."""
    if not isinstance(section, dict):
        return section
    if "model" in section:
        problems.append((("space", "model"), "is not set here: list several under `model`."))
    ids = tuple(str(model.get("id")) for model in models if isinstance(model, dict))
    values = {"seed": seed, **section, "model": ids or ("",)}
    try:
        return Space.model_validate(values)
    except ValidationError as error:
        told = describe(error, Space, values, what="space")
        problems += [(("space", *place), text) for place, text in told]
        kept = ("model", "prune", "quantize", "finetune", "seed")
        return Space.model_validate({key: values[key] for key in kept if key in values})


def problems_of(written: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Problem]:
    """What the types alone do not say. `values` are the sections with plug-ins in their places."""
    consent = written.get("allow_code") is True
    for key in ("source", "overrides"):
        if key in written:
            yield (key,), "is not a key of `recipe`."
    for key in ("model", "objectives"):
        if not values[key]:
            yield (key,), "is missing."
    yield from same_ids(values["model"])
    yield from target_problems(written.get("target"), consent=consent)
    yield from host_problems(written)
    yield from resource_problems(written, values)
    yield from metric_problems(written, values)
    if isinstance(values["space"], Space):
        yield from below("space", space_problems(values["space"], consent=consent))
        if isinstance(values["search"], Grid):
            yield from below("space", grid_problems(values["space"]))
    yield from below("baseline", baseline_problems(written.get("baseline")))


def baseline_problems(written: Any) -> Iterator[Problem]:
    """The dense model's own fine-tuning: a grid of options, and nobody to learn from."""
    section = written.get("finetune") if isinstance(written, dict) else None
    if not isinstance(section, dict):
        return
    if section.get("distillation") is not None:
        yield ("finetune", "distillation"), "has no teacher: the dense model is the teacher."
    space = Space(model=("",), finetune=section)
    yield from space_problems(space, consent=False)
    yield from grid_problems(space)


def below(section: str, problems: Iterable[Problem]) -> Iterator[Problem]:
    """The same problems, seen from the whole recipe."""
    return (((section, *place), text) for place, text in problems)


def metric_problems(written: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Problem]:
    """Objectives and limits on numbers that nothing will measure."""
    objectives = [item for item in values["objectives"] if isinstance(item, dict)]
    names = [str(objective.get("name")) for objective in objectives]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield ("objectives", i), f"names `{name}` again."
    task = values["task"]
    whose = "any task" if task is None else name_of(TASKS, task)
    given = frozenset(DIRECTIONS) if task is None else metrics_of(task.kind)
    if _own_metrics(written):
        return
    asked: list[tuple[Place, str]] = [(("objectives", i), name) for i, name in enumerate(names)]
    asked += [(("limits", limit["name"]), limit["name"]) for limit in values["limits"]]
    for place, name in asked:
        if name not in given:
            yield place, f"names no metric that {whose} gives, got `{name}`{nearest(name, given)}"


def host_problems(written: Mapping[str, Any]) -> Iterator[Problem]:
    target, resources = written.get("target"), written.get("resources")
    engine = resources.get("engine") if isinstance(resources, dict) else None
    if engine == "inline" and isinstance(target, dict) and target.get("host"):
        yield (
            ("target", "host"),
            "needs `resources.engine: ray`, which knows nodes by their labels.",
        )


def resource_problems(written: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Problem]:
    """Options for models that are not there, and DeepSpeed files that count batches otherwise."""
    resources = written.get("resources")
    if not isinstance(resources, dict):
        return
    per_model = resources.get("per_model")
    models = [str(model.get("id")) for model in values["model"] if isinstance(model, dict)]
    for name in per_model if isinstance(per_model, dict) else ():
        if name not in models:
            place = ("resources", "per_model", name)
            yield place, f"names no model of this recipe, which has {', '.join(models)}."
    sections: list[tuple[Place, Any]] = [(("resources",), resources)]
    if isinstance(per_model, dict):
        sections += [(("resources", "per_model", name), each) for name, each in per_model.items()]
    for section_place, section in sections:
        if isinstance(section, dict) and isinstance(values["space"], Space):
            yield from batch_problems(section_place, section, values["space"])


def batch_problems(place: Place, section: Mapping[str, Any], space: Space) -> Iterator[Problem]:
    """A DeepSpeed configuration that would train on other batches than the recipe's."""
    try:
        options = GangOptions(**{k: v for k, v in section.items() if k in GangOptions.model_fields})
    except ValidationError:
        return  # told with the others
    config = options.deepspeed or {}
    for _, values in variants(space.tree["finetune"], ()):
        finetune = FinetuneOptions(**values)
        rows, rounds = finetune.per_device_train_batch_size, finetune.gradient_accumulation_steps
        for name, wanted in (
            ("train_batch_size", rows * rounds),
            ("gradient_clipping", finetune.max_grad_norm),
        ):
            found = config.get(name, "auto")
            if found not in ("auto", wanted):
                yield (
                    (*place, "deepspeed"),
                    f"has {name} {found}, but the recipe trains with {wanted:g}: leave it out, or"
                    " write auto.",
                )
                return
        for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            if config.get(name, "auto") != "auto":
                yield (
                    (*place, "deepspeed"),
                    f"has {name} {config[name]}, which follows from the recipe's batch and the number"
                    " of workers: leave it out, or write auto.",
                )
                return


def target_problems(written: Any, *, consent: bool) -> Iterator[Problem]:
    runtime = written.get("runtime") if isinstance(written, dict) else None
    if isinstance(runtime, str):
        try:
            find(RUNTIMES, runtime, what="runtime", consent=consent)
        except LookupError as error:
            yield ("target", "runtime"), str(error)
