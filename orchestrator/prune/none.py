"""No pruning, a method like the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.signature import Signature
from orchestrator.trial import Frozen

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from orchestrator.prune import PruneContext


class Untouched:
    """A model that keeps all its weights."""

    tokenizer = None
    masks: Mapping[str, torch.Tensor] = {}

    def on_step(self, step: int, num_steps: int) -> None:
        """Nothing to put back."""

    def finish(self) -> None:
        """Nothing to finish."""

    def report(self) -> dict[str, Any]:
        """No sparsity."""
        return {"sparsity": 0.0, "kept": {}}


class NoPruning(Frozen):
    """Keep every weight."""

    method: Literal["none"] = "none"

    def plan(self, signature: Signature) -> Signature:
        """The same shapes."""
        return signature

    def start(self, model: PreTrainedModel, context: PruneContext) -> Untouched:
        """Leave the model alone."""
        return Untouched()
