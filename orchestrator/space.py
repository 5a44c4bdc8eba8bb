"""Choices, ranges and conditions → configurations; why a combination is infeasible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field, ValidationError

from orchestrator.finetune import FinetuneOptions, steps_of
from orchestrator.parameters import (
    ABSENT,
    Choice,
    Filling,
    Number,
    Range,
    Suggest,
    as_list,
    parse,
    variants,
)
from orchestrator.plugins import build, find
from orchestrator.problems import Problem
from orchestrator.prune import METHODS
from orchestrator.quantize import ALWAYS_FLOAT, Numerics, QuantizeOptions
from orchestrator.runtimes import RUNTIMES
from orchestrator.signature import Signature, check_divides, weight_bytes
from orchestrator.trial import BadInput, Frozen, Infeasible, TrialConfig

if TYPE_CHECKING:
    from orchestrator.recipe import Recipe
    from orchestrator.tasks import Task

FrozenT = TypeVar("FrozenT", bound=Frozen)


class Space(Frozen):
    """Everything that may be tried, as written in the recipe; `tree` is the same with its parameters parsed."""

    model: tuple[str, ...] = Field(exclude=True)  # said elsewhere in a recipe
    prune: Any = "none"
    quantize: Any = "none"
    finetune: Any = {}
    seed: Any = 0
    forbid: tuple[dict[str, Any], ...] = ()

    @property
    def tree(self) -> dict[str, Any]:
        """Sections in the order they are drawn. Raises `BadInput` with every malformed parameter."""
        tree, problems = self.parsed
        if problems:
            raise BadInput([f"space.{'.'.join(map(str, at))} {text}" for at, text in problems])
        return tree

    @cached_property
    def parsed(self) -> tuple[dict[str, Any], list[Problem]]:
        """The tree, and what is wrong with the parameters that are left out of it."""
        sections = {
            "model": self.model[0] if len(self.model) == 1 else {"choice": self.model},
            "prune": spell_out(self.prune, "method"),
            "quantize": spell_out(self.quantize, "scheme"),
            "finetune": self.finetune or {},
            "seed": self.seed,
        }
        problems: list[Problem] = []
        return {name: parse(node, (name,), problems) for name, node in sections.items()}, problems


def spell_out(node: Any, key: str) -> Any:
    """`W8A8` as {scheme: W8A8}, also within lists and alternatives; nothing at all as `none`."""
    if node is None:
        return {key: "none"}
    if isinstance(node, str):
        return {key: node}
    if isinstance(node, list | tuple):
        return [spell_out(item, key) for item in node]
    if isinstance(node, dict) and "choice" in node:
        spelt = {
            name: spell_out(node[name], key) for name in ("choice", "otherwise") if name in node
        }
        return {**node, **spelt}
    return node


def draw(space: Space, suggest: Suggest) -> TrialConfig:
    """One configuration, from a searcher's answers.

    Raises `Infeasible` for what the recipe forbids and what a plug-in's own class refuses.
    """
    drawing = Filling(space.tree, suggest)
    sections = {name: drawing.fill(node, name) for name, node in space.tree.items()}
    config = resolve(**{name: value for name, value in sections.items() if value is not ABSENT})
    for rule in space.forbid:
        if all(_meets(config, path, wanted) for path, wanted in rule.items()):
            raise Infeasible(f"the recipe forbids {rule}")
    return config


def _meets(config: TrialConfig, path: str, wanted: Any) -> bool:
    """Whether the value at `path`, of any method where there are several, is the wanted one."""
    values: list[Any] = [config.model_dump(mode="json")]
    values[0]["prune"] = values[0]["prune"] or [{"method": "none"}]
    for key in path.split("."):
        inner = [value.get(key) for value in values if isinstance(value, dict)]
        values = [item for value in inner for item in as_list(value)]
    return any(value in as_list(wanted) for value in values)


def grid(space: Space, *, most: int | None = None) -> Iterator[TrialConfig]:
    """Every configuration that is allowed, each once; what the recipe writes last turns fastest.

    `most` bounds how many combinations are looked at. Raises ValueError for a range that does not
    say where its grid points are.
    """
    digits: list[int] = []
    seen: set[str] = set()
    for _ in count() if most is None else range(most):
        sizes: list[int] = []

        def suggest(_: str, parameter: Choice | Range, sizes: list[int] = sizes) -> Number:
            points = parameter.grid()
            if len(sizes) == len(digits):
                digits.append(0)
            sizes.append(len(points))
            return points[digits[len(sizes) - 1]]

        try:
            config = draw(space, suggest)
            if config.id not in seen:
                seen.add(config.id)
                yield config
        except Infeasible:
            pass
        while digits and digits[-1] == sizes[len(digits) - 1] - 1:
            digits.pop()
        if not digits:
            return
        digits[-1] += 1


def resolve(
    *, model: str, prune: Any = "none", quantize: Any = "none", finetune: Any = None, seed: int = 0
) -> TrialConfig:
    """The configuration with every option at its value, and what cannot matter left out.

    Two configurations that mean the same have the same id. Raises `Infeasible` where a plug-in's
    class refuses its options.
    """
    try:
        return TrialConfig(
            model=model,
            prune=tuple(_method(section) for section in method_sections(prune)),
            quantize=_quantization(QuantizeOptions(**spell_out(quantize, "scheme"))),
            finetune=_finetuning(FinetuneOptions(**(finetune or {}))),
            seed=seed,
        )
    except ValidationError as error:
        reasons = (detail["msg"].removeprefix("Value error, ") for detail in error.errors())
        raise Infeasible(f"{error.title}: {'; '.join(reasons)}") from error


def method_sections(prune: Any) -> list[dict[str, Any]]:
    """The methods that a `prune` section lists, in their order; `none` is no method."""
    sections = _flat(spell_out(prune, "method"))
    return [section for section in sections if section["method"] != "none"]


def _flat(methods: Any) -> list[dict[str, Any]]:
    if isinstance(methods, dict):
        return [methods]
    return [section for item in methods for section in _flat(item)]


def _method(section: dict[str, Any]) -> dict[str, Any]:
    """A method's options, at their defaults where its schedule or importance make them mean nothing."""
    method = build(METHODS, section, key="method", what="pruning method")
    unused: set[str] = set()
    if getattr(method, "schedule", "gradual") != "gradual":
        unused |= {"begin", "end", "num_updates"}
    if getattr(method, "importance", "taylor") != "taylor":
        unused |= {"num_batches"}
    options = _without(method, unused & set(type(method).model_fields))
    return {**options.model_dump(mode="json"), "method": section["method"]}


def _quantization(options: QuantizeOptions) -> dict[str, Any]:
    """Options at their defaults where the scheme, or doing without QAT, makes them mean nothing."""
    if options.scheme == "none":
        options = QuantizeOptions()
    unused = set() if options.qat else {"qat_start"}
    if options.scheme != "linear":
        unused |= {"interval", "granularity"}
    if not options.scheme.endswith("A16"):
        unused |= {"group_size"}
    return _without(options, unused).model_dump(mode="json")


def _finetuning(options: FinetuneOptions) -> dict[str, Any]:
    """Options at their defaults where the budget makes them mean nothing."""
    if not trains(options):
        options = FinetuneOptions(max_steps=0)
    unused = set() if options.max_steps is None else {"num_train_epochs"}
    return _without(options, unused).model_dump(mode="json")


def _without(options: FrozenT, unused: set[str]) -> FrozenT:
    defaults = {name: type(options).model_fields[name].default for name in unused}
    return options.model_copy(update=defaults)


def finetune_sections(space: Space) -> list[dict[str, Any]]:
    """Fine-tuning options in every combination of their alternatives, as far as they can be read."""
    return [section for _, section in variants(space.parsed[0]["finetune"], ())]


def trains(options: FinetuneOptions) -> bool:
    """Whether the budget is more than nothing."""
    return bool(options.num_train_epochs if options.max_steps is None else options.max_steps)


def num_steps(finetune: Mapping[str, Any], num_train: int) -> int:
    """Optimizer steps of a fine-tuning section on `num_train` rows."""
    options = FinetuneOptions(**finetune)
    copies = options.augmentation.copies if options.augmentation else 0
    return steps_of(options, num_train * (1 + copies))


def can_go_on(config: TrialConfig) -> bool:
    """Whether no step of its training hangs on how many follow.

    Then a longer training goes on from a shorter one. Otherwise the learning rate, a pruning
    schedule or the start of QAT would have been another.
    """
    finetune = config.finetune
    steady = finetune["lr_scheduler_type"] == "constant" and not finetune["warmup_ratio"]
    at_once = all(method.get("schedule", "before") == "before" for method in config.prune)
    return steady and at_once and not config.quantize["qat_start"]


# -- what can be said of a configuration before any work -----------------------------------------


def infeasible(config: TrialConfig, signature: Signature, recipe: Recipe) -> str | None:
    """Why a configuration cannot work on a model of that signature, None if nothing speaks against it."""
    runtime = find(RUNTIMES, recipe.target.runtime, what="runtime")
    try:
        shape = planned(config, signature)
        quantize = QuantizeOptions(**config.quantize)
        numerics = runtime.numerics(quantize, recipe.target)
        _check_training(config, quantize, numerics)
        _check_vocabulary(config, recipe.task)
        _check_distillation(config, recipe.task)
        if numerics.weight is not None and numerics.weight.granularity == "group":
            check_divides(
                shape, numerics.weight.group_size, ignore=(*quantize.ignore, *ALWAYS_FLOAT)
            )
    except Infeasible as reason:
        return str(reason)
    return None


def planned(config: TrialConfig, signature: Signature) -> Signature:
    """The shape after pruning. Raises `Infeasible`."""
    for section in config.prune:
        signature = build(METHODS, section, key="method", what="pruning method").plan(signature)
    return signature


def _check_training(config: TrialConfig, quantize: QuantizeOptions, numerics: Numerics) -> None:
    """Raise `Infeasible` for what only means something while a model is trained, and is not."""
    trained = trains(FinetuneOptions(**config.finetune))
    if quantize.qat and numerics.weight is None:
        raise Infeasible(
            f"scheme {quantize.scheme} rounds no weights: QAT has nothing to train for"
        )
    if quantize.qat and not trained:
        raise Infeasible("QAT needs optimizer steps, but the budget is 0")
    for section in config.prune:
        if section.get("schedule") == "gradual" and not trained:
            raise Infeasible(
                f"a gradual {section['method']} needs optimizer steps, but the budget is 0"
            )


def _check_vocabulary(config: TrialConfig, task: Task) -> None:
    """Raise `Infeasible` where a smaller vocabulary makes numbers that do not compare."""
    if not any(section["method"] == "vocabulary" for section in config.prune):
        return
    if not task.comparable_vocabulary:
        raise Infeasible(f"{task.quality} does not compare across vocabularies, so none is pruned")
    if task.kind != "encoder" and config.finetune["distillation"] is not None:
        raise Infeasible("a student with a smaller vocabulary cannot learn its teacher's logits")


def _check_distillation(config: TrialConfig, task: Task) -> None:
    """Raise `Infeasible` where the layers of a teacher cannot be told from one attention mask."""
    distillation = config.finetune["distillation"]
    if task.kind == "encoder_decoder" and distillation and distillation["hidden"]:
        raise Infeasible("finetune.distillation.hidden is for encoders and decoders, not for both")


def predict(
    config: TrialConfig, signature: Signature, recipe: Recipe, *, length: int | None = None
) -> dict[str, float]:
    """What the shape alone says: `size_mb` (weights, without the graph's own bytes), `num_params`.

    With the `length` of an input in tokens also `macs` of a batch of the target. Raises
    `Infeasible`.
    """
    shape = planned(config, signature)
    quantize = QuantizeOptions(**config.quantize)
    runtime = find(RUNTIMES, recipe.target.runtime, what="runtime")
    numerics = runtime.numerics(quantize, recipe.target)
    size = weight_bytes(shape, numerics=numerics, ignore=(*quantize.ignore, *ALWAYS_FLOAT))
    known = {"size_mb": size / 1e6, "num_params": float(shape.num_params)}
    if length is not None:
        known["macs"] = float(shape.macs(batch=recipe.target.batch_size, length=length))
    return known
