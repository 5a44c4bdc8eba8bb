"""The one place where values become integer codes; training, converting and serving all agree with it.

Weights are [out, in] and symmetric; their scales are [out, groups]. Activations are asymmetric,
their scale and zero point are taken anew at every call.
"""

from __future__ import annotations

import torch

from orchestrator.quantize import ActivationNumerics, WeightNumerics
from orchestrator.ranks import Ranks

ALONE = Ranks()
TINY = torch.finfo(torch.float32).tiny
CLIP_RATIOS = [1.0 - 0.05 * step for step in range(11)]


def code_range(numerics: WeightNumerics | ActivationNumerics) -> tuple[int, int]:
    """The lowest and highest code."""
    half = 2 ** (numerics.bits - 1)
    if isinstance(numerics, ActivationNumerics):
        return (-half, half - 1) if numerics.signed else (0, 2 * half - 1)
    return (1 - half if numerics.narrow else -half), half - 1


def weight_scales(weight: torch.Tensor, numerics: WeightNumerics) -> torch.Tensor:
    """Scales [out, groups], float32: the largest magnitude lands on the highest code."""
    num_rows = weight.shape[0]
    if numerics.interval is not None:
        return weight.new_full((num_rows, 1), numerics.interval, dtype=torch.float32)
    if numerics.granularity == "tensor":
        largest = _largest(weight.reshape(1, -1)).expand(num_rows, 1)
    elif numerics.granularity == "group":
        largest = _largest(weight.reshape(num_rows, -1, numerics.group_size))
    else:
        largest = _largest(weight).unsqueeze(-1)
    # A row of zeros would divide by zero; a subnormal scale would lose its codes.
    return (largest.float() / code_range(numerics)[1]).clamp_min(TINY)


def clipped_scales(weight: torch.Tensor, numerics: WeightNumerics) -> torch.Tensor:
    """Scales [out, groups] that minimise the squared rounding error over a grid of clipping ratios."""
    full = weight_scales(weight, numerics)
    best, least = full, torch.full_like(full, torch.inf)
    for ratio in CLIP_RATIOS:
        scales = full * ratio
        rounded = round_weight(weight, scales, numerics).mul_(scales.unsqueeze(-1))
        error = (rounded - _blocks(weight, scales)).square_().sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def round_weight(
    weight: torch.Tensor, scales: torch.Tensor, numerics: WeightNumerics
) -> torch.Tensor:
    """Codes as float32 [out, groups, block]; what lies outside of the range saturates."""
    return (_blocks(weight, scales) / scales.unsqueeze(-1)).round_().clamp_(*code_range(numerics))


def quantize_weight(
    weight: torch.Tensor, numerics: WeightNumerics, *, clip_search: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [out, in] and scales float32 [out, groups]."""
    scales = clipped_scales(weight, numerics) if clip_search else weight_scales(weight, numerics)
    codes = round_weight(weight, scales, numerics)
    return codes.to(torch.int8).reshape(weight.shape).contiguous(), scales.contiguous()


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights, float32 [out, in], that codes [out, in] and scales [out, groups] stand for."""
    return (_blocks(codes, scales) * scales.unsqueeze(-1)).reshape(codes.shape)


def round_activation(
    x: torch.Tensor, numerics: ActivationNumerics, ranks: Ranks = ALONE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes minus zero point (float32, like `x`) and their scale, of x's rank.

    Per tensor this is ONNX DynamicQuantizeLinear; per token, torchao's asymmetric dynamic int8.
    A tensor is that of all `ranks` together.
    """
    lowest, highest = code_range(numerics)
    low, high = _range(x, numerics, ranks)
    # torchao keeps scales above epsilon; ONNX only avoids dividing by zero.
    floor = torch.finfo(torch.float32).eps if numerics.granularity == "token" else TINY
    scale = ((high - low) / (highest - lowest)).clamp_min_(floor)
    zero_point = (lowest - (low / scale).round_()).clamp_(lowest, highest)
    codes = torch.div(x, scale).round_()
    # Nothing falls below the range, since `low` is rounded alike; a tie may land one above it.
    return torch.minimum(codes, highest - zero_point, out=codes), scale


def _range(
    x: torch.Tensor, numerics: ActivationNumerics, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value, zero included, float32, broadcastable against `x`."""
    if numerics.granularity == "token":
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        extremes = ranks.extremes(*torch.aminmax(x))
        low, high = (bound.reshape((1,) * x.dim()) for bound in extremes)
    return low.float().clamp_max_(0.0), high.float().clamp_min_(0.0)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude along the last dimension, without a temporary of the input's size."""
    return torch.maximum(values.amax(-1), -values.amin(-1))


def _blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[out, in] seen as [out, groups, block]."""
    return values.reshape(*scales.shape, -1)
