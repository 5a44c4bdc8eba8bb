"""What was appended stays, whoever is killed; one driver writes at a time, and anyone may read."""

from __future__ import annotations

import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from servers import postgresql, postgresql_server  # noqa: F401 (fixtures)
from waiting import until

from orchestrator import lease
from orchestrator import ledger as ledgers
from orchestrator.database import Unreachable
from orchestrator.ledger import Held, LeaseLost, Ledger
from orchestrator.trial import BadInput

REPOSITORY = Path(__file__).resolve().parent.parent
WAITS_S = 60

# Takes the lease, then appends an event for each line that it reads; for "forever", without end.
DRIVER = """
import sys
from orchestrator import lease
from orchestrator.ledger import Held, LeaseLost, Ledger

ledger = Ledger(sys.argv[1], "study")
try:
    print("taken", ledger.take(), flush=True)
except Held as error:
    sys.exit(print("held", error))
for line in sys.stdin:
    try:
        while True:
            print(ledger.append("rung", "a", filler="x" * 500), flush=True)
            if line != "forever\\n":
                break
    except LeaseLost as error:
        print("lost", error, flush=True)
"""


class Driver:
    """Another process that runs the study, or is refused: `said` is its first line."""

    def __init__(self, where: Path | str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(where)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def said(self) -> str:
        return self.process.stdout.readline().strip()

    def told(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def killed(self) -> list[str]:
        """End it with SIGKILL; what it had said and nobody had read."""
        self.process.kill()
        said = self.process.stdout.read()  # what `said` has read ahead, too
        self.process.wait(timeout=WAITS_S)
        return said.splitlines()


@pytest.fixture
def driver(where: Path | str) -> Iterator[Callable[[], Driver]]:
    started = []

    def start() -> Driver:
        started.append(Driver(where))
        return started[-1]

    yield start
    for each in started:
        if each.process.returncode is None:
            each.killed()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.cluster)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql"))
    return tmp_path / "ledger"


@pytest.fixture
def ledger(where: Path | str) -> Iterator[Ledger]:
    """A ledger whose lease this process holds."""
    ledger = Ledger(where, "study")
    ledger.take()
    yield ledger
    ledger.close()


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process is on another machine, as far as it knows."""
    monkeypatch.setattr(lease, "place", lambda: "another machine")


# -- events --------------------------------------------------------------------------------------


def test_events_come_back_in_order_by_kind_and_from_an_id_on(ledger, monkeypatch):
    monkeypatch.setattr(ledgers, "PAGE", 3)
    kinds = ["asked", "started", "rung", "rung", "finished", "asked", "rung", "rung", "rung"]
    ids = [ledger.append(kind, "a", attempt=2, step=step) for step, kind in enumerate(kinds)]
    assert ids == list(range(1, 10))
    events = list(ledger.events())
    assert [event.kind for event in events] == kinds
    assert [event.payload["step"] for event in events] == list(range(9))
    assert {(event.key, event.attempt, event.lease) for event in events} == {("a", 2, 1)}
    assert [event.id for event in ledger.events("rung", after=3)] == [4, 7, 8, 9]
    assert list(ledger.events(after=9)) == []
    assert all(abs(event.time - time.time()) < WAITS_S for event in events)


def test_a_payload_survives_with_its_awkward_numbers_and_letters(ledger):
    ledger.append("rung", "a", kind="x", loss=math.nan, limit=-math.inf, text="ü\0'\ud800%s?")
    payload = next(ledger.events()).payload
    assert math.isnan(payload["loss"]) and payload["limit"] == -math.inf
    assert (payload["kind"], payload["text"]) == ("x", "ü\0'\ud800%s?")


def test_what_is_appended_while_events_are_read_comes_with_the_next_reading(ledger, monkeypatch):
    monkeypatch.setattr(ledgers, "PAGE", 1)
    for _ in range(3):
        ledger.append("rung", "a")
    read = [ledger.append("rung", "a") for _ in ledger.events()]
    assert read == [4, 5, 6]


def test_studies_that_share_a_ledger_do_not_see_each_other(where, ledger):
    other = Ledger(where, "another study")
    assert other.take() == 1
    ledger.append("started", "a")
    assert list(other.events()) == [] and other.attempts("a") == 0
    assert other.append("started", "a") == 1
    other.close()


def test_a_reader_needs_no_lease_and_sees_each_event_at_once(where, monkeypatch):
    reader = Ledger(where, "study")  # before there is anything
    assert (list(reader.events()), reader.attempts("a"), reader.held()) == ([], 0, None)
    if isinstance(where, Path):
        assert not where.exists(), "reading makes no files"
    writer = Ledger(where, "study")
    writer.take()
    for number in range(1, 4):
        writer.append("rung", "a")
        assert [event.id for event in reader.events()] == list(range(1, number + 1))
    assert reader.held().holder.pid == os.getpid()
    writer.close()
    assert reader.held() is None
    reader.close()


def test_a_result_counts_once_and_not_after_that_of_a_later_attempt(ledger):
    assert ledger.append("finished", "a", attempt=2, result=1) == 1
    assert ledger.append("finished", "a", attempt=2, result=2) is None
    assert ledger.append("finished", "a", attempt=1, result=3) is None
    assert ledger.append("finished", "b", attempt=2, result=4) == 2
    assert ledger.append("finished", "a", attempt=3, result=5) == 3
    assert [event.payload["result"] for event in ledger.events("finished")] == [1, 4, 5]


def test_the_attempts_of_a_key_are_those_started_or_finished(ledger):
    ledger.append("asked", "a")
    assert ledger.attempts("a") == 0
    ledger.append("started", "a")
    ledger.append("started", "a", attempt=2)
    assert (ledger.attempts("a"), ledger.attempts("b")) == (2, 0)
    ledger.append("finished", "a", attempt=3)
    assert ledger.attempts("a") == 3


def test_an_event_costs_the_same_however_many_there_are(tmp_path):
    ledger = Ledger(tmp_path, "study")
    ledger.take()
    few = instructions(ledger)
    with sqlite3.connect(tmp_path / "ledger.sqlite3") as file:
        many = ((f"{n}", "finished" if n % 2 else "started") for n in range(20_000))
        row = "INSERT INTO slimtune_events VALUES ('study', ?1 + 100, 0, ?1, 1, ?2, 1, '{}')"
        file.executemany(row, many)
    assert instructions(ledger) < 2 * few
    ledger.close()


def instructions(ledger: Ledger) -> int:
    """What SQLite executes, in its own instructions, for a result and all that is asked around it."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    connection = ledger._database._connection
    connection.set_progress_handler(step, 1)
    key = f"trial {ledger.append('started', 'a')}"
    ledger.append("finished", key)
    ledger.attempts(key)
    list(ledger.events("rung", after=ledger.append("rung", key) - 1))
    connection.set_progress_handler(None, 1)
    return count


# -- kill -9 -------------------------------------------------------------------------------------


def test_no_event_is_lost_when_drivers_are_killed_at_any_moment(where, driver):
    moments, seen = random.Random(0), 0
    for number in range(1, 6):
        writer = driver()
        assert writer.said == f"taken {number}"  # at once, though the one before gave nothing back
        writer.told("forever")
        first = int(writer.said)
        time.sleep(moments.uniform(0, 0.3))
        told = [first, *map(int, writer.killed())]
        reader = Ledger(where, "study")
        ids = [event.id for event in reader.events()]
        reader.close()
        assert ids == list(range(1, len(ids) + 1))
        assert told == list(range(seen + 1, seen + len(told) + 1))
        assert len(ids) - told[-1] in (0, 1), "at most one that it could not tell of any more"
        seen = len(ids)


# -- the lease -----------------------------------------------------------------------------------


def test_a_second_driver_is_refused_and_told_who_holds_the_study(where, ledger, driver):
    second = driver()
    told = second.said
    assert told.startswith(f"held The study study is being run by {lease._user()} on ")
    assert f"(process {os.getpid()}) since 20" in told and "last heard of" in told
    with pytest.raises(Held):
        Ledger(where, "study").take()


def test_of_many_drivers_that_begin_at_once_one_gets_the_study(driver):
    said = [each.said.split()[0] for each in [driver() for _ in range(5)]]
    assert sorted(said) == ["held"] * 4 + ["taken"]


def test_a_lease_given_back_can_be_taken_and_its_number_grows(where, ledger):
    ledger.release()
    other = Ledger(where, "study")
    assert other.take() == 2
    other.close()
    assert ledger.take() == 3


def test_a_dead_driver_that_nobody_has_buried_holds_nothing(where, driver):
    first = driver()
    assert first.said == "taken 1"
    os.kill(first.process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    ledger = Ledger(where, "study")
    assert ledger.held() is None
    assert ledger.take() == 2
    ledger.close()


def test_a_process_that_got_the_number_of_a_dead_driver_holds_nothing(ledger):
    held = ledger.held()
    assert held.is_seen and held.is_alive
    assert not replace(held, holder=replace(held.holder, began=held.holder.began - 1)).is_alive


def test_the_lease_of_another_machine_is_its_own_while_it_is_renewed(ledger, where, monkeypatch):
    other = Ledger(where, "study")
    elsewhere(monkeypatch)
    with pytest.raises(Held, match="can be taken over 30 s after that"):
        other.take()
    held = other.held()
    assert replace(held, renewed=held.now - lease.LEASE_S + 1).is_alive
    assert not replace(held, renewed=held.now - lease.LEASE_S - 1).is_alive
    other.close()


def test_a_driver_that_cannot_be_seen_and_is_silent_is_waited_for(where, driver, monkeypatch):
    first = driver()
    assert first.said == "taken 1"
    first.killed()
    elsewhere(monkeypatch)
    monkeypatch.setattr(lease, "LEASE_S", 3)
    ledger, told = Ledger(where, "study"), []
    before = time.monotonic()
    assert ledger.held() is not None
    assert ledger.take(wait=told.append) == 2
    assert time.monotonic() - before > 1
    [sentence] = told
    assert f"(process {first.process.pid}) is heard of again" in sentence
    ledger.close()


def test_a_lease_is_renewed_though_nothing_is_written(where, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_S", 0.3)
    ledger = Ledger(where, "study")
    ledger.take()
    taken = ledger.held().taken
    until(lambda: ledger.held().renewed > taken + 0.3)
    ledger.close()
    assert ledger.held() is None


def test_a_driver_that_slept_until_it_was_taken_over_writes_nothing(where, driver, monkeypatch):
    sleeper = driver()
    assert sleeper.said == "taken 1"
    sleeper.told("once")
    assert sleeper.said == "1"
    os.kill(sleeper.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(lease, "LEASE_S", 0.2)
    elsewhere(monkeypatch)
    ledger = Ledger(where, "study")
    until(lambda: ledger.held() is None)
    assert ledger.take() == 2
    os.kill(sleeper.process.pid, signal.SIGCONT)
    sleeper.told("once")
    assert sleeper.said.startswith("lost The study study was taken over by ")
    assert ledger.append("rung", "b") == 2
    assert [event.key for event in ledger.events()] == ["a", "b"]
    ledger.close()


def test_who_lost_the_lease_cannot_give_it_back(where, ledger, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_S", -1)
    elsewhere(monkeypatch)
    other = Ledger(where, "study")
    assert other.take() == 2
    with pytest.raises(LeaseLost):
        ledger.append("rung", "a")
    ledger.close()
    monkeypatch.setattr(lease, "LEASE_S", 30)
    assert other.held().number == 2
    assert other.append("rung", "b") == 1
    other.close()


@pytest.mark.slow
def test_an_event_waits_for_a_lock_that_a_disk_away_for_a_minute_holds_up(tmp_path):
    with closing(Ledger(tmp_path, "study")) as ledger:
        ledger.take()
        slow = sqlite3.connect(tmp_path / "ledger.sqlite3", check_same_thread=False)
        slow.execute("BEGIN IMMEDIATE")
        back = threading.Timer(65, slow.rollback)
        back.start()
        assert ledger.append("started", "a") == 1
        back.join()
        slow.close()


# -- what cannot be used -------------------------------------------------------------------------


def test_a_damaged_file_is_said_to_be(tmp_path):
    (tmp_path / "ledger.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(BadInput, match=r"ledger\.sqlite3 is damaged: "):
        Ledger(tmp_path, "study")


def test_a_file_damaged_in_its_middle_is_said_to_be(tmp_path):
    ledger = Ledger(tmp_path, "study")
    ledger.take()
    for _ in range(50):
        ledger.append("rung", "a", filler="x" * 500)
    ledger.close()
    path = tmp_path / "ledger.sqlite3"
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    with pytest.raises(BadInput, match="is damaged"):
        list(Ledger(tmp_path, "study").events())


def test_an_empty_file_is_a_ledger_that_was_not_begun(tmp_path):
    (tmp_path / "ledger.sqlite3").touch()
    ledger = Ledger(tmp_path, "study")
    assert list(ledger.events()) == [] and ledger.take() == 1
    ledger.close()


def test_a_ledger_of_another_version_is_refused(where, monkeypatch):
    ledger = Ledger(where, "study")
    ledger.take()
    ledger.close()
    monkeypatch.setattr(ledgers, "VERSION", ledgers.VERSION + 1)
    with pytest.raises(BadInput, match="another version"):
        Ledger(where, "study")


def test_a_file_with_tables_of_something_else_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "ledger.sqlite3") as file:
        file.execute("CREATE TABLE events (id INTEGER)")
    with pytest.raises(BadInput, match="another version"):
        Ledger(tmp_path, "study")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"file/ledger\.sqlite3 cannot be made"):
        Ledger(tmp_path / "file", "study").take()


def test_without_psycopg_one_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(BadInput, match=r"pip install 'slimtune\[postgresql\]'"):
        Ledger("postgresql://host/database", "study")


@pytest.mark.parametrize(
    "address",
    [
        "user:SECRET@127.0.0.1:1/database",
        "127.0.0.1:1/database?user=u&password=SECRET",
        "user:a@SECRET@127.0.0.1:1/database",
        "user:SECRET/b@127.0.0.1:1/database",
        "user:1/SECRET@127.0.0.1:1/database",
        "user:SECRET%@127.0.0.1:1/database",
    ],
)
def test_a_password_is_in_no_message(address):
    pytest.importorskip("psycopg")
    with pytest.raises(BadInput) as error:
        Ledger(f"postgresql://{address}", "study")
    assert "SECRET" not in str(error.value) and "ledger" in str(error.value)


@pytest.mark.cluster
def test_a_reader_of_a_database_is_kept_from_writing(postgresql):  # noqa: F811
    writer, reader = Ledger(postgresql, "study"), Ledger(postgresql, "study")
    writer.take()
    assert reader.held()
    with pytest.raises(BadInput, match="read-only"):
        reader._database.change("DELETE FROM slimtune_events")
    writer.close()


def test_a_server_that_ends_connections_is_asked_again(postgresql, monkeypatch):  # noqa: F811
    import psycopg

    monkeypatch.setattr(ledgers, "RETRY_S", 0.05)

    def end_connections() -> None:
        with psycopg.connect(postgresql, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'slimtune'"
            )

    ledger = Ledger(postgresql, "study")
    ledger.take()
    for number in range(5):
        assert ledger.append("stage", "a", number=number) == number + 1
        end_connections()
        assert ledger.attempts("a") == 0
        end_connections()
    assert [event.payload["number"] for event in ledger.events()] == list(range(5))
    ledger.close()


def test_an_event_whose_answer_was_lost_is_there_once(postgresql, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ledgers, "RETRY_S", 0.05)
    ledger = Ledger(postgresql, "study")
    ledger.take()
    ledger.append("asked", "a")
    database = ledger._database
    whole = database.transaction

    @contextmanager
    def answer_lost():
        with whole():
            yield
        raise Unreachable(["gone"])

    monkeypatch.setattr(database, "transaction", answer_lost)
    assert ledger.append("asked", "b") == 2
    assert ledger.append("finished", "b", status="completed") == 3
    assert [event.key for event in ledger.events()] == ["a", "b", "b"]
    ledger.close()


def test_a_server_that_stays_away_is_told(postgresql, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ledgers, "RETRY_S", 0.05)
    monkeypatch.setattr(ledgers, "PATIENCE_S", 0.2)
    ledger = Ledger(postgresql, "study")
    ledger.take()

    def away(*_, **__):
        raise Unreachable(["The ledger cannot be used."])

    monkeypatch.setattr(ledgers, "_open", away)
    monkeypatch.setattr(ledger._database, "transaction", away)
    with pytest.raises(BadInput, match="cannot be used"):
        ledger.append("asked", "a")
