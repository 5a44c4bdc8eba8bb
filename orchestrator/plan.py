"""What a study would do: every configuration with its exact size and its cost. Starts nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from orchestrator.facts import Json, facts_of
from orchestrator.manifest import facts_on_disk
from orchestrator.recipe import Recipe
from orchestrator.references import dense_int8, first_layers
from orchestrator.report import wording
from orchestrator.signature import Signature
from orchestrator.space import infeasible, num_steps, predict
from orchestrator.trial import TrialConfig

ASSUMED_MACS_PER_S = 5e10  # what a training step reaches on two cores, until a study measured it


def make_plan(recipe: Recipe) -> Json:
    """Configurations, references, totals and disk need, as JSON values."""
    facts = facts_on_disk(recipe) or facts_of(recipe)
    recipe.check_facts(facts)
    planned = list(_planned(recipe, facts))
    shown = wording.telling_apart(config.model_dump(mode="json") for _, config in planned)
    rows = [_row(role, config, recipe, facts, shown=shown) for role, config in planned]
    feasible = [row for row in rows if row["infeasible"] is None]
    return {
        "study": recipe.name,
        "target": recipe.target.model_dump(mode="json"),
        "num_rows": facts["num_rows"],
        "notes": facts.get("notes", []),
        "configurations": rows,
        "num_feasible": len(feasible),
        "predicted_hours": sum(row["predicted_s"] for row in feasible) / 3600,
        "disk_mb": sum(2 * row["size_mb"] + _checkpoint_mb(row) for row in feasible),
    }


def _checkpoint_mb(row: Json) -> float:
    """The trained model, in float32, as it is kept until the study ends."""
    return float(4 * row["num_params"] / 1e6)


def _planned(recipe: Recipe, facts: Json) -> Iterator[tuple[str, TrialConfig]]:
    """Baselines, references and what the search asks for, each configuration once."""
    seen = set()
    for role, config in _all_planned(recipe, facts):
        if config.id not in seen:
            seen.add(config.id)
            yield role, config


def _all_planned(recipe: Recipe, facts: Json) -> Iterator[tuple[str, TrialConfig]]:
    for model in recipe.models:
        finetune = recipe.baseline_budgets(model.id)[0]
        yield "baseline", recipe.trial_config(model=model.id, finetune=finetune)
    for model in recipe.models:
        arguments = (recipe, model.id, _signature(facts, model.id))
        yield from dense_int8(*arguments)
        yield from first_layers(*arguments)
    yield from (("trial", config) for config in recipe.asked())


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


def _row(
    role: str, config: TrialConfig, recipe: Recipe, facts: Json, *, shown: Collection[str]
) -> Json:
    signature = _signature(facts, config.model)
    values = config.model_dump(mode="json")
    row: Json = {
        "trial_id": config.id,
        "role": role,
        "config": values,
        "description": wording.describe(values, shown=shown),
        "infeasible": infeasible(config, signature, recipe),
    }
    if row["infeasible"] is None:
        length = round(facts["models"][config.model]["mean_length"])
        row |= predict(config, signature, recipe, length=length)
        trainings = _trainings(role, config, recipe)
        row["predicted_s"] = sum(training_seconds(c, signature, facts) for c in trainings)
    return row


def _trainings(role: str, config: TrialConfig, recipe: Recipe) -> list[TrialConfig]:
    """What is trained for a configuration: of the dense model its grid, and the best of it further."""
    if role != "baseline":
        return [config]
    budgets = recipe.baseline_budgets(config.model)
    return [recipe.trial_config(model=config.model, finetune=budget) for budget in budgets]


def _signature(facts: Json, model: str) -> Signature:
    return Signature.model_validate(facts["models"][model]["signature"])


def plan_table(plan: Json) -> Table:
    """The plan as people read it."""
    title = f"{plan['study']}: {plan['num_feasible']} of {len(plan['configurations'])}"
    table = Table(title=f"{title} configurations can work", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("trial", no_wrap=True)
    table.add_column("configuration", min_width=18)
    for name in ("size (MB)", "MACs", "parameters", "training"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in plan["configurations"]:
        table.add_row(row["trial_id"][:8], _what(row), *_figures(row))
    table.caption = "\n".join([_totals(plan), *plan["notes"]])
    table.caption_justify = "left"
    return table


def _totals(plan: Json) -> str:
    seconds = plan["predicted_hours"] * 3600
    rows = ", ".join(f"{count:,} {split}" for split, count in plan["num_rows"].items())
    return (
        f"about {wording.duration(seconds)} of training, up to {plan['disk_mb']:.3g} MB of disk;"
        f" rows: {rows}"
    )


def _what(row: Json) -> Text:
    role = "" if row["role"] == "trial" else f"{row['role']}: "
    if row["infeasible"] is None:
        return Text(f"{role}{row['description']}")
    reason = (f"\ncannot work: {row['infeasible']}", "yellow")
    return Text.assemble((f"{role}{row['description']}", "dim"), reason)


def _figures(row: Json) -> list[str]:
    if row["infeasible"] is not None:
        return []
    sizes = [wording.number(name, row[name]) for name in ("size_mb", "macs", "num_params")]
    return [*sizes, wording.duration(row["predicted_s"])]
