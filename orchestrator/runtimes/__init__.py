"""SERVED where: how a runtime rounds, and how an artifact is written for it, loaded and run.

The matrix of scheme × runtime is what these classes declare in `numerics`, and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from orchestrator.quantize import Numerics, QuantizeOptions
from orchestrator.runtimes.onnxruntime import OnnxRuntime
from orchestrator.runtimes.torch import TorchRuntime
from orchestrator.trial import Frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Target(Frozen):
    """Where and how the artifact is served; every served number is taken this way.

    `host` holds labels of the Ray nodes that count: speed and memory are taken on nodes of the
    kind that has them, wherever a trial was trained.
    """

    runtime: str = "onnxruntime"
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    threads: int = Field(1, ge=1)
    batch_size: int = Field(1, ge=1)
    padding: Literal["longest", "max_length"] = "longest"
    prompt_tokens: int = Field(64, ge=1)
    new_tokens: int = Field(32, ge=1)
    command: str | None = None
    host: dict[str, str] = {}


class Session(Protocol):
    """A loaded artifact.

    `run` maps named int64 arrays [batch, length] to logits (classifier [batch, classes], decoder
    [batch, length, vocabulary]) as float32. Decoders also `prefill` a prompt (logits of its last
    position, and an opaque cache) and `decode` one token a row with the cache.
    """

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray: ...
    def prefill(self, input_ids: np.ndarray) -> tuple[np.ndarray, Any]: ...
    def decode(self, token: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]: ...


class Runtime(Protocol):
    """How one engine serves. `numerics` raises `Infeasible` for what it cannot serve in its own bits."""

    name: str
    model_file: str  # "model.onnx", "model.safetensors"

    def numerics(self, options: QuantizeOptions, target: Target) -> Numerics: ...

    def check(self, target: Target) -> None:
        """Raise ValueError where this machine cannot serve on the target's device."""

    def export(
        self, model: PreTrainedModel, folder: Path, *, kind: str, cache: Path
    ) -> dict[str, Any]:
        """Write a converted model; returns the `inputs` and `outputs` of artifact.json.

        `cache` is a folder for what can be shared by models of one signature.
        """

    def load(self, folder: Path, target: Target) -> Session: ...

    def structure(self, folder: Path) -> str:
        """A hash of all of an artifact that its speed and memory hang on: equal where only the
        values of weights differ."""


RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": OnnxRuntime(),
    "torch": TorchRuntime(),
}
