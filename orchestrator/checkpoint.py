"""A trained model on disk, without pickle, so that trials that share their training do it once.

Its shapes come from taking the same units out of the dense model again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from orchestrator.prune.tree import removals, shrink
from orchestrator.quantize import Numerics
from orchestrator.quantize.convert import prepare
from orchestrator.quantize.fake import set_enabled

WEIGHTS, ABOUT = "model.safetensors", "about.json"


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    details: dict[str, Any],
) -> None:
    """Weights, fake-quant state, which units are left, the tokenizer, and `details` (JSON values)."""
    save_model(model, str(folder / WEIGHTS))
    tokenizer.save_pretrained(folder / "tokenizer")
    about = {"removals": removals(model), "details": details}
    (folder / ABOUT).write_text(json.dumps(about))


def load(
    folder: Path, dense: PreTrainedModel, *, numerics: Numerics | None, ignore: tuple[str, ...]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """What was saved, made of `dense`; prepared for `numerics` where it was trained so."""
    about = json.loads((folder / ABOUT).read_text())
    for keep in about["removals"]:
        shrink(dense, keep)
    if numerics is not None:
        prepare(dense, numerics, ignore=ignore)
        set_enabled(dense, True)
    load_model(dense, str(folder / WEIGHTS))
    return dense, AutoTokenizer.from_pretrained(folder / "tokenizer"), about["details"]
