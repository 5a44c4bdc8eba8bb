"""One process of a gang, as an actor of Ray: it works, says how that goes, and hears orders meanwhile."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import count
from typing import Any

import ray

from orchestrator.alone import this_host
from orchestrator.artifact import DamagedArtifact
from orchestrator.launch.ray_places import Place, here, rank_environment
from orchestrator.trial import BadInput, Preempted, Work

POLL_S = 1.0  # between looks at who measures on this host, while it waits for a claim
LOOK_S = 5.0  # a worker is asked for news again when it had none for so long


@dataclass(frozen=True)
class Answer:
    """What a worker hands back: a value, or the problems in its way; its size afterwards.

    A gang that `is_broken` has ranks which wait for something that will not come. One that `leaves`
    has ended its work, `value` says where, since a machine of it is about to be taken away. What
    `has_no_disk` may be done where there is more.
    """

    value: Any = None
    problems: tuple[str, ...] = ()
    rss_mb: float = 0.0
    is_broken: bool = False
    has_no_disk: bool = False
    leaves: bool = False


@dataclass(frozen=True)
class News:
    """The `number`-th thing a worker has to say: the stage that a work has come to, or the name of a
    result that it `wants` to make, or `lets_go` of."""

    number: int
    work: Work | None = None
    stage: str = ""
    wants: str = ""
    lets_go: str = ""


class RayWorker:
    """One process of a gang, as Ray's actor. What it is asked to do is in orchestrator/gang.py.

    It works in one thread, answers questions about that in another, and is granted claims in a third.
    """

    def __init__(self, worker: str, arguments: dict[str, Any]) -> None:
        self._worker, self._arguments = worker, arguments
        self._work: Work | None = None
        self._news, self._changed = deque[News](), threading.Condition()
        self._numbers = count(1)
        self._granted: set[str] = set()
        self._leaves = False

    @cached_property
    def worker(self) -> Any:
        module, _, name = self._worker.partition(":")
        worker = getattr(import_module(module), name)(**self._arguments)
        worker.claim = self.claim
        return worker

    def place(self) -> Place:
        return here()

    def join(self, rank: int, *places: Place) -> None:
        """Become that rank of the gang whose workers are at `places`; nothing is imported yet."""
        os.environ.update(rank_environment(rank, places))

    def follow(self) -> None:
        """Train what rank 0 leads, until it lets go."""
        self.worker.follow()

    def facts(self) -> Answer:
        try:
            return Answer(self.worker.facts())
        except BadInput as error:
            return Answer(problems=tuple(error.problems))

    def do(self, work: Work) -> Answer:
        self._work = work
        self._say()
        value: Any = None
        problems: tuple[str, ...] = ()
        has_no_disk = False
        try:
            value = self.worker.do(work, self._begin)
        except Preempted as error:
            return Answer(str(error), leaves=True)
        except Exception as error:
            problems = (_explained(error),)
            has_no_disk = isinstance(error, OSError) and error.errno == errno.ENOSPC
        self._work = None
        if self.worker.is_broken:
            return Answer(value, problems, is_broken=True)
        self.worker.reset()
        return Answer(value, problems, self.worker.rss_mb(), has_no_disk=has_no_disk)

    def leave(self) -> None:
        """What it does is to end at its next stage, a training at its next step."""
        self._leaves = True
        if "worker" in self.__dict__:
            self.worker.leave()

    def _begin(self, stage: str) -> None:
        if self._leaves:
            raise Preempted(f"it was about to begin: {stage}")
        self._say(stage=stage)

    @contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Wait until it is this worker's to make the result of that name, and let go of it then."""
        if self._work is None:  # the driver does not listen
            yield
            return
        self._say(wants=name)
        while not self._is_granted(name):
            this_host().give_way()
            if self._leaves:
                raise Preempted(f"it waited for {name}")
        try:
            yield
        finally:
            self._granted.discard(name)
            self._say(lets_go=name)

    def _is_granted(self, name: str) -> bool:
        """Waits a while for it."""
        with self._changed:
            return self._changed.wait_for(lambda: name in self._granted, timeout=POLL_S)

    def grant(self, name: str) -> None:
        with self._changed:
            self._granted.add(name)
            self._changed.notify_all()

    def _say(self, **what: str) -> None:
        with self._changed:
            self._news.append(News(next(self._numbers), self._work, **what))
            self._changed.notify_all()

    def news(self, after: int) -> list[News]:
        """What is new since number `after`; waits a while for it."""
        with self._changed:
            while self._news and self._news[0].number <= after:
                self._news.popleft()
            self._changed.wait_for(lambda: bool(self._news), timeout=LOOK_S)
            return list(self._news)


def _explained(error: Exception) -> str:
    return str(error) if isinstance(error, DamagedArtifact) else f"{type(error).__name__}: {error}"


REMOTE_WORKER = ray.remote(
    max_restarts=0,
    max_task_retries=0,
    concurrency_groups={"work": 1, "news": 1, "orders": 1},
)(RayWorker)
