"""Trials that were trained on machines of another kind than the target's: timed there afterwards."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from orchestrator.front import Outcome
from orchestrator.launch import Lost
from orchestrator.outcomes import folder_of
from orchestrator.trial import NoBaseline, Result, TrialStatus, Work

if TYPE_CHECKING:
    from orchestrator.study import Study


class Untimed:
    """What waits to be timed. The search is told of it when that is done."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._waiting: dict[str, Outcome] = {}
        self._singly = self._is_timing = False

    def add(self, outcome: Outcome) -> None:
        self._waiting[outcome.result.trial_id] = outcome

    def timed_on(self) -> str:
        """The kind of machine whose speed counts; "" where none of it is there."""
        kind = str(self.study.facts["fingerprint"])
        if self.study.launcher.has(kind):
            return kind
        self.study.note_once(
            "no machine is here of the kind that this study's latencies were taken on: trials are"
            " timed where they run, and compare once all were timed in one pass, at the end"
        )
        return ""

    def next_work(self) -> Work | None:
        """All that waits, as one work.

        There is one such work at a time, so that those that come meanwhile are taken together.
        """
        if self._is_timing or not self._waiting:
            return None
        self._is_timing = True  # until it has ended, all its attempts included
        chosen = islice(self._waiting.items(), 1 if self._singly else None)
        artifacts = {key: folder_of(outcome, self.study.folder) for key, outcome in chosen}
        return Work(kind="speed", key="speed", artifacts=artifacts)

    def ended(self, work: Work, result: Result | Lost) -> None:
        """Take in what was measured; a trial whose speed cannot be had has failed."""
        self._is_timing = False
        if isinstance(result, Lost) and len(work.artifacts) > 1:
            self._singly = True  # one of them is to blame
            return
        for key in work.artifacts:
            outcome = self._waiting.pop(key)
            if isinstance(result, Lost):
                self._fail(outcome, result)
                continue
            assert isinstance(result, dict)
            timed = outcome.joined(result[key])
            self.study.outcomes.add(timed)
            self.study.ledger.append(
                "measured",
                key,
                kind="speed",
                measurement=result[key].model_dump(mode="json"),
                hypervolume=self.study.outcomes.hypervolume,
            )
            self.study.write(timed)
            self.study.learn(timed)

    def recall(self, timed: Outcome) -> None:
        """An earlier run has measured it."""
        self._waiting.pop(timed.result.trial_id, None)
        self.study.outcomes.add(timed)
        self.study.learn(timed)

    def _fail(self, outcome: Outcome, lost: Lost) -> None:
        message = f"its speed could not be taken: {lost.message}"
        update = {"status": TrialStatus.FAILED, "reason": lost.reason, "message": message}
        failed = outcome.result.model_copy(update=update | {"measurement": None, "artifact": None})
        self.study.record_failure(outcome.replaced(failed))
        if outcome.role == "baseline":
            raise NoBaseline(f"the dense baseline of {failed.config.model} failed: {message}")
