"""DeepSpeed ZeRO: ranks share out optimizer state (1), gradients too (2), parameters too (3).

Rajbhandari et al. 2020 (https://arxiv.org/abs/1910.02054).
"""

from __future__ import annotations

import copy
import gc
import os
from dataclasses import dataclass
from functools import _lru_cache_wrapper, cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from orchestrator.strategies import Plan, Wrapped


BUCKET = 2**22  # gradients that are averaged together
LEAN = {  # DeepSpeed's own defaults keep models of up to a billion parameters whole on every rank
    "sub_group_size": 2**24,
    "stage3_prefetch_bucket_size": 2**23,
    "stage3_max_live_parameters": 2**24,
    "stage3_max_reuse_distance": 0,
}
OFFLOAD = {"optimizer": "offload_optimizer", "parameters": "offload_param"}


@dataclass(frozen=True)
class Zero:
    """`offload` is what lies in the host's memory; `config` is a DeepSpeed configuration to begin with."""

    stage: int
    offload: tuple[str, ...] = ()
    config: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"zero{self.stage}"

    def fill(self, model: PreTrainedModel, weights: Path, device: torch.device) -> None:
        """Stage 3: this rank's stretch of every parameter. Else all of it."""
        from orchestrator.skeleton import Stored, fill_whole

        functional_linear()
        if self.stage < 3:
            fill_whole(model, weights, device)
            return
        stored = Stored(weights)
        # Init wants a batch size, of which it makes nothing.
        config = self._sections() | {"train_micro_batch_size_per_gpu": 1}
        _partition(model, stored, device, config)
        stored.fill_buffers(model)

    def place(self, model: PreTrainedModel, device: torch.device) -> None:
        """It is where it was filled."""
        if self.stage < 3:
            model.to(device)

    def wrap(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, plan: Plan) -> Wrapped:
        """Raises RuntimeError where Accelerate made something else of it without a word."""
        import torch
        from accelerate import Accelerator
        from accelerate.state import PartialState
        from accelerate.utils import DeepSpeedPlugin
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        from orchestrator.ranks import Ranks
        from orchestrator.strategies import Wrapped, forget_state

        forget_state()
        on_cpu = plan.device.type == "cpu"
        _announce(on_cpu)
        PartialState(cpu=on_cpu)  # before Accelerator, which would leave DeepSpeed out on a CPU
        config = self._sections() | {
            "train_micro_batch_size_per_gpu": -(-plan.batch_size // Ranks.here().size),
            "gradient_accumulation_steps": plan.num_calls,
            "gradient_clipping": plan.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "torch_autocast": {"enabled": plan.bf16, "dtype": "bfloat16"},
            "steps_per_print": 2**31,
        }
        accelerator = Accelerator(
            mixed_precision="no",  # DeepSpeed would round the weights themselves to bf16
            gradient_accumulation_steps=plan.num_calls,
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
            device_placement=False,
        )
        engine, prepared = accelerator.prepare(model, optimizer)
        unset_hf_deepspeed_config()  # with it transformers would partition every later model
        self._check(engine, plan)
        if self.stage == 3:
            _train_in_place(engine.optimizer)

        def clip() -> torch.Tensor:
            return torch.as_tensor(engine.get_global_grad_norm(), device=plan.device).float()

        return Wrapped(accelerator, engine, prepared, clip, close=lambda: _close(engine))

    def answering(self, model: PreTrainedModel) -> PreTrainedModel:
        """At stage 3 an engine without an optimizer brings its weights together as they are used."""
        if self.stage < 3:
            return model
        import deepspeed

        config = self._sections() | {"train_micro_batch_size_per_gpu": 1}
        deepspeed.initialize(model=model, config=config)
        return model

    def leave(self) -> None:
        """Put back what zero.Init replaced in torch, which would show in what is exported."""
        from torch.nn import functional

        functional.linear = functional_linear()
        _forget_engines()

    def _sections(self) -> dict[str, Any]:
        config = copy.deepcopy(self.config or {})
        config.pop("train_batch_size", None)  # it is the recipe's, and need not divide evenly
        zero = config.setdefault("zero_optimization", {})
        zero["stage"] = self.stage
        for what, section in OFFLOAD.items():
            if what in self.offload:
                zero.setdefault(section, {"device": "cpu"})
                config["zero_force_ds_cpu_optimizer"] = False  # one that is compiled on the spot
        zero.setdefault("reduce_bucket_size", BUCKET)
        if self.stage == 3:
            for name, value in LEAN.items():
                zero.setdefault(name, value)
            # A small parameter that stayed whole would have two copies for a mask to hold down.
            zero["stage3_param_persistence_threshold"] = 0
        return config

    def _check(self, engine: nn.Module, plan: Plan) -> None:
        from deepspeed import DeepSpeedEngine

        from orchestrator.ranks import Ranks

        found = type(engine).__name__
        if isinstance(engine, DeepSpeedEngine):
            found = (
                f"ZeRO stage {engine.zero_optimization_stage()} over {engine.dp_world_size} ranks, "
                f"gradients clipped at {engine.gradient_clipping()}"
            )
        wanted = (
            f"ZeRO stage {self.stage} over {Ranks.here().size} ranks, "
            f"gradients clipped at {plan.max_grad_norm}"
        )
        if found != wanted:
            raise RuntimeError(f"{self.name}: wanted {wanted}, but Accelerate made {found}")


def _train_in_place(zero: Any) -> None:
    """Let the optimizer step on the weights themselves, of which DeepSpeed has made a copy.

    It means to share those that are float32, but compares a device with its name.
    """
    flats = zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
    for weights, copied in flats:
        if (weights.dtype, weights.device) == (copied.dtype, copied.device):
            copied.data = weights.data


def _close(engine: Any) -> None:
    """DeepSpeed keeps references to an engine that is gone: leave it little to hold."""
    zero = engine.optimizer
    engine.destroy()
    zero.optimizer.state.clear()
    for name in ("single_partition_of_fp32_groups", "averaged_gradients"):
        if hasattr(zero, name):
            setattr(zero, name, {})
    for name, value in vars(zero).items():
        if name.endswith("__param_id_to_grad_partition"):
            value.clear()
    if hasattr(zero, "grad_partitions_flat_buffer"):
        zero.grad_partitions_flat_buffer = None


def _forget_engines() -> None:
    """What DeepSpeed has put on a stack and into caches of methods holds engines and models."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()
    for found in gc.get_objects():
        # `isinstance` would ask a proxy for what is gone.
        if type(found) is _lru_cache_wrapper and found.__module__.startswith("deepspeed."):
            found.cache_clear()


def _announce(on_cpu: bool) -> None:
    """What Accelerate and DeepSpeed read from the environment."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with it DeepSpeed is left out silently
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"


def _partition(
    module: nn.Module, stored: Any, device: torch.device, config: dict[str, Any]
) -> None:
    """Read and share out parameters module by module, so that one module at a time is whole."""
    import deepspeed

    from orchestrator.skeleton import aliases, materialise

    names = {id(parameter): found for found, parameter in aliases(module)}
    for each in module.modules():
        own = [p for p in each.parameters(recurse=False) if p.is_meta]
        for parameter in own:
            materialise(parameter, stored.read(names[id(parameter)]).to(device))
        if own:
            deepspeed.zero.Init(module=_alone(each), config_dict_or_path=config)


def _alone(module: nn.Module) -> nn.Module:
    """The module's own parameters without those of its children."""
    from torch import nn

    holder = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        holder.register_parameter(name, parameter)
    return holder


@cache
def functional_linear() -> Any:
    """torch's own, as it was before DeepSpeed came."""
    from torch.nn import functional

    return functional.linear
