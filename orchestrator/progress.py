"""How a training goes, step by step: its losses, and how fast it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.ranks import Ranks
from orchestrator.trial import Diverged

if TYPE_CHECKING:
    import torch

OnLog = Callable[[int, int, float], None]


class LossCurve:
    """Mean losses at logging steps. A device is asked for them only there; a CPU at every step.

    Each rank adds its part of a step's loss; the gradient's norm is that of all.
    """

    def __init__(
        self,
        begin: int,
        num_steps: int,
        logging_steps: int,
        on_log: OnLog | None,
        *,
        check_each: bool,
        ranks: Ranks,
    ) -> None:
        import torch

        self.points: list[tuple[int, float]] = []
        self._num_steps, self._logging_steps = num_steps, logging_steps
        self._on_log, self._check_each, self._ranks = on_log, check_each, ranks
        self._since, self._sums = begin, torch.zeros(2)

    def state(self) -> dict[str, Any]:
        """Of all ranks, for `restore`. Together."""
        sums = self._ranks.total(self._sums.clone()).tolist()
        return {"points": self.points, "since": self._since, "sums": sums}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a curve was interrupted."""
        import torch

        self.points = [(int(step), float(loss)) for step, loss in state["points"]]
        self._since = int(state["since"])
        if self._ranks.rank == 0:  # what the others added is in it
            self._sums = torch.tensor(state["sums"])

    def add(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Raises `Diverged` for a loss or gradient that is not finite."""
        import torch

        self._sums = self._sums.to(loss.device, non_blocking=True) + torch.stack([loss, grad_norm])
        is_due = step % self._logging_steps == 0 or step == self._num_steps
        if not (is_due or self._check_each):
            return
        losses, norms = self._ranks.total(self._sums.clone()).tolist()
        norms /= self._ranks.size
        if not math.isfinite(losses + norms):
            raise Diverged(f"loss or gradient is not finite at step {step} of {self._num_steps}")
        if is_due:
            mean = losses / (step - self._since)
            self.points.append((step, mean))
            self._since, self._sums = step, torch.zeros_like(self._sums)
            if self._on_log is not None:
                self._on_log(step, self._num_steps, mean)


class Pace:
    """How long steps take, and over how many tokens of all ranks.

    `before` is the summary of the steps before an interruption.
    """

    def __init__(self, ranks: Ranks, before: dict[str, Any] | None = None) -> None:
        self._ranks, self._before = ranks, before or {}
        self._ends = [time.perf_counter()]
        self._tokens, self._positions = 0, [0]

    def add_batch(self, *, tokens: int, positions: int) -> None:
        self._tokens += tokens
        self._positions[-1] += positions

    def end_step(self) -> None:
        self._ends.append(time.perf_counter())
        self._positions.append(0)

    def summary(self) -> dict[str, Any]:
        """Fields of a `TrainingReport`. Together."""
        import torch

        counts = self._ranks.total(torch.tensor([self._tokens, *self._positions[:-1]]))
        tokens, *each = counts.tolist()
        seconds, positions = np.diff(self._ends), np.array(each)
        warm = slice(1, None) if len(seconds) > 1 else slice(None)
        medians = [seconds[warm], seconds[warm] / positions[warm]]
        step, position = (float(np.median(m)) if len(m) else 0.0 for m in medians)
        found = {
            "seconds": self._ends[-1] - self._ends[0],
            "step_seconds": step or self._before.get("step_seconds", 0.0),
            "position_seconds": position or self._before.get("position_seconds", 0.0),
            "tokens": tokens,
            "positions": int(positions.sum()),
        }
        for name in ("seconds", "tokens", "positions"):
            found[name] += self._before.get(name, 0)
        return found
