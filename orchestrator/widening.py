"""Whether a recipe goes on from a study that was begun with another one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.parameters import Choice, Parameter, Range
from orchestrator.recipe import Recipe
from orchestrator.space import Space

Json = dict[str, Any]
MAX_SHOWN = 120  # characters of a value in a message


def contradictions(there: Recipe, asked: Recipe) -> list[str]:
    """Where `asked` contradicts the study begun with `there`, each a path with both values.

    A wider space does not: a choice may get more alternatives behind its own, a range wider
    bounds, a plain value may become a choice that begins with it or a range around it, and rules
    may be taken back.
    """
    old, new = there.identity(), asked.identity()
    is_same_space = old.pop("space") == new.pop("space")
    found = list(_differences(old, new))
    if not is_same_space:
        found += _narrowed(there.space, asked.space)
        if there.largest_budget() != asked.largest_budget():
            found.append(("space.finetune", there.largest_budget(), asked.largest_budget()))
    return [
        f"another `{path}`: {_shown(old)} there, {_shown(new)} here" for path, old, new in found
    ]


def _narrowed(there: Space, asked: Space) -> Iterator[tuple[str, Any, Any]]:
    for name, node in there.tree.items():
        if not _widens(node, asked.tree[name]):
            yield f"space.{name}", getattr(there, name), getattr(asked, name)
    if any(rule not in there.forbid for rule in asked.forbid):
        yield "space.forbid", list(there.forbid), list(asked.forbid)


def _widens(old: Any, new: Any) -> bool:
    """Whether every value of `old` is one of `new`, at the same position where positions count."""
    if isinstance(old, Parameter) and isinstance(new, Parameter) and _conditions_differ(old, new):
        return False
    if isinstance(old, Choice) and isinstance(new, Choice):
        pairs = zip(old.choice, new.choice, strict=False)
        return len(new.choice) >= len(old.choice) and all(_widens(*pair) for pair in pairs)
    if isinstance(old, Range) and isinstance(new, Range):
        same = (old.log, old.step, old.whole) == (new.log, new.step, new.whole)
        return same and new.range[0] <= old.range[0] and new.range[1] >= old.range[1]
    if isinstance(old, Parameter):
        return False
    if isinstance(new, Choice):
        return not new.when and _widens(old, new.choice[0])
    if isinstance(new, Range):
        is_number = isinstance(old, int | float) and not isinstance(old, bool)
        return not new.when and is_number and new.range[0] <= old <= new.range[1]
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_widens(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_widens, old, new))
    return bool(old == new)


def _conditions_differ(old: Parameter, new: Parameter) -> bool:
    return (old.when, old.otherwise) != (new.when, new.otherwise)


def _differences(there: Any, asked: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two nested values differ, as (path, one, other)."""
    if isinstance(there, Mapping) and isinstance(asked, Mapping):
        for key in {**asked, **there}:
            yield from _differences(there.get(key), asked.get(key), f"{path}.{key}".lstrip("."))
    elif there != asked:
        yield path, there, asked


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
