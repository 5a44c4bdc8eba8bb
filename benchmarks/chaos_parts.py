"""A method of the recipe of chaos.py that takes its time, as training on a GPU would."""

from __future__ import annotations

import os
import time
from typing import Any, Literal

from orchestrator.prune.none import NoPruning, Untouched


class Slow(NoPruning):
    """Prunes nothing, and holds its worker for CHAOS_HOLD_S seconds."""

    method: Literal["chaos_parts:Slow"] = "chaos_parts:Slow"

    def start(self, model: Any, context: Any) -> Untouched:
        time.sleep(float(os.environ.get("CHAOS_HOLD_S", "0")))
        return super().start(model, context)
