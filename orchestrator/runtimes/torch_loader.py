"""Loads the model of this folder; needs torch, transformers and safetensors, nothing else.

    from load import load
    model = load(".")

config.json cannot say everything about a compressed model. Shapes are therefore those of the
tensors in model.safetensors, and loader.json holds the rest: the model's class, what to change in
the config and in modules' attributes, tensors stored once for several uses, and how linear layers
with integer codes compute.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """A linear layer whose weight is codes int8 [out, in] times scales [out]."""

    def __init__(
        self, codes: torch.Tensor, *, scales: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.squeeze(1))
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """Not the weight: its shape, dtype and device, at which some models look."""
        return self.scales.unsqueeze(1).expand(self.codes.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.codes.to(x.dtype)) * self.scales
        return y if self.bias is None else y + self.bias


class DynamicInt8Linear(Int8Linear):
    """An integer product: inputs are rounded to int8 too, with a scale and zero point a token."""

    def __init__(
        self, codes: torch.Tensor, *, scales: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__(codes, scales=scales, bias=bias)
        self.register_buffer("sums", codes.sum(1, dtype=torch.int32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows.amin(1, keepdim=True).clamp_max_(0)
        high = rows.amax(1, keepdim=True).clamp_min_(0)
        scale = ((high - low) / 255).clamp_min_(torch.finfo(torch.float32).eps)
        zero_point = (-128 - (low / scale).round_()).clamp_(-128, 127)
        codes = (rows / scale).round_().add_(zero_point).clamp_(-128, 127).to(torch.int8)
        product = integer_product(codes, self.codes).sub_(zero_point.int() * self.sums)
        y = product * (scale * self.scales)
        y = y if self.bias is None else y.add_(self.bias)
        return y.view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """An embedding table of codes int8 [rows, width] times scales [rows, 1]."""

    def __init__(self, codes: torch.Tensor, *, scales: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.codes[ids] * self.scales[ids]


def integer_product(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """int8 [rows, in] times int8 [out, in], int32 [rows, out]."""
    # CUDA's int8 kernel takes more than 16 rows and multiples of 8 alone.
    if rows.is_cuda and (len(rows) <= 16 or rows.shape[1] % 8 or codes.shape[0] % 8):
        return F.linear(rows.double(), codes.double()).int()
    return torch._int_mm(rows, codes.t())


def dequantized(
    codes: torch.Tensor, *, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> nn.Linear:
    """A plain linear layer: its weight was rounded for the sake of its size alone."""
    linear = nn.Linear(codes.shape[1], codes.shape[0], bias=bias is not None, device="meta")
    tensors = {"weight": codes * scales, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
    return linear


LINEAR = {"dequantized": dequantized, "weight only": Int8Linear, "dynamic": DynamicInt8Linear}


def load(folder: str | Path) -> transformers.PreTrainedModel:
    """The model in evaluation mode, on the CPU."""
    folder = Path(folder)
    spec = json.loads((folder / "loader.json").read_text())
    config = transformers.AutoConfig.from_pretrained(folder)
    for name, value in spec["config"].items():
        setattr(config, name, value)
    with parameters_without_memory():
        model = getattr(transformers, spec["class"])(config)
    for name, attributes in spec["attributes"].items():
        vars(model.get_submodule(name)).update(attributes)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: tensors[original] for name, original in spec["shared"].items()}
    place(model, tensors, linear=spec["linear"])
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"model.safetensors lacks {', '.join(missing)}")
    return model.eval()


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Models made inside have real buffers, and parameters that wait for their tensors."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def place(model: nn.Module, tensors: dict[str, torch.Tensor], *, linear: str) -> None:
    """Give each module its tensors, whatever their shape; integer codes take the module's place."""
    owned: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owned[path][leaf] = tensor
    for path, own in owned.items():
        module = model.get_submodule(path)
        if "codes" in own:
            make = Int8Embedding if isinstance(module, nn.Embedding) else LINEAR[linear]
            model.set_submodule(path, make(own.pop("codes"), **own))
            continue
        for leaf, tensor in own.items():
            is_parameter = leaf in dict(module.named_parameters(recurse=False))
            value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            setattr(module, leaf, value)
