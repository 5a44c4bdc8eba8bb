"""Structured pruning: attention heads, feed-forward neurons and whole layers really go.

Heads: Michel et al. 2019 (https://arxiv.org/abs/1905.10650). Layers: Sajjad et al. 2020
(https://arxiv.org/abs/2004.03844).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from orchestrator.prune.options import Importance, Scheduled, num_kept
from orchestrator.signature import Signature

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from orchestrator.prune import PruneContext, Pruning


class Structured(Scheduled):
    """Remove shares of the heads and neurons of every layer, and of the layers of every stack.

    The least important units go; in grouped-query attention a unit is a key and value head with
    all its query heads. `layer_choice` keeps the layers with the greatest importance, the first
    ones, or the first, the last and some evenly between. `taylor` looks at `num_batches` training
    batches each time units are chosen.
    """

    # "spread" is the default since importance, summed over whole layers, misjudges them: on a
    # trained 5-layer Llama magnitude and taylor both take the first layer, by far the worst choice.

    method: Literal["structured"] = "structured"
    heads: float = Field(0.0, ge=0.0, lt=1.0)
    neurons: float = Field(0.0, ge=0.0, lt=1.0)
    layers: float = Field(0.0, ge=0.0, lt=1.0)
    importance: Importance = "taylor"
    layer_choice: Literal["importance", "first", "spread"] = "spread"
    num_batches: int = Field(16, ge=1)

    def plan(self, signature: Signature) -> Signature:
        """The shapes with the same share of units gone everywhere."""
        sparsities = {"heads": self.heads, "neurons": self.neurons, "layers": self.layers}
        return signature.keep(
            {
                group.name: num_kept(group.num_units, sparsities[group.kind])
                for group in signature.groups
                if group.kind in sparsities
            }
        )

    def start(self, model: PreTrainedModel, context: PruneContext) -> Pruning:
        """Take units out, or begin to mask them."""
        from orchestrator.prune.masks import MaskedUnits

        return MaskedUnits(model, context=context, options=self)
