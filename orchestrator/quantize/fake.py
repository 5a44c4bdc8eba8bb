"""Layers that train through the rounding of the runtime that will serve them.

They keep the parameters, hence the state dict, of what they stand for. Gradients pass straight
through the rounding (Bengio et al. 2013, https://arxiv.org/abs/1308.3432), and nothing is saved
for the backward pass beyond what a plain linear layer saves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from orchestrator.quantize import ActivationNumerics, Numerics, WeightNumerics
from orchestrator.quantize.rounding import round_activation, round_weight, weight_scales
from orchestrator.ranks import Ranks


class FakeQuantInput:
    """Rounds activations, once for all layers that take the same tensor (query, key and value).

    It is shared by the layers of one model and remembers the last tensor alone. `ranks` split the
    rows of a call among them: one scale a call is then one for all of their rows.
    """

    def __init__(self, numerics: ActivationNumerics) -> None:
        self.numerics = numerics
        self.ranks = Ranks()
        self._last: weakref.ref[torch.Tensor] | None = None
        self._key: tuple[Any, ...] = ()
        self._rounded: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        dtype = _compute_dtype(x)
        if torch.compiler.is_compiling():  # a compiler finds by itself what is computed twice
            apply = _apart if self._asks_ranks else _RoundActivation.apply
            return apply(x, self.numerics, dtype, self.ranks)
        if x.is_inference():  # has no version, so a change in place would go unseen
            return _RoundActivation.apply(x, self.numerics, dtype, self.ranks)
        key = (x._version, dtype, x.requires_grad and torch.is_grad_enabled())
        if self._rounded is None or self._last is None or self._last() is not x or self._key != key:
            self._rounded = _RoundActivation.apply(x, self.numerics, dtype, self.ranks)
            self._last, self._key = weakref.ref(x), key
        return self._rounded

    @property
    def _asks_ranks(self) -> bool:
        return self.ranks.size > 1 and self.numerics.granularity == "tensor"

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeQuantInput:
        return FakeQuantInput(self.numerics)


class FakeQuantLinear(nn.Linear):
    """A linear layer that computes with rounded weights and, where numerics say so, inputs."""

    numerics: Numerics
    inputs: FakeQuantInput | None
    enabled: bool
    rounds_again: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return super().forward(x)
        return _fake_linear(self, x, self.weight)


class FakeQuantConv1D(Conv1D):
    """The same for GPT-2's linear layer, whose weight is [in, out]."""

    numerics: Numerics
    inputs: FakeQuantInput | None
    enabled: bool
    rounds_again: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return super().forward(x)
        return _fake_linear(self, x, self.weight.t())


class FakeQuantEmbedding(nn.Embedding):
    """An embedding whose rows are rounded as they are looked up."""

    numerics: Numerics
    enabled: bool

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = super().forward(ids)
        if not self.enabled:
            return rows
        flat = rows.reshape(-1, self.embedding_dim)
        return _RoundWeight.apply(flat, self.numerics.weight, rows.dtype).view_as(rows)


FAKES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FakeQuantLinear,
    Conv1D: FakeQuantConv1D,
    nn.Embedding: FakeQuantEmbedding,
}


def make_fake(module: nn.Module, numerics: Numerics, *, inputs: FakeQuantInput | None) -> None:
    """Let a layer compute with rounding from now on; `inputs` is for linear layers.

    Only the class changes, so parameters, hooks and whoever refers to the module stay valid.
    """
    module.__class__ = FAKES.get(type(module), type(module))
    module.numerics, module.inputs, module.enabled = numerics, inputs, True
    module.rounds_again = False


def round_again(model: nn.Module, does: Callable[[torch.Tensor], bool]) -> None:
    """Layers whose weight `does` keep no rounded copy of it for the backward pass: they round again.

    For weights that a rank brings together layer by layer: copies of all of them would be the
    whole model after all.
    """
    for module in model.modules():
        if type(module) in (FakeQuantLinear, FakeQuantConv1D):
            module.rounds_again = does(module.weight)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Turn the rounding of a prepared model on or off."""
    for module in model.modules():
        if type(module) in FAKES.values():
            module.enabled = enabled


class _RoundActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        numerics: ActivationNumerics,
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> torch.Tensor:
        codes, scale = round_activation(x, numerics, ranks)
        return codes.mul_(scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad, None, None, None


@torch.compiler.disable
def _apart(
    x: torch.Tensor, numerics: ActivationNumerics, dtype: torch.dtype, ranks: Ranks
) -> torch.Tensor:
    """Not compiled: what ranks do together has to come in the same order on all of them."""
    return _RoundActivation.apply(x, numerics, dtype, ranks)


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, numerics: WeightNumerics, dtype: torch.dtype
    ) -> torch.Tensor:
        scales = weight_scales(weight, numerics)
        codes = round_weight(weight, scales, numerics)
        return codes.mul_(scales.unsqueeze(-1)).reshape(weight.shape).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad, None, None


class _RoundedTwice(torch.autograd.Function):
    """A linear layer whose weight is rounded in the forward and again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        numerics: WeightNumerics,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.numerics, ctx.dtype = numerics, dtype
        rounded = _RoundWeight.forward(ctx, weight, numerics, dtype)
        return F.linear(x, rounded, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ _RoundWeight.forward(ctx, weight, ctx.numerics, ctx.dtype)
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            to_weight = (flat.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = flat.sum(0).to(weight.dtype)
        return to_x, to_weight, to_bias, None, None


def _fake_linear(
    layer: FakeQuantLinear | FakeQuantConv1D, x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """`weight` is [out, in]."""
    if layer.rounds_again:
        x = x if layer.inputs is None else layer.inputs(x)
        return _RoundedTwice.apply(
            x, weight, layer.bias, layer.numerics.weight, _compute_dtype(weight)
        )
    rounded = _RoundWeight.apply(weight, layer.numerics.weight, _compute_dtype(weight))
    return F.linear(x if layer.inputs is None else layer.inputs(x), rounded, layer.bias)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What a matrix product will compute in: autocast's dtype where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
