"""Serving with torch alone: floating point, and int8 by torch's own kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.quantize import (
    ActivationNumerics,
    Numerics,
    QuantizeOptions,
    WeightNumerics,
)
from orchestrator.trial import Infeasible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from orchestrator.runtimes import Target
    from orchestrator.runtimes.torch_artifact import TorchSession

INT8 = WeightNumerics(bits=8, granularity="channel")
PER_TOKEN = ActivationNumerics(bits=8, granularity="token", signed=True)


class TorchRuntime:
    """A transformers model: a standard checkpoint where its config can say the shapes.

    W8A8 rounds as torchao's Int8DynamicActivationInt8WeightConfig with asymmetric activations
    does, W8A16 as its Int8WeightOnlyConfig; both keep int8 in memory. `linear` is int8 on disk
    and float32 in memory.
    """

    name = "torch"
    model_file = "model.safetensors"
    schemes = ("none", "bf16", "W8A8", "W8A16", "linear")

    def numerics(self, options: QuantizeOptions, target: Target) -> Numerics:
        """Raises Infeasible for W4A16, for unknown schemes, and for options that do not fit."""
        scheme = options.scheme
        if scheme == "W4A16":
            raise Infeasible(_NO_INT4)
        if scheme not in self.schemes:
            raise Infeasible(f"torch serves the schemes {', '.join(self.schemes)}, not {scheme}")
        if scheme in ("none", "bf16"):
            if options.embeddings:
                raise Infeasible(f"`embeddings` rounds to int8, which scheme {scheme} has not")
            return Numerics(scheme=scheme, dtype="bfloat16" if scheme == "bf16" else "float32")
        return Numerics(
            scheme=scheme,
            weight=_linear(options) if scheme == "linear" else INT8,
            activation=PER_TOKEN if scheme == "W8A8" else None,
            embedding=INT8 if options.embeddings else None,
        )

    def check(self, target: Target) -> None:
        import torch

        if target.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"target.device is {target.device}, but torch finds no GPU here")

    def export(
        self, model: PreTrainedModel, folder: Path, *, kind: str, cache: Path
    ) -> dict[str, Any]:
        from orchestrator.runtimes.torch_artifact import ports, write_model

        write_model(model, folder)
        return ports(model, kind=kind)

    def load(self, folder: Path, target: Target) -> TorchSession:
        from orchestrator.runtimes.torch_artifact import TorchSession, load_model

        return TorchSession(load_model(folder), device=target.device, threads=target.threads)

    def structure(self, folder: Path) -> str:
        from orchestrator.runtimes.torch_artifact import structure

        return structure(folder)


_NO_INT4 = (
    "torch serves no W4A16 in its own bits: on a CPU torchao stores int4 as one int8 a weight, and "
    "on a GPU its int4 kernels need the package mslk and round otherwise; choose runtime onnxruntime"
)


def _linear(options: QuantizeOptions) -> WeightNumerics:
    return WeightNumerics(bits=8, granularity=options.granularity, interval=options.interval)
