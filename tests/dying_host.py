"""A method that ends its worker on hosts where HOST_IS_BAD is set, as bad memory or a bad GPU would."""

from __future__ import annotations

import os
import time
from typing import Any, Literal

from orchestrator.prune.none import NoPruning, Untouched

HOLD_S = 4.0  # elsewhere, so that there is work left when it has died some times


class DiesThere(NoPruning):
    """Prunes nothing."""

    method: Literal["dying_host:DiesThere"] = "dying_host:DiesThere"

    def start(self, model: Any, context: Any) -> Untouched:
        if "HOST_IS_BAD" in os.environ:
            os._exit(1)
        time.sleep(HOLD_S)
        return super().start(model, context)
