"""Unstructured pruning to a given sparsity (Han et al. 2015, https://arxiv.org/abs/1506.02626)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from orchestrator.prune.options import Importance, Scheduled
from orchestrator.signature import Signature

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from orchestrator.prune import PruneContext, Pruning


class Magnitude(Scheduled):
    """The least important weights become zero.

    `scope` is where weights are compared: within each matrix, or across all of them. `importance`
    other than the magnitude makes this the first-order or the random variant; `taylor` looks at
    `num_batches` training batches each time the sparsity rises. `ignore` lists name endings.
    """

    method: Literal["magnitude"] = "magnitude"
    sparsity: float = Field(ge=0.0, lt=1.0)
    scope: Literal["layer", "global"] = "layer"
    importance: Importance = "magnitude"
    num_batches: int = Field(16, ge=1)
    ignore: tuple[str, ...] = ()

    def plan(self, signature: Signature) -> Signature:
        """The same shapes: zeros are stored."""
        return signature

    def start(self, model: PreTrainedModel, context: PruneContext) -> Pruning:
        """Set weights to zero, or begin to."""
        from orchestrator.prune.masks import MaskedWeights

        return MaskedWeights(
            model,
            context=context,
            options=self,
            choose=self._choose,
            ignore=self.ignore,
            importance=self.importance,
            num_batches=self.num_batches,
        )

    def _choose(self, scores: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
        import torch

        sparsity = self.sparsity * share
        if self.scope == "layer":
            return {name: _highest(score, sparsity) for name, score in scores.items()}
        kept = _highest(torch.cat([score.flatten() for score in scores.values()]), sparsity)
        parts = kept.split([score.numel() for score in scores.values()])
        return {
            name: part.view_as(score)
            for (name, score), part in zip(scores.items(), parts, strict=True)
        }


def _highest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True for all but the lowest `sparsity` of the scores."""
    import torch

    count = round(sparsity * scores.numel())
    lowest = scores.flatten().topk(count, largest=False, sorted=False).indices
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    return kept.index_fill_(0, lowest, False).view_as(scores)
