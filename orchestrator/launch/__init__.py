"""WHERE trials run. A launcher is the driver's side of its workers; it moves plain data only.

To add an engine: write one class that has the members of `Launcher` in a new file here, and give
it a line in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from orchestrator.trial import Reason, Result, Work

if TYPE_CHECKING:
    from orchestrator.recipe import Recipe


class CutOff(Exception):
    """The driver has no part any more in the cluster that it drives."""


@dataclass(frozen=True)
class Told:
    """The stage that a work has come to."""

    work: Work
    stage: str


@dataclass(frozen=True)
class Done:
    """A work's result. What failed inside a trial is a result too."""

    work: Work
    result: Result


@dataclass(frozen=True)
class Lost:
    """A work that came to no result: its worker died, hung, or could not do it.

    `again` says whether another attempt may end otherwise, `counts` whether it was one of those
    that `resources.max_attempts` allows: a machine that is taken away on notice is no fault.
    """

    work: Work
    reason: Reason
    message: str
    again: bool = True
    counts: bool = True


Event = Done | Lost


class Launcher(Protocol):
    """What the study asks of wherever trials run; every time is in seconds of `now()`.

    `facts` loads data and base models, checks them (raises `BadInput`) and describes them.
    `has` says whether a machine is there whose fingerprint is `kind`, on which works that are `timed_on` it
    run; `free` is how many works could start at once; `start` hands one over and returns, and may
    be asked for one more where speed is to be taken; `wait` blocks
    until a work has ended, at most `timeout` seconds where given, and tells `hear` of stages
    meanwhile. `waiting` says of each work that has not begun what it waits for. `close` ends
    whatever runs and frees all it holds.
    """

    hear: Callable[[Told], None]

    def facts(self) -> dict[str, Any]: ...
    def has(self, kind: str) -> bool: ...
    def free(self) -> int: ...
    def start(self, work: Work) -> None: ...
    def wait(self, timeout: float | None = None) -> list[Event]: ...
    def waiting(self) -> dict[str, str]: ...
    def now(self) -> float: ...
    def close(self) -> None: ...


ENGINES = {
    "inline": "orchestrator.launch.inline:Inline",
    "ray": "orchestrator.launch.ray_gangs:RayGangs",
}


def make_launcher(
    recipe: Recipe, folder: Path, *, device: str | None = None, **limits: int
) -> Launcher:
    """The recipe's engine. Its module is imported here, since one of them needs ray.

    `limits` are those of a worker's bench.
    """
    module, _, name = ENGINES[recipe.resources.engine].partition(":")
    return cast(
        Launcher, getattr(import_module(module), name)(recipe, folder, device=device, **limits)
    )
