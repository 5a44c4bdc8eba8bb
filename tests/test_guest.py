"""A second driver may join a study whose ledger is a server: it does part of the works, and takes over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny_study
from conftest import REPOSITORY, Here
from servers import postgresql, postgresql_server  # noqa: F401
from waiting import until

from orchestrator.launch import Done, Event, Lost, Told
from orchestrator.launch.guests import WithGuests
from orchestrator.ledger import Event as LedgerEvent
from orchestrator.ledger import Ledger
from orchestrator.manifest import ledger_key
from orchestrator.offers import Offers
from orchestrator.trial import Measurement, Reason, TrialConfig, TrialResult, TrialStatus, Work

CONFIG = TrialConfig(model="bert", finetune={"learning_rate": 1e-3})
TRIAL = Work("trial", CONFIG.id, 2, config=CONFIG, sealed={"baseline/artifact": "ab"}, pieces=2)
MEASURED = Measurement(metrics={"accuracy": 0.5}, intervals={"accuracy": (0.4, 0.6)})
RESULTS: dict[str, Event] = {
    "trial": Done(
        TRIAL,
        TrialResult(
            trial_id=CONFIG.id, config=CONFIG, status=TrialStatus.COMPLETED, measurement=MEASURED
        ),
    ),
    "test": Done(TRIAL, (MEASURED, "abc")),
    "timings": Done(TRIAL, {"a": MEASURED}),
    "lost": Lost(TRIAL, Reason.TIMEOUT, "it took too long", again=False, counts=False),
}


class Own:
    """Machines of the driver's own, all of them at work."""

    def __init__(self, room: int = 0) -> None:
        self.room, self.started, self.told = room, list[Work](), list[Told]()
        self.hear = self.told.append

    def free(self) -> int:
        return self.room - len(self.started)

    def start(self, work: Work) -> None:
        self.started.append(work)

    def wait(self, timeout: float | None = None) -> list[Event]:
        return []

    def waiting(self) -> dict[str, str]:
        return {}

    def close(self) -> None: ...


@pytest.fixture
def offers(postgresql: str) -> Offers:  # noqa: F811
    with closing(Ledger(postgresql, "study")) as ledger:
        ledger.take()
    return Offers(postgresql, "study")


@pytest.mark.parametrize("kind", RESULTS)
def test_a_work_goes_to_a_guest_where_there_is_no_room_and_comes_back(kind: str, offers: Offers):
    own = Own()
    launcher = WithGuests(own, offers)  # type: ignore[arg-type]
    assert launcher.free() == 0
    offers.announce("guest", free=1)
    launcher._looked = 0.0
    assert launcher.free() == 1
    launcher.start(TRIAL)
    assert launcher.free() == 0 and own.started == []
    assert launcher.waiting() == {TRIAL.key: "a driver that has joined"}
    [offer] = offers.all("guest")
    assert offer.work == TRIAL and offers.take(offer.number)
    offers.tell(offer.number, "finetune")
    assert launcher.wait(0.0) == [] and own.told == [Told(TRIAL, "finetune")]
    assert offers.answer(offer.number, RESULTS[kind])
    assert launcher.wait(5.0) == [RESULTS[kind]]
    assert offers.all() == [] and not offers.answer(offer.number, RESULTS[kind])
    launcher._looked = 0.0
    launcher.start(TRIAL)
    assert len(offers.all("guest")) == 1
    assert not offers.answer(offer.number, RESULTS[kind])  # late, and not of this one


def test_what_a_guest_that_left_had_is_lost_and_its_own_machines_come_first(offers: Offers):
    own = Own(room=1)
    launcher = WithGuests(own, offers)  # type: ignore[arg-type]
    offers.announce("guest", free=2)
    launcher.start(TRIAL)
    assert own.started == [TRIAL]
    launcher.start(TRIAL)
    timings = Work("timings", "timings")
    launcher.start(timings)
    assert own.started == [TRIAL, timings]  # speed is taken on machines of its own
    offers.leave("guest")
    [lost] = launcher.wait(5.0)
    assert isinstance(lost, Lost) and lost.again
    assert lost.message == "the driver guest, which had joined, was not heard of any more"


def test_joining_needs_a_ledger_that_is_a_server(slimtune: Here, tmp_path: Path):
    done = slimtune("run", tiny_study.write_recipe(tmp_path), "--join")
    assert done.status == 2 and "--join needs a ledger that all drivers reach" in done.err


# -- two drivers -----------------------------------------------------------------------------------


def write(folder: Path, ledger: str) -> Path:
    rates = [rate * 1e-4 for rate in range(1, 9)]
    finetune = {"learning_rate": {"choice": rates}, "max_steps": 60}
    return tiny_study.write_recipe(
        folder,
        ledger=ledger,
        space={"finetune": finetune},
        references={"dense_int8": False, "first_layers": [], "random_twin": False},
        resources={"engine": "inline", "save_steps": 0},
    )


def driver(recipe: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "run", str(recipe), *flags],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def happened(recipe: Path, ledger: str, kind: str) -> list[LedgerEvent]:
    study = recipe.parent / "study"
    if not (study / "manifest.json").exists():
        return []
    with closing(Ledger(ledger, ledger_key(study))) as opened:
        return [event for event in opened.events() if event.kind == kind]


def results(recipe: Path, ledger: str) -> dict[str, Any]:
    """Of trials by id, each of which may have finished once."""
    finished = happened(recipe, ledger, "finished")
    assert set(Counter(event.key for event in finished).values()) == {1}
    return {event.key: event.payload["result"]["status"] for event in finished}


def two_drivers(recipe: Path, ledger: str) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """The second joins once the first has its dense baseline."""
    first = driver(recipe)
    until(lambda: happened(recipe, ledger, "finished"), what="the dense baseline")
    return first, driver(recipe, "--join")


@pytest.mark.slow
def test_two_drivers_share_a_study(postgresql: str, tmp_path: Path):  # noqa: F811
    recipe = write(tmp_path, postgresql)
    first, second = two_drivers(recipe, postgresql)
    said = [process.communicate(timeout=400)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    found = results(recipe, postgresql)
    assert len(found) == 9 and set(found.values()) == {"completed"}
    assert "joined the study, which" in said[1]
    [told] = [line for line in said[1].splitlines() if "of its works here" in line]
    assert int(told.split("has done ")[1].split()[0]) > 0
    assert json.loads((tmp_path / "study" / "front.json").read_text())["trials"]["completed"] == 9


@pytest.mark.slow
def test_who_has_joined_goes_on_where_the_driver_is_killed(postgresql: str, tmp_path: Path):  # noqa: F811
    recipe = write(tmp_path, postgresql)
    first, second = two_drivers(recipe, postgresql)
    until(lambda: len(happened(recipe, postgresql, "finished")) > 3, what="some trials")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    said = second.communicate(timeout=400)[1]
    assert second.returncode == 0, said
    found = results(recipe, postgresql)
    assert len(found) == 9 and set(found.values()) == {"completed"}
    assert {event.lease for event in happened(recipe, postgresql, "finished")} == {1, 2}
