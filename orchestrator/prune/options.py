"""What the options of several methods share: when weights go, and what makes one important."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from orchestrator.trial import Frozen

Importance = Literal["magnitude", "taylor", "random"]
"""`taylor` is first-order, |weight × gradient|; `random` is the control."""


class Scheduled(Frozen):
    """When weights go: before fine-tuning, gradually during it, or after it.

    `begin` and `end` are shares of the optimizer steps, between which `num_updates` updates raise
    the sparsity along the cubic of Zhu & Gupta 2017 (https://arxiv.org/abs/1710.01878).
    """

    schedule: Literal["before", "gradual", "after"] = "before"
    begin: float = Field(0.0, ge=0.0, lt=1.0)
    end: float = Field(0.5, gt=0.0, le=1.0)
    num_updates: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.begin < self.end:
            raise ValueError(f"`begin < end` must hold, but got begin={self.begin}, end={self.end}")
        return self

    def share(self, step: int, num_steps: int) -> float:
        """Share of the final sparsity, 0 to 1, due after `step` of `num_steps` optimizer steps."""
        if self.schedule != "gradual":
            return float(self.schedule == "before")
        progress = (step / max(num_steps, 1) - self.begin) / (self.end - self.begin)
        updates = int(min(max(progress, 0.0), 1.0) * self.num_updates + 1e-9)
        return 1.0 - (1.0 - updates / self.num_updates) ** 3


def num_kept(num_units: int, sparsity: float) -> int:
    """Units left of `num_units`, at least one."""
    return max(1, num_units - round(num_units * sparsity))
