"""How a study stands, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.report import wording

Json = Mapping[str, Any]
STYLES = {"running": "green", "finished": "bold", "interrupted": "yellow", "not begun": "dim"}
COUNTED = (
    "running",
    "queued",
    "completed",
    "to_be_timed",
    "stopped",
    "skipped",
    "failed",
    "given_up",
)
FURTHER = {
    "interrupted": "the command that began it goes on",
    "not begun": "nothing is in its ledger",
}


def status_table(status: Json) -> RenderableType:
    """What `study_status` found, for people."""
    state = status["state"]
    head = Text.assemble(status["study"], ": ", (state, STYLES[state]))
    if state in FURTHER:
        head.append(f"; {FURTHER[state]}", style="dim")
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(status):
        facts.add_row(Text(name, style="dim"), Text(value))
    return Group(head, facts, *_running(status))


def _facts(status: Json) -> Iterator[tuple[str, str]]:
    if driver := status["driver"]:
        who = f"{driver['user']} on {driver['host']} (process {driver['pid']})"
        yield "driver", f"{who} since {_moment(driver['since'])}"
    yield "trials", _counted(status["trials"])
    if status["hypervolume"] is not None:
        yield "hypervolume", f"{status['hypervolume']:.4f}"
    yield "device time", wording.duration(status["device_seconds"])
    for name in ("last_event", "expected_end"):
        if status[name] is not None:
            yield name.replace("_", " "), _moment(status[name])


def _counted(trials: Json) -> str:
    """ "20 asked · 1 running · 15 completed · 2 failed (1 oom, 1 error)"."""
    told = [f"{trials['asked']} asked"]
    for name in COUNTED:
        if trials[name]:
            told.append(f"{trials[name]} {name.replace('_', ' ')}")
        if name == "failed" and trials[name]:
            reasons = trials["failed_by_reason"].items()
            told[-1] += f" ({', '.join(f'{count} {reason}' for reason, count in reasons)})"
    if lost := trials["lost_attempts"]:
        told.append(f"{lost} {'attempt' if lost == 1 else 'attempts'} lost")
    return " · ".join(told)


def _running(status: Json) -> Iterator[Table]:
    if not status["running"]:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("runs now", "attempt", "since", "stage"):
        table.add_column(column, justify="right" if column == "attempt" else "left")
    for each in status["running"]:
        cells = (each["key"], str(each["attempt"]), _moment(each["since"]), each["stage"] or "")
        table.add_row(*map(Text, cells))
    yield table


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
