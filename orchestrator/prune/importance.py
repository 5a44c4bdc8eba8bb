"""How much a weight, a unit or a layer matters, from its values or from what the loss says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from orchestrator.prune import PruneContext
from orchestrator.prune.options import Importance
from orchestrator.signature import Group, Weight

Scores = dict[str, torch.Tensor]


def element_scores(
    model: PreTrainedModel,
    names: Sequence[str],
    *,
    importance: Importance,
    context: PruneContext,
    num_batches: int,
) -> Scores:
    """A float32 score, none negative, for each element of the named weights; higher is kept."""
    if not names:
        return {}
    if importance == "taylor":
        inputs = {"importance": importance, "weights": list(names), "num_batches": num_batches}
        return context.once(
            model, inputs, lambda: _taylor(model, names, context=context, num_batches=num_batches)
        )
    if importance == "random":
        return _random(model, names, seed=context.seed)
    return {name: model.get_parameter(name).detach().float().abs() for name in names}


def unit_scores(scores: Scores, group: Group) -> torch.Tensor:
    """The sum of a unit's elements over all its slices: [units]."""
    total: torch.Tensor | None = None
    for part in group.slices:
        end = part.start + group.num_units * part.size
        owned = scores[part.weight].movedim(part.dim, 0)[part.start : end]
        summed = owned.reshape(group.num_units, -1).sum(dim=1)
        total = summed if total is None else total + summed
    assert total is not None
    return total


def layer_scores(scores: Scores, weights: Iterable[Weight], *, num_layers: int) -> torch.Tensor:
    """The sum of all elements of each layer, `weights` being those of one stack: [layers]."""
    total = torch.zeros(num_layers)
    for weight in weights:
        total[int(weight.layer.rpartition(".")[2])] += scores[weight.name].sum().cpu()
    return total


def _random(model: PreTrainedModel, names: Sequence[str], *, seed: int) -> Scores:
    """Uniform scores, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator).to(parameter.device)
        for name, parameter in ((name, model.get_parameter(name)) for name in names)
    }


def _taylor(
    model: PreTrainedModel, names: Sequence[str], *, context: PruneContext, num_batches: int
) -> Scores:
    """|weight × gradient|, summed over batches of the training split.

    Molchanov et al. 2019 (https://arxiv.org/abs/1906.10771); summed over a head it is close to
    Michel et al. 2019 (https://arxiv.org/abs/1905.10650). The gradients that training holds are
    left alone.
    """
    weights = [model.get_parameter(name) for name in names]
    trainable = [weight.requires_grad for weight in weights]
    was_training = model.training
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    model.eval()
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for batch in context.batches(num_batches):
            batch = {name: values.to(model.device) for name, values in batch.items()}
            with torch.enable_grad():
                loss = context.loss(model, batch)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for total, weight, gradient in zip(totals, weights, gradients, strict=True):
                if gradient is not None:
                    total += (weight.detach().float() * gradient.float()).abs()
    finally:
        model.train(was_training)
        for weight, flag in zip(weights, trainable, strict=True):
            weight.requires_grad_(flag)
    return dict(zip(names, totals, strict=True))
