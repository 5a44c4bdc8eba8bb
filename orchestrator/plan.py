"""What a study would do: every configuration with its exact size and its cost. Starts nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.facts import Json, facts_of
from orchestrator.recipe import Recipe
from orchestrator.references import dense_int8, first_layers
from orchestrator.signature import Signature
from orchestrator.space import infeasible, predict
from orchestrator.study import identity_matches, read_manifest_facts
from orchestrator.trial import TrialConfig

ASSUMED_MACS_PER_S = 5e10  # what a training step reaches on two cores, until a study measured it


def make_plan(recipe: Recipe) -> Json:
    """Configurations, references, totals and disk need, as JSON values."""
    folder = Path(recipe.output_dir)
    facts = read_manifest_facts(folder) if identity_matches(recipe) else None
    facts = facts or facts_of(recipe)
    recipe.check_facts(facts)
    rows = [_baseline_row(model.id, recipe, facts) for model in recipe.models]
    for model in recipe.models:
        arguments = (recipe, model.id, _signature(facts, model.id))
        for role, config in (*dense_int8(*arguments), *first_layers(*arguments)):
            rows.append(_row(role, config, recipe, facts))
    search = recipe.search.start(recipe.space, seed=recipe.seed)
    rows += [_row("trial", config, recipe, facts) for config in iter(search.ask, None) if config]
    feasible = [row for row in rows if row["infeasible"] is None]
    return {
        "study": recipe.name,
        "target": recipe.target.model_dump(mode="json"),
        "num_rows": facts["num_rows"],
        "configurations": rows,
        "num_feasible": len(feasible),
        "predicted_hours": sum(row["predicted_s"] for row in feasible) / 3600,
        "disk_mb": sum(2 * row["size_mb"] for row in feasible),
    }


def training_seconds(
    config: TrialConfig,
    signature: Signature,
    facts: Json,
    *,
    macs_per_s: float = ASSUMED_MACS_PER_S,
) -> float:
    """Seconds of fine-tuning: forward and backward are three times the forward multiply-accumulates."""
    model = facts["models"][config.model]
    steps = num_steps(config.finetune, model["num_train"])
    batch = config.finetune["per_device_train_batch_size"]
    rows = steps * batch * config.finetune["gradient_accumulation_steps"]
    macs = signature.macs(batch=1, length=max(1, round(model["mean_length"])))
    return float(3 * macs * rows / macs_per_s)


def num_steps(finetune: Json, num_train: int) -> int:
    """Optimizer steps of a fine-tuning section on `num_train` rows."""
    steps: int | None = finetune["max_steps"]
    if steps is not None:
        return steps
    if finetune["augmentation"] is not None:
        num_train *= 1 + finetune["augmentation"]["copies"]
    batches = -(-num_train // finetune["per_device_train_batch_size"])
    epochs: float = finetune["num_train_epochs"]
    return math.ceil(epochs * batches / finetune["gradient_accumulation_steps"])


def _baseline_row(model: str, recipe: Recipe, facts: Json) -> Json:
    """The dense model: its grid, and the winner's further training."""
    budgets = recipe.baseline_budgets(model)
    configs = [recipe.trial_config(model=model, finetune=budget) for budget in budgets]
    signature = _signature(facts, model)
    seconds = sum(training_seconds(config, signature, facts) for config in configs)
    return _row("baseline", configs[0], recipe, facts) | {"predicted_s": seconds}


def _row(role: str, config: TrialConfig, recipe: Recipe, facts: Json) -> Json:
    signature = _signature(facts, config.model)
    reason = infeasible(config, signature, recipe)
    row: Json = {
        "trial_id": config.id,
        "role": role,
        "config": config.model_dump(mode="json"),
        "description": recipe.describe(config, role),
        "infeasible": reason,
    }
    if reason is None:
        length = round(facts["models"][config.model]["mean_length"])
        known = predict(config, signature, recipe, length=length)
        row |= known | {"predicted_s": training_seconds(config, signature, facts)}
    return row


def _signature(facts: Json, model: str) -> Signature:
    return Signature.model_validate(facts["models"][model]["signature"])


def plan_table(plan: Json) -> Table:
    """The plan as people read it."""
    title = (
        f"{plan['study']}: {plan['num_feasible']} of {len(plan['configurations'])} configurations"
        f" can work · about {plan['predicted_hours']:.2g} device-hours of training"
        f" · up to {plan['disk_mb']:.0f} MB of disk"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("trial", no_wrap=True)
    table.add_column("what")
    for name in ("size_mb", "MMACs", "params", "train s"):
        table.add_column(name, justify="right")
    for row in plan["configurations"]:
        table.add_row(row["trial_id"][:8], _what(row), *_figures(row))
    return table


def _what(row: Json) -> str:
    if row["infeasible"] is None:
        return str(row["description"])
    return f"[dim]{row['description']}[/]\n[yellow]cannot work: {row['infeasible']}[/]"


def _figures(row: Json) -> tuple[Any, ...]:
    if row["infeasible"] is not None:
        return ("", "", "", "")
    return (
        f"{row['size_mb']:.2f}",
        f"{row['macs'] / 1e6:.1f}",
        f"{row['num_params'] / 1e6:.2f} M",
        f"{row['predicted_s']:.0f}",
    )
