"""A measurement has the host for itself, nobody waits for ever, and the dead hold nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import until

from orchestrator.alone import Host

REPOSITORY = Path(__file__).resolve().parent.parent
START = """
import sys, time
from pathlib import Path
from orchestrator.alone import Host
folder = Path(sys.argv[1])
host = Host(folder)
def say(word):
    with (folder / "log").open("a") as log:
        log.write(word + "\\n")
"""


class Others:
    """Other processes of this host, and what they have said so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, code: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", START + code, str(self.folder)]
        self.started.append(subprocess.Popen(command, cwd=REPOSITORY))
        return self.started[-1]

    @property
    def said(self) -> list[str]:
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def wait_for(self, word: str, count: int = 1) -> None:
        until(lambda: self.said.count(word) >= count)


@pytest.fixture
def others(tmp_path: Path):
    others = Others(tmp_path)
    yield others
    for process in others.started:
        process.kill()
        process.wait()


WORKS = """
with host.working():
    say("works")
    while True:
        host.give_way()
        time.sleep(0.005)
"""
WORKS_DEAF = """
with host.working():
    say("works")
    time.sleep(600)
"""
MEASURES_THRICE = """
with host.working():
    for _ in range(3):
        host.give_way()
        with host.alone() as is_alone:
            say(f"begin {is_alone}")
            time.sleep(0.03)
            say("end")
    say("done")
"""
COUNTS = """
with host.working():
    for step in range(10**6):
        host.give_way()
        (folder / "steps").write_text(str(step))
        if step == 0:
            say("works")
"""


def test_those_who_work_stand_still_while_one_measures(others, tmp_path):
    others.start(COUNTS)
    others.wait_for("works")
    steps = tmp_path / "steps"
    with Host(tmp_path).alone() as is_alone:
        assert is_alone
        before = steps.read_text()
        time.sleep(0.3)
        assert steps.read_text() == before
    until(lambda: steps.read_text() != before)


def test_who_comes_while_one_measures_waits(others, tmp_path):
    with Host(tmp_path).alone():
        others.start('say("came")\n' + WORKS)
        others.wait_for("came")
        time.sleep(0.2)
        assert "works" not in others.said
    others.wait_for("works")


def test_three_that_measure_at_once_go_one_after_the_other(others):
    for _ in range(3):
        others.start(MEASURES_THRICE)
    others.wait_for("done", 3)
    turns = [word for word in others.said if word != "done"]
    assert turns == ["begin True", "end"] * 9


@pytest.mark.parametrize("holder", ["with host.alone(): say('works'); time.sleep(600)", WORKS_DEAF])
def test_what_a_killed_process_held_is_free(others, tmp_path, holder):
    process = others.start(holder)
    others.wait_for("works")
    with Host(tmp_path, patience_s=0.1).alone() as is_alone:
        assert not is_alone
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Host(tmp_path).alone() as is_alone:
        assert is_alone


def test_one_that_gave_up_holds_nobody_up(others, tmp_path):
    others.start(WORKS_DEAF)
    others.wait_for("works")
    with Host(tmp_path, patience_s=0.1).alone():
        pass
    others.start(WORKS)
    others.wait_for("works", 2)


def test_steps_within_a_measurement_do_not_end_it(others, tmp_path):
    host = Host(tmp_path)
    with host.working(), host.alone() as is_alone:
        host.give_way()
        others.start('say("came")\n' + WORKS)
        others.wait_for("came")
        time.sleep(0.2)
        assert is_alone and "works" not in others.said
    others.wait_for("works")
