"""From a name in a recipe to the plug-in it means: an entry of a catalog, or `package.module:Name`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from orchestrator.problems import nearest


def is_code(name: str) -> bool:
    """Whether a name points outside the catalogs, at code that needs the user's consent."""
    return ":" in name


def find(catalog: Mapping[str, Any], name: str, *, what: str, consent: bool = True) -> Any:
    """The plug-in called `name`. Raises LookupError with how a sentence about it goes on.

    Without `consent`, which a recipe gives by `allow_code: true`, no code outside is imported.
    """
    if name in catalog:
        return catalog[name]
    if not is_code(name):
        raise LookupError(f"names no {what}, got `{name}`{nearest(name, catalog)}")
    if not consent:
        raise LookupError(f"names code of its own, `{name}`, which needs `allow_code: true`.")
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise LookupError(f"names `{name}`, which cannot be imported: {error}.") from error


def build(catalog: Mapping[str, Any], section: Mapping[str, Any], *, key: str, what: str) -> Any:
    """An instance of the plug-in that `section[key]` names; the rest of `section` are its options."""
    options = {name: value for name, value in section.items() if name != key}
    return find(catalog, section[key], what=what)(**options)


def name_of(catalog: Mapping[str, Any], plugin: Any) -> str:
    """The name under which a recipe would find the class of `plugin`."""
    kind = type(plugin)
    names = (name for name, entry in catalog.items() if entry is kind)
    return next(names, f"{kind.__module__}:{kind.__qualname__}")
