"""Notice that the machine of a process is about to be taken away, as spot machines are."""

from __future__ import annotations

import threading

from orchestrator.ranks import Ranks


class Notice:
    """Given by one thread of a process, looked for by the one that works."""

    def __init__(self) -> None:
        self._given = threading.Event()

    def give(self) -> None:
        self._given.set()

    def is_given(self, ranks: Ranks) -> bool:
        """Whether any rank has it. Together."""
        import torch

        if ranks.size == 1:
            return self._given.is_set()
        return bool(ranks.total(torch.tensor(float(self._given.is_set()))) > 0)
