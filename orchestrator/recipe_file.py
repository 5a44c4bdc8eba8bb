"""A recipe as text: YAML, values from the command line put in, and problems told in its words."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.problems import Place, Problem
from orchestrator.trial import BadInput


class _Loader(yaml.SafeLoader):
    """YAML without two of its surprises: `1e-4` is a number, and no key may come twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    values: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.MarkedYAMLError(
                problem=f"`{key.value}` is given twice", problem_mark=key.start_mark
            )
        seen.add(str(key.value))
    return values


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a recipe and what it says; of a study's folder, its recipe. Raises `BadInput`."""
    try:
        if path.is_dir():
            return "", _of_study(path)
        source = path.read_text(encoding="utf-8")
        written = yaml.load(source, Loader=_Loader)
    except OSError as error:
        raise BadInput([f"{path} cannot be read: {error.strerror}."]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput([f"{path} is not valid YAML: {_one_line(error)}."]) from error
    if not isinstance(written, dict):
        raise BadInput([f"{path} has to be a mapping of keys to values, got {written!r}."])
    return source, written


def _of_study(folder: Path) -> dict[str, Any]:
    """The recipe that a study was run with, whose folder may have been moved."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return {**manifest["recipe"], "output_dir": str(folder)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput([f"{folder} is a folder and holds no study; name a recipe."]) from error


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
    return f"{getattr(error, 'problem', None) or error}{where}"


def override(
    written: dict[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], list[Place], list[str]]:
    """A copy with each `key.path=value` put in; the places that are new, and what went wrong."""
    written = copy.deepcopy(written)
    places: list[Place] = []
    problems: list[str] = []
    for text in overrides:
        path, equals, value = text.partition("=")
        try:
            if not equals:
                raise ValueError("has no `=`: write key.path=value")
            places.append(_put(written, path.split("."), yaml.load(value, Loader=_Loader)))
        except (ValueError, yaml.YAMLError) as error:
            problems.append(f"command line: {text} {_one_line(error)}.")
    return written, places, problems


def _put(written: dict[str, Any], keys: list[str], value: Any) -> Place:
    """Set one value in place. Raises ValueError where the way leads through what is not there."""
    node: Any = written
    place: Place = ()
    new: Place | None = None
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        step = _step(node, key, ".".join(map(str, place)))
        place = (*place, step)
        if new is None and (following is None or (isinstance(node, dict) and step not in node)):
            new = place
        if following is None:
            node[step] = value
        elif isinstance(node, dict):
            node = node.setdefault(step, {})
        else:
            node = node[step]
    assert new is not None
    return new


def _step(node: Any, key: str, path: str) -> str | int:
    """`key` as what `node`, which lies at `path`, is indexed with."""
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise ValueError(f"goes into `{path}`, which is the plain value {node!r}")
    if not key.isdigit() or int(key) >= len(node):
        raise ValueError(f"asks `{path}` for item {key}; it has {len(node)}, counted from 0")
    return int(key)


def told(problem: Problem, written: Any, file: str, by_hand: Iterable[Place] = ()) -> str:
    """A problem as the sentence that a user reads; `by_hand` are places set on the command line."""
    place, text = problem
    shown = _as_written(place, written)
    if any(shown[: len(path)] == path for path in by_hand):
        file = "command line"
    path = ".".join(map(str, shown))
    return f"{file}: {path}{'' if text.startswith(':') else ' '}{text}"


def _as_written(place: Place, written: Any) -> Place:
    """`place` without the index of a list where the user wrote its only item alone."""
    shown: list[str | int] = []
    for step in place:
        if isinstance(step, int) and not isinstance(written, list):
            continue
        shown.append(step)
        inside = isinstance(written, dict) and step in written
        inside |= isinstance(written, list) and isinstance(step, int) and step < len(written)
        written = written[step] if inside else None
    return tuple(shown)
