"""What a trial is in plain data: its configuration, what became of it, and what was measured.

Driver and worker meet in these types alone; nothing here knows torch or ray.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Infeasible(Exception):
    """A configuration that cannot work, with the reason a person can act on."""


class BadInput(Exception):
    """What the user gave cannot be used. Holds every problem found, each a full sentence."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Preempted(Exception):
    """A work ends early, since its machine is about to be taken away: it goes on elsewhere."""


class Diverged(Exception):
    """Training produced a loss that is not finite."""


class Stopped(Exception):
    """A trial was ended before its full budget, on purpose."""


class NoBaseline(Exception):
    """The dense model could not be trained, exported or measured: no trial can be judged."""


class Frozen(BaseModel):
    """A value: immutable, compared by content, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def content_hash(value: Any) -> str:
    """Sixteen hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class TrialConfig(Frozen):
    """One point of the space, every option resolved to its value.

    `prune` lists methods in the order they are applied; an empty list removes nothing. The
    sections are plain data: each plug-in's own class gives them their meaning.
    """

    model: str
    prune: tuple[dict[str, Any], ...] = ()
    quantize: dict[str, Any] = Field(default_factory=lambda: {"scheme": "none"})
    finetune: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0

    @property
    def id(self) -> str:
        """The name of the trial: the hash of its configuration."""
        return content_hash(self.model_dump(mode="json"))

    def __hash__(self) -> int:
        return hash(self.id)


class TrialStatus(StrEnum):
    """What became of a trial."""

    COMPLETED = "completed"
    STOPPED = "stopped"  # ended early by its rung, on purpose
    FAILED = "failed"
    SKIPPED = "skipped"  # never trained: a limit or the dense model's quality ruled it out


class Reason(StrEnum):
    """Why a trial did not complete."""

    OOM = "oom"
    TIMEOUT = "timeout"
    DIVERGED = "diverged"
    INFEASIBLE = "infeasible"
    ERROR = "error"


class Measurement(Frozen):
    """All numbers of one artifact on one split, taken from the artifact in its runtime.

    `intervals` holds 95 % intervals by metric name. `notes` says what a reader must know to
    trust a number, for instance that a latency did not settle before its cap. `is_timed` is False
    where speed and memory are yet to be taken, on a machine of the target's kind.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    num_examples: int = 0
    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    is_timed: bool = True

    def joined(self, later: Measurement) -> Measurement:
        """The same artifact with what was measured later, which replaces what has the same name."""
        intervals = {n: pair for n, pair in self.intervals.items() if n not in later.metrics}
        return self.model_copy(
            update={
                "metrics": self.metrics | later.metrics,
                "intervals": intervals | later.intervals,
                "fingerprint": later.fingerprint,
                "notes": (*self.notes, *later.notes),
                "is_timed": self.is_timed or later.is_timed,
            }
        )


class TrialResult(Frozen):
    """What a worker hands back for one configuration.

    `test` is filled for points of the front alone, at the end of the study, and chooses nothing.
    `details` is what the stages report about themselves: sparsity reached, largest difference
    between trained and served numbers, training curve, seconds a stage.
    """

    trial_id: str
    config: TrialConfig
    status: TrialStatus
    reason: Reason | None = None
    message: str = ""
    measurement: Measurement | None = None
    test: Measurement | None = None
    artifact: str | None = None
    sha256: str | None = None
    device_seconds: float = 0.0
    details: dict[str, Any] = Field(default_factory=dict)


Kind = Literal["baseline", "trial", "test", "speed", "timings"]
TIMED = ("speed", "timings")  # works that run on machines of the target's kind alone


@dataclass(frozen=True)
class Work:
    """One thing for one gang to do, once.

    `baseline` trains, exports and measures the dense model of `model`; `trial` does so with
    `config`; `test` scores the artifact of `config` in `folder` on the test split; `speed` takes
    speed and memory of `artifacts` (key → artifact folder) that were trained elsewhere; `timings`
    takes their latencies in one interleaved pass. `folder` and artifacts are relative to the
    study's folder. `key` is what the ledger calls it: a trial's id, `baseline:<model>` for a dense
    model. `timed_on` is the fingerprint of the machines on which speed counts; "" takes any. Batches
    are trained on in `pieces`, to the same result. `sealed` are the hashes of artifacts by their
    folders, which a worker fetches from the storage where the study has one.
    """

    kind: Kind
    key: str
    attempt: int = 1
    model: str = ""
    config: TrialConfig | None = None
    folder: str = ""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    timed_on: str = ""
    pieces: int = 1
    sealed: Mapping[str, str] = field(default_factory=dict)


def model_of(work: Work) -> str:
    """The base model that a work trains, "" where it trains none."""
    if work.kind == "baseline":
        return work.model
    return work.config.model if work.kind == "trial" and work.config else ""


Result = TrialResult | tuple[Measurement, str] | dict[str, Measurement]
"""Of a baseline or trial; of a test, with the artifact's new hash; of speed and timings, by key."""
