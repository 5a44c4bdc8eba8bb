"""Masks over a model that several ranks hold: rank 0 chooses them, every rank keeps its part at zero."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from orchestrator.prune import Pruning, load_methods
from orchestrator.prune.options import Scheduled
from orchestrator.ranks import Ranks
from orchestrator.shards import full_shape, held, spread, whole


@dataclass(frozen=True)
class Chooser:
    """What rank 0 chooses by: the whole model, on which its methods are at work."""

    model: PreTrainedModel
    prunings: Sequence[Pruning]

    def masks(self) -> dict[str, torch.Tensor]:
        """The factors of all methods together, by weight name."""
        found: dict[str, torch.Tensor] = {}
        for pruning in self.prunings:
            for name, factor in pruning.masks.items():
                found[name] = found[name] * factor if name in found else factor
        return found


class SpreadMasks:
    """What happens to the masks of `model`, of which this rank holds a part, at each step.

    `methods` are a configuration's `prune`, from which every rank knows when masks are due. The
    weights are then brought together at rank 0, one at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        methods: Sequence[Mapping[str, Any]],
        chooser: Chooser | None,
    ) -> None:
        self._model, self._chooser = model, chooser
        self._schedules = schedules(methods)
        self._has_begun = False
        self._parameters: list[torch.Tensor] = []
        self._factors: list[torch.Tensor] = []

    def on_step(self, step: int, num_steps: int) -> None:
        """Put the zeros back; at first and when the schedule says so, with masks chosen anew."""
        is_due = self._has_begun and any(
            s.share(step, num_steps) > s.share(step - 1, num_steps) for s in self._schedules
        )
        if is_due:
            self._choose(step, num_steps)
        if is_due or not self._has_begun:
            self._receive()
        self._has_begun = True
        self._apply()

    def _choose(self, step: int, num_steps: int) -> None:
        for name, parameter in self._model.named_parameters():
            full = whole(parameter)
            if self._chooser:
                self._chooser.model.get_parameter(name).data.copy_(full)
        if self._chooser:
            for pruning in self._chooser.prunings:
                pruning.on_step(step, num_steps)

    def _receive(self) -> None:
        masks = self._chooser.masks() if self._chooser else {}
        names = json.loads(Ranks.here().told(json.dumps(list(masks)) if self._chooser else None))
        self._parameters = [self._model.get_parameter(name) for name in names]
        self._factors = []
        for name, parameter in zip(names, self._parameters, strict=True):
            full = masks[name].expand(full_shape(parameter)) if self._chooser else None
            factor = spread(parameter, full, dtype=torch.uint8)
            self._factors.append(factor.to(held(parameter)))

    @torch.no_grad()
    def _apply(self) -> None:
        if self._parameters:
            torch._foreach_mul_([held(p) for p in self._parameters], self._factors)


def schedules(methods: Sequence[Mapping[str, Any]]) -> list[Scheduled]:
    """Of those methods whose masks move while the model trains."""
    scheduled = (method for method in load_methods(methods) if isinstance(method, Scheduled))
    return [method for method in scheduled if method.schedule == "gradual"]
