"""WHO holds what of a model while it trains. One file a way; this file holds contract and catalog.

To add a strategy: write a class that has the members of `Strategy` in a new file here, and give it
a line in `STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from orchestrator.resources import GangOptions
from orchestrator.strategies.fsdp2 import FSDP2
from orchestrator.strategies.replicated import Replicated
from orchestrator.strategies.zero import Zero

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """What a strategy has to know of a training.

    Each optimizer step is `num_calls` forward passes of a rank over at most `batch_size` rows.
    """

    device: torch.device
    bf16: bool
    num_calls: int
    batch_size: int
    max_grad_norm: float


@dataclass(frozen=True)
class Wrapped:
    """A model and its optimizer as they train.

    `clip` bounds the gradient and tells its norm; `close` gives back what only training needed.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip: Callable[[], torch.Tensor]
    close: Callable[[], None] = lambda: None


class Strategy(Protocol):
    """How the ranks of a gang share a training. Every rank calls the same, in the same order.

    `fill` gives a model without weights (on the meta device, buffers real) those that this rank
    is to hold, from a safetensors file; `place` brings one that has them to its device; `wrap`
    makes it train, and raises RuntimeError where that is not what was asked for; `answering` makes
    a filled one answer without training; `leave` undoes what all of these did to the process.
    """

    name: str

    def fill(self, model: PreTrainedModel, weights: Path, device: torch.device) -> None: ...
    def place(self, model: PreTrainedModel, device: torch.device) -> None: ...
    def wrap(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, plan: Plan
    ) -> Wrapped: ...
    def answering(self, model: PreTrainedModel) -> PreTrainedModel: ...
    def leave(self) -> None: ...


SINGLE = Replicated("single")
STRATEGIES: dict[str, Callable[[GangOptions], Strategy]] = {
    "single": lambda options: SINGLE,
    "ddp": lambda options: Replicated("ddp"),
    "zero1": lambda options: Zero(1, options.offload, options.deepspeed),
    "zero2": lambda options: Zero(2, options.offload, options.deepspeed),
    "zero3": lambda options: Zero(3, options.offload, options.deepspeed),
    "fsdp2": lambda options: FSDP2(options.offload),
}


def make_strategy(options: GangOptions) -> Strategy:
    """What the options say that ranks hold."""
    return STRATEGIES[options.strategy_name](options)


def forget_state() -> None:
    """What Accelerate fixes once a process: strategy, device and precision of trials may differ.

    What accelerate launch has put into the environment would go before what a trial asks for.
    """
    import os

    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in list(os.environ):
        if name.startswith("ACCELERATE_") and name != "ACCELERATE_TORCH_DEVICE":
            del os.environ[name]
