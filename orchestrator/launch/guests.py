"""Works that go to drivers which have joined a study, beside those on machines of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from orchestrator.database import Unreachable
from orchestrator.launch import Event, Launcher, Lost, Told
from orchestrator.offers import Guest, Offer, Offers
from orchestrator.trial import TIMED, BadInput, Reason, Work

POLL_S = 1.0


class WithGuests:
    """A launcher, and whoever else has joined the study. Its own machines come first."""

    def __init__(self, own: Launcher, offers: Offers) -> None:
        self.own, self.offers = own, offers
        self._offered: dict[int, Work] = {}
        self._stages: dict[int, str] = {}
        self._guests: list[Guest] = []
        self._looked = 0.0
        offers.clear()

    @property
    def hear(self) -> Callable[[Told], None]:
        return self.own.hear

    @hear.setter
    def hear(self, hear: Callable[[Told], None]) -> None:
        self.own.hear = hear

    def facts(self) -> dict[str, Any]:
        return self.own.facts()

    def has(self, kind: str) -> bool:
        return self.own.has(kind)

    def free(self) -> int:
        return self.own.free() + sum(guest.free for guest in self._with_room())

    def start(self, work: Work) -> None:
        room = [] if work.kind in TIMED or self.own.free() > 0 else self._with_room()
        if not room:
            self.own.start(work)
            return
        guest = max(room, key=lambda each: each.free)
        try:
            number = self.offers.make(guest.name, work)
        except Unreachable:
            self.own.start(work)
            return
        self._offered[number], self._stages[number] = work, ""
        self._guests = [Guest(g.name, g.free - (g == guest)) for g in self._guests]

    def wait(self, timeout: float | None = None) -> list[Event]:
        until = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            began = time.monotonic()
            events = self.own.wait(min(POLL_S, max(0.0, until - began)))
            events += self._from_guests()
            if events or time.monotonic() >= until:
                return events
            if not self._offered and timeout is None:
                return []
            time.sleep(max(0.0, min(POLL_S - (time.monotonic() - began), until - began)))

    def waiting(self) -> dict[str, str]:
        silent = [work for number, work in self._offered.items() if not self._stages[number]]
        return self.own.waiting() | {work.key: "a driver that has joined" for work in silent}

    def now(self) -> float:
        return self.own.now()

    def close(self) -> None:
        self.own.close()
        with suppress(BadInput):
            self.offers.clear()

    # -- guests ----------------------------------------------------------------------------------

    def _with_room(self) -> list[Guest]:
        """Guests that could take one work more, as they were a moment ago."""
        if time.monotonic() - self._looked > POLL_S:
            self._looked = time.monotonic()
            self._guests = []
            with suppress(Unreachable):
                waiting = [offer.guest for offer in self.offers.all() if offer.state == "offered"]
                self._guests = [
                    Guest(guest.name, guest.free - waiting.count(guest.name))
                    for guest in self.offers.guests()
                ]
        return [guest for guest in self._guests if guest.free > 0]

    def _from_guests(self) -> list[Event]:
        """What they have to say; the works of those that are gone are lost."""
        events: list[Event] = []
        if not self._offered:
            return events
        try:
            there = {guest.name for guest in self.offers.guests()}
            offers = self.offers.all()
        except Unreachable:  # as the ledger will be: that waits for it
            return events
        for offer in offers:
            work = self._offered.get(offer.number)
            if work is None:
                continue
            self._tell(offer, work)
            if offer.answer is not None:
                events.append(offer.answer)
            elif offer.guest not in there:
                gone = f"the driver {offer.guest}, which had joined, was not heard of any more"
                events.append(Lost(work, Reason.ERROR, gone))
            else:
                continue
            with suppress(Unreachable):
                self.offers.withdraw(offer.number)
            del self._offered[offer.number], self._stages[offer.number]
        return events

    def _tell(self, offer: Offer, work: Work) -> None:
        if offer.stage != self._stages[offer.number]:
            self._stages[offer.number] = offer.stage
            self.own.hear(Told(work, offer.stage))
