"""manifest.json: which study a folder holds, and what it was made with."""

from __future__ import annotations

import json
import platform
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator import __version__, pareto
from orchestrator.recipe import Recipe
from orchestrator.stages import file_sha256, write_atomically
from orchestrator.storage import Storage
from orchestrator.trial import BadInput, content_hash
from orchestrator.widening import contradictions

Json = dict[str, Any]
NAME, SCHEMA = "manifest.json", 2
OWN_NAMES = {"stages", "ledger", "trials", "baseline", "recipe.yaml"}


def read_manifest(folder: Path) -> Json | None:
    """manifest.json of a study's folder; None for a folder that is new or empty.

    Raises `BadInput` for a folder that holds something else. Hidden files do not count: a driver
    that was killed at its start leaves some.
    """
    path = folder / NAME
    if path.is_file():
        try:
            return parse_manifest(path.read_bytes(), where=f"output_dir: {path}")
        except OSError as error:
            raise BadInput([f"output_dir: {path} cannot be read: {error.strerror}."]) from error
    seen: set[str] = set()
    with suppress(FileNotFoundError):  # who looked at the machines takes away the folder it made
        seen = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    unknown = sorted(name for name in seen - OWN_NAMES if not name.startswith("."))
    if unknown:
        raise BadInput(
            [
                f"output_dir: {folder} holds {', '.join(unknown[:3])} and no study; choose an empty"
                " or new folder."
            ]
        )
    return None


def parse_manifest(text: bytes, *, where: str) -> Json:
    """The content of a manifest.json. Raises `BadInput`, which says `where` it lies."""
    try:
        manifest: Json = json.loads(text)
        if manifest["schema"] == SCHEMA and {"identity", "recipe", "facts"} <= manifest.keys():
            return manifest
        why = "was written by another version of slimtune"
    except (ValueError, TypeError, KeyError):
        why = "is damaged, or is no study's"
    raise BadInput([f"{where} {why}; choose another folder."])


def ledger_key(folder: Path) -> str:
    """What the folder's study is called in its ledger, which several studies may share."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return str(manifest["ledger_key"])
    return content_hash([platform.node(), str(folder.resolve())])


def write_manifest(folder: Path, recipe: Recipe, facts: Json) -> None:
    """Say whose folder this is: the recipe, the code, the versions, and what was learnt of the input."""
    manifest = {
        "schema": SCHEMA,
        "ledger_key": ledger_key(folder),
        "identity": recipe.identity(),
        "recipe": recipe.resolved(),
        "slimtune": __version__,
        "files": package_files(),
        "packages": installed_versions(),
        "seed": recipe.seed,
        "reference_point": pareto.reference_point(recipe.objectives),
        "facts": facts,
    }
    write_atomically(folder / NAME, json.dumps(manifest, indent=1))


def facts_on_disk(recipe: Recipe) -> Json | None:
    """What the study that the recipe describes learnt about its data and models, if it was begun."""
    try:
        manifest = read_manifest(Path(recipe.output_dir))
    except BadInput:
        return None
    begun = manifest is not None and manifest["identity"] == recipe.identity()
    return manifest["facts"] if manifest and begun else None


def check_writable(folder: Path) -> None:
    """Raise `BadInput` unless files can be made in a folder, or in what there is above it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        why = f"{there} is a file" if there.is_file() else error.strerror
        raise BadInput([f"output_dir: {folder} cannot be written: {why}."]) from error


def open_study(folder: Path, recipe: Recipe) -> Json | None:
    """The facts that the folder's study has learnt; None for a new one.

    Raises `BadInput` naming what differs, if the recipe contradicts the study that is there.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    check_goes_on(manifest, recipe, where=f"output_dir: {folder}")
    facts: Json = manifest["facts"]
    return facts


def check_goes_on(manifest: Json, recipe: Recipe, *, where: str) -> None:
    """Raise `BadInput` naming what differs, if the recipe contradicts the study `where` it lies."""
    if manifest["identity"] == recipe.identity():
        return
    if found := contradictions(Recipe.from_resolved(manifest["recipe"]), recipe):
        holds = f"{where} holds a study with"
        way = f"choose another {where.partition(':')[0]} or the recipe of that study."
        raise BadInput([f"{holds} {difference}; {way}" for difference in found])


def adopt(storage: Storage, folder: Path, recipe: Recipe) -> None:
    """Take up in a new folder the study that a storage holds, if it holds one. Raises `BadInput`."""
    storage.check()
    path, where = folder / NAME, f"storage: {storage.uri}"
    if (text := storage.published(path)) is None:
        return
    manifest = parse_manifest(text, where=where)
    check_goes_on(manifest, recipe, where=where)
    if read_manifest(folder) is None:
        write_atomically(path, text.decode())
    elif manifest["ledger_key"] != ledger_key(folder):
        raise BadInput([f"{where} holds another study than output_dir; give this one its own URI."])


def package_files() -> Json:
    """SHA-256 of each source file of this package."""
    root = Path(__file__).parent
    files = sorted(root.rglob("*.py"))
    return {path.relative_to(root).as_posix(): file_sha256(path)[:16] for path in files}


def installed_versions() -> dict[str, str]:
    """Versions of what a study's numbers depend on."""
    names = ("torch", "transformers", "accelerate", "onnxruntime", "numpy", "tokenizers")
    return {name: version(name) for name in names}
