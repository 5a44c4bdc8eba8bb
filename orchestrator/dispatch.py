"""Works on their way: started where there is room, tried again when lost, recorded as they end."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.launch import Done, Event, Launcher, Lost, Told
from orchestrator.ledger import Ledger
from orchestrator.trial import Reason, Result, TrialResult, Work

Next = Callable[[], Work | None]
Ended = Callable[[Work, Result | Lost], None]
WAIT_S = 5.0  # between looks at a budget, at most


@dataclass
class Running:
    """A work on a gang, and since when; `told` is the last that was said of what it waits for."""

    work: Work
    since: float
    told: str = ""


def _in_parts(work: Work, result: Result) -> Lost | None:
    """That a trial which found too little memory is to be tried once more, with half the rows a call."""
    failed = isinstance(result, TrialResult) and result.reason is Reason.OOM
    if not failed or work.pieces > 1:
        return None
    assert isinstance(result, TrialResult)
    return Lost(work, Reason.OOM, f"{result.message}; it is tried again with half the rows a call")


class Dispatch:
    """Hands works to a launcher and hears of them. `device_s` is what lost works have taken.

    `timed_on` is asked, as a work starts, for the kind of machine whose speed counts; `devices` how
    many a work takes; `sealed` for the hashes of the artifacts that it reads.
    """

    def __init__(
        self,
        launcher: Launcher,
        ledger: Ledger,
        *,
        max_attempts: int,
        timed_on: Callable[[], str],
        devices: Callable[[Work], int] = lambda work: 1,
        sealed: Callable[[Work], Mapping[str, str]] = lambda work: {},
    ) -> None:
        self.launcher, self.ledger = launcher, ledger
        self.max_attempts, self.devices, self.timed_on = max_attempts, devices, timed_on
        self.sealed = sealed
        self.running: dict[tuple[str, str], Running] = {}
        self.device_s = 0.0
        self._spared: Counter[str] = Counter()  # attempts of each work that do not count
        self.on_lost: Callable[[Work, Lost], None] = lambda work, lost: None

    def run(self, next_work: Next, ended: Ended, *, at_once: Next = lambda: None) -> None:
        """Until `next_work` has none and nothing runs.

        It is asked whenever there is room, `at_once` without regard to that; `ended` hears of each
        work once, of a lost one when no attempt is left.
        """
        again: deque[Work] = deque()
        while True:
            while (work := at_once()) is not None:
                self._start(work)
            while self.launcher.free() > 0:
                work = again.popleft() if again else next_work()
                if work is None:
                    break
                self._start(work)
            if not self.running:
                return
            for event in self.launcher.wait(WAIT_S):
                self._hear(event, again, ended)
            self._tell_what_waits()

    def abandon(self, message: str) -> None:
        """Record that what runs will come to no result here."""
        for running in list(self.running.values()):
            self._lose(running.work, reason="interrupted", message=message)

    # -- one work --------------------------------------------------------------------------------

    def _start(self, work: Work) -> None:
        if work.kind in ("baseline", "trial"):  # the others end as measurements
            devices = self.devices(work)
            self.ledger.append("started", work.key, attempt=work.attempt, devices=devices)
        work = replace(work, timed_on=self.timed_on(), sealed=self.sealed(work))
        self.running[work.kind, work.key] = Running(work, self.launcher.now())
        self.launcher.start(work)

    def _tell_what_waits(self) -> None:
        """As stages, of works that have waited for a while."""
        waiting = self.launcher.waiting()
        for running in self.running.values():
            why = waiting.get(running.work.key, "")
            waited = self.launcher.now() - running.since
            if why and why != running.told and waited >= WAIT_S:
                running.told = why
                self.launcher.hear(Told(running.work, f"waits for {why}"))

    def _hear(self, event: Event, again: deque[Work], ended: Ended) -> None:
        work = event.work
        if isinstance(event, Done):
            lost = _in_parts(work, event.result)
            if lost is None or not self._has_attempts(work):
                self.running.pop((work.kind, work.key))
                ended(work, event.result)
                return
            event = lost
        self._lose(work, reason=event.reason.value, message=event.message)
        self.on_lost(work, event)
        self._spared[work.key] += not event.counts
        if event.again and self._has_attempts(work):
            pieces = 2 if event.reason is Reason.OOM else work.pieces
            again.append(replace(work, attempt=work.attempt + 1, pieces=pieces))
        else:
            ended(work, event)

    def _has_attempts(self, work: Work) -> bool:
        """Whether another one is left."""
        return work.attempt - self._spared[work.key] < self.max_attempts

    def _lose(self, work: Work, **why: Any) -> None:
        running = self.running.pop((work.kind, work.key))
        seconds = (self.launcher.now() - running.since) * self.devices(work)
        self.device_s += seconds
        self.ledger.append(
            "lost", work.key, attempt=work.attempt, device_seconds=seconds, work=work.kind, **why
        )
