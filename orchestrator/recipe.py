"""The typed recipe: what the user wrote, checked as a whole. The one place where user input is checked.

Every problem is found before any work and told in one go, as `BadInput`: file, key, value, and
what would be valid.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import (
    ConfigDict,
    Field,
    PositiveInt,
    SkipValidation,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from orchestrator import recipe_checks as checks
from orchestrator.budget import Budget
from orchestrator.finetune import FinetuneOptions
from orchestrator.measure import MeasureOptions
from orchestrator.metrics import DIRECTIONS
from orchestrator.parameters import variants
from orchestrator.pareto import Objective
from orchestrator.plugins import name_of
from orchestrator.problems import Problem, describe
from orchestrator.recipe_file import override, read, told
from orchestrator.resources import Resources
from orchestrator.runtimes import Target
from orchestrator.search import SEARCHERS, Goal, Searcher
from orchestrator.signature import Signature
from orchestrator.space import Space, finetune_sections, grid, infeasible, predict, resolve, trains
from orchestrator.tasks import TASKS, Task
from orchestrator.trial import BadInput, Frozen, TrialConfig, content_hash

MAX_CHECKED = 500  # configurations that are looked through for one that can work; others may
# may differ between runs of one study
NOT_IDENTITY = ("name", "output_dir", "keep", "resources", "budget", "ledger", "storage")


class TokenizerOptions(Frozen):
    """A tokenizer trained on the task's training split, for a model from scratch."""

    train: Literal["bpe"] = "bpe"
    vocab_size: int = Field(gt=256)


class ModelOptions(Frozen):
    """A base model: `name` is a hub id or a folder; `config` describes one to train from scratch.

    `finetuned` says that the model answers the task already: it is evaluated and not trained.
    """

    id: str = Field("", pattern=r"^[\w.-]*$")
    name: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | TokenizerOptions | None = None
    revision: str | None = None
    finetuned: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.name is None) == (self.config is None):
            raise ValueError("needs either `name` (hub id or folder) or `config` (from scratch)")
        if self.config is None:
            if isinstance(self.tokenizer, TokenizerOptions):
                raise ValueError("can train a `tokenizer` only for a model from scratch (`config`)")
            return self
        if "model_type" not in self.config:
            raise ValueError("needs `model_type` in `config`, for instance llama or bert")
        if self.tokenizer is None:
            raise ValueError("needs `tokenizer` beside `config`: a name, or {train, vocab_size}")
        if self.finetuned:
            raise ValueError("cannot be `finetuned` already and start from scratch (`config`)")
        return self


class Baseline(Frozen):
    """How the dense model is trained: the best of a small grid of fine-tuning options."""

    finetune: dict[str, Any] = {}


class References(Frozen):
    """Points that are always on the picture, where they make sense.

    `first_layers`: that many first layers of the dense model, distilled, in int8. `random_twin`:
    one structured point of the front again, with random importance.
    """

    dense_int8: bool = True
    first_layers: tuple[PositiveInt, ...] = (2, 4)
    random_twin: bool = True


class Recipe(Frozen):
    """A study as the user wants it. `source` is the text as written, `overrides` the command line's.

    `storage` is a URI at which workers that share no file system keep what they share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str = Field(pattern=r"^[\w.-]+$")
    output_dir: str
    model: tuple[ModelOptions, ...]
    task: SkipValidation[Task]
    target: Target = Target()
    objectives: tuple[Objective, ...]
    limits: tuple[Objective, ...] = ()
    baseline: Baseline = Baseline()
    space: Space
    search: SkipValidation[Searcher]
    references: References = References()
    measure: MeasureOptions = MeasureOptions()
    calibration_batch_size: int = Field(16, gt=0)
    seed: int = Field(0, ge=0)
    keep: Literal["front", "all"] = "front"
    resources: Resources = Resources()
    budget: Budget = Budget()
    ledger: str | None = Field(None, pattern="^postgresql://")
    storage: str | None = Field(None, pattern=r"^[a-z0-9]+://")
    allow_code: bool = False
    source: str = Field("", exclude=True, repr=False)
    overrides: tuple[str, ...] = Field((), exclude=True)

    @field_validator("ledger", "storage")
    @classmethod
    def _holds_no_secret(cls, url: str | None, info: ValidationInfo) -> str | None:
        if url is not None and urlsplit(url).password is not None:
            instead = {
                "ledger": "set PGPASSWORD or use a .pgpass file",
                "storage": "give credentials through the environment",
            }
            raise ValueError(
                "names a password, which would be written down: leave it out, and"
                f" {instead[str(info.field_name)]}"
            )
        return url

    @classmethod
    def from_resolved(cls, values: Mapping[str, Any], *, output_dir: Path | None = None) -> Recipe:
        """The recipe whose `resolved()` are `values`, such as those in a manifest."""
        moved = {} if output_dir is None else {"output_dir": str(output_dir)}
        return make_recipe({**values, **moved})

    @property
    def models(self) -> tuple[ModelOptions, ...]:
        """The base models that are offered."""
        return self.model

    def model_options(self, model: str) -> ModelOptions:
        """The base model with that id."""
        return next(options for options in self.model if options.id == model)

    def sign(self, metric: str) -> int:
        """1 for a metric that is better when larger, -1 for the others."""
        own = {objective.name: objective.direction for objective in self.objectives}
        return 1 if (own | DIRECTIONS)[metric] == "max" else -1

    # -- the dense model -------------------------------------------------------------------------

    def baseline_folder(self, study: Path, model: str) -> Path:
        """Where the dense model of `model` lies in a study's folder."""
        return study / "baseline" if len(self.model) == 1 else study / "baseline" / model

    def baseline_grid(self, model: str) -> list[FinetuneOptions]:
        """What the dense model is the best of; no training at all for a model fine-tuned already."""
        if self.model_options(model).finetuned:
            return [FinetuneOptions(max_steps=0)]
        space = Space(model=(model,), finetune=self.baseline.finetune, seed=self.seed)
        return [FinetuneOptions(**config.finetune) for config in grid(space)]

    def continued_baseline(self, trained: FinetuneOptions) -> FinetuneOptions | None:
        """What the best dense model is trained on with: the options of the trial with most budget.

        Where those are a student's, its own options for as many passes over the real rows as the
        student makes over all of its rows. None where trials do not train, and for a model that is
        fine-tuned already.
        """
        longest = FinetuneOptions(**self.largest_budget())
        if not (trains(trained) and trains(longest)):
            return None
        if longest.distillation is None:
            return longest
        copies = longest.augmentation.copies if longest.augmentation else 0
        budget = {
            "num_train_epochs": longest.num_train_epochs * (1 + copies),
            "max_steps": longest.max_steps,
        }
        return trained.model_copy(update=budget)

    def baseline_budgets(self, model: str) -> list[dict[str, Any]]:
        """The fine-tuning of every dense model that is trained, as plain data."""
        candidates = self.baseline_grid(model)
        longer = self.continued_baseline(candidates[0])
        return [o.model_dump(mode="json") for o in (*candidates, longer) if o is not None]

    # -- trials ----------------------------------------------------------------------------------

    def trial_config(self, *, model: str, **sections: Any) -> TrialConfig:
        """A configuration outside the space, such as a reference, with every option resolved."""
        return resolve(model=model, **{"seed": self.seed, **sections})

    def asked(self) -> Iterator[TrialConfig]:
        """Every configuration the search asks for, were none of them to teach it anything."""
        search = self.search.start(self.space, seed=self.seed, goal=self.goal)
        while (ask := search.ask()) is not None:
            yield ask.config

    @property
    def goal(self) -> Goal:
        """What the search is after."""
        return Goal(objectives=self.objectives, limits=self.limits)

    def num_trials(self) -> int:
        """How many configurations the search asks for."""
        return sum(1 for _ in self.asked())

    def largest_budget(self) -> dict[str, Any]:
        """Fine-tuning options of the space that spend the largest budget, as plain data.

        Budgets in epochs count as larger than those in steps.
        """
        sections = (value for _, value in variants(self.space.tree["finetune"], ()))
        options = [FinetuneOptions(**section) for section in sections]
        return max(options, key=_budget).model_dump(mode="json")

    def finetunes_with(self, option: str) -> bool:
        """Whether anything may be trained with that option of fine-tuning switched on."""
        dense = Space(model=("",), finetune=self.baseline.finetune)
        sections = (each for space in (self.space, dense) for each in finetune_sections(space))
        return any(section.get(option) for section in sections)

    def check_facts(self, facts: Mapping[str, Any]) -> None:
        """Raise `BadInput`, with the reasons, where no configuration can work within the limits."""
        models = facts["models"].items()
        signatures = {name: Signature.model_validate(model["signature"]) for name, model in models}
        reasons: Counter[str] = Counter()
        reached: dict[str, list[float]] = {}
        for number, config in enumerate(self.asked()):
            if number == MAX_CHECKED:
                return
            signature = signatures[config.model]
            if (reason := infeasible(config, signature, self)) is not None:
                reasons[reason] += 1
            elif broken := self._broken_limits(predict(config, signature, self)):
                for name, value in broken.items():
                    reached.setdefault(name, []).append(value)
            else:
                return
        why = [f"{reason} ({count} of them)" for reason, count in reasons.most_common(5)]
        why += [_unmet(o, reached[o.name]) for o in self.limits if o.name in reached]
        told = "; ".join(why) or "it is empty"
        raise BadInput([f"space: none of its configurations can work: {told}."])

    def _broken_limits(self, known: Mapping[str, float]) -> dict[str, float]:
        """What is known before training and outside its limit."""
        asked = (limit for limit in self.limits if limit.name in known)
        return {o.name: known[o.name] for o in asked if not o.allows(known[o.name])}

    # -- what it is ------------------------------------------------------------------------------

    def resolved(self) -> dict[str, Any]:
        """The whole recipe with its defaults, as JSON values that `make_recipe` takes again."""
        values = self.model_dump(mode="json")
        for objective in values["objectives"]:
            del objective["min"], objective["max"]
        values["limits"] = {
            limit.name: {
                key: value for key in ("min", "max") if (value := getattr(limit, key)) is not None
            }
            for limit in self.limits
        }
        values["task"] = {**values["task"], "name": name_of(TASKS, self.task)}
        values["search"] = {**values["search"], "name": name_of(SEARCHERS, self.search)}
        return values

    def identity(self) -> dict[str, Any]:
        """What has to be equal for a study to be the same one; a search may be made longer."""
        values = {k: v for k, v in self.resolved().items() if k not in NOT_IDENTITY}
        values["search"] = {k: v for k, v in values["search"].items() if k != "num_trials"}
        return values

    @property
    def hash(self) -> str:
        """Equal for recipes that ask for the same work, whatever they are called."""
        return content_hash({k: v for k, v in self.resolved().items() if k not in NOT_IDENTITY})


def _budget(options: FinetuneOptions) -> tuple[bool, float]:
    if options.max_steps is None:
        return options.num_train_epochs > 0, options.num_train_epochs
    rows = options.per_device_train_batch_size * options.gradient_accumulation_steps
    return False, options.max_steps * rows


def _unmet(limit: Objective, values: Sequence[float]) -> str:
    """That values known before training are all outside a limit, and how near they come."""
    low = -math.inf if limit.min is None else limit.min
    high = math.inf if limit.max is None else limit.max
    best = min(values, key=lambda value: max(low - value, value - high))
    bounds = {"min": limit.min, "max": limit.max}
    asked = ", ".join(f"{name}: {value:g}" for name, value in bounds.items() if value is not None)
    return f"limits.{limit.name} is {{{asked}}}, and what comes nearest has {best:.3g}"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `key.path=value` from the command line put in. Raises `BadInput`."""
    path = Path(path)
    source, written = read(path)
    written, by_hand, misplaced = override(written, overrides)
    recipe, problems = _check(written, name=path.stem, source=source, overrides=tuple(overrides))
    sentences = [told(problem, written, str(path), by_hand) for problem in problems]
    if recipe is None or misplaced or problems:
        raise BadInput([*misplaced, *sentences])
    return recipe


def make_recipe(written: Mapping[str, Any], *, name: str = "study") -> Recipe:
    """A recipe from plain data, checked like a file. Raises `BadInput`."""
    source = yaml.safe_dump(dict(written), sort_keys=False)
    recipe, problems = _check(written, name=name, source=source)
    if recipe is None or problems:
        raise BadInput([told(problem, written, "recipe") for problem in problems])
    return recipe


def _check(
    written: Mapping[str, Any], *, name: str, source: str, overrides: tuple[str, ...] = ()
) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, where it can be built, and everything that is wrong with it."""
    problems: list[Problem] = []
    consent = written.get("allow_code") is True
    models = checks.models_of(written.get("model", []))
    sections: dict[str, Any] = {
        "model": models,
        "task": checks.plugin_of(written.get("task"), "task", TASKS, problems, consent=consent),
        "search": checks.plugin_of(
            written.get("search", "grid"), "search", SEARCHERS, problems, consent=consent
        ),
        "objectives": checks.objectives_of(written, problems),
        "limits": checks.limits_of(written.get("limits", {}), problems),
        "space": checks.space_of(
            written.get("space", {}), models, written.get("seed", 0), problems
        ),
    }
    output_dir = f"runs/{written.get('name', name)}"
    values = {"name": name, "output_dir": output_dir, **written, **sections}
    values |= {"source": source, "overrides": overrides}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += describe(error, Recipe, values, what="recipe")
        recipe = None
    problems += checks.problems_of(written, values)
    return recipe, list(dict.fromkeys(problems))
