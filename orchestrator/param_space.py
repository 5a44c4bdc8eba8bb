"""A configuration from the keys of a `param_space`, as Ray Tune calls what its users search.

A key is a path of a configuration, such as `finetune.learning_rate`, `quantize.scheme` or `prune`.
Its value stands in the place of what the recipe's space says there.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping
from typing import Any

from orchestrator.finetune import FinetuneOptions
from orchestrator.parameters import Choice, Number, Range
from orchestrator.plugins import find
from orchestrator.problems import nearest, raise_if
from orchestrator.prune import METHODS
from orchestrator.quantize import QuantizeOptions
from orchestrator.recipe import Recipe
from orchestrator.space import Space, draw, spell_out
from orchestrator.trial import BadInput, Frozen, TrialConfig

SHORT = {"prune": "method", "quantize": "scheme"}  # sections that a name alone may stand for
MERGED: dict[str, type[Frozen]] = {"quantize": QuantizeOptions, "finetune": FinetuneOptions}
Path = tuple[str, ...]


def configure(recipe: Recipe, given: Mapping[str, Any]) -> TrialConfig:
    """The recipe's only configuration once `given` has replaced what it names.

    A mapping for `quantize` or `finetune` is merged into the recipe's. Raises `BadInput` for paths
    that no configuration has and for choices that stay open, `Infeasible` for what the recipe
    forbids and what a plug-in's own class refuses.
    """
    tree = copy.deepcopy(recipe.space.tree)
    placed = sorted(_paths(given, tree), key=lambda pair: len(pair[0]))
    raise_if([problem for path, value in placed for problem in _check(recipe, path, value)])
    for path, value in placed:
        plain = _plain(value)
        if len(path) == 1 and path[0] in SHORT:
            plain = spell_out(plain, SHORT[path[0]])
        _place(tree, path, plain)
    model = tree["model"]
    space = Space(
        model=recipe.space.model if isinstance(model, Choice) else (model,),
        forbid=recipe.space.forbid,
        **{name: node for name, node in tree.items() if name != "model"},
    )
    return _only_one(space)


def in_short(config: TrialConfig, recipe: Recipe) -> dict[str, Any]:
    """What `configure` needs to come to that configuration.

    Options that say no more than a default are left out, unless the recipe's space names them.
    """
    tree, values = recipe.space.tree, config.model_dump(mode="json")
    for section, kind in MERGED.items():
        named = tree[section] if isinstance(tree[section], dict) else {}
        values[section] = _telling(values[section], kind, named)
    values["prune"] = [
        _telling(options, find(METHODS, options["method"], what="pruning method"), ["method"])
        for options in values["prune"]
    ]
    return values


def _telling(options: Mapping[str, Any], kind: Any, named: Container[str]) -> dict[str, Any]:
    """Options that are `named` or not at the default of their class."""
    defaults = {name: field.get_default() for name, field in kind.model_fields.items()}
    return {
        name: value
        for name, value in options.items()
        if name in named or value != _plain(defaults[name])
    }


def _only_one(space: Space) -> TrialConfig:
    """Raises `BadInput` where the space still offers several."""
    still_open: list[str] = []

    def suggest(place: str, parameter: Choice | Range) -> Number:
        still_open.append(place)
        return parameter.range[0] if isinstance(parameter, Range) else 0

    try:
        return draw(space, suggest)
    finally:
        if still_open:
            names = ", ".join(f"`{name}`" for name in dict.fromkeys(still_open))
            raise BadInput(
                [
                    f"param_space: the recipe's space leaves {names} open: give a value to each, or "
                    "let search_alg be the recipe's own Searcher."
                ]
            )


def _paths(given: Mapping[str, Any], tree: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """What is given, each by its path; mappings that are merged by the paths within them."""
    for key, value in given.items():
        is_merged = key in MERGED and isinstance(value, Mapping) and isinstance(tree[key], dict)
        inner = value.items() if is_merged else ()
        yield from (((key, name), item) for name, item in inner)
        if not is_merged:
            yield tuple(key.split(".")), value


def _check(recipe: Recipe, path: Path, value: Any) -> list[str]:
    known = _known(recipe)
    if ".".join(path[:2]) not in known:
        name = ".".join(path)
        return [f"param_space: `{name}` is not a path of a configuration{nearest(name, known)}"]
    models = [options.id for options in recipe.models]
    if path == ("model",) and value not in models:
        return [f"param_space: model `{value}` is not in the recipe{nearest(value, models)}"]
    return []


def _known(recipe: Recipe) -> set[str]:
    """The paths that may be given, down to the options of a section."""
    methods = [find(METHODS, name, what="pruning method") for name in _methods(recipe)]
    options = {f"prune.{name}" for method in methods for name in method.model_fields}
    merged = {f"{section}.{name}" for section, kind in MERGED.items() for name in kind.model_fields}
    return {*recipe.space.tree, *options, *merged}


def _methods(recipe: Recipe) -> set[str]:
    """The pruning methods that the recipe's space names."""

    def names(node: Any) -> Iterator[str]:
        if isinstance(node, Choice | list):
            for item in _items(node):
                yield from names(item)
        elif isinstance(node, dict) and isinstance(node.get("method"), str):
            yield node["method"]

    return set(names(recipe.space.tree["prune"]))


def _place(node: Any, path: Path, value: Any) -> None:
    """Put a value where `path` leads below `node`: within every method of a list that has it."""
    key, *rest = path
    if isinstance(node, Choice | list):
        for item in _items(node):
            _place(item, path, value)
    elif isinstance(node, dict) and _takes(node, key):
        if rest:
            if not isinstance(node.get(key), dict | list | Choice):
                node[key] = {}
            _place(node[key], tuple(rest), value)
        else:
            node[key] = value


def _takes(node: Mapping[str, Any], key: str) -> bool:
    """Whether a mapping may have the key; only methods are of several kinds."""
    if "method" not in node:
        return True
    return key in find(METHODS, node["method"], what="pruning method").model_fields


def _items(node: Choice | list[Any]) -> list[Any]:
    return list(node.choice) if isinstance(node, Choice) else node


def _plain(value: Any) -> Any:
    """As JSON has it: what Tune samples may be numpy's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
