"""Works that the driver of a study offers to drivers that have joined it, by way of the ledger's database.

The driver that has the lease alone asks, tells and records. A guest says how much room it has, does
what it is offered on machines of its own, and answers; who falls silent is counted out.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestrator.database import Database, connect
from orchestrator.launch import Done, Event, Lost
from orchestrator.lease import LEASE_S
from orchestrator.trial import Measurement, Reason, Result, TrialConfig, TrialResult, Work

Json = dict[str, Any]
State = Literal["offered", "taken", "ended"]

GUESTS = """CREATE TABLE slimtune_guests (
    study TEXT NOT NULL, guest TEXT NOT NULL, free INTEGER NOT NULL,
    renewed DOUBLE PRECISION NOT NULL, PRIMARY KEY (study, guest))"""
OFFERS = """CREATE TABLE slimtune_offers (
    study TEXT NOT NULL, number BIGINT NOT NULL, guest TEXT NOT NULL, work TEXT NOT NULL,
    state TEXT NOT NULL, stage TEXT NOT NULL, answer TEXT, PRIMARY KEY (study, number))"""


@dataclass(frozen=True)
class Guest:
    """A driver that has joined: who it is, and how many works more it has room for."""

    name: str
    free: int


@dataclass(frozen=True)
class Offer:
    """A work for a guest: how far that has come, and what became of it."""

    number: int
    guest: str
    work: Work
    state: State
    stage: str
    answer: Event | None


class Offers:
    """The offers and guests of one study, in the ledger's database at a `postgresql://` URL, which the
    ledger has begun.

    Each call is a connection of its own, which may be made anew after the server was away. Raises
    `BadInput` where it is.
    """

    def __init__(self, where: str, study: str) -> None:
        self._where, self.study = where, study

    def _database(self) -> closing[Database]:
        return closing(connect(self._where, write=True))

    # -- guests ----------------------------------------------------------------------------------

    def announce(self, guest: str, *, free: int) -> None:
        """Say that a guest is there, and what it has room for."""
        with self._database() as database:
            database.change(
                "INSERT INTO slimtune_guests VALUES (?, ?, ?, epoch())"
                " ON CONFLICT (study, guest) DO UPDATE SET free = excluded.free, renewed = epoch()",
                (self.study, guest, free),
            )

    def leave(self, guest: str) -> None:
        with self._database() as database:
            database.change(
                "DELETE FROM slimtune_guests WHERE study = ? AND guest = ?", (self.study, guest)
            )

    def guests(self) -> list[Guest]:
        """Those that were heard of lately."""
        with self._database() as database:
            rows = database.rows(
                "SELECT guest, free FROM slimtune_guests"
                " WHERE study = ? AND renewed >= epoch() - ? ORDER BY guest",
                (self.study, LEASE_S),
            )
        return [Guest(*row) for row in rows]

    # -- offers ----------------------------------------------------------------------------------

    def make(self, guest: str, work: Work) -> int:
        """Offer a work to a guest; its number, which no other has: a guest may answer late."""
        number = secrets.randbits(62)
        with self._database() as database:
            database.change(
                "INSERT INTO slimtune_offers VALUES (?, ?, ?, ?, 'offered', '', NULL)",
                (self.study, number, guest, json.dumps(_work_to_json(work))),
            )
        return number

    def all(self, guest: str | None = None) -> list[Offer]:
        """Offers to a guest, or to all of them."""
        only, names = ("", []) if guest is None else (" AND guest = ?", [guest])
        with self._database() as database:
            rows = database.rows(
                "SELECT number, guest, work, state, stage, answer FROM slimtune_offers"
                f" WHERE study = ?{only}",
                [self.study, *names],
            )
        return list(map(_offer, rows))

    def take(self, number: int) -> bool:
        """Begin to work on an offer, unless it was withdrawn."""
        return self._update(number, "state = 'taken'")

    def tell(self, number: int, stage: str) -> bool:
        """The stage that an offer has come to."""
        return self._update(number, "stage = ?", stage)

    def answer(self, number: int, event: Event) -> bool:
        """What became of an offer; False where nobody waits for it any more."""
        text = json.dumps(_event_to_json(event))
        return self._update(number, "state = 'ended', answer = ?", text)

    def withdraw(self, *numbers: int) -> None:
        """Offers that are done with."""
        with self._database() as database:
            for number in numbers:
                database.change(
                    "DELETE FROM slimtune_offers WHERE study = ? AND number = ?",
                    (self.study, number),
                )

    def clear(self) -> None:
        """Withdraw all offers, such as those of a driver that is gone."""
        with self._database() as database:
            database.change("DELETE FROM slimtune_offers WHERE study = ?", (self.study,))

    def _update(self, number: int, what: str, *values: str) -> bool:
        with self._database() as database:
            changed = database.change(
                f"UPDATE slimtune_offers SET {what} WHERE study = ? AND number = ?",
                (*values, self.study, number),
            )
        return changed > 0


# -- works and what became of them, as JSON ---------------------------------------------------------


def _offer(row: tuple[Any, ...]) -> Offer:
    number, guest, text, state, stage, answer = row
    work = _work_from_json(json.loads(text))
    event = None if answer is None else _event_from_json(json.loads(answer), work)
    return Offer(number, guest, work, state, stage, event)


def _work_to_json(work: Work) -> Json:
    config = work.config and work.config.model_dump(mode="json")
    fields = {name: value for name, value in vars(work).items() if name != "config"}
    return {
        **fields,
        "config": config,
        "artifacts": dict(work.artifacts),
        "sealed": dict(work.sealed),
    }


def _work_from_json(found: Json) -> Work:
    config = found.pop("config")
    return Work(**found, config=config and TrialConfig.model_validate(config))


def _event_to_json(event: Event) -> Json:
    if isinstance(event, Lost):
        lost = asdict(event)
        del lost["work"]
        return {"lost": lost}
    return {"done": dict(_result_to_json(event.result))}


def _result_to_json(result: Result) -> Iterator[tuple[str, Any]]:
    if isinstance(result, TrialResult):
        yield "trial", result.model_dump(mode="json")
    elif isinstance(result, tuple):
        yield "test", [result[0].model_dump(mode="json"), result[1]]
    else:
        yield "by_key", {key: each.model_dump(mode="json") for key, each in result.items()}


def _event_from_json(found: Json, work: Work) -> Event:
    if "lost" in found:
        return Lost(work, **{**found["lost"], "reason": Reason(found["lost"]["reason"])})
    [(kind, value)] = found["done"].items()
    if kind == "trial":
        return Done(work, TrialResult.model_validate(value))
    if kind == "test":
        return Done(work, (Measurement.model_validate(value[0]), value[1]))
    return Done(work, {key: Measurement.model_validate(each) for key, each in value.items()})
