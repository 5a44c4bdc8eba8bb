"""A trial that stops says why, and where its seconds went."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest
import torch

from orchestrator import run_trial
from orchestrator.run_trial import Clock, explain
from orchestrator.trial import Diverged, Infeasible, Reason


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (Diverged("loss is not finite"), Reason.DIVERGED, "loss is not finite"),
        (Infeasible("16 does not divide 40"), Reason.INFEASIBLE, "16 does not divide 40"),
        (MemoryError(), Reason.OOM, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), Reason.OOM, "CUDA out of memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Reason.OOM, "allocate"),
        (RuntimeError("Failed to allocate memory for 80 bytes"), Reason.OOM, "80 bytes"),
        (subprocess.TimeoutExpired("phone", 3600), Reason.TIMEOUT, "3600 seconds"),
        (OSError(errno.ENOSPC, "No space"), Reason.ERROR, "the disk is full"),
        (RuntimeError("I/O error: No space left on device"), Reason.ERROR, "the disk is full"),
        (ValueError("first line\nsecond line"), Reason.ERROR, "ValueError: first line"),
        (KeyError(), Reason.ERROR, "KeyError"),
    ],
)
def test_every_failure_has_a_reason_and_one_line(
    error: Exception, reason: Reason, message: str
) -> None:
    found, text = explain(error)
    assert found is reason and message in text and "\n" not in text


def test_seconds_are_kept_by_stage_and_told_as_stages_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 1.0, 3.0, 4.0, 7.0, 7.0, 11.0, 11.0])  # it waited at 3.0
    monkeypatch.setattr(run_trial.time, "perf_counter", lambda: next(now))
    told: list[str] = []
    clock = Clock(told.append, tmp_path / "trial" / "log.txt")
    for stage in ("prune", "finetune", "prune", ""):
        clock(stage)
    assert clock.seconds == {"prune": 2.0 + 4.0, "finetune": 3.0}
    assert told == ["prune", "finetune", "prune"]
    log = (tmp_path / "trial" / "log.txt").read_text().splitlines()
    assert [line.split()[1] for line in log] == told
