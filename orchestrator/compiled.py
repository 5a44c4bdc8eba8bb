"""Layers that torch.compile has fused into few kernels.

Layers are compiled, one by one, and not the model: they are alike, so that one compilation serves
all of them, and what a strategy, a mask or a teacher hangs on a model stays outside. Only `forward`
is compiled, which leaves names, weights and hooks as they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

A_LAYER = 8  # compilations: of lengths, numbers of rows, and with rounding and without


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks for a device here, as the end of a sentence."""
    if device.type == "cpu":
        name = os.environ.get("CXX", "g++")
        return None if shutil.which(name) else f"a C++ compiler: there is no {name} (CXX names one)"
    return None if find_spec("triton") else "Triton: pip install triton"


@contextmanager
def compiled(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, each of the `layers` is compiled when it is first called.

    The first compilation is for one length and number of rows, the next for any.
    """
    if not layers:
        yield
        return
    import torch

    settings = torch._dynamo.config.patch(
        # Pruning may leave each layer another shape. Beyond the limit a layer is not compiled.
        recompile_limit=A_LAYER * len(layers),
        # A layer's gradients are ready when its backward pass ends: DDP need not split it up.
        optimize_ddp=False,
    )
    try:
        with settings:
            for layer in layers:
                layer.forward = torch.compile(layer.forward)
            yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
        torch.compiler.reset()  # what was compiled is of no use to the next training
