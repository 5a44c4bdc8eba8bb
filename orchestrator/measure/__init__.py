"""HOW good an artifact is: every number is taken from the saved folder, reloaded in its runtime."""

from __future__ import annotations

from pydantic import Field

from orchestrator.trial import Frozen


class MeasureOptions(Frozen):
    """How long measuring may go on.

    A latency is repeated until its 95 % interval is within `relative_interval` of its median or
    `max_seconds` are spent; which of the two it was is said.
    """

    relative_interval: float = Field(0.05, gt=0)
    max_seconds: float = Field(5.0, gt=0)
    num_inputs: int = Field(32, ge=1)
    num_check_inputs: int = Field(256, ge=1)
