"""How much a study may spend, and what it has spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from orchestrator.trial import Frozen

if TYPE_CHECKING:
    from orchestrator.ledger import Event


@dataclass
class Spent:
    """Configurations that were asked for, device-seconds of all work, seconds that a driver ran.

    Work that failed, was stopped or was lost counts like any other.
    """

    num_trials: int = 0
    device_s: float = 0.0
    wall_s: float = 0.0


class Past:
    """When earlier drivers ran, and what they had begun when they were killed, from their events."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[float, float]] = {}  # first and last event under each lease
        self._begun: dict[str, tuple[int, float, int]] = {}

    def add(self, event: Event) -> None:
        first, _ = self._runs.get(event.lease, (event.time, event.time))
        self._runs[event.lease] = (first, event.time)
        if event.kind == "started":
            devices = event.payload.get("devices", 1)
            self._begun[event.key] = (event.lease, event.time, devices)
        elif event.kind in ("finished", "lost"):
            self._begun.pop(event.key, None)

    @property
    def wall_s(self) -> float:
        """Seconds from the first to the last event of each driver."""
        return sum(last - first for first, last in self._runs.values())

    @property
    def unended_s(self) -> float:
        """Device-seconds of works that came to no end, up to the last event of their driver."""
        begun = self._begun.values()
        return sum((self._runs[lease][1] - since) * devices for lease, since, devices in begun)


class Budget(Frozen):
    """A recipe's budget section: when no further trial is begun. Trials that run are finished.

    `money` is in any currency, by `price_per_device_hour`.
    """

    num_trials: int | None = Field(None, ge=0)
    device_hours: float | None = Field(None, ge=0)
    wall_hours: float | None = Field(None, ge=0)
    money: float | None = Field(None, ge=0)
    price_per_device_hour: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.money is None) != (self.price_per_device_hour is None):
            raise ValueError("needs `money` and `price_per_device_hour` together")
        return self

    def used_up(self, spent: Spent) -> str | None:
        """Which limit is reached, in words; None while there is some left of each."""
        hours = spent.device_s / 3600
        price = self.price_per_device_hour or 0.0
        limits = {
            "num_trials": (spent.num_trials, self.num_trials),
            "device_hours": (hours, self.device_hours),
            "wall_hours": (spent.wall_s / 3600, self.wall_hours),
            "money": (hours * price, self.money),
        }
        for name, (used, limit) in limits.items():
            if limit is not None and used >= limit:
                return f"budget.{name} of {limit:g} is used up"
        return None
