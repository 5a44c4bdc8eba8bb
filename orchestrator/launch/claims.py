"""Who makes a result that several gangs want: the first that asks, and those after it in turn."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

Gang = TypeVar("Gang")


class Claims(Generic[Gang]):
    """Claims on results by name. Each returns whose they are by then, if they were not before."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Gang]] = {}  # the first of each has it

    def want(self, name: str, gang: Gang) -> list[tuple[str, Gang]]:
        """Ask for a result."""
        queue = self._queues.setdefault(name, deque())
        queue.append(gang)
        return [(name, gang)] if len(queue) == 1 else []

    def let_go(self, name: str, gang: Gang) -> list[tuple[str, Gang]]:
        """It is made, or given up."""
        queue = self._queues.get(name, deque())
        had_it = bool(queue) and queue[0] is gang
        if gang in queue:
            queue.remove(gang)
        if not queue:
            self._queues.pop(name, None)
            return []
        return [(name, queue[0])] if had_it else []

    def forget(self, gang: Gang) -> list[tuple[str, Gang]]:
        """The gang is no more."""
        names = [name for name, queue in self._queues.items() if gang in queue]
        return [granted for name in names for granted in self.let_go(name, gang)]
