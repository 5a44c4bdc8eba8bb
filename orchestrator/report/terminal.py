"""What a study looks like in a terminal: progress while it runs, tables of what it found."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
NOISE = "≈"
NO_ROOM = "waits for a place"  # how the stage of a trial begins that the cluster has no room for
NAMES_WIDTH, INTERVAL_WIDTH = 30, 14  # characters; of what is not a number, and of an interval


def front_table(
    front: Json, *, chosen: Sequence[Json] | None = None, width: int | None = None
) -> Table:
    """The front, or the chosen points of it, beside the dense model; points keep their numbers.

    In a terminal whose `width` in characters has no room for them, intervals are left out.
    """
    objectives = [objective["name"] for objective in front["objectives"]]
    points = front["points"] if chosen is None else chosen
    wide = width is None or width >= NAMES_WIDTH + INTERVAL_WIDTH * (len(objectives) + 1)
    table = _table(_front_title(front, points))
    table.add_column("", justify="right")
    table.add_column("configuration", min_width=18)
    for name in objectives:
        table.add_column(wording.label(name), justify="right")
    table.add_column("on test", justify="right")
    for cells in _front_rows(front, points, objectives, intervals=wide):
        table.add_row(*cells)
    if any(point["within_noise_of"] for point in points):
        quality = front.get("quality", objectives[0])
        table.caption = f"{NOISE} {wording.label(quality)} within noise of these points"
    return table


def _table(title: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption_justify = "left"
    return table


def _front_title(front: Json, points: Sequence[Json]) -> str:
    count, served = len(front["points"]), wording.target(front["target"])
    told = f"{count}" if len(points) == count else f"{len(points)} of the {count}"
    return f"{front.get('study', 'front')}: {told} on the front, served by {served}"


def _front_rows(
    front: Json, points: Sequence[Json], objectives: Sequence[str], *, intervals: bool
) -> Iterator[list[Text]]:
    dense, quality = front["baseline"], front.get("quality", objectives[0])
    numbers = {point["trial_id"]: i for i, point in enumerate(front["points"], start=1)}
    first = [] if dense["trial_id"] in numbers else [dense]
    shown = wording.telling_apart(point["config"] for point in [*first, *front["points"]])
    for point in [*first, *points]:
        name = wording.describe(point["config"], shown=shown)
        cells = [Text(str(numbers.get(point["trial_id"], "")))]
        cells.append(Text.assemble(name, "\n", (_footnote(point, numbers), "dim")))
        metrics, test = point["metrics"], point["test"] or {}
        for metric in objectives:
            versus = wording.versus_dense(metric, metrics, dense["metrics"])
            pair = point["intervals"].get(metric) if intervals else None
            cells.append(_cell(metric, metrics.get(metric), versus, pair))
        pair = (point.get("test_intervals") or {}).get(quality) if intervals else None
        cells.append(_cell(quality, test.get(quality), "", pair))
        yield cells


def _footnote(point: Json, numbers: Mapping[str, int]) -> str:
    close = sorted(numbers[other] for other in point["within_noise_of"] if other in numbers)
    noise = f" · {NOISE} {', '.join(map(str, close))}" if close else ""
    role = "" if point.get("role", "trial") == "trial" else f" · {point['role']}"
    return f"{point['trial_id'][:8]}{role}{noise}"


def _cell(metric: str, value: float | None, versus: str, interval: Sequence[float] | None) -> Text:
    text = Text(wording.number(metric, value))
    for note in filter(None, [versus, wording.interval(metric, interval)]):
        text.append(f"\n{note}", style="dim")
    return text


def measurement_table(measured: Json) -> Table:
    """Every metric of one measurement with its interval."""
    table = _table(f"{measured['trial_id'][:8]}: {wording.describe(measured['config'])}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, value in sorted(measured["metrics"].items()):
        interval = wording.interval(name, measured["intervals"].get(name))
        table.add_row(wording.label(name), wording.number(name, value), interval)
    table.caption = "\n".join(measured.get("notes", ())) or None
    return table


@dataclass
class _Trial:
    """A trial that runs."""

    number: int
    text: str
    stage: str = ""
    since: float = field(default_factory=time.monotonic)


class Progress:
    """Looks on while a study runs: what runs, best so far, what is left.

    On a terminal the last lines are redrawn; elsewhere each trial prints a line when it starts,
    when it waits for room, and when it ends. Used as a context manager.
    """

    def __init__(self, objectives: Sequence[Objective], *, console: Console | None = None) -> None:
        self.objectives = objectives
        self.console = console or Console()
        self.results: list[TrialResult] = []
        self._known: list[TrialResult] = []  # from earlier runs
        self._running: dict[str, _Trial] = {}
        self._total: int | None = None
        self._phase = _Trial(0, "")
        self._dense: Mapping[str, float] = {}
        self._began = time.monotonic()
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
        if isinstance(error, KeyboardInterrupt) and self.results:
            self.console.print(self.summary(), highlight=False)

    def phase(self, text: str) -> None:
        """Work that belongs to no trial begins."""
        self._phase = _Trial(0, text)
        self._refresh()

    def note(self, text: str) -> None:
        """Something that a reader of the numbers must know."""
        self._print(Text.assemble(("note: ", "yellow"), text))

    def trial_started(self, key: str, number: int, total: int | None, text: str) -> None:
        """Trial `number` of `total`, where that is known, begins; 0 is the dense baseline."""
        self._total = total
        self._running[key] = _Trial(number, text)
        if self._live is None:
            self._print(Text(f"{self._counter(number)} {text}"))
        self._refresh()

    def stage(self, key: str, text: str) -> None:
        """A stage of a running trial begins."""
        trial = self._running.get(key, self._phase)
        waited, trial.stage = trial.stage, text
        if self._live is None and text.startswith(NO_ROOM) and not waited.startswith(NO_ROOM):
            self._print(Text(f"{self._counter(trial.number)} {text}"))
        self._refresh()

    def trial_lost(self, key: str, text: str) -> None:
        """A running trial has lost its worker; another attempt may follow."""
        trial = self._running.get(key, self._phase)
        trial.stage = "waits for another attempt"
        self._print(Text.assemble(self._counter(trial.number), " ", (text, "yellow")))

    def trial_finished(self, key: str, result: TrialResult) -> None:
        """What became of a running trial."""
        self.results.append(result)
        self._learn_dense(result)
        trial = self._running.pop(key, self._phase)
        took = wording.duration(time.monotonic() - trial.since)
        outcome = self._outcome(result).append(f" · {took}", style="dim")
        counter = self._counter(trial.number)
        if self._live is None:
            self._print(Text.assemble(counter, " → ", outcome))
        else:
            line = Table.grid(padding=(0, 1))
            line.add_row(Text(counter, style="bold"), Group(Text(trial.text), outcome))
            self.console.print(line)
        self._refresh()

    def trial_reused(self, result: TrialResult) -> None:
        """A trial that an earlier run has finished."""
        self._known.append(result)
        self._learn_dense(result)

    def summary(self) -> str:
        """How many trials ended in which way, and in what time."""
        counts = Counter(
            f"{result.status.value} ({result.reason.value})"
            if result.reason
            else result.status.value
            for result in self.results
        )
        told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        return f"{told or 'nothing'} in {self.elapsed}"

    @property
    def elapsed(self) -> str:
        """The time since the start, in words."""
        return wording.duration(time.monotonic() - self._began)

    def _learn_dense(self, result: TrialResult) -> None:
        if not self._dense and result.measurement is not None:  # the baseline comes first
            self._dense = result.measurement.metrics

    def _print(self, line: Text) -> None:
        self.console.print(line, soft_wrap=self._live is None)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _tick(self) -> None:
        while not self._done.wait(0.5):
            # nothing else may run while latency is taken, not even this
            stages = {trial.stage for trial in self._running.values()}
            if not stages & {"latency", "memory"}:
                self._refresh()

    def _counter(self, number: int) -> str:
        return f"[{number}]" if self._total is None else f"[{number}/{self._total}]"

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
            value = wording.with_unit(name, metrics.get(name))
            told.append(f"{value} ({versus})" if versus else value)
        return told

    def _best(self) -> str:
        """The front's size and the best value of each objective."""
        found = [*self._known, *self.results]
        metrics = [r.measurement.metrics for r in found if r.measurement is not None]
        points = pareto.normalise(metrics, self.objectives)
        front = pareto.front(points)
        if not len(front):
            return ""
        told = []
        for column, objective in enumerate(self.objectives):
            value = abs(float(points[front, column].min()))
            told.append(wording.with_unit(objective.name, value))
        return f"best so far: {' · '.join(told)} · {len(front)} on the front"

    def _left(self) -> str:
        gone = time.monotonic() - self._began
        if not self.results or self._total is None:
            return f"{self.elapsed} gone"
        left = gone / len(self.results) * max(self._total - self._num_done, 0)
        return f"{self.elapsed} gone, about {wording.duration(left)} left"

    @property
    def _num_done(self) -> int:
        """Trials that have ended, in this run or an earlier one, the baseline not counted."""
        return max(len(self.results) + len(self._known) - 1, 0)

    def _picture(self) -> RenderableType:
        lines: list[RenderableType] = []
        if self._running and self._total is not None:
            bar = ProgressBar(total=self._total, completed=self._num_done, width=28)
            head = Table.grid(padding=(0, 1))
            counter = Text(self._counter(self._num_done), style="bold")
            head.add_row(counter, bar, Text(self._left(), style="dim"))
            lines.append(head)
        for trial in list(self._running.values()) or [self._phase]:
            seconds = wording.duration(time.monotonic() - trial.since)
            doing = " · ".join(filter(None, [trial.stage, seconds]))
            lines.append(Text.assemble("▸ ", trial.text, (f"  {doing}", "dim")))
        if best := self._best():
            lines.append(Text(best, style="dim"))
        return Group(*lines)
