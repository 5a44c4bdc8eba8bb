"""The end of a study: the front timed in one pass, scored on the test split, written down."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import front as fronts
from orchestrator import pareto
from orchestrator.artifact import read_predictions, sealed_as
from orchestrator.front import Json, Outcome
from orchestrator.launch import Lost
from orchestrator.outcomes import folder_of
from orchestrator.report import write_report
from orchestrator.stages import GOING, write_atomically
from orchestrator.storage import Storage, remove_folder
from orchestrator.trial import (
    Measurement,
    NoBaseline,
    Reason,
    Result,
    TrialResult,
    TrialStatus,
    Work,
)

if TYPE_CHECKING:
    from orchestrator.study import Study


LARGE_STAGES = ("trained", "importance", "tokens")  # made again where they are missed


class Conclusion:
    """What is done once no trial is left to run."""

    def __init__(self, study: Study) -> None:
        self.study, self.recipe = study, study.recipe
        self.outcomes, self.ledger, self.storage = study.outcomes, study.ledger, study.storage
        self._untimable: set[str] = set()

    def run(self) -> Json:
        """Time and score what is shown, drop what is dominated, write front.json and the report."""
        self.study.watch.phase("timing the front in one pass")
        while untimed := self._untimed():
            self._time(untimed)
        self.study.watch.phase("scoring the front on the test split")
        while untested := self._untested():
            self._score(untested)
        if self.storage:
            self._bring(self.storage)
        front, dominated, over = self.outcomes.split()
        if self.recipe.keep == "front":
            for outcome in (*dominated, *over):
                self._drop(outcome)
            self._remove_large_stages()
        text = self._front_json(front, dominated, over)
        write_atomically(self.study.folder / "front.json", json.dumps(text, indent=1))
        write_report(self.study.folder)
        if self.storage:
            self._publish(text, self.storage)
        return text

    # -- what lies in a storage ------------------------------------------------------------------

    def _bring(self, storage: Storage) -> None:
        """What is shown into the study's folder. What the storage has lost has failed."""
        while missing := [o for o in self._shown() if sealed_as(_artifact(o)) != o.result.sha256]:
            for outcome in missing:
                if not storage.fetch(_artifact(outcome), version=str(outcome.result.sha256)):
                    lacks = f"{storage.uri} lacks its artifact {outcome.result.sha256}"
                    self._fail(outcome, lacks)

    def _publish(self, front: Json, storage: Storage) -> None:
        """Front, report and the artifacts that are shown, under their own names in the storage."""
        folder = self.study.folder
        before = json.loads(storage.published(folder / "front.json") or "{}")
        for gone in _artifacts_in(before) - _artifacts_in(front):
            storage.withdraw(folder / gone)
        artifacts = [folder / name for name in sorted(_artifacts_in(front))]
        files = [path for artifact in artifacts for path in artifact.rglob("*") if path.is_file()]
        storage.publish([*files, folder / "report.html", folder / "front.json"])

    def _remove_large_stages(self) -> None:
        stages = self.study.folder / "stages"
        found = {*stages.glob("*"), *(self.storage.below(stages) if self.storage else ())}
        for folder in found:
            if folder.name.partition("-")[0] in LARGE_STAGES or folder.name.startswith(GOING):
                remove_folder(folder, self.storage)

    # -- what is shown ---------------------------------------------------------------------------

    def _references(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.completed and o.role not in ("trial", "baseline")]

    def _shown(self) -> list[Outcome]:
        """Baselines, references and the front, those that have an artifact, each once."""
        front, _, _ = self.outcomes.split()
        shown = [*self.outcomes.baselines.values(), *self._references(), *front]
        unique = {o.result.trial_id: o for o in shown if o.result.artifact is not None}
        return list(unique.values())

    def _untimed(self) -> list[Outcome]:
        """All that is shown, where one of it was not timed beside the others.

        Where machines of different kinds have timed trials, no two of those compare: then it is
        every trial.
        """
        completed = [o for o in self.outcomes if o.completed and o.result.artifact is not None]
        mixed = len({outcome.fingerprint for outcome in completed}) > 1
        wanted = completed if mixed else self._shown()
        wanted = [o for o in wanted if o.result.trial_id not in self._untimable]
        return wanted if mixed or any(not o.is_timed_together for o in wanted) else []

    def _untested(self) -> list[Outcome]:
        """The baselines first: the others are held against what they have answered."""
        untested = [o for o in self._shown() if o.result.test is None]
        return [o for o in untested if o.role == "baseline"] or untested

    # -- timing ----------------------------------------------------------------------------------

    def _time(self, outcomes: list[Outcome]) -> None:
        """Latencies of all of them, interleaved, so that they compare."""
        artifacts = {o.result.trial_id: folder_of(o, self.study.folder) for o in outcomes}
        works = deque([Work(kind="timings", key="timings", artifacts=artifacts)])
        self.study.dispatch.run(lambda: works.popleft() if works else None, self._timed)

    def _timed(self, work: Work, result: Result | Lost) -> None:
        if isinstance(result, Lost):
            self._untimable.update(work.artifacts)
            self.study.watch.note(f"the front was not timed in one pass: {result.message}")
            return
        assert isinstance(result, dict)
        for key, measured in result.items():
            outcome = self.outcomes.get(key)
            assert outcome is not None
            self._keep(outcome.timed_together(measured), "timings", measured)

    # -- scoring ---------------------------------------------------------------------------------

    def _score(self, outcomes: list[Outcome]) -> None:
        works = deque(
            Work(
                kind="test",
                key=f"test:{o.result.trial_id}",
                config=o.result.config,
                folder=folder_of(o, self.study.folder),
            )
            for o in outcomes
        )
        self.study.dispatch.run(lambda: works.popleft() if works else None, self._scored)

    def _scored(self, work: Work, result: Result | Lost) -> None:
        """Take in test scores; an artifact that cannot be scored fails its trial."""
        outcome = self.outcomes.get(work.key.removeprefix("test:"))
        assert outcome is not None
        if isinstance(result, Lost):
            self._fail(outcome, result.message)
            return
        assert isinstance(result, tuple)
        measured, sha256 = result
        update = {"test": measured, "sha256": sha256}
        scored = outcome.replaced(outcome.result.model_copy(update=update))
        self._keep(scored, "test", measured, sha256=sha256)

    def _fail(self, outcome: Outcome, message: str) -> None:
        result = TrialResult(
            trial_id=outcome.result.trial_id,
            config=outcome.result.config,
            status=TrialStatus.FAILED,
            reason=Reason.ERROR,
            message=message,
            device_seconds=outcome.result.device_seconds,
        )
        self.study.record_failure(outcome.replaced(result))
        if outcome.role == "baseline":
            raise NoBaseline(f"{message}; the same command makes it again")

    def _keep(
        self, outcome: Outcome, kind: str, measured: Measurement, *, sha256: str | None = None
    ) -> None:
        """Record a measurement that came after a trial's result."""
        self.ledger.append(
            "measured",
            outcome.result.trial_id,
            kind=kind,
            measurement=measured.model_dump(mode="json"),
            sha256=sha256,
        )
        self.outcomes.add(outcome)
        self.study.write(outcome)

    def _drop(self, outcome: Outcome) -> None:
        """Delete a dominated artifact; its command builds it again."""
        if outcome.role != "trial" or outcome.result.artifact is None:
            return
        remove_folder(_artifact(outcome), self.storage)
        dropped = outcome.replaced(outcome.result.model_copy(update={"artifact": None}))
        self.outcomes.add(dropped)
        self.study.write(dropped)

    # -- front.json ------------------------------------------------------------------------------

    def _front_json(
        self, front: list[Outcome], dominated: list[Outcome], over: list[Outcome]
    ) -> Json:
        baseline = next(iter(self.outcomes.baselines.values()))
        objectives = self.recipe.objectives
        reference_point = pareto.reference_point(objectives)
        records = {o.result.trial_id: self._records(o) for o in front}
        close = fronts.within_noise(front, self.recipe.task, records)

        def points(group: list[Outcome]) -> list[Json]:
            return [
                fronts.point(
                    self.outcomes.get(o.result.trial_id) or o,
                    study=self.study.folder,
                    runtime=self.recipe.target.runtime,
                    close=close.get(o.result.trial_id, ()),
                )
                for o in group
            ]

        return {
            "schema": 1,
            "study": self.recipe.name,
            "quality": self.recipe.task.quality,
            "target": self.recipe.target.model_dump(mode="json"),
            "fingerprint": self.study.facts["fingerprint"],
            "objectives": [{"name": o.name, "direction": o.direction} for o in objectives],
            "limits": [limit.model_dump(mode="json") for limit in self.recipe.limits],
            "reference_point": reference_point,
            "hypervolume": fronts.hypervolume(front, baseline.metrics, objectives, reference_point),
            "baseline": points([baseline])[0],
            "points": points(front),
            "references": points([*self.outcomes.baselines.values(), *self._references()]),
            "dominated": points(dominated),
            "over_limit": points(over),
            "trials": fronts.counts(list(self.outcomes)),
            "all_trials": [fronts.trial_row(o) for o in self.outcomes],
            "device_seconds": self.study.spent.device_s + self.study.dispatch.device_s,
        }

    def _records(self, outcome: Outcome) -> list[Json]:
        if outcome.result.artifact is None:
            return []
        return read_predictions(_artifact(outcome), "validation")


def _artifact(outcome: Outcome) -> Path:
    return outcome.folder / str(outcome.result.artifact)


def _artifacts_in(front: Json) -> set[str]:
    """Folders of what a front.json shows, relative to the study's."""
    shown = [*front.get("points", ()), *front.get("references", ())]
    return {point["artifact"] for point in shown if point["artifact"]}
