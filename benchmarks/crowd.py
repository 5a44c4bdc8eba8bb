"""Gangs that share processes, so that a small machine holds hundreds; to the driver each is its own."""

from __future__ import annotations

from itertools import count
from typing import Any

import ray

from orchestrator.launch.ray_gang import Gang
from orchestrator.launch.ray_worker import RayWorker


class Crowd:
    """One process of several gangs' workers, each with a number."""

    def __init__(self) -> None:
        self._workers: dict[int, RayWorker] = {}

    def add(self, number: int, worker: str, arguments: dict[str, Any]) -> None:
        self._workers[number] = RayWorker(worker, arguments)

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        return getattr(self._workers[number], method)(*arguments)


class Member:
    """What the driver takes for the actor of one gang."""

    def __init__(self, crowd: Any, number: int) -> None:
        self._crowd, self._number = crowd, number

    def __getattr__(self, method: str) -> Method:
        return Method(self._crowd, self._number, method)


class Method:
    def __init__(self, crowd: Any, number: int, name: str, group: str = "work") -> None:
        self._crowd, self._number, self._name, self._group = crowd, number, name, group

    def options(self, *, concurrency_group: str) -> Method:
        return Method(self._crowd, self._number, self._name, concurrency_group)

    def remote(self, *arguments: Any) -> ray.ObjectRef:
        call = self._crowd.call.options(concurrency_group=self._group)
        return call.remote(self._number, self._name, *arguments)


def share_processes(size: int) -> None:
    """From now on that many gangs share a process."""
    numbers, crowds = count(), []
    groups = {"work": size, "news": size, "grants": size}
    remote = ray.remote(num_cpus=0, max_restarts=0, concurrency_groups=groups)(Crowd)

    def member(gang: Gang, rank: int, worker: str, arguments: dict[str, Any]) -> Any:
        number = next(numbers)
        if number % size == 0:
            crowds.append(remote.remote())
        ray.get(crowds[-1].add.options(concurrency_group="work").remote(number, worker, arguments))
        return Member(crowds[-1], number)

    Gang._actor = member  # type: ignore[method-assign, assignment]
