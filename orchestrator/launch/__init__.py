"""WHERE trials run. A launcher is the driver's side of its workers; it moves plain data only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from orchestrator.trial import Measurement, TrialConfig, TrialResult

Note = Callable[[str], None]


class Launcher(Protocol):
    """What the study asks of wherever trials run. Each call returns when the work is done.

    `facts` loads data and base models, checks them (raises `BadInput`) and describes them.
    `baseline` trains, exports and measures the dense model; `trial` one configuration;
    `test` scores the artifact of a finished trial on the test split.
    """

    def facts(self) -> dict[str, Any]: ...
    def baseline(self, model: str, note: Note) -> TrialResult: ...
    def trial(self, config: TrialConfig, note: Note) -> TrialResult: ...
    def test(self, folder: Path, config: TrialConfig) -> tuple[Measurement, str]: ...
    def close(self) -> None: ...
