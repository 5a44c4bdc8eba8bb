"""Which layers of a model are rounded, and the two steps: prepare before training, convert after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from orchestrator.quantize import ALWAYS_FLOAT, Numerics, WeightNumerics
from orchestrator.quantize.fake import FAKES, FakeQuantInput, make_fake
from orchestrator.quantize.modules import QuantizedEmbedding, QuantizedLinear
from orchestrator.quantize.rounding import code_range, quantize_weight
from orchestrator.trial import Infeasible


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer to be rounded. `numerics.weight` is its own; `tied_to` shares its weight and comes first."""

    name: str
    module: nn.Module
    numerics: Numerics
    tied_to: str | None = None

    @property
    def rounding(self) -> WeightNumerics:
        assert self.numerics.weight is not None
        return self.numerics.weight

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]."""
        weight = self.module.weight
        return weight.t() if isinstance(self.module, Conv1D) else weight

    @property
    def largest_weight(self) -> float:
        return self.module.weight.detach().abs().max().item()

    @property
    def is_prepared(self) -> bool:
        return type(self.module) in FAKES.values()


def default_ignore(model: nn.Module) -> list[str]:
    """Names of what stays in floating point under every scheme: label heads and tiny tables."""
    return [name for name in _candidates(model) if _is_listed(name, ALWAYS_FLOAT)]


def prepare(model: nn.Module, numerics: Numerics, *, ignore: Iterable[str] = ()) -> list[str]:
    """Let layers train through the rounding of `numerics`; returns their names.

    Linear layers and, where numerics say so, embeddings; a weight tied between the two is rounded
    only with the embeddings. `ignore` holds names or their endings. Raises Infeasible where a
    group size or an interval does not fit a layer.
    """
    layers = _choose(model, numerics, tuple(ignore))
    _check(layers)
    inputs = FakeQuantInput(numerics.activation) if numerics.activation else None
    for layer in layers:
        make_fake(layer.module, layer.numerics, inputs=inputs)
    return [layer.name for layer in layers]


@torch.no_grad()
def convert(
    model: nn.Module, numerics: Numerics, *, ignore: Iterable[str] = (), clip_search: bool = False
) -> nn.Module:
    """Replace layers, prepared or plain, by their codes; the same model, now in `numerics.dtype`.

    `clip_search` lets plain layers of less than 8 bits clip their largest weights where that
    lowers the squared error. Raises Infeasible as `prepare` does.
    """
    layers = _choose(model, numerics, tuple(ignore))
    _check(layers)
    made: dict[str, QuantizedLinear | QuantizedEmbedding] = {}
    for layer in layers:
        if layer.tied_to is not None:
            codes, scales = made[layer.tied_to].codes, made[layer.tied_to].scales
        else:
            clip = clip_search and not layer.is_prepared and layer.rounding.bits < 8
            codes, scales = quantize_weight(layer.weight, layer.rounding, clip_search=clip)
        made[layer.name] = _quantized(layer, codes, scales)
    _swap(model, {layer.module: made[layer.name] for layer in layers})
    _cast(model, getattr(torch, numerics.dtype))
    return model


def _choose(model: nn.Module, numerics: Numerics, ignore: tuple[str, ...]) -> list[_Layer]:
    """What is rounded, in the model's order; a tied weight for all its users or for none."""
    candidates = _candidates(model)
    listed = {name for name in candidates if _is_listed(name, ignore)} | set(default_ignore(model))
    ties = _ties(candidates)
    layers = []
    for name, module in candidates.items():
        users = ties.get(name, [name])
        is_table = name in ties or isinstance(module, nn.Embedding)
        weight = numerics.embedding if is_table else numerics.weight
        if weight is None or listed.intersection(users):
            continue
        own = numerics.model_copy(update={"weight": weight})
        tied_to = users[0] if name != users[0] else None
        layers.append(_Layer(name=name, module=module, numerics=own, tied_to=tied_to))
    return layers


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of a kind that can be rounded, by name. Subclasses compute otherwise: left alone."""
    kinds = {*FAKES, *FAKES.values()}
    return {name: module for name, module in model.named_modules() if type(module) in kinds}


def _ties(candidates: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """For each layer that shares an embedding's weight: all users of that weight, in order."""
    users = defaultdict(list)
    for name, module in candidates.items():
        users[module.weight].append(name)
    shared = [
        names
        for names in users.values()
        if len(names) > 1 and any(isinstance(candidates[name], nn.Embedding) for name in names)
    ]
    return {name: names for names in shared for name in names}


def _is_listed(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _check(layers: list[_Layer]) -> None:
    """Raises Infeasible with the rule, the layers that break it and what would fit."""
    _check_group_size(layers)
    # What was trained through saturating codes has learnt to live with them.
    _check_interval([layer for layer in layers if not layer.is_prepared])


def _check_group_size(layers: list[_Layer]) -> None:
    """Groups must come out even."""
    misfits = [
        layer
        for layer in layers
        if layer.rounding.granularity == "group"
        and layer.weight.shape[1] % layer.rounding.group_size != 0
    ]
    if misfits:
        size = misfits[0].rounding.group_size
        shown = ", ".join(f"{layer.name} ({layer.weight.shape[1]} inputs)" for layer in misfits[:3])
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise Infeasible(
            f"group_size {size} must divide the inputs of every rounded layer, and does not divide "
            f"{shown}{more}; choose a divisor, or list the layers in `ignore`"
        )


def _check_interval(layers: list[_Layer]) -> None:
    """A fixed interval must reach the largest weight with the codes there are."""
    fixed = [layer for layer in layers if layer.rounding.interval is not None]
    if not fixed:
        return
    widest = max(fixed, key=lambda layer: layer.largest_weight)
    bits, interval = widest.rounding.bits, widest.rounding.interval
    assert interval is not None
    needed = widest.largest_weight / code_range(widest.rounding)[1]
    if needed > interval:
        raise Infeasible(
            f"interval {interval:g} needs more than {bits} bits in {widest.name}; the smallest "
            f"interval that fits every layer is {needed:.4g}"
        )


def _quantized(
    layer: _Layer, codes: torch.Tensor, scales: torch.Tensor
) -> QuantizedLinear | QuantizedEmbedding:
    module = layer.module
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(
            codes,
            scales=scales,
            numerics=layer.rounding,
            padding_idx=module.padding_idx,
            tied_to=layer.tied_to,
        )
    bias = None if module.bias is None else module.bias.detach().float()
    return QuantizedLinear(
        codes, scales=scales, bias=bias, numerics=layer.numerics, tied_to=layer.tied_to
    )


def _swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, wherever the model holds them."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is stored; rotary frequencies, which are not, need their float32."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
