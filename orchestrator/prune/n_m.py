"""N:M sparsity (Mishra et al. 2021, https://arxiv.org/abs/2104.08378)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from orchestrator.prune.options import Importance, Scheduled
from orchestrator.signature import Signature
from orchestrator.trial import Infeasible

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from orchestrator.prune import PruneContext, Pruning


class NM(Scheduled):
    """`n` zeros in each block of `m` weights along a row's inputs, the least important ones.

    A gradual schedule raises the number of zeros by whole ones. `taylor` looks at `num_batches`
    training batches. `ignore` lists name endings.
    """

    method: Literal["n_m"] = "n_m"
    n: int = Field(2, ge=1)
    m: int = Field(4, ge=2)
    importance: Importance = "magnitude"
    num_batches: int = Field(16, ge=1)
    ignore: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_block(self) -> Self:
        if not self.n < self.m:
            raise ValueError(f"`n < m` must hold, but got n={self.n}, m={self.m}")
        return self

    def plan(self, signature: Signature) -> Signature:
        """The same shapes. Raises `Infeasible` where blocks do not divide a row's inputs."""
        for weight in signature.prunable_weights(ignore=self.ignore):
            if weight.in_features % self.m:
                raise Infeasible(
                    f"blocks of {self.m} do not divide the {weight.in_features} inputs of"
                    f" {weight.name}"
                )
        return signature

    def start(self, model: PreTrainedModel, context: PruneContext) -> Pruning:
        """Set weights to zero, or begin to."""
        from orchestrator.prune.masks import MaskedWeights
        from orchestrator.prune.tree import read_signature

        self.plan(read_signature(model))
        transposed = {w.name for w in read_signature(model).weights if w.role == "conv1d"}

        def choose(scores: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
            num_zeros = round(self.n * share)
            return {
                name: self._keep(score.t(), num_zeros).t()
                if name in transposed
                else self._keep(score, num_zeros)
                for name, score in scores.items()
            }

        return MaskedWeights(
            model,
            context=context,
            options=self,
            choose=choose,
            ignore=self.ignore,
            importance=self.importance,
            num_batches=self.num_batches,
        )

    def _keep(self, scores: torch.Tensor, num_zeros: int) -> torch.Tensor:
        """True for all but the `num_zeros` lowest scores of each block of scores [out, in]."""
        import torch

        blocks = scores.reshape(-1, self.m)
        lowest = blocks.topk(num_zeros, dim=1, largest=False).indices
        kept = torch.ones_like(blocks, dtype=torch.bool).scatter_(1, lowest, False)
        return kept.view(scores.shape)
