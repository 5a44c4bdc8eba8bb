"""Importance scores on disk, so that trials that judge the same weights do it once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from orchestrator.stages import Stages

FILE, VERSION = "scores.safetensors", 1
Scores = dict[str, torch.Tensor]


def shared_scores(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    compute: Callable[[], Scores],
    *,
    stages: Stages,
) -> Scores:
    """What `compute` finds, float32 by the name of a weight, for this model's weights and `inputs`.

    Read back it is on the model's device.
    """
    made: list[Scores] = []

    def build(folder: Path) -> None:
        made.append(compute())
        save_file({name: score.cpu() for name, score in made[0].items()}, folder / FILE)

    key = inputs | {"model": weights_sha256(model)}
    folder = stages.once("importance", key, build, version=VERSION)
    if made:
        return made[0]
    return load_file(folder / FILE, device=str(model.device))


def weights_sha256(model: PreTrainedModel) -> str:
    """The hex SHA-256 of all parameters with their names, whatever device they are on."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
