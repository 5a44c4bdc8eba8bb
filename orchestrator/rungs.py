"""How a trial stands while it trains, told at rungs to who may stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """How a trial stands at its `rung`, the first being 1.

    `loss` is the mean since it was last logged, `quality` the score on validation of the model as
    it is then, None where it is held in parts.
    """

    rung: int
    step: int
    num_steps: int
    loss: float
    quality: float | None = None


@dataclass(frozen=True)
class Rungs:
    """A training is `count` rungs high, evenly. The last is its end, of which the result tells.

    `hear` is told at the others; `check`, which may raise `Stopped`, is called whenever a loss is
    logged.
    """

    count: int
    hear: Callable[[Standing], None]
    check: Callable[[], None] = lambda: None

    def during(self, score: Callable[[], float] | None) -> Telling:
        """Of one training; `score` finds the quality of its model."""
        return Telling(self, score)


class Telling:
    """Tells how one training stands: at the first logged loss, once a rung is reached."""

    def __init__(self, rungs: Rungs, score: Callable[[], float] | None) -> None:
        self._rungs, self._score = rungs, score
        self._loss: float | None = None
        self._told = 0

    def on_log(self, step: int, num_steps: int, loss: float) -> None:
        self._loss = loss
        self._rungs.check()

    def on_step(self, step: int, num_steps: int) -> None:
        """After what changes the weights: masks are in their places when they are scored."""
        loss, self._loss = self._loss, None
        rung = step * self._rungs.count // max(num_steps, 1)
        if loss is None or rung <= self._told or step == num_steps:
            return
        self._told = rung
        quality = self._score() if self._score else None
        self._rungs.hear(Standing(rung, step, num_steps, loss, quality))
