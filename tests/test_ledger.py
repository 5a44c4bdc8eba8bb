"""Events are kept in order, durable at once, and readable by another process meanwhile."""

from __future__ import annotations

from pathlib import Path

from orchestrator.ledger import Ledger


def test_events_come_back_in_order_by_kind_and_study(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "one")
    ledger.append("asked", "a", config={"seed": 1})
    ledger.append("started", "a")
    ledger.append("started", "a", attempt=2)
    Ledger(tmp_path, "two").append("started", "a")
    assert [e["kind"] for e in ledger.events()] == ["asked", "started", "started"]
    assert ledger.attempts("a") == 2
    assert next(ledger.events("asked"))["payload"] == {"config": {"seed": 1}}


def test_a_second_reader_sees_an_event_while_the_writer_is_open(tmp_path: Path) -> None:
    writer = Ledger(tmp_path, "s")
    writer.append("finished", "a", status="completed")
    assert [e["trial"] for e in Ledger(tmp_path, "s").events("finished")] == ["a"]
