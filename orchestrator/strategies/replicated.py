"""Every rank holds the whole model: alone, or as data parallel replicas (DDP) that average gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from orchestrator.strategies import Plan, Wrapped


@dataclass(frozen=True)
class Replicated:
    name: str

    def fill(self, model: PreTrainedModel, weights: Path, device: torch.device) -> None:
        """All weights, on this rank's device."""
        from orchestrator.skeleton import fill_whole

        fill_whole(model, weights, device)

    def place(self, model: PreTrainedModel, device: torch.device) -> None:
        """On the device."""
        model.to(device)

    def answering(self, model: PreTrainedModel) -> PreTrainedModel:
        """It answers as it is."""
        return model

    def leave(self) -> None:
        """Nothing stays behind."""

    def wrap(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, plan: Plan) -> Wrapped:
        """Raises RuntimeError where several ranks would each train alone."""
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
        from torch.nn.parallel import DistributedDataParallel

        from orchestrator.ranks import Ranks
        from orchestrator.strategies import Wrapped, forget_state

        forget_state()
        # A family may have parameters that its task does not use.
        replicas = DistributedDataParallelKwargs(
            find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        accelerator = Accelerator(
            mixed_precision="bf16" if plan.bf16 else "no",
            gradient_accumulation_steps=plan.num_calls,
            cpu=plan.device.type == "cpu",
            device_placement=False,
            kwargs_handlers=[replicas],
        )
        trained, prepared = accelerator.prepare(model, optimizer)
        size = Ranks.here().size
        if accelerator.num_processes != size or (
            size > 1 and not isinstance(trained, DistributedDataParallel)
        ):
            raise RuntimeError(f"{self.name}: {size} ranks, but Accelerate trains each alone")
        parameters = [p for p in model.parameters() if p.requires_grad]
        return Wrapped(
            accelerator,
            trained,
            prepared,
            clip=lambda: accelerator.clip_grad_norm_(parameters, plan.max_grad_norm),
        )
