"""What is wrong with a space: every alternative is held against the class that will take it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from orchestrator.finetune import FinetuneOptions
from orchestrator.parameters import ABSENT, Choice, Range, parameters, settings, variants
from orchestrator.plugins import find
from orchestrator.problems import Place, Problem, describe, nearest
from orchestrator.prune import METHODS
from orchestrator.quantize import QuantizeOptions
from orchestrator.runtimes import RUNTIMES, Runtime, Target
from orchestrator.space import Space
from orchestrator.trial import Infeasible


def space_problems(space: Space, *, consent: bool) -> Iterator[Problem]:
    """What is wrong anywhere in the space, in alternatives too that few configurations take."""
    tree, malformed = space.parsed
    yield from malformed
    for place, section in _sections(tree["prune"], ("prune",)):
        yield from _method_problems(section, place, consent=consent)
    for place, section in _sections(tree["quantize"], ("quantize",)):
        yield from _option_problems(section, QuantizeOptions, place, what="quantize")
        yield from _scheme_problems(section, place)
    for place, section in _sections(tree["finetune"], ("finetune",)):
        yield from _option_problems(section, FinetuneOptions, place, what="finetune")
    yield from _condition_problems(space)


def grid_problems(space: Space) -> Iterator[Problem]:
    """Ranges that do not say where their grid points are."""
    for place, _, parameter in parameters(space.parsed[0]):
        try:
            parameter.grid()
        except ValueError as error:
            yield place, f"{error}."


def _sections(node: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """The plain sections that a node may become: its alternatives, and the items of lists."""
    if isinstance(node, Choice):
        for i, child in enumerate(node.choice):
            yield from _sections(child, (*place, "choice", i))
        if "otherwise" in node.model_fields_set:
            yield from _sections(node.otherwise, (*place, "otherwise"))
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from _sections(child, (*place, i))
    elif node is not ABSENT:
        yield place, node


def _method_problems(section: Any, place: Place, *, consent: bool) -> Iterator[Problem]:
    name = section.get("method") if isinstance(section, dict) else None
    if not isinstance(name, str):
        place = (*place, "method")
        if isinstance(name, Choice):
            yield place, "has to be one name: offer alternatives of the whole `prune` instead."
        else:
            yield place, f"is missing{nearest('', METHODS)}"
        return
    try:
        method = find(METHODS, name, what="pruning method", consent=consent)
    except LookupError as error:
        yield (*place, "method"), str(error)
        return
    options = {key: node for key, node in section.items() if key != "method"}
    yield from _option_problems(options, method, place, what=name)


def _scheme_problems(section: Any, place: Place) -> Iterator[Problem]:
    """Schemes that no runtime serves; whether the chosen one does is said of each configuration."""
    written = section.get("scheme", "none") if isinstance(section, dict) else "none"
    for where, scheme in variants(written, (*place, "scheme")):
        refusals = [_refusal(runtime, str(scheme)) for runtime in RUNTIMES.values()]
        if all(refusals):
            yield where, f"is served by no runtime: {'; '.join(map(str, refusals))}."


def _refusal(runtime: Runtime, scheme: str) -> str | None:
    try:
        runtime.numerics(QuantizeOptions(scheme=scheme), Target())
    except Infeasible as reason:
        return str(reason)
    return None


def _option_problems(
    section: Any, model: type[BaseModel], place: Place, *, what: str
) -> Iterator[Problem]:
    """Check each value that an option may take, against the class of the options.

    What the class says of several options together counts only where none of them is a parameter:
    elsewhere some combinations may be fine, and the others come out as infeasible.
    """
    if not isinstance(section, dict):
        yield place, f"has to map options of `{what}` to values, got {section!r}."
        return
    shown = {key: variants(node, (*place, key)) for key, node in section.items()}
    first = {key: values[0] for key, values in shown.items() if values}
    fixed = all(len(values) == 1 for values in shown.values())
    for where, text in _value_problems(first, model, place, what=what):
        if fixed or where != place:
            yield where, text
    for key in first:
        for value in shown[key][1:]:
            for where, text in _value_problems(first | {key: value}, model, place, what=what):
                if where[: len(value[0])] == value[0]:
                    yield where, text


def _value_problems(
    located: Mapping[str, tuple[Place, Any]], model: type[BaseModel], place: Place, *, what: str
) -> Iterator[Problem]:
    """What a class says of options whose values come from the given places."""
    values = {key: value for key, (_, value) in located.items()}
    try:
        model.model_validate(values)
    except ValidationError as error:
        for inner, text in describe(error, model, values, what=what):
            key = str(inner[0]) if inner else ""
            known = key in located and key in model.model_fields
            moved = known and located[key][0] != (*place, key)
            yield located[key][0] if moved else (*place, *inner), text


def _condition_problems(space: Space) -> Iterator[Problem]:
    """Conditions on what is not in the space, that can never hold, or that wait for each other."""
    tree = space.parsed[0]
    drawn = _values_by_path(settings(tree))
    waits: dict[str, set[str]] = {}
    for place, path, parameter in parameters(tree):
        for name, wanted in parameter.when.items():
            yield from _condition((*place, "when", name), name, wanted, drawn)
            waits.setdefault(path, set()).add(name)
            waits.setdefault(name, set()).add(name.rpartition(".")[0] or name.partition(".")[0])
    resolved = _values_by_path([*settings(tree), *_defaults(tree)])
    for i, rule in enumerate(space.forbid):
        for name, wanted in rule.items():
            yield from _condition(("forbid", i, name), name, wanted, resolved)
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        yield (), f"has conditions that wait for each other: {' → '.join(error.args[1])}."


def _values_by_path(found: Iterable[tuple[str, Any]]) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {}
    for path, value in found:
        values.setdefault(path, []).append(value)
    return values


def _defaults(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every option that a configuration of the space has without being told to, and its value."""
    classes: list[tuple[str, Any]] = [("quantize", QuantizeOptions)]
    classes += [("finetune", FinetuneOptions)]
    for _, section in _sections(tree["prune"], ()):
        name = section.get("method") if isinstance(section, dict) else None
        if isinstance(name, str) and name in METHODS:
            classes.append(("prune", METHODS[name]))
    for section, options in classes:
        for key, field in options.model_fields.items():
            if not field.is_required():
                yield f"{section}.{key}", to_jsonable_python(field.get_default())


def _condition(
    place: Place, name: str, wanted: Any, known: Mapping[str, list[Any]]
) -> Iterator[Problem]:
    """What is wrong with asking whether the value at path `name` is (one of) `wanted`."""
    if name not in known:
        yield place, f"names nothing in the space, got `{name}`{nearest(name, known)}"
        return
    asked = wanted if isinstance(wanted, list) else [wanted]
    values = known[name]
    if not any(isinstance(value, Range) or value in asked for value in values):
        choices = {str(value) for value in values}
        yield place, f"asks for what never is, got {wanted!r}{nearest(wanted, choices)}"
