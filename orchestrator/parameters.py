"""Choices and ranges within plain data: parsed, walked through, and filled with values.

A mapping with the key `choice` or `range` is a parameter wherever it stands. What was not chosen
is never asked about, so alternatives may hold parameters of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
from pydantic import Field, StrictFloat, StrictInt, ValidationError, model_validator

from orchestrator.problems import Place, Problem, describe
from orchestrator.trial import Frozen

Number = int | float
ABSENT = object()
"""What a parameter is worth whose `when` does not hold and that has no `otherwise`."""


class Parameter(Frozen):
    """What choices and ranges share.

    `when` maps paths of the configuration to the value, or list of values, that they must have for
    the parameter to exist; else `otherwise` stands in, or nothing: the plug-in's own default.
    """

    when: dict[str, Any] = {}
    otherwise: Any = None


class Choice(Parameter):
    """One of several alternatives, which may hold parameters of their own."""

    choice: tuple[Any, ...] = Field(min_length=1)

    def grid(self) -> tuple[int, ...]:
        """The positions of all alternatives."""
        return tuple(range(len(self.choice)))

    def sample(self, rng: np.random.Generator) -> int:
        """The position of one alternative, all equally likely."""
        return int(rng.integers(len(self.choice)))


class Range(Parameter):
    """A number between two others, both included; whole if both bounds are.

    `step` allows only low, low + step, …; `num` is how many points a grid takes.
    """

    range: tuple[StrictInt | StrictFloat, StrictInt | StrictFloat]
    log: bool = False
    step: StrictInt | StrictFloat | None = Field(None, gt=0)
    num: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.range
        if not low < high:
            raise ValueError(f"needs low < high, but got {low=}, {high=}")
        if self.log and low <= 0:
            raise ValueError(f"needs low > 0 for a logarithmic range, but got {low=}")
        if self.log and self.step is not None:
            raise ValueError(f"takes `step` or `log`, not both, but got step={self.step}, log=True")
        return self

    @property
    def whole(self) -> bool:
        """Whether only integers are drawn."""
        return all(isinstance(value, int) for value in (*self.range, self.step or 0))

    def grid(self) -> tuple[Number, ...]:
        """The points of a grid. Raises ValueError where neither `num` nor `step` says which."""
        low, high = self.range
        if self.step is not None:
            count = math.floor((high - low) / self.step + 1e-9) + 1
            return self._tidy(low + self.step * np.arange(count))
        if self.num is not None:
            spacing = np.geomspace if self.log else np.linspace
            return self._tidy(spacing(low, high, self.num))
        if self.whole:
            return self._tidy(np.arange(low, high + 1))
        raise ValueError("needs `num` (how many points) or `step` to be searched as a grid")

    def sample(self, rng: np.random.Generator) -> Number:
        """One value, uniform on the linear or logarithmic scale."""
        low, high = self.range
        if self.step is not None:
            return self.grid()[int(rng.integers(len(self.grid())))]
        if self.log:
            value = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            edge = 0.5 - 1e-9 if self.whole else 0.0  # whole numbers are rounded to
            value = rng.uniform(low - edge, high + edge)
        return self.nearest(value)

    def nearest(self, value: float) -> Number:
        """The number between the bounds that is closest to `value`; a `step` is not looked at."""
        return self._tidy(np.array([value]))[0]

    def _tidy(self, values: np.ndarray) -> tuple[Number, ...]:
        """Plain numbers inside the range, free of rounding noise, without repeats."""
        low, high = self.range
        cast: Callable[[Any], Number] = round if self.whole else lambda value: float(f"{value:.6g}")
        return tuple(dict.fromkeys(min(max(cast(value), low), high) for value in values.tolist()))


Suggest = Callable[[str, Choice | Range], Number]
"""A searcher's answer for one parameter: the position of an alternative, or a number of a range.

The first argument is the parameter's place in the space, unique and the same in every draw.
"""


def parse(node: Any, path: Place, problems: list[Problem]) -> Any:
    """`node` with every mapping that has `choice` or `range` turned into a parameter.

    What is not well formed is noted in `problems` and left out.
    """
    if isinstance(node, list | tuple):
        return [parse(item, (*path, i), problems) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    parsed = {key: parse(value, (*path, key), problems) for key, value in node.items()}
    kind = Choice if "choice" in node else Range if "range" in node else None
    if kind is None:
        return parsed
    try:
        return kind.model_validate(parsed)
    except ValidationError as error:
        found = describe(error, kind, parsed, what="choice" if kind is Choice else "range")
        problems.extend(((*path, *where), text) for where, text in found)
        return ABSENT


def parameters(
    node: Any, place: Place = (), path: str = ""
) -> Iterator[tuple[Place, str, Choice | Range]]:
    """Every parameter below `node`: its place in the recipe, and the path it sets in a configuration."""
    if isinstance(node, Choice | Range):
        yield place, path, node
    for step, name, child in _children(node, path):
        yield from parameters(child, (*place, *step), name)


def settings(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every path of a configuration below `node`, with each value, or range, that it may have."""
    if not isinstance(node, Choice | dict | list):
        yield path, node
    for _, name, child in _children(node, path):
        yield from settings(child, name)


def _children(node: Any, path: str) -> Iterator[tuple[Place, str, Any]]:
    """What lies one level down: steps in the recipe, the path in a configuration, the node."""
    if isinstance(node, Parameter) and "otherwise" in node.model_fields_set:
        yield ("otherwise",), path, node.otherwise
    if isinstance(node, Choice):
        yield from ((("choice", i), path, child) for i, child in enumerate(node.choice))
    elif isinstance(node, list):
        yield from (((i,), path, child) for i, child in enumerate(node))
    elif isinstance(node, dict):
        yield from (((key,), f"{path}.{key}".lstrip("."), child) for key, child in node.items())


def variants(node: Any, place: Place) -> list[tuple[Place, Any]]:
    """Plain values that show all of `node`, one parameter moved at a time, each with what moved.

    Of a range both ends; the first value has every parameter at its first.
    """
    found: list[tuple[Place, Any]]
    if isinstance(node, Choice):
        found = [v for i, c in enumerate(node.choice) for v in variants(c, (*place, "choice", i))]
    elif isinstance(node, Range):
        found = [((*place, "range", i), end) for i, end in enumerate(node.range)]
    elif node is ABSENT:
        found = []
    elif isinstance(node, dict | list):
        found = _moved_one_at_a_time(node, place)
    else:
        found = [(place, node)]
    if isinstance(node, Parameter) and "otherwise" in node.model_fields_set:
        found += variants(node.otherwise, (*place, "otherwise"))
    return found


def _moved_one_at_a_time(node: Any, place: Place) -> list[tuple[Place, Any]]:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    inner = {key: variants(node[key], (*place, key)) for key in keys}
    still = {key: values[0][1] for key, values in inner.items() if values}
    moved = [(where, still | {key: value}) for key in still for where, value in inner[key][1:]]
    values = [(place, still), *moved]
    if isinstance(node, dict):
        return list(values)
    return [(where, list(value.values())) for where, value in values]


class Filling:
    """One walk through the tree. Answers are kept, as a condition may ask ahead of its turn."""

    def __init__(self, tree: dict[str, Any], suggest: Suggest) -> None:
        self.tree, self.suggest = tree, suggest
        self.answers: dict[str, Number] = {}

    def fill(self, node: Any, path: str) -> Any:
        """`node` with a value in the place of every parameter."""
        node, path = self._settle(node, path)
        if isinstance(node, dict):
            filled = {key: self.fill(value, f"{path}.{key}") for key, value in node.items()}
            return {key: value for key, value in filled.items() if value is not ABSENT}
        if isinstance(node, list):
            items = (self.fill(item, f"{path}.{i}") for i, item in enumerate(node))
            return [item for item in items if item is not ABSENT]
        return node

    def _settle(self, node: Any, path: str) -> tuple[Any, str]:
        """What stands at `path` once no parameter is left on top of it, and its place in the space."""
        while isinstance(node, Choice | Range):
            if not all(self._holds(keys, wanted) for keys, wanted in node.when.items()):
                given = "otherwise" in node.model_fields_set
                node, path = (node.otherwise, f"{path}.otherwise") if given else (ABSENT, path)
                continue
            if path not in self.answers:
                self.answers[path] = self.suggest(path, node)
            answer = self.answers[path]
            if isinstance(node, Range):
                return answer, path
            node, path = node.choice[int(answer)], f"{path}.choice.{answer}"
        return node, path

    def _holds(self, keys: str, wanted: Any) -> bool:
        section, *rest = keys.split(".")
        found = self._values(self.tree.get(section), section, rest)
        return any(value in as_list(wanted) for value in found)

    def _values(self, node: Any, path: str, keys: list[str]) -> Iterator[Any]:
        """All values that `keys` lead to below `node`: a list of methods answers for each of them."""
        node, path = self._settle(node, path)
        if isinstance(node, list):
            for i, item in enumerate(node):
                yield from self._values(item, f"{path}.{i}", keys)
        elif not keys:
            yield node
        elif isinstance(node, dict) and keys[0] in node:
            yield from self._values(node[keys[0]], f"{path}.{keys[0]}", keys[1:])


def as_list(value: Any) -> list[Any]:
    """`value` itself, or the only item of a list."""
    return list(value) if isinstance(value, list | tuple) else [value]
