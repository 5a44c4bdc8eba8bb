"""What a recipe takes from elsewhere, brought here once: for machines that see no network."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator import __version__, hub
from orchestrator.facts import ask_worker, cache_folder
from orchestrator.problems import raise_if
from orchestrator.recipe import ModelOptions, Recipe, load_recipe
from orchestrator.recipe_file import read
from orchestrator.stages import write_atomically
from orchestrator.tasks.causal_lm import PYTHON_STDLIB
from orchestrator.tasks.data import collect, is_local
from orchestrator.trial import BadInput

Json = dict[str, Any]
NAME = "fetched.json"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A model, tokenizer or data set that a recipe names at `key`, and pins, if it can, at `pin`."""

    what: str
    key: str
    name: str
    kind: hub.Kind
    is_here: bool
    pin: str | None = None
    revision: str | None = None

    def told(self, revision: str | None) -> Json:
        shown = {"what": self.what, "key": self.key, "name": self.name, "is_here": self.is_here}
        return {**shown, "revision": revision}

    def commit(self) -> str:
        return hub.commit_of(self.name, kind=self.kind, revision=self.revision, what=self.key)


def fetch(path: Path, overrides: Sequence[str] = (), *, to: str | None = None) -> Json:
    """Read all that a study would, its revisions pinned first, and say what that was.

    It comes into the hub's caches; or into the folder or URI `to`, and with it a copy of what lies
    on this machine. Raises `BadInput` for whatever a study would refuse.
    """
    if to is None:
        return _fetch(path, overrides, None, named=None)
    if "://" not in to:
        return _fetch(path, overrides, Path(to), named=str(Path(to).absolute()))
    with tempfile.TemporaryDirectory() as folder:
        told = _fetch(path, overrides, Path(folder), named=Path(to).name)
        _upload(Path(folder), to)
    return told | {"file": f"{to.rstrip('/')}/{NAME}"}


def _fetch(path: Path, overrides: Sequence[str], folder: Path | None, *, named: str | None) -> Json:
    """Fetch into a folder that will be read as `named`, or into the caches."""
    recipe = load_recipe(path, overrides)
    items = list(_items(recipe, is_list=isinstance(read(path)[1].get("model"), list)))
    commits = _commits(items)
    pins = {item.pin: commits[item.key] for item in items if item.pin and not item.is_here}
    home = {} if folder is None else {"HF_HOME": str(folder.resolve() / "huggingface")}
    facts = ask_worker(load_recipe(path, [*overrides, *_arguments(pins)]), home)
    copies = {} if folder is None else _copies(items, recipe, folder, str(named))
    environment = {"HF_HUB_OFFLINE": "1"} | ({"HF_HOME": f"{named}/huggingface"} if named else {})
    arguments = [str(path), *overrides, *_arguments(pins | copies)]
    told = {
        "schema": 1,
        "slimtune": __version__,
        "study": recipe.name,
        "items": [item.told(commits.get(item.key)) for item in items],
        "num_rows": facts["num_rows"],
        "models": {name: model["source"] for name, model in facts["models"].items()},
        "command": shlex.join(["env", *_arguments(environment), "slimtune", "run", *arguments]),
    }
    kept = folder / NAME if folder else cache_folder() / "fetched" / f"{recipe.name}.json"
    write_atomically(kept, json.dumps(told, indent=1))
    return told | {"file": f"{named}/{NAME}" if named else str(kept)}


def _items(recipe: Recipe, *, is_list: bool) -> Iterator[Item]:
    """What the recipe names; nothing for a model from scratch or this interpreter's own library."""
    for number, model in enumerate(recipe.models):
        yield from _of_model(model, f"model.{number}" if is_list else "model")
    data = getattr(recipe.task, "data", None)
    if isinstance(data, str) and data != PYTHON_STDLIB:
        revision = getattr(recipe.task, "data_revision", None)
        yield Item(
            what="data", key="task.data", name=data, kind="dataset", is_here=is_local(data),
            pin="task.data_revision", revision=revision,
        )  # fmt: skip


def _of_model(model: ModelOptions, place: str) -> Iterator[Item]:
    if model.name is not None:
        yield Item(
            what=f"model {model.id}", key=f"{place}.name", name=model.name, kind="model",
            is_here=Path(model.name).is_dir(), pin=f"{place}.revision", revision=model.revision,
        )  # fmt: skip
    if isinstance(model.tokenizer, str):
        here = Path(model.tokenizer).is_dir()
        yield Item(
            what=f"tokenizer of {model.id}", key=f"{place}.tokenizer", name=model.tokenizer,
            kind="model", is_here=here,
        )  # fmt: skip


def _commits(items: Sequence[Item]) -> dict[str, str]:
    """The commit of each item of the hub, by its key; problems are told together."""
    problems: list[str] = []
    asked = {item.key: item for item in items if not item.is_here}
    found = collect(asked, Item.commit, problems)
    raise_if(problems)
    return found


def _arguments(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _copies(items: Sequence[Item], recipe: Recipe, folder: Path, named: str) -> dict[str, str]:
    """Copy what lies on this machine into a folder; where the recipe finds it there, by key."""
    moved = {}
    for item in items:
        if item.is_here:
            source = Path(item.name).expanduser()
            target = Path("files", item.key, source.name)
            _copy(source, folder / target)
            moved[item.key] = f"{named}/{target}"
            if item.key == "task.data" and source.is_file():
                for name in filter(None, (getattr(recipe.task, split) for split in SPLITS)):
                    _copy(source.parent / name, folder / target.parent / name)
    return moved


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def _upload(folder: Path, uri: str) -> None:
    """Put a folder at a URI; links become files, as object stores have none. Raises `BadInput`."""
    import fsspec

    with tempfile.TemporaryDirectory() as plain:
        left_out = shutil.ignore_patterns("blobs", ".locks", "*.lock")
        shutil.copytree(folder, plain, ignore=left_out, dirs_exist_ok=True)
        try:
            files, root = fsspec.url_to_fs(uri)
            files.put(f"{plain}/", root, recursive=True)
        except (OSError, ValueError, ImportError) as error:
            raise BadInput([f"--to: {uri} cannot be written: {error}."]) from error


def fetched_table(told: Json) -> RenderableType:
    """What `fetch` returns, for people."""
    rows = ", ".join(f"{count:,} {split}" for split, count in told["num_rows"].items())
    table = Table(box=None)
    for name in ("", "name", "revision"):
        table.add_column(name, header_style="dim", overflow="fold")
    for item in told["items"]:
        here = "on this machine" if item["is_here"] else item["revision"]
        table.add_row(item["what"], Text(item["name"]), here)
    return Group(f"{told['study']}: rows of {rows}", table)
