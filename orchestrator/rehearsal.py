"""A recipe as this machine can try it: with the devices that are here, and as many workers as fit."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.recipe import Recipe
from orchestrator.resources import GangOptions, Resources, num_cores

FEW = 2  # workers that stand in for more: the least among which something is shared out


@dataclass(frozen=True)
class Rehearsal:
    """What is tried in place of a recipe: on `device`, and how each model's trials differ, in words."""

    recipe: Recipe
    device: str | None
    substituted: dict[str, str]


def rehearse(recipe: Recipe, *, device: str | None, num_gpus: int) -> Rehearsal:
    """The recipe for a machine with so many GPUs, of which none is used where `device` is `cpu`.

    A gang that asks for more of them than there are is stood in for by two processes on the CPU.
    """
    num_gpus = 0 if device == "cpu" else num_gpus
    wanted = {model.id: recipe.resources.of(model.id) for model in recipe.models}
    if any(num_gpus < options.num_workers for options in wanted.values()):
        num_gpus, device = 0, "cpu"
    here = {model: _that_fit(options, num_gpus) for model, options in wanted.items()}
    served = _served_here(recipe, num_gpus)
    said = {m: _said(wanted[m], here[m], recipe, served, num_gpus) for m in wanted}
    resources = _resources(recipe.resources, here)
    return Rehearsal(
        served.model_copy(update={"resources": resources}), device=device, substituted=said
    )


def _that_fit(options: GangOptions, num_gpus: int) -> GangOptions:
    workers = options.num_workers
    if num_gpus:
        return options.model_copy(update={"cpus_per_trial": None})
    if options.gpus_per_trial or workers > num_cores():
        workers = min(workers, FEW, num_cores())
    few = {"gpus_per_trial": 0, "cpus_per_trial": workers, "workers_per_trial": workers}
    name = options.strategy_name  # of four workers it is ddp, also where one stands in for them
    return options.model_copy(update=few | {"strategy": name})


def _served_here(recipe: Recipe, num_gpus: int) -> Recipe:
    if num_gpus or not recipe.target.device.startswith("cuda"):
        return recipe
    target = recipe.target.model_copy(update={"device": "cpu"})
    return recipe.model_copy(update={"target": target})


def _said(
    wanted: GangOptions, here: GangOptions, recipe: Recipe, served: Recipe, num_gpus: int
) -> str:
    parts = []
    if wanted.gpus_per_trial and not num_gpus:
        parts.append(
            f"trained by {here.num_workers} on cpu instead of {wanted.gpus_per_trial} GPUs"
        )
    elif here.num_workers != wanted.num_workers:
        parts.append(f"trained by {here.num_workers} instead of {wanted.num_workers}")
    if served is not recipe:
        parts.append(f"served on cpu instead of {recipe.target.device}")
    return ", ".join(parts)


def _resources(resources: Resources, here: dict[str, GangOptions]) -> Resources:
    """One gang at a time, on a Ray of its own where a gang is needed at all."""
    is_shared = any(each.strategy_name != "single" for each in here.values())
    engine = "ray" if is_shared else "inline"
    return Resources(
        engine=engine,
        address="local",
        per_model=here,
        max_gangs=1,
        save_steps=0,
        time_limit_s=resources.time_limit_s,
    )
