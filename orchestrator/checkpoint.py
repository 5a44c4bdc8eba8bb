"""A trained model on disk, without pickle, so that trials that share their training do it once.

Its shapes come from taking the same units out of the dense model again. Where a longer training
may go on from it, what its optimizer has gathered and its random numbers lie beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from orchestrator.prune.tree import removals, shrink
from orchestrator.quantize import Numerics
from orchestrator.quantize.convert import prepare
from orchestrator.quantize.fake import set_enabled

WEIGHTS, ABOUT, GATHERED = "model.safetensors", "about.json", "optimizer.safetensors"
RANDOM = "random."
Gathered = dict[str, torch.Tensor]


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    details: dict[str, Any],
    gathered: Gathered | None = None,
) -> None:
    """Weights, fake-quant state, which units are left, the tokenizer, and `details` (JSON values)."""
    if gathered is not None:
        save_file(gathered, folder / GATHERED)
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


def removals_in(folder: Path) -> list[dict[str, list[int]]]:
    """Which units of the dense model are left in what was saved, step by step."""
    return list(json.loads((folder / ABOUT).read_text())["removals"])


# -- going on ------------------------------------------------------------------------------------


def gather(optimizer: torch.optim.Optimizer) -> Gathered:
    """What an optimizer knows of its parameters, by their place, and where random numbers stand."""
    state = optimizer.state_dict()["state"]
    found = {
        f"{place}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for place, values in state.items()
        for name, value in values.items()
    }
    found[f"{RANDOM}cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found[f"{RANDOM}cuda"] = torch.cuda.get_rng_state()
    return found


@dataclass(frozen=True)
class Earlier:
    """A training that is `step` steps along, saved in `folder`."""

    folder: Path
    step: int

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put model, optimizer and random numbers where they were."""
        load_model(model, str(self.folder / WEIGHTS))
        gathered = load_file(self.folder / GATHERED)
        torch.set_rng_state(gathered.pop(f"{RANDOM}cpu"))
        if (random := gathered.pop(f"{RANDOM}cuda", None)) is not None:
            torch.cuda.set_rng_state(random)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in gathered.items():
            place, _, what = name.partition(".")
            state.setdefault(int(place), {})[what] = value
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )


def earlier(folder: Path) -> Earlier | None:
    """The training in `folder`, where a longer one can go on from it."""
    if not (folder / GATHERED).exists():
        return None
    about = json.loads((folder / ABOUT).read_text())
    return Earlier(folder, about["details"]["training"]["steps"])
