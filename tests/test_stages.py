"""A stage's work is done once, appears whole or not at all, and is never trusted when damaged."""

from __future__ import annotations

import errno
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.stages import Stages, clear_unfinished, write_atomically


def counted(calls: list[int], text: str = "weights"):
    def build(folder: Path) -> None:
        calls.append(1)
        (folder / "model.txt").write_text(text)

    return build


def test_what_killed_workers_left_goes_but_for_trainings_to_go_on_with(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    done = stages.once("trained", {"seed": 0}, counted([]), version=1)
    goes_on = stages.beside("trained", {"seed": 1}, version=1)
    for left in (
        goes_on,
        stages.beside("trained", {"seed": 0}, version=1),
        tmp_path / ".trained-x",
    ):
        (left / "step-5").mkdir(parents=True)
    clear_unfinished(tmp_path)
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == {done, goes_on}


def test_equal_inputs_are_worked_on_once(tmp_path: Path) -> None:
    calls: list[int] = []
    first = Stages(tmp_path).once("dense", {"seed": 0}, counted(calls), version=1)
    again = Stages(tmp_path).once("dense", {"seed": 0}, counted(calls), version=1)
    assert first == again and len(calls) == 1
    assert (first / "model.txt").read_text() == "weights"


@pytest.mark.parametrize(
    ("stage", "inputs", "version"),
    [("dense", {"seed": 1}, 1), ("dense", {"seed": 0}, 2), ("other", {"seed": 0}, 1)],
)
def test_other_inputs_stage_or_version_are_other_results(
    tmp_path: Path, stage: str, inputs: dict[str, int], version: int
) -> None:
    calls: list[int] = []
    one = Stages(tmp_path).once("dense", {"seed": 0}, counted(calls), version=1)
    two = Stages(tmp_path).once(stage, inputs, counted(calls), version=version)
    assert one != two and len(calls) == 2


def test_a_damaged_result_is_built_again(tmp_path: Path) -> None:
    calls: list[int] = []
    folder = Stages(tmp_path).once("dense", {}, counted(calls), version=1)
    (folder / "model.txt").write_text("weightz")
    folder = Stages(tmp_path).once("dense", {}, counted(calls), version=1)
    assert len(calls) == 2
    assert (folder / "model.txt").read_text() == "weights"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Stages(tmp_path).once("dense", {}, fail, version=1)
    assert list(tmp_path.iterdir()) == []


def test_an_atomic_write_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_atomically(path, "1")
    write_atomically(path, "2")
    assert path.read_text() == "2"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_who_wants_what_another_makes_waits_for_it(tmp_path: Path) -> None:
    begun, calls, waited = threading.Event(), [], []

    def build(folder: Path) -> None:
        begun.set()
        while not waited:
            time.sleep(0.01)
        counted(calls)(folder)

    def wait() -> None:
        waited.append(1)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(Stages(tmp_path).once, "dense", {}, build, version=1)
        assert begun.wait(10)
        second = Stages(tmp_path, while_waiting=wait)
        folder = second.once("dense", {}, counted(calls), version=1)
    assert folder == first.result() and len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_without_locks_workers_that_make_the_same_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    calls: list[int] = []

    def build(folder: Path) -> None:
        Stages(tmp_path).once("dense", {"seed": 0}, counted(calls), version=1)  # another is faster
        counted(calls)(folder)

    folder = Stages(tmp_path).once("dense", {"seed": 0}, build, version=1)
    assert len(calls) == 2 and (folder / "model.txt").read_text() == "weights"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
