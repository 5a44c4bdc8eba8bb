"""A method that ends its worker on hosts where HOST_IS_BAD is set, as bad memory or a bad GPU would."""

from __future__ import annotations

import os
from typing import Any, Literal

from orchestrator.prune.none import NoPruning, Untouched


class DiesThere(NoPruning):
    """Prunes nothing."""

    method: Literal["dying_host:DiesThere"] = "dying_host:DiesThere"

    def start(self, model: Any, context: Any) -> Untouched:
        if "HOST_IS_BAD" in os.environ:
            os._exit(1)
        return super().start(model, context)
