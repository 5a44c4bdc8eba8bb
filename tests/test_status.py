"""A study's state can be read by anyone, at any time, without disturbing its driver."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator import lease
from orchestrator.ledger import Ledger
from orchestrator.manifest import NAME, SCHEMA
from orchestrator.report.status_table import status_table
from orchestrator.status import study_status
from orchestrator.trial import BadInput, TrialConfig, TrialResult

RECIPE = {"name": "tiny", "search": {"name": "random", "num_trials": 4}, "resources": {}}


def begin(folder: Path, **sections: Any) -> None:
    """Write the manifest of a study in `folder`."""
    recipe = RECIPE | sections
    folder.mkdir(exist_ok=True)
    manifest = {
        "schema": SCHEMA,
        "ledger_key": "tiny",
        "identity": {},
        "facts": {},
        "recipe": recipe,
    }
    (folder / NAME).write_text(json.dumps(manifest))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    begin(tmp_path / "study")
    return tmp_path / "study"


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    ledger = Ledger(folder / "ledger", "tiny")
    ledger.take()
    yield ledger
    ledger.close()


def finish(ledger: Ledger, key: str, status: str, *, devices: int = 1, **more: Any) -> None:
    """One result, after 2 s."""
    attempt = max(1, ledger.attempts(key))
    volume = more.pop("hypervolume", 0.5)
    result = TrialResult(
        trial_id=key, config=TrialConfig(model="m"), status=status, device_seconds=2, **more
    )
    payload = {"result": result.model_dump(mode="json"), "hypervolume": volume, "devices": devices}
    ledger.append("finished", key, attempt=attempt, role="trial", **payload)


def printed(status: dict[str, Any]) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(status_table(status))
    return captured.get()


def test_a_study_that_was_not_begun_says_so_and_stays_as_it_is(tmp_path):
    status = study_status(tmp_path / "none")
    assert (status["study"], status["state"]) == ("none", "not begun")
    assert not (tmp_path / "none").exists()
    begin(tmp_path / "study")
    assert study_status(tmp_path / "study")["state"] == "not begun"
    assert "tiny: not begun" in printed(study_status(tmp_path / "study"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BadInput, match="notes.txt"):
        study_status(tmp_path)


def test_results_are_counted_by_how_they_ended(folder, ledger):
    for key in "abcd":
        ledger.append("asked", key)
    finish(ledger, "a", "completed", hypervolume=0.4)
    finish(ledger, "b", "failed", reason="oom")
    finish(ledger, "c", "skipped", reason="infeasible", hypervolume=0.7)
    ledger.append("lost", "d", device_seconds=3, reason="timeout", message="it hung")
    ledger.append("given_up", "d")
    finish(ledger, "d", "failed", reason="timeout", hypervolume=0.7)
    status = study_status(folder)
    assert status["trials"] == {
        "asked": 4,
        "running": 0,
        "queued": 0,
        "completed": 1,
        "stopped": 0,
        "failed": 2,
        "skipped": 1,
        "failed_by_reason": {"oom": 1, "timeout": 1},
        "lost_attempts": 1,
        "given_up": 1,
        "to_be_timed": 0,
    }
    assert (status["device_seconds"], status["hypervolume"]) == (4 * 2 + 3, 0.7)
    told = "4 asked · 1 completed · 1 skipped · 2 failed (1 oom, 1 timeout) · 1 given up"
    assert f"{told} · 1 attempt lost" in printed(status)


def test_what_was_asked_for_and_has_no_place_yet_is_queued(folder, ledger):
    for key in "abc":
        ledger.append("asked", key)
    finish(ledger, "a", "completed")
    ledger.append("started", "b")
    ledger.append("stage", "b", stage="waits for a place with 1 GPU")
    status = study_status(folder)
    assert (status["trials"]["running"], status["trials"]["queued"]) == (1, 1)
    told = printed(status)
    assert "1 running · 1 queued · 1 completed" in told
    assert told.rstrip().endswith("waits for a place with 1 GPU")


def test_what_was_trained_on_another_kind_of_machine_is_to_be_timed_until_it_is(folder, ledger):
    finish(ledger, "a", "completed", measurement={"metrics": {}, "is_timed": False})
    finish(ledger, "b", "completed", measurement={"metrics": {}})
    assert "2 completed · 1 to be timed" in printed(study_status(folder))
    ledger.append("measured", "a", kind="speed", measurement={}, hypervolume=0.5)
    status = study_status(folder)
    assert (status["trials"]["to_be_timed"], status["hypervolume"]) == (0, 0.5)


def test_only_the_last_result_of_a_trial_counts_but_all_its_time(folder, ledger):
    ledger.append("started", "a")
    finish(ledger, "a", "failed", reason="oom")
    ledger.append("started", "a", attempt=2)
    finish(ledger, "a", "completed")
    status = study_status(folder)
    assert (status["trials"]["completed"], status["trials"]["failed"]) == (1, 0)
    assert status["device_seconds"] == 4


def test_a_gang_of_several_devices_takes_the_time_of_each(tmp_path):
    begin(tmp_path / "study")
    ledger = Ledger(tmp_path / "study" / "ledger", "tiny")
    ledger.take()
    finish(ledger, "a", "completed", devices=4)
    finish(ledger, "b", "completed", devices=1)
    assert study_status(tmp_path / "study")["device_seconds"] == 4 * 2 + 2
    ledger.close()


def test_what_runs_now_is_told_with_its_attempt_and_stage(folder, ledger):
    ledger.append("started", "done", gang="gang-1")
    finish(ledger, "done", "completed")
    ledger.append("started", "lost", gang="gang-1")
    ledger.append("lost", "lost", device_seconds=1)
    ledger.append("started", "a", attempt=2, gang="gang-1")
    ledger.append("rung", "a", attempt=2, stage="finetune")
    ledger.append("started", "timings")
    ledger.append("started", "test:b")
    ledger.append("measured", "b", kind="timings")
    ledger.append("measured", "b", kind="test")
    status = study_status(folder)
    (runs,) = status["running"]
    assert (runs["key"], runs["attempt"], runs["stage"]) == ("a", 2, "finetune")
    assert abs(runs["since"] - time.time()) < 60
    assert (status["state"], status["driver"]["since"] > 0) == ("running", True)
    last = printed(status).splitlines()[-1].split()
    assert (last[:2], last[-1]) == (["a", "2"], "finetune")


def test_what_a_dead_driver_left_running_does_not_run(folder, ledger, monkeypatch):
    ledger.append("started", "a")
    ledger.release()
    assert study_status(folder)["running"] == []
    ledger.take()
    assert study_status(folder)["running"] == []
    ledger.append("started", "b")
    assert [each["key"] for each in study_status(folder)["running"]] == ["b"]


def test_a_study_is_finished_when_its_front_is_there_and_nothing_is_left(folder, ledger):
    ledger.append("asked", "a")
    finish(ledger, "a", "completed")
    ledger.release()
    assert study_status(folder)["state"] == "interrupted"
    (folder / "front.json").write_text("{}")
    assert study_status(folder)["state"] == "finished"
    ledger.take()
    assert study_status(folder)["state"] == "running"
    ledger.append("asked", "b")
    ledger.release()
    assert study_status(folder)["state"] == "interrupted", "more was asked since"
    assert "the command that began it goes on" in printed(study_status(folder))


def test_the_end_is_expected_at_the_pace_of_this_driver(folder, ledger, monkeypatch):
    assert study_status(folder)["expected_end"] is None
    for key in "abcd":
        ledger.append("asked", key)
    finish(ledger, "a", "completed")
    finish(ledger, "b", "completed")
    taken, last = ledger.held().taken, list(ledger.events())[-1].time
    expected = study_status(folder)["expected_end"]
    assert expected >= last + (last - taken) / 2 * 2
    assert expected < last + 60
    finish(ledger, "c", "completed")
    finish(ledger, "d", "completed")
    assert study_status(folder)["expected_end"] is None


def test_a_driver_that_is_gone_is_not_said_to_run(folder, ledger, monkeypatch):
    ledger.append("started", "a")
    assert study_status(folder)["state"] == "running"
    monkeypatch.setattr(lease, "began", lambda pid: None)
    status = study_status(folder)
    assert (status["state"], status["driver"]) == ("interrupted", None)


def test_a_status_is_json(folder, ledger):
    ledger.append("started", "a", gang="gang-1")
    assert json.loads(json.dumps(study_status(folder)))["study"] == "tiny"
