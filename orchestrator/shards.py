"""What one rank holds of a model whose parameters may be spread over several.

Three ways to hold a parameter are known: all of it, the rows of a DTensor (FSDP2), or a stretch of
the flattened values (DeepSpeed ZeRO stage 3). Whoever reads or changes weights while they train
does so through these functions, in the same order on every rank where they say "together".
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from orchestrator.ranks import Ranks


def is_zero3(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed keeps a stretch of it on each rank."""
    return hasattr(parameter, "ds_tensor")


def is_sharded(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor) or is_zero3(parameter)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of all of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def held(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part, to be read or changed in place; it is flat under ZeRO stage 3."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    if is_zero3(parameter):
        return _stretch(parameter, parameter.ds_tensor.data)
    return parameter.data


@torch.no_grad()
def part_of(parameter: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """The part of `full`, which has the parameter's full shape, that belongs to `held`."""
    if isinstance(parameter, DTensor):
        begin = _first_row(parameter)
        return full[begin : begin + len(parameter.to_local())]
    if is_zero3(parameter):
        begin = Ranks.here().rank * parameter.ds_tensor.ds_numel
        return full.reshape(-1)[begin : begin + parameter.ds_tensor.ds_numel]
    return full


@torch.no_grad()
def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of it, on every rank. Together."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if is_zero3(parameter):
        own = parameter.ds_tensor.data.contiguous()
        gathered = own.new_empty(own.numel() * torch.distributed.get_world_size())
        torch.distributed.all_gather_into_tensor(gathered, own)
        shape = full_shape(parameter)
        return gathered[: shape.numel()].view(shape)
    return parameter.detach()


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters on the CPU of rank 0, nothing on the others. Together.

    They are brought together one at a time.
    """
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        full = whole(parameter)
        if Ranks.here().rank == 0:
            found[name] = full.to("cpu", copy=True)
    return found


def spread(
    parameter: torch.Tensor, full: torch.Tensor | None, *, dtype: torch.dtype
) -> torch.Tensor:
    """This rank's part of a tensor [full shape of the parameter] that rank 0 alone has. Together."""
    device = held(parameter).device
    if full is None:
        full = torch.empty(full_shape(parameter), dtype=dtype, device=device)
    else:
        full = full.to(device=device, dtype=dtype).contiguous()
    torch.distributed.broadcast(full, 0)
    return part_of(parameter, full).clone()


def _first_row(parameter: DTensor) -> int:
    """Rows are dealt out as `torch.chunk` does."""
    chunk = -(-parameter.shape[0] // parameter.device_mesh.size())
    return parameter.device_mesh.get_local_rank() * chunk


def _stretch(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Without the padding at the end of the last rank's part."""
    left = full_shape(parameter).numel() - Ranks.here().rank * part.numel()
    return part[: max(0, min(left, part.numel()))]
