"""Gangs that compute nothing, on a clock that jumps: thousands of trials in seconds."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from orchestrator.launch import Done, Event, Lost, Told
from orchestrator.trial import Reason, Result, Work

Surrogate = Callable[[Work], tuple[float, Result | Reason]]
"""What a work takes in seconds, and what it comes to; a reason where its worker is lost."""


class Virtual:
    """`num_gangs` gangs of one study; `facts` are what a worker would say of data and models."""

    def __init__(
        self, surrogate: Surrogate, *, facts: Mapping[str, Any], num_gangs: int = 1
    ) -> None:
        self.surrogate, self.num_gangs = surrogate, num_gangs
        self.hear: Callable[[Told], None] = lambda told: None
        self._facts = dict(facts)
        self._clock = 0.0
        self._order = count()
        self._running: list[tuple[float, int, Work, Result | Reason]] = []

    def facts(self) -> dict[str, Any]:
        return self._facts

    def has(self, kind: str) -> bool:
        return str(self._facts["fingerprint"]) == kind

    def free(self) -> int:
        return self.num_gangs - len(self._running)

    def start(self, work: Work) -> None:
        assert self.free() > 0
        seconds, result = self.surrogate(work)
        entry = (self._clock + seconds, next(self._order), work, result)
        heapq.heappush(self._running, entry)

    def wait(self, timeout: float | None = None) -> list[Event]:
        """The work that ends first; the clock is then when it ends. No `timeout` passes here."""
        if not self._running:
            return []
        self._clock, _, work, result = heapq.heappop(self._running)
        if isinstance(result, Reason):
            return [Lost(work, result, "the worker died")]
        return [Done(work, result)]

    def waiting(self) -> dict[str, str]:
        return {}

    def now(self) -> float:
        return self._clock

    def close(self) -> None:
        self._running.clear()
