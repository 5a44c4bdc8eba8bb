"""A step of the recipe of chaos.py that takes its time, as training on a GPU would."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field

from orchestrator.prune.none import NoPruning


class Slow(NoPruning):
    """Prunes nothing, and holds its worker for some seconds."""

    method: Literal["chaos_parts:Slow"] = "chaos_parts:Slow"
    seconds: float = Field(5.0, ge=0)
    number: int = 0

    def start(self, model, context):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        time.sleep(self.seconds)
        return super().start(model, context)
