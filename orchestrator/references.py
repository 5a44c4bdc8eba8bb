"""Points that are always on the picture: what anyone would try first, and the control."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.recipe import Recipe
from orchestrator.signature import Signature
from orchestrator.space import infeasible, resolve
from orchestrator.trial import Infeasible, TrialConfig

INT8 = {"scheme": "W8A8", "embeddings": True}  # what a runtime's own quantizer does by default
Reference = tuple[str, TrialConfig]


def dense_int8(recipe: Recipe, model: str, signature: Signature) -> Iterator[Reference]:
    """The dense model with post-training int8."""
    if not recipe.references.dense_int8:
        return
    config = resolve(model=model, quantize=INT8, finetune={"max_steps": 0}, seed=recipe.seed)
    if infeasible(config, signature, recipe) is None:
        yield "dense int8", config


def first_layers(recipe: Recipe, model: str, signature: Signature) -> Iterator[Reference]:
    """The first k layers of the dense model, distilled and int8, at the largest budget of a trial."""
    total = next(g.num_units for g in signature.groups if g.kind == "layers")
    finetune = recipe.largest_budget()
    finetune["distillation"] = finetune.get("distillation") or {}
    for count in recipe.references.first_layers:
        try:
            config = resolve(
                model=model,
                prune={
                    "method": "structured",
                    "layers": round(1 - count / total, 6),
                    "layer_choice": "first",
                },
                quantize=INT8 | {"qat": True},
                finetune=finetune,
                seed=recipe.seed,
            )
        except Infeasible:
            continue
        if count < total and infeasible(config, signature, recipe) is None:
            name = "layer" if count == 1 else "layers"
            yield f"first {count} {name}", config


def random_twin(configs: Sequence[TrialConfig]) -> list[TrialConfig]:
    """The first structured configuration again, with units chosen at random: the control.

    [] when no configuration chose units by their importance.
    """
    for config in configs:
        methods = [dict(method) for method in config.prune]
        chosen = [method for method in methods if _chooses_units(method)]
        if chosen:
            for method in chosen:
                method["importance"] = "random"
            return [config.model_copy(update={"prune": tuple(methods)})]
    return []


def _chooses_units(method: dict[str, Any]) -> bool:
    """Whether importance decides which heads, neurons or layers go."""
    if method["method"] != "structured" or method["importance"] == "random":
        return False
    by_importance = method["layers"] > 0 and method["layer_choice"] == "importance"
    return bool(method["heads"] > 0 or method["neurons"] > 0 or by_importance)
