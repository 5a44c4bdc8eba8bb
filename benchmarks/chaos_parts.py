"""A method of the recipe of chaos.py that takes its time, as training on a GPU would."""

from __future__ import annotations

import os
import time
from typing import Any, Literal

from orchestrator.prune.none import NoPruning, Untouched


class Holding(Untouched):
    """Leaves the weights alone, and makes a training last so many seconds longer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step(self, step: int, num_steps: int) -> None:
        time.sleep(self.seconds / num_steps)


class Slow(NoPruning):
    """Prunes nothing, and holds its worker while it trains: `hold_s` seconds, else CHAOS_HOLD_S."""

    method: Literal["chaos_parts:Slow"] = "chaos_parts:Slow"
    hold_s: float | None = None

    def start(self, model: Any, context: Any) -> Holding:
        given = os.environ.get("CHAOS_HOLD_S", "0") if self.hold_s is None else self.hold_s
        return Holding(float(given))
