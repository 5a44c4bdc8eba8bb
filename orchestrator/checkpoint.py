"""A trained model on disk, without pickle, so that trials that share their training do it once.

Its shapes come from taking the same units out of the dense model again. Where a longer training
may go on from it, what its optimizer has gathered and its random numbers lie beside it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from orchestrator import optimizer_state
from orchestrator.notice import Notice
from orchestrator.prune.tree import removals, shrink
from orchestrator.quantize import Numerics
from orchestrator.quantize.convert import prepare
from orchestrator.quantize.fake import set_enabled
from orchestrator.ranks import Ranks
from orchestrator.shards import gathered
from orchestrator.skeleton import Stored, aliases
from orchestrator.stages import folder_sha256
from orchestrator.storage import Storage, remove_folder

WEIGHTS, ABOUT, GATHERED = "model.safetensors", "about.json", "optimizer.safetensors"
RANDOM = "random."
Gathered = dict[str, torch.Tensor]


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    details: dict[str, Any],
    optimizer: Gathered | None = None,
) -> None:
    """Weights, fake-quant state, which units are left, the tokenizer, and `details` (JSON values)."""
    if optimizer is not None:
        save_file(optimizer, folder / GATHERED)
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


def gather(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Gathered:
    """What the optimizer knows of each parameter, and where random numbers stand on each rank.

    It is found on rank 0, and on the others nothing. Together.
    """
    found = optimizer_state.gather(model, optimizer)
    ranks = Ranks.here()
    for name, state in _random_states().items():
        for rank in range(ranks.size):
            own = state if rank == ranks.rank else torch.zeros_like(state)
            found[f"{RANDOM}{name}.{rank}"] = ranks.total(own.to(torch.int32)).to(torch.uint8)
    return found if ranks.rank == 0 else {}


def _random_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


@dataclass(frozen=True)
class Earlier:
    """A training that is `step` steps along, saved in `folder`.

    `progress` is there where the very training was interrupted: its losses and times so far.
    `is_placed` where the model has the weights already.
    """

    folder: Path
    step: int
    progress: dict[str, Any] | None = None
    is_placed: bool = False

    def place(self, model: torch.nn.Module) -> None:
        """Put the weights where they were."""
        if not self.is_placed:
            place_weights(model, self.folder)

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put optimizer and random numbers where they were. Together."""
        with safe_open(self.folder / GATHERED, framework="pt") as stored:
            names = set(stored.keys())
            optimizer_state.restore(model, optimizer, names, stored.get_tensor)
            for device in _random_states():
                name = f"{RANDOM}{device}.{Ranks.here().rank}"
                if name in names:  # there may have been fewer ranks
                    _set_random(device, stored.get_tensor(name))


def _set_random(device: str, state: torch.Tensor) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state)


def place_weights(model: torch.nn.Module, folder: Path) -> None:
    """Give a whole model the weights that are saved in `folder`."""
    stored = Stored(folder / WEIGHTS)
    with torch.no_grad():
        for names, parameter in aliases(model):
            parameter.copy_(stored.read(names))
    stored.fill_buffers(model)


def earlier(folder: Path) -> Earlier | None:
    """The training in `folder`, where a longer one can go on from it."""
    if not (folder / GATHERED).exists():
        return None
    about = json.loads((folder / ABOUT).read_text())
    return Earlier(folder, about["details"]["training"]["steps"])


@dataclass(frozen=True)
class Saver:
    """Writes down a training every so many steps, so that an interrupted one goes on from there.

    In `folder` lies the last of them, whole, and in the study's `storage` too; no pickle is in it.
    After `notice` one is written at once; of 0 steps, none ever.
    """

    folder: Path
    every: int
    storage: Storage | None = None
    notice: Notice = field(default_factory=Notice)

    def is_due(self, step: int, *, leaves: bool = False) -> bool:
        return self.every > 0 and (leaves or step % self.every == 0)

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: dict[str, Any],
    ) -> None:
        """Weights, optimizer and random numbers after `step`, from all ranks. Together."""
        weights, gathered_state = gathered(model), gather(model, optimizer)
        if Ranks.here().rank > 0:
            return
        persistent = model.state_dict(keep_vars=True)
        for name, buffer in model.named_buffers():
            if name in persistent:
                weights[name] = buffer.detach().cpu().contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".step-{step}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save_file({name: value.contiguous() for name, value in weights.items()}, part / WEIGHTS)
        save_file(gathered_state, part / GATHERED)
        seal = {"step": step, "progress": progress, "sha256": folder_sha256(part)}
        (part / ABOUT).write_text(json.dumps(seal))
        before = self._all()
        made = part.rename(self.folder / f"step-{step}")
        if self.storage:
            self.storage.send(made)
        for folder in before:
            remove_folder(folder, self.storage)

    def last(self) -> Earlier | None:
        """The last that is intact; others are removed."""
        for folder in reversed(self._all()):
            try:
                if self.storage and not folder.exists():
                    self.storage.fetch(folder)
                seal = json.loads((folder / ABOUT).read_text())
                intact = seal["sha256"] == folder_sha256(folder, leave_out=frozenset({ABOUT}))
            except (OSError, ValueError, KeyError):
                intact = False
            if intact:
                return Earlier(folder, seal["step"], seal["progress"])
            remove_folder(folder, self.storage)
        return None

    def forget(self) -> None:
        """The training is over."""
        remove_folder(self.folder, self.storage)

    def _all(self) -> list[Path]:
        found = set(self.folder.glob("step-*"))
        if self.storage:
            found.update(self.storage.below(self.folder))
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
