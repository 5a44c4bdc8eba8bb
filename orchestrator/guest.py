"""A driver that has joined a study which another one runs: it does what it is offered, on its own machines."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.launch import Launcher, Told, make_launcher
from orchestrator.lease import Holder
from orchestrator.ledger import Ledger
from orchestrator.manifest import adopt, ledger_key, open_study
from orchestrator.offers import Offers
from orchestrator.recipe import Recipe
from orchestrator.storage import Storage
from orchestrator.trial import BadInput

POLL_S = 1.0
Tell = Callable[[str], None]


def help_out(recipe: Recipe, *, device: str | None, tell: Tell) -> None:
    """Do what the driver of the study offers, as long as there is one.

    Returns at once where nobody runs it. `tell` hears what somebody who looks on should know.
    Raises `BadInput` where the recipe is another study's, or its ledger cannot be used.
    """
    if recipe.ledger is None:
        problem = "a ledger that all drivers reach, such as `ledger: postgresql://host/database`"
        raise BadInput([f"--join needs {problem}."])
    folder = Path(recipe.output_dir)
    if recipe.storage:
        adopt(Storage(recipe.storage, folder), folder, recipe)
    if open_study(folder, recipe) is None:
        return
    study = ledger_key(folder)
    ledger, offers = Ledger(recipe.ledger, study), Offers(recipe.ledger, study)
    if (held := ledger.held()) is None:
        return
    tell(f"joined the study, which {held.holder} runs")
    visit = Visit(make_launcher(recipe, folder, device=device), offers)
    try:
        while ledger.held() is not None:
            with suppress(BadInput):  # the ledger's server is away; it may be back the next time
                visit.take_part()
    finally:
        visit.end()
        ledger.close()
        tell(f"has done {visit.num_done} of its works here; nobody runs it any more")


class Visit:
    """A guest's stay at one study, with the launcher of its own machines."""

    def __init__(self, launcher: Launcher, offers: Offers) -> None:
        self.launcher, self.offers = launcher, offers
        self.name = f"{Holder.me()} {secrets.token_hex(4)}"
        self.num_done = 0
        self._taken: dict[str, int] = {}  # numbers of offers by the keys of their works
        launcher.hear = self._hear

    def take_part(self) -> None:
        """Say what there is room for, begin what is offered, and answer what has ended."""
        self.offers.announce(self.name, free=max(0, self.launcher.free()))
        for offer in self.offers.all(self.name):
            if offer.state == "offered" and self.offers.take(offer.number):
                self._taken[offer.work.key] = offer.number
                self.launcher.start(offer.work)
        if not self._taken:
            time.sleep(POLL_S)
            return
        for event in self.launcher.wait(POLL_S):
            self.offers.answer(self._taken.pop(event.work.key), event)
            self.num_done += 1

    def end(self) -> None:
        """Free all machines; what has not ended is lost to the study at once."""
        self.launcher.close()
        with suppress(BadInput):
            self.offers.leave(self.name)

    def _hear(self, told: Told) -> None:
        with suppress(BadInput):
            self.offers.tell(self._taken[told.work.key], told.stage)
