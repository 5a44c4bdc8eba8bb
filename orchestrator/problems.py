"""What is wrong with a user's input, in sentences: where, which value, and what would be valid."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.trial import BadInput

Place = tuple[str | int, ...]
Problem = tuple[Place, str]  # where, and what follows it in the sentence


def raise_if(problems: list[str]) -> None:
    """Raises `BadInput` if there are problems, each said once."""
    if problems:
        raise BadInput(list(dict.fromkeys(problems)))


def nearest(name: object, valid: Iterable[str]) -> str:
    """How a sentence about an unknown name ends: the closest valid one, then all of them."""
    known = sorted(valid)
    close = difflib.get_close_matches(str(name), known, n=1)
    close = close or [item for item in known if name and item.startswith(str(name))]
    hint = f"; did you mean `{close[0]}`?" if close else "."
    return f"{hint} Choices: {', '.join(known)}."


def describe(
    error: ValidationError, model: type[BaseModel], value: Any, *, what: str
) -> list[Problem]:
    """The problems that kept `value` from becoming a `model`, which the user knows as `what`."""
    problems: dict[Place, list[str]] = {}
    for detail in error.errors(include_url=False):
        path = _real(detail["loc"], value)
        problems.setdefault(path, [])
        text = _sentence(detail, path, model, what)
        if text not in problems[path]:
            problems[path].append(text)
    return [(path, _joined(texts, path, value)) for path, texts in problems.items()]


def _sentence(detail: Any, path: Place, model: type[BaseModel], what: str) -> str:
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "too_short":
        return "is empty"
    if detail["type"] == "extra_forbidden":
        owner = _model_at(model, path[:-1])
        keys = [key for key in path[:-1] if isinstance(key, str)]
        name = what if owner is model else ".".join(keys)
        valid = (key for key, field in owner.model_fields.items() if not field.exclude)
        return f"is not a key of `{name}`{nearest(path[-1], valid)}"
    text: str = detail["msg"].removeprefix("Input ").removeprefix("String ")
    if detail["type"] == "value_error":
        return ": " + text.removeprefix("Value error, ")
    return text[0].lower() + text[1:]


def _joined(texts: Sequence[str], path: Place, value: Any) -> str:
    """One sentence for all that the members of a union said about one value."""
    text = " or ".join(texts)
    if text.startswith("should"):
        text = f"{text}, got {_at(value, path)!r}"
    return text if text.endswith(".") else f"{text}."


def _real(location: Sequence[str | int], value: Any) -> Place:
    """`location` without the names that pydantic adds for members of a union."""
    path: list[str | int] = []
    for i, step in enumerate(location):
        inside = isinstance(value, dict) and step in value
        inside |= isinstance(value, list | tuple) and isinstance(step, int) and step < len(value)
        if inside:
            value = value[step]
        if inside or (isinstance(value, dict) and i == len(location) - 1):
            path.append(step)
    return tuple(path)


def _at(value: Any, path: Place) -> Any:
    for step in path:
        value = value[step]
    return value


def _model_at(model: type[BaseModel], path: Place) -> type[BaseModel]:
    """The class that the value at `path` below `model` has to be of."""
    for step in path:
        if isinstance(step, str) and step in model.model_fields:
            model = _model_in(model.model_fields[step].annotation) or model
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_model_in(argument) for argument in typing.get_args(annotation))
    return next((found for found in inner if found is not None), None)
