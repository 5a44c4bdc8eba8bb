"""A model's shapes without its weights, and how those that a rank is to hold come into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from orchestrator.prune.tree import parameter_names, shrink

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def make_skeleton(
    auto_class: Any,
    config: PretrainedConfig,
    removals: Sequence[Mapping[str, Sequence[int]]],
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model of `config` less its `removals`; parameters on the meta device, buffers real."""
    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    for keep in removals:
        shrink(model, keep)
    return model


def aliases(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Each parameter once, with all its names; tied ones have several."""
    names = parameter_names(model)
    return [(names[id(parameter)], parameter) for parameter in model.parameters()]


class Stored:
    """Tensors of a safetensors file, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = set(self._file.keys())

    def read(self, names: Sequence[str]) -> torch.Tensor:
        """The tensor that was saved under one of the `names`. Raises KeyError."""
        for name in names:
            if name in self._names:
                return self._file.get_tensor(name)
        raise KeyError(names[0])

    def fill_buffers(self, model: nn.Module) -> None:
        """Those that are saved."""
        for name, buffer in model.named_buffers():
            if name in self._names:
                buffer.copy_(self._file.get_tensor(name))


def materialise(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Give a parameter on the meta device its value; whoever refers to it keeps doing so."""
    real = nn.Parameter(value, requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, real)


def fill_whole(model: PreTrainedModel, weights: Path, device: torch.device) -> None:
    """All parameters and buffers, on the device."""
    stored = Stored(weights)
    for names, parameter in aliases(model):
        materialise(parameter, stored.read(names).to(device))
    stored.fill_buffers(model)
    model.to(device)
