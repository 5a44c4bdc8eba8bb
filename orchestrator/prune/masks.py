"""Pruning at work: masks that hold through every optimizer step, and what they become at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from orchestrator.prune import PruneContext
from orchestrator.prune.importance import Scores, element_scores, layer_scores, unit_scores
from orchestrator.prune.options import Importance, Scheduled, num_kept
from orchestrator.prune.tree import read_signature, shrink
from orchestrator.signature import Group, Signature

if TYPE_CHECKING:
    from orchestrator.prune.structured import Structured


class Masks:
    """Factors 0 or 1 by weight name, multiplied into a model's weights in one call.

    A factor has its weight's shape or broadcasts to it.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._weights: list[torch.Tensor] = []
        self._factors: list[torch.Tensor] = []

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self._factors, strict=True))

    def set(self, model: PreTrainedModel, factors: Mapping[str, torch.Tensor]) -> None:
        """Replace all factors and put them in force."""
        self.names = list(factors)
        self._weights = [model.get_parameter(name) for name in factors]
        self._factors = [
            factor.to(device=weight.device, dtype=weight.dtype)
            for factor, weight in zip(factors.values(), self._weights, strict=True)
        ]
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Put the zeros back."""
        if self._weights:
            torch._foreach_mul_(self._weights, self._factors)


class MaskedWeights:
    """Single weights on their way to zero.

    `choose(scores, share)` says which elements stay (True) at a share of the final sparsity. What
    is zero already has the lowest score, -1, so it never comes back.
    """

    tokenizer = None

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        context: PruneContext,
        options: Scheduled,
        choose: Callable[[Scores, float], Mapping[str, torch.Tensor]],
        ignore: Sequence[str] = (),
        importance: Importance = "magnitude",
        num_batches: int = 0,
    ) -> None:
        self._model, self._context, self._options = model, context, options
        self._choose, self._ignore = choose, ignore
        self._importance, self._num_batches = importance, num_batches
        self._masks = Masks()
        self._share, self._has_begun = 0.0, False
        self._advance(options.share(0, 1))

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        return self._masks.factors

    def on_step(self, step: int, num_steps: int) -> None:
        """Put the zeros back, and add those that are due."""
        if not self._has_begun:
            self._begin(self._options.share(step, num_steps) if step else self._share)
        self._masks.apply()
        self._advance(self._options.share(step, num_steps))

    def finish(self) -> None:
        """Reach the final sparsity, if the schedule has not."""
        self._advance(1.0)

    def report(self) -> dict[str, Any]:
        """Share of zeros in all prunable weights."""
        signature = read_signature(self._model)
        weights = [self._model.get_parameter(w.name) for w in signature.prunable_weights()]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        total = sum(weight.numel() for weight in weights)
        return {"sparsity": zeros / total, "kept": signature.counts}

    def _begin(self, share: float) -> None:
        """Mask what is zero in the model as it will be trained, or goes on to be.

        Other methods, or moving it to its device, may have replaced tensors since they were set.
        """
        self._has_begun, self._share = True, share
        if self._share:
            named = {name: self._model.get_parameter(name) for name in self._names()}
            self._masks.set(self._model, {name: weight != 0 for name, weight in named.items()})

    def _names(self) -> list[str]:
        weights = read_signature(self._model).prunable_weights(ignore=self._ignore)
        return [weight.name for weight in weights]

    def _advance(self, share: float) -> None:
        if share <= self._share:
            return
        scores = element_scores(
            self._model,
            self._names(),
            importance=self._importance,
            context=self._context,
            num_batches=self._num_batches,
        )
        for name, score in scores.items():
            score.masked_fill_(self._model.get_parameter(name) == 0, -1.0)
        self._masks.set(self._model, self._choose(scores, share))
        self._share = share


class MaskedUnits:
    """Heads, neurons and layers on their way out of a model.

    A gradual schedule masks heads and neurons while training and takes them out in `finish`.
    Layers it takes out at once: behind a layer norm, no zeros turn a layer into the identity.
    """

    tokenizer = None

    def __init__(
        self, model: PreTrainedModel, *, context: PruneContext, options: Structured
    ) -> None:
        self._model, self._context, self._options = model, context, options
        self._num_before = self._num_weights()
        self._masks = Masks()
        self._share = 0.0
        self._has_all_layers = self._has_all_units = True
        if options.schedule != "after":
            self._drop_layers()
        if options.schedule == "before":
            self.finish()

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        return self._masks.factors

    def on_step(self, step: int, num_steps: int) -> None:
        """Put the zeros back, and mask the units that are due."""
        self._masks.apply()
        share = self._options.share(step, num_steps)
        if self._has_all_units and share > self._share:
            keep = self._choose_units(share)
            self._masks.set(self._model, _factors(self._model, keep))
            self._share = share

    def finish(self) -> None:
        """Take out what is still to go; nothing is left to do a second time."""
        self._drop_layers()
        if self._has_all_units:
            shrink(self._model, self._choose_units(1.0))
            self._masks = Masks()
            self._has_all_units = False

    def report(self) -> dict[str, Any]:
        """Share of the prunable weights that is gone, and how many units are left."""
        sparsity = 1 - self._num_weights() / self._num_before
        return {"sparsity": sparsity, "kept": read_signature(self._model).counts}

    def _num_weights(self) -> int:
        return sum(weight.size for weight in read_signature(self._model).prunable_weights())

    def _scores(self, names: Sequence[str], importance: Importance) -> Scores:
        return element_scores(
            self._model,
            names,
            importance=importance,
            context=self._context,
            num_batches=self._options.num_batches,
        )

    def _drop_layers(self) -> None:
        if self._has_all_layers and self._options.layers:
            signature = read_signature(self._model)
            groups = signature.groups_of("layers")
            shrink(self._model, {g.name: self._choose_layers(signature, g) for g in groups})
        self._has_all_layers = False

    def _choose_layers(self, signature: Signature, group: Group) -> list[int]:
        count = num_kept(group.num_units, self._options.layers)
        if self._options.layer_choice == "first":
            return list(range(count))
        if self._options.layer_choice == "spread":
            return _spread(group.num_units, count)
        weights = [w for w in signature.weights if w.layer.rpartition(".")[0] == group.stack]
        scores = self._scores([weight.name for weight in weights], self._options.importance)
        return _best(layer_scores(scores, weights, num_layers=group.num_units), count)

    def _choose_units(self, share: float) -> dict[str, list[int]]:
        """The heads and neurons to keep at a share of the final sparsity, by group."""
        signature = read_signature(self._model)
        sparsities = {"heads": self._options.heads, "neurons": self._options.neurons}
        counts = {
            group: num_kept(group.num_units, sparsities[group.kind] * share)
            for group in signature.groups
            if sparsities.get(group.kind)
        }
        alive = self._unit_scores(counts, "magnitude")
        if any((alive[group.name] > 0).sum() > count for group, count in counts.items()):
            scores = self._unit_scores(counts, self._options.importance)
        else:
            scores = alive  # what has to go is masked already
        return {
            group.name: _best(scores[group.name].masked_fill(alive[group.name] == 0, -1.0), count)
            for group, count in counts.items()
        }

    def _unit_scores(self, groups: Iterable[Group], importance: Importance) -> Scores:
        """Scores by group; by magnitude they are 0 for masked units alone."""
        names = dict.fromkeys(part.weight for group in groups for part in group.slices)
        scores = self._scores(list(names), importance)
        return {group.name: unit_scores(scores, group) for group in groups}


def _best(scores: torch.Tensor, count: int) -> list[int]:
    """Indices of the `count` highest scores, in ascending order."""
    return sorted(scores.topk(count).indices.tolist())


def _spread(num_units: int, count: int) -> list[int]:
    """`count` of `num_units` indices: the first, the last, and evenly between."""
    if count == 1:
        return [0]
    return [round(index * (num_units - 1) / (count - 1)) for index in range(count)]


def _factors(model: PreTrainedModel, keep: Mapping[str, Sequence[int]]) -> Scores:
    """Factors that zero every slice of the units that are not kept."""
    factors: Scores = {}
    for group in read_signature(model).groups:
        if group.name not in keep or len(keep[group.name]) == group.num_units:
            continue
        kept = torch.zeros(group.num_units)
        kept[list(keep[group.name])] = 1.0
        for part in group.slices:
            weight = model.get_parameter(part.weight)
            along = factors.setdefault(part.weight, _ones_along(weight, part.dim))
            owned = along.movedim(part.dim, 0)[part.start : part.start + len(kept) * part.size]
            owned *= kept.repeat_interleave(part.size).view(-1, *[1] * (owned.ndim - 1))
    return factors


def _ones_along(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Ones that vary along `dim` alone and broadcast to the weight's shape."""
    shape = [1] * weight.ndim
    shape[dim] = weight.shape[dim]
    return torch.ones(shape)
