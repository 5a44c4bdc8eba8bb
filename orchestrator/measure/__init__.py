"""HOW good an artifact is: every number is taken from the saved folder, reloaded in its runtime."""

from __future__ import annotations

from orchestrator.trial import Frozen


class MeasureOptions(Frozen):
    """How long measuring may go on.

    A latency is repeated until its 95 % interval is within `relative_interval` of its median or
    `max_seconds` are spent; which of the two it was is said.
    """

    relative_interval: float = 0.05
    max_seconds: float = 5.0
    num_inputs: int = 32
    num_check_inputs: int = 256
