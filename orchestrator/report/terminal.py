"""What a study looks like in a terminal: progress while it runs, tables of what it found."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator import pareto
from orchestrator.pareto import Objective
from orchestrator.report import wording
from orchestrator.trial import TrialResult, TrialStatus

Json = Mapping[str, Any]


def front_table(front: Json) -> Table:
    """The front beside the dense model: objectives with intervals, size and speed against dense."""
    objectives = [objective["name"] for objective in front["objectives"]]
    quality = front.get("quality", objectives[0])
    served = wording.target(front["target"])
    title = (
        f"{front.get('study', 'front')}: {len(front['points'])} on the front, served by {served}"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", justify="right")
    table.add_column("configuration", min_width=18)
    for name in objectives:
        table.add_column(wording.label(name), justify="right")
    table.add_column("on test", justify="right")
    numbers = {point["trial_id"]: i for i, point in enumerate(front["points"], start=1)}
    rows = [] if front["baseline"]["trial_id"] in numbers else [front["baseline"]]
    for point in [*rows, *front["points"]]:
        table.add_row(*_front_row(point, numbers, objectives, quality, front["baseline"]))
    return table


def _front_row(
    point: Json, numbers: Mapping[str, int], objectives: Sequence[str], quality: str, dense: Json
) -> list[Text]:
    name = wording.describe(point["config"])
    told = Text.assemble(name, "\n", (_footnote(point, numbers), "dim"))
    cells = [Text(str(numbers.get(point["trial_id"], ""))), told]
    for metric in objectives:
        versus = wording.versus_dense(metric, point["metrics"], dense["metrics"])
        cells.append(_cell(metric, point["metrics"], point["intervals"], versus))
    cells.append(_cell(quality, point["test"] or {}, point.get("test_intervals") or {}, ""))
    return cells


def _footnote(point: Json, numbers: Mapping[str, int]) -> str:
    close = sorted(numbers[other] for other in point["within_noise_of"] if other in numbers)
    noise = f" · quality within noise of {', '.join(map(str, close))}" if close else ""
    role = "" if point.get("role", "trial") == "trial" else f" · {point['role']}"
    return f"{point['trial_id'][:8]}{role}{noise}"


def _cell(metric: str, metrics: Json, intervals: Json, versus: str) -> Text:
    text = Text(wording.number(metric, metrics.get(metric)))
    notes = [versus, wording.interval(metric, intervals.get(metric))]
    for note in filter(None, notes):
        text.append(f"\n{note}", style="dim")
    return text


def measurement_table(measured: Json) -> Table:
    """Every metric of one measurement with its interval."""
    table = Table(title=measured["trial_id"], title_justify="left", box=SIMPLE_HEAD)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, value in sorted(measured["metrics"].items()):
        interval = wording.interval(name, measured["intervals"].get(name))
        table.add_row(wording.label(name), wording.number(name, value), interval)
    table.caption = "\n".join(measured.get("notes", ())) or None
    return table


class Progress:
    """Looks on while a study runs: what runs, best so far, what is left.

    On a terminal the last lines are redrawn; elsewhere each trial prints a line when it starts
    and one when it ends. Used as a context manager.
    """

    def __init__(self, objectives: Sequence[Objective], *, console: Console | None = None) -> None:
        self.objectives = objectives
        self.console = console or Console()
        self.results: list[TrialResult] = []
        self._number, self._text, self._stage = 0, "", ""
        self._total: int | None = None
        self._dense: Mapping[str, float] = {}
        self._began = self._trial_began = time.monotonic()
        self._live: Live | None = None
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._picture,
                console=self.console,
                auto_refresh=False,
                transient=True,
            )
            self._live.start()
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self.results:
            self.console.print(self.summary(), highlight=False)

    def trial_started(self, number: int, total: int | None, text: str) -> None:
        """Trial `number` of `total` begins; 0 is the dense baseline, `total` None is unknown."""
        self._number, self._total, self._text, self._stage = number, total, text, ""
        self._trial_began = time.monotonic()
        if self._live is None:
            self._say(Text(f"{self._counter()} {text}"))

    def stage(self, text: str) -> None:
        """A stage of the running trial begins."""
        self._stage = text
        self._refresh()

    def trial_finished(self, result: TrialResult) -> None:
        """What became of the running trial."""
        self.results.append(result)
        if self._number == 0 and result.measurement is not None:
            self._dense = result.measurement.metrics
        took = wording.duration(time.monotonic() - self._trial_began)
        name = f" {self._text}" if self._live is not None else ""
        line = Text.assemble((self._counter(), "bold"), name, " → ", self._outcome(result))
        self._say(line.append(f" · {took}", style="dim"))

    def summary(self) -> str:
        """How many trials ended in which way, and in what time."""
        counts = Counter(
            f"{result.status.value} ({result.reason.value})"
            if result.reason
            else result.status.value
            for result in self.results
        )
        told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        return f"{told or 'nothing'} in {wording.duration(time.monotonic() - self._began)}"

    def _say(self, line: Text) -> None:
        self.console.print(line, soft_wrap=True)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _tick(self) -> None:
        while not self._done.wait(0.5):
            # nothing else may run while latency is taken, not even this
            if self._stage not in ("latency", "memory"):
                self._refresh()

    def _counter(self) -> str:
        return f"[{self._number}/{self._total or '?'}]"

    def _outcome(self, result: TrialResult) -> Text:
        if result.measurement is None:
            reason = f" ({result.reason.value})" if result.reason else ""
            told = f"{result.status.value}{reason}: {result.message}".rstrip(": ")
            return Text(told, style="red" if result.status is TrialStatus.FAILED else "yellow")
        return Text(" · ".join(self._numbers(result.measurement.metrics)))

    def _numbers(self, metrics: Mapping[str, float]) -> list[str]:
        told = []
        for name in (objective.name for objective in self.objectives):
            versus = wording.versus_dense(name, metrics, self._dense)
            value = f"{wording.label(name)} {wording.number(name, metrics.get(name))}"
            told.append(f"{value} ({versus})" if versus else value)
        return told

    def _best(self) -> str:
        """The front's size and the best value of each objective."""
        metrics = [r.measurement.metrics for r in self.results if r.measurement is not None]
        points = pareto.normalise(metrics, self.objectives)
        front = pareto.front(points)
        if not len(front):
            return "no result yet"
        found = []
        for column, objective in enumerate(self.objectives):
            value = abs(float(points[front, column].min()))
            found.append(f"{wording.label(objective.name)} {wording.number(objective.name, value)}")
        return f"best so far: {' · '.join(found)} · {len(front)} on the front"

    def _left(self) -> str:
        gone = wording.duration(time.monotonic() - self._began)
        finished = max(len(self.results), 1)
        if self._total is None or not self.results:
            return f"{gone} gone"
        left = (self._total - self._number + 1) * (time.monotonic() - self._began) / finished
        return f"{gone} gone, about {wording.duration(max(left, 0))} left"

    def _picture(self) -> RenderableType:
        share = max(self._number - 1, 0) / self._total if self._total else None
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=share or 0.0, width=28, pulse=share is None)
        head.add_row(Text(self._counter(), style="bold"), bar, Text(self._left(), style="dim"))
        seconds = wording.duration(time.monotonic() - self._trial_began)
        running = Text.assemble("▸ ", self._text, (f"  {self._stage} · {seconds}", "dim"))
        return Group(head, running, Text(self._best(), style="dim"))
