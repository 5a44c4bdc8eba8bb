"""The folder that is deployed: what a stranger needs to load it, and proof that it is unchanged."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zstandard

from orchestrator.stages import file_sha256, folder_sha256, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orchestrator.runtimes import Runtime
    from orchestrator.tasks import Kind

DESCRIPTION = "artifact.json"
PREDICTIONS = "predictions.jsonl.zst"
CARD = "README.md"
NOT_HASHED = frozenset({DESCRIPTION})


class DamagedArtifact(Exception):
    """A file of an artifact is missing or is not the one that was measured."""


def write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    runtime: Runtime,
    *,
    kind: Kind,
    cache: Path,
    about: dict[str, Any],
) -> str:
    """Write a converted model as `runtime` loads it, and seal it; `about` comes into artifact.json.

    `cache` is for what models of one shape share.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ports = runtime.export(model, folder, kind=kind, cache=cache)
    model.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return seal(folder, {**ports, "kind": kind, **about})


def seal(folder: Path, description: dict[str, Any]) -> str:
    """Write artifact.json with the SHA-256 of every other file; returns the hash of artifact.json."""
    hashes = folder_sha256(folder, leave_out=NOT_HASHED)
    text = json.dumps({"schema": 1, **description, "sha256": hashes}, indent=2, ensure_ascii=False)
    write_atomically(folder / DESCRIPTION, text + "\n")
    return file_sha256(folder / DESCRIPTION)


def reseal(folder: Path) -> str:
    """Take the hashes anew after card or predictions were completed; the new hash of artifact.json."""
    description = json.loads((folder / DESCRIPTION).read_text())
    del description["sha256"], description["schema"]
    return seal(folder, description)


def sealed_as(folder: Path) -> str:
    """The hash of an artifact's description, "" where there is none."""
    path = folder / DESCRIPTION
    return file_sha256(path) if path.exists() else ""


def verify(folder: Path) -> dict[str, Any]:
    """The description of an intact artifact. Raises `DamagedArtifact` naming every bad file."""
    try:
        description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise DamagedArtifact(f"{folder} is not an artifact: {error}") from error
    found = folder_sha256(folder, leave_out=NOT_HASHED)
    problems = [f"{name} is missing" for name in description["sha256"] if name not in found]
    problems += [
        f"{name} has SHA-256 {found[name][:12]}…, expected {expected[:12]}…"
        for name, expected in description["sha256"].items()
        if name in found and found[name] != expected
    ]
    if problems:
        raise DamagedArtifact(f"{folder} is damaged: " + "; ".join(problems))
    return description


def model_bytes(folder: Path) -> list[Path]:
    """The files that hold graph and weights."""
    endings = (".onnx", ".onnx.data", ".safetensors")
    return sorted(path for path in folder.iterdir() if path.name.endswith(endings))


def write_predictions(folder: Path, split: str, records: Sequence[dict[str, Any]]) -> None:
    """Put `records` of `split` in the predictions file, in place of those it had for that split."""
    kept = [row for row in _read_rows(folder) if row["split"] != split]
    rows = kept + [{"split": split, **record} for record in records]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / PREDICTIONS).write_bytes(zstandard.ZstdCompressor(level=9).compress(text.encode()))


def read_predictions(folder: Path, split: str) -> list[dict[str, Any]]:
    """The records of one split, as `Task.records` made them."""
    rows = [row for row in _read_rows(folder) if row["split"] == split]
    return [{key: value for key, value in row.items() if key != "split"} for row in rows]


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / PREDICTIONS
    if not path.exists():
        return []
    with path.open("rb") as stream, zstandard.ZstdDecompressor().stream_reader(stream) as reader:
        return [json.loads(line) for line in io.TextIOWrapper(reader, encoding="utf-8")]
