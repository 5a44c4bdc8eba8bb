"""How a study stands, from its folder and its ledger; for whoever looks on, at any time."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.ledger import Event, Lease, Ledger
from orchestrator.manifest import ledger_key, read_manifest
from orchestrator.trial import TrialStatus

Json = dict[str, Any]


def study_status(folder: Path) -> Json:
    """What a study has done, does, and has left. Raises `BadInput` for a folder of something else.

    `state` is "not begun", "running", "interrupted" or "finished". Times are in seconds since
    1970, by the ledger's clock.
    """
    manifest = read_manifest(folder)
    recipe: Json = manifest["recipe"] if manifest else {}
    name = recipe.get("name", folder.absolute().name)
    where = recipe.get("ledger") or folder / "ledger"
    with closing(Ledger(where, ledger_key(folder))) as ledger:
        lease = ledger.held()
        tally = Tally()
        for event in ledger.events():
            tally.add(event)
    running = [r for r in tally.running.values() if lease and r.lease == lease.number]
    return {
        "study": name,
        "state": _state(folder, tally, lease),
        "driver": _driver(lease),
        "trials": {"running": len(running), **tally.counts(running={r.key for r in running})},
        "running": [vars(each) for each in running],
        "device_seconds": tally.device_seconds,
        "hypervolume": tally.hypervolume,
        "last_event": tally.last.time if tally.last else None,
        "expected_end": _expected_end(recipe, tally, lease),
    }


@dataclass
class Running:
    """A work that was started and has not ended."""

    key: str
    attempt: int
    lease: int
    since: float
    stage: str | None = None


@dataclass
class Tally:
    """What events add up to; `ended` holds the last result of each key, as (status, reason)."""

    asked: set[str] = field(default_factory=set)
    running: dict[str, Running] = field(default_factory=dict)
    ended: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    untimed: set[str] = field(default_factory=set)
    trained: list[float] = field(default_factory=list)  # when, under the last lease
    num_lost: int = 0
    device_seconds: float = 0.0
    hypervolume: float | None = None
    last: Event | None = None

    def add(self, event: Event) -> None:
        if self.last is not None and event.lease != self.last.lease:
            self.running.clear()  # it died with the driver before
            self.trained.clear()
        self.last = event
        self.hypervolume = event.payload.get("hypervolume", self.hypervolume)
        match event.kind:
            case "asked":
                self.asked.add(event.key)
            case "started":
                self.running[event.key] = Running(event.key, event.attempt, event.lease, event.time)
            case "finished":
                self._finish(event)
            case "lost":
                self.running.pop(event.key, None)
                self.num_lost += 1
                self.device_seconds += event.payload.get("device_seconds", 0.0)
            case "measured":
                self._end_measuring(event)
            case "given_up":
                self.given_up.add(event.key)
        if event.key in self.running:
            running = self.running[event.key]
            running.stage = event.payload.get("stage", running.stage)

    def _finish(self, event: Event) -> None:
        result = event.payload["result"]
        self.running.pop(event.key, None)
        self.ended[event.key] = result["status"], result["reason"]
        self.device_seconds += result["device_seconds"] * event.payload.get("devices", 1)
        if not (result.get("measurement") or {}).get("is_timed", True):
            self.untimed.add(result["trial_id"])
        if result["status"] != TrialStatus.SKIPPED:
            self.trained.append(event.time)

    def _end_measuring(self, event: Event) -> None:
        """A front is timed as one work, `timings`, and scored on the test split one by one; a trial
        of another kind of machine is timed afterwards."""
        kind = event.payload.get("kind")
        if kind == "speed":
            self.untimed.discard(event.key)
        self.running.pop("timings" if kind == "timings" else f"{kind}:{event.key}", None)

    def counts(self, *, running: set[str]) -> Json:
        """Results by status, failures by their reason, what came to none and what is left."""
        found = Counter(status for status, _ in self.ended.values())
        failed = Counter(why for status, why in self.ended.values() if status == TrialStatus.FAILED)
        return {
            "asked": len(self.asked),
            "queued": len(self.asked - self.ended.keys() - running),
            **{status.value: found[status.value] for status in TrialStatus},
            "failed_by_reason": dict(failed),
            "lost_attempts": self.num_lost,
            "given_up": len(self.given_up),
            "to_be_timed": len(self.untimed),
        }


def _state(folder: Path, tally: Tally, lease: Lease | None) -> str:
    if lease is not None:
        return "running"
    if tally.last is None:
        return "not begun"
    left = tally.running or tally.asked - tally.ended.keys()
    return "finished" if (folder / "front.json").exists() and not left else "interrupted"


def _driver(lease: Lease | None) -> Json | None:
    if lease is None:
        return None
    holder = lease.holder
    told = {"user": holder.user, "host": holder.host, "pid": holder.pid}
    return {**told, "since": lease.taken, "last_heard_of": lease.renewed}


def _expected_end(recipe: Json, tally: Tally, lease: Lease | None) -> float | None:
    """When the search has its trials, at the pace of this driver; None where nobody can tell."""
    wanted = recipe.get("search", {}).get("num_trials")
    if lease is None or wanted is None or not tally.trained or tally.last is None:
        return None
    if tally.last.lease != lease.number:
        return None
    left = wanted - len(tally.asked & tally.ended.keys())
    seconds_each = (tally.trained[-1] - lease.taken) / len(tally.trained)
    return max(lease.now, tally.trained[-1] + left * seconds_each) if left > 0 else None
