"""Weights near zero become zero (Han et al. 2015, https://arxiv.org/abs/1506.02626)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from orchestrator.prune.options import Scheduled
from orchestrator.signature import Signature

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from orchestrator.prune import PruneContext, Pruning


class Threshold(Scheduled):
    """Every weight with |w| <= `threshold` becomes zero; the sparsity this gives is reported.

    `unit` "std" counts in standard deviations of the matrix, taken when it is first pruned. A
    gradual schedule raises the threshold. `ignore` lists name endings.
    """

    method: Literal["threshold"] = "threshold"
    threshold: float = Field(ge=0.0)
    unit: Literal["absolute", "std"] = "absolute"
    ignore: tuple[str, ...] = ()

    def plan(self, signature: Signature) -> Signature:
        """The same shapes: zeros are stored."""
        return signature

    def start(self, model: PreTrainedModel, context: PruneContext) -> Pruning:
        """Set weights to zero, or begin to."""
        from orchestrator.prune.masks import MaskedWeights

        deviations: dict[str, float] = {}

        def choose(scores: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
            if self.unit == "std" and not deviations:
                deviations.update({n: model.get_parameter(n).std().item() for n in scores})
            limits = {name: self.threshold * deviations.get(name, 1.0) for name in scores}
            return {name: score > limits[name] * share for name, score in scores.items()}

        return MaskedWeights(
            model, context=context, options=self, choose=choose, ignore=self.ignore
        )
