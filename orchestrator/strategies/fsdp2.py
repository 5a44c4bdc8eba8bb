"""Each rank holds some rows of every parameter, its gradient and its moments (FSDP2).

Zhao et al. 2023 (https://arxiv.org/abs/2304.11277). One layer at a time is brought together, to
compute with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from orchestrator.strategies import Plan, Wrapped


@dataclass(frozen=True)
class FSDP2:
    """`offload` keeps the rows, and with them the optimizer's state, in the host's memory."""

    offload: tuple[str, ...] = ()
    name = "fsdp2"

    def fill(self, model: PreTrainedModel, weights: Path, device: torch.device) -> None:
        """Shard layer by layer, then read this rank's rows."""
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        from orchestrator.prune.tree import layers_of
        from orchestrator.ranks import Ranks
        from orchestrator.shards import held, part_of
        from orchestrator.skeleton import Stored, aliases

        mesh = init_device_mesh(device.type, (Ranks.here().size,))
        options = {"mesh": mesh}
        if "parameters" in self.offload and device.type != "cpu":
            options["offload_policy"] = CPUOffloadPolicy()
            device = torch.device("cpu")
        for layer in layers_of(model):
            fully_shard(layer, **options)
        fully_shard(model, **options)
        # `to_empty` would also empty the buffers, which are real.
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        stored = Stored(weights)
        for names, parameter in aliases(model):
            held(parameter).copy_(part_of(parameter, stored.read(names)))
        stored.fill_buffers(model)

    def place(self, model: PreTrainedModel, device: torch.device) -> None:
        """It is where it was filled."""

    def answering(self, model: PreTrainedModel) -> PreTrainedModel:
        """It answers as it is."""
        return model

    def leave(self) -> None:
        """Nothing stays behind."""

    def wrap(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, plan: Plan) -> Wrapped:
        """Raises RuntimeError where a parameter is not sharded."""
        import torch
        from accelerate import Accelerator

        from orchestrator.ranks import Ranks
        from orchestrator.shards import is_sharded
        from orchestrator.strategies import Wrapped, forget_state

        forget_state()
        # Accelerate's own FSDP leaves CPUs out and wants whole weights on rank 0: here it does
        # the precision and the accumulation of gradients that are sharded already.
        accelerator = Accelerator(
            mixed_precision="bf16" if plan.bf16 else "no",
            gradient_accumulation_steps=plan.num_calls,
            cpu=plan.device.type == "cpu",
            device_placement=False,
        )
        trained = accelerator.prepare_model(model, evaluation_mode=True)
        prepared = accelerator.prepare_optimizer(optimizer)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not all(is_sharded(p) for p in parameters):
            raise RuntimeError(f"{self.name}: not every parameter is sharded")
        if accelerator.num_processes != Ranks.here().size:
            raise RuntimeError(f"{self.name}: Accelerate trains each rank alone")

        def clip() -> torch.Tensor:
            norm = torch.nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
            return norm.full_tensor()

        return Wrapped(accelerator, trained, prepared, clip)
