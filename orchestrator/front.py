"""From the results of a study to front.json: which points are on the front, and what is known of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator import pareto
from orchestrator.pareto import Objective
from orchestrator.tasks import Record, Task
from orchestrator.trial import BadInput, Measurement, TrialResult, TrialStatus

Json = dict[str, Any]


class Outcome:
    """One trial with its place in the study: where it lies, and whether it is a reference."""

    def __init__(self, result: TrialResult, folder: Path, *, role: str, reused: bool) -> None:
        self.result, self.folder, self.role, self.reused = result, folder, role, reused

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers on the validation split; none for a trial that did not complete."""
        measured = self.result.measurement
        return measured.metrics if measured is not None else {}

    @property
    def completed(self) -> bool:
        return self.result.status is TrialStatus.COMPLETED

    @property
    def fingerprint(self) -> str:
        """Of the machine that it was timed on."""
        measured = self.result.measurement
        return measured.fingerprint if measured is not None else ""

    @property
    def is_timed(self) -> bool:
        """Whether nothing of a completed trial is yet to be measured."""
        return self.result.measurement is None or self.result.measurement.is_timed

    @property
    def is_timed_together(self) -> bool:
        """Whether its latency was taken in one pass with the other points that are shown."""
        return bool(self.result.details.get("timed_together"))

    def replaced(self, result: TrialResult) -> Outcome:
        """The same trial with another result."""
        return Outcome(result, self.folder, role=self.role, reused=self.reused)

    def timed_together(self, timings: Measurement) -> Outcome:
        """The same trial with latencies from one pass with the other points that are shown."""
        after = self.joined(timings)
        details = after.result.details | {"timed_together": True}
        return after.replaced(after.result.model_copy(update={"details": details}))

    def joined(self, later: Measurement) -> Outcome:
        """The same trial with what was measured of its artifact later."""
        before = self.result.measurement
        assert before is not None
        return self.replaced(self.result.model_copy(update={"measurement": before.joined(later)}))


def split_outcomes(
    outcomes: Sequence[Outcome], objectives: Sequence[Objective], limits: Sequence[Objective]
) -> tuple[list[Outcome], list[Outcome], list[Outcome]]:
    """Completed trials as (front, dominated, over a limit); the front is among those within limits."""
    completed = [outcome for outcome in outcomes if outcome.completed]
    allowed = [o for o in completed if pareto.within_limits(o.metrics, limits)]
    over = [o for o in completed if not pareto.within_limits(o.metrics, limits)]
    points = pareto.normalise([o.metrics for o in allowed], objectives)
    best = set(pareto.front(points).tolist()) if len(points) else set()
    front = [o for i, o in enumerate(allowed) if i in best]
    first = objectives[0]
    front.sort(key=lambda o: o.metrics[first.name], reverse=first.direction == "max")
    return front, [o for i, o in enumerate(allowed) if i not in best], over


def hypervolume(
    outcomes: Sequence[Outcome],
    baseline: Mapping[str, float],
    objectives: Sequence[Objective],
    reference_point: Mapping[str, float],
) -> float:
    """Volume that the outcomes dominate, objectives in units of the dense baseline."""
    if not outcomes:
        return 0.0
    points = pareto.normalised_by_baseline([o.metrics for o in outcomes], baseline, objectives)
    return pareto.hypervolume(points, pareto.normalise([reference_point], objectives)[0])


def within_noise(
    front: Sequence[Outcome], task: Task, records: Mapping[str, Sequence[Record]]
) -> dict[str, list[str]]:
    """For each point the others whose quality on the same rows cannot be told from its own."""
    close: dict[str, list[str]] = {outcome.result.trial_id: [] for outcome in front}
    for i, a in enumerate(front):
        for b in front[i + 1 :]:
            mine, other = a.result.trial_id, b.result.trial_id
            if not (records.get(mine) and records.get(other)):
                continue
            _, low, high = task.paired_difference(records[mine], records[other])
            if low <= 0 <= high:
                close[mine].append(other)
                close[other].append(mine)
    return close


def point(outcome: Outcome, *, study: Path, runtime: str, close: Sequence[str] = ()) -> Json:
    """One trial as it stands in front.json."""
    result = outcome.result
    measured = result.measurement
    assert measured is not None
    artifact = outcome.folder / result.artifact if result.artifact else None
    return {
        "trial_id": result.trial_id,
        "role": outcome.role,
        "config": result.config.model_dump(mode="json"),
        "metrics": dict(measured.metrics),
        "test": dict(result.test.metrics) if result.test else None,
        "intervals": {name: list(pair) for name, pair in measured.intervals.items()},
        "test_intervals": _intervals(result),
        "num_examples": measured.num_examples,
        "artifact": artifact.relative_to(study).as_posix() if artifact else None,
        "sha256": result.sha256,
        "runtime": runtime,
        "within_noise_of": list(close),
        "rebuild": f"slimtune export {result.trial_id} DIR --study {study.as_posix()}",
        "notes": list(measured.notes),
        "details": {k: v for k, v in result.details.items() if k != "training"},
    }


def _intervals(result: TrialResult) -> Json | None:
    if result.test is None:
        return None
    return {name: list(pair) for name, pair in result.test.intervals.items()}


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many trials ended in which way, and how many were there already."""
    found = {status.value: 0 for status in TrialStatus}
    for outcome in outcomes:
        found[outcome.result.status.value] += 1
    return found | {"reused": sum(outcome.reused for outcome in outcomes)}


def trial_row(outcome: Outcome) -> Json:
    """One line of the list of all trials."""
    result = outcome.result
    return {
        "trial_id": result.trial_id,
        "role": outcome.role,
        "config": result.config.model_dump(mode="json"),
        "status": result.status.value,
        "reason": result.reason.value if result.reason else None,
        "message": result.message,
        "metrics": dict(outcome.metrics),
        "device_seconds": result.device_seconds,
    }


def read_front(study: Path) -> Json:
    """front.json of a finished study. Raises `BadInput` where there is none that can be read."""
    path = study / "front.json"
    try:
        front: Json = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = "finish its study first" if study.is_dir() else "there is no such folder"
        raise BadInput([f"{study} has no front.json; {why}."]) from error
    except ValueError as error:
        problem = f"{path} is damaged: {error}; running its recipe again writes it anew."
        raise BadInput([problem]) from error
    return front
