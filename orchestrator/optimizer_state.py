"""What an optimizer has gathered of each parameter, by its name, whatever of it this rank holds.

So that a training may go on under another strategy, or with another number of ranks. Both
functions are called by all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from orchestrator.ranks import Ranks
from orchestrator.shards import full_shape, is_zero3, part_of

STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")
Read = Callable[[str], torch.Tensor]


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """On rank 0 the whole state on the CPU, as `name.exp_avg`; nothing on the others."""
    _link(optimizer)
    base, found = _base(optimizer), {}
    is_first = Ranks.here().rank == 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if _is_zero(parameter):
            from deepspeed.utils import safe_get_full_optimizer_state

            values = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        else:
            state = base.state.get(parameter)
            if not state:  # it took no part in the loss
                continue
            values = {key: _full(state[key]) for key in MOMENTS}
        if is_first:
            shape = full_shape(parameter)
            for key, value in values.items():
                whole = value.flatten()[: shape.numel()].view(shape)
                found[f"{name}.{key}"] = whole.to("cpu", torch.float32, copy=True).contiguous()
            found[f"{name}.{STEP}"] = torch.tensor(float(_step(base, parameter)))
    return found


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: set[str], read: Read
) -> None:
    """Put every parameter's state where `gather` found it; `read(name.exp_avg)` gives the whole."""
    base = _base(optimizer)
    parameters = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and f"{name}.{STEP}" in names
    }
    if not parameters:
        return
    step = read(f"{next(iter(parameters))}.{STEP}").item()
    if any(map(_is_zero, parameters.values())):
        _begin_flat(optimizer, base, step)
    for name, parameter in parameters.items():
        whole = {key: read(f"{name}.{key}") for key in MOMENTS}
        if is_zero3(parameter):
            for key, value in whole.items():
                flat, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(
                    parameter, False, key
                )
                part = part_of(parameter, value)
                flat[: part.numel()].copy_(part)
        elif _is_zero(parameter):
            from deepspeed.utils import safe_set_full_optimizer_state

            for key, value in whole.items():
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        else:
            base.state[parameter] = _own_state(parameter, whole, read(f"{name}.{STEP}"))


def _own_state(
    parameter: torch.Tensor, whole: Mapping[str, torch.Tensor], step: torch.Tensor
) -> dict[str, torch.Tensor]:
    """As AdamW makes it at its first step, with what was found."""
    device = parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device
    state: dict[str, Any] = {STEP: step.to(device, torch.float32).clone()}
    for key, value in whole.items():
        state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        held = state[key].to_local() if isinstance(parameter, DTensor) else state[key]
        held.copy_(part_of(parameter, value))
    return state


def _begin_flat(optimizer: Any, base: torch.optim.Optimizer, step: float) -> None:
    """State for the flat stretches of parameters that ZeRO's optimizer steps on."""
    flats = [flat for group in base.param_groups for flat in group["params"]]
    flats = flats or optimizer.optimizer.fp32_partitioned_groups_flat  # stage 3 shows one at a time
    for flat in flats:
        moments = {key: torch.zeros_like(flat) for key in MOMENTS}
        counted = torch.tensor(step, dtype=torch.float32, device=flat.device)
        base.state[flat] = {STEP: counted, **moments}
    _link(optimizer)


def _link(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 know where in its flat stretches a parameter's state lies.

    It does so by itself, but in the midst of its first step, when only some groups have a state.
    """
    while optimizer is not None:
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        optimizer = getattr(optimizer, "optimizer", None)


def _base(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch inside those of Accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _is_zero(parameter: torch.Tensor) -> bool:
    return (
        is_zero3(parameter)
        or getattr(parameter, "_hp_mapping", None) is not None
        or hasattr(parameter, "_dp_group")
    )


def _full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _step(base: torch.optim.Optimizer, parameter: torch.Tensor) -> float:
    state = base.state.get(parameter) or next(iter(base.state.values()))
    return float(state[STEP])
