"""The loop: ask → place → hear → tell, then the front. Resuming is the same code.

The ledger is the truth: what it holds is taken in as if it happened now, and then the loop goes on.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

from orchestrator import front as fronts
from orchestrator import pareto
from orchestrator.budget import Past, Spent
from orchestrator.conclusion import Conclusion
from orchestrator.disk import Disk
from orchestrator.dispatch import Dispatch, Ended, Next
from orchestrator.front import Json, Outcome
from orchestrator.launch import Launcher, Lost, Told, make_launcher
from orchestrator.launch.guests import WithGuests
from orchestrator.ledger import Event, Ledger
from orchestrator.manifest import NAME as MANIFEST
from orchestrator.manifest import (
    adopt,
    check_writable,
    ledger_key,
    open_study,
    write_manifest,
)
from orchestrator.offers import Offers
from orchestrator.outcomes import Outcomes, folder_of
from orchestrator.recipe import Recipe
from orchestrator.references import dense_int8, first_layers, random_twin
from orchestrator.report import wording
from orchestrator.search import Ask
from orchestrator.signature import Signature
from orchestrator.stages import clear_unfinished, write_atomically
from orchestrator.storage import Storage
from orchestrator.trial import (
    Kind,
    Measurement,
    NoBaseline,
    Reason,
    Result,
    TrialConfig,
    TrialResult,
    TrialStatus,
    Work,
    model_of,
)
from orchestrator.untimed import Untimed

RESULT, RECIPE = "measurement.json", "recipe.yaml"
TRIED_AGAIN = {Reason.OOM, Reason.TIMEOUT, Reason.ERROR}  # the others would end the same way
MAX_SHOWN = 500  # configurations that are looked through for what tells them apart
Planned = tuple[str, TrialConfig]  # a role, and what it is for


class Watch(Protocol):
    """Who looks on while a study runs; `key` names a work, `total` is None where nobody knows.

    `phase` begins work that belongs to no trial, `note` tells what a reader of the numbers must
    know, `trial_reused` is for what an earlier run has done. Trial 0 is the dense baseline.
    """

    def phase(self, text: str) -> None:
        return

    def note(self, text: str) -> None:
        return

    def trial_started(self, key: str, number: int, total: int | None, text: str) -> None:
        return

    def stage(self, key: str, text: str) -> None:
        return

    def trial_lost(self, key: str, text: str) -> None:
        return

    def trial_finished(self, key: str, result: TrialResult) -> None:
        return

    def trial_reused(self, result: TrialResult) -> None:
        return


class Silent(Watch):
    """Nobody looks on."""


class Study:
    """One run of a recipe in one folder.

    `run()` does what is not done yet and returns front.json; `front()` reads it; `select()`
    chooses from it.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        launcher: Launcher | None = None,
        watch: Watch | None = None,
        device: str | None = None,
    ) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        self.launcher = launcher or make_launcher(recipe, self.folder, device=device)
        self.storage = Storage(recipe.storage, self.folder) if recipe.storage else None
        self.watch = watch or Silent()
        self.launcher.hear = self._hear
        self.outcomes = Outcomes(recipe)
        self.disk = Disk(self.folder)
        self.spent = Spent()
        self._number = 0
        self._asked: dict[str, TrialConfig] = {}
        self._pending: deque[Planned] = deque()
        self._roles: dict[str, str] = {}
        self.untimed = Untimed(self)
        self._said: set[str] = set()

    # -- the sentence ----------------------------------------------------------------------------

    def run(self) -> Json:
        """Finish the study. Raises `BadInput`, and `NoBaseline` when the dense model failed."""
        self._open()
        try:
            self._recall()
            self._run_baselines()
            self._run_trials()
            self._run_random_twin()
            return Conclusion(self).run()
        finally:
            self._close()

    def front(self) -> Json:
        """front.json of the finished study."""
        return fronts.read_front(self.folder)

    def select(
        self, *, max: dict[str, float] | None = None, min: dict[str, float] | None = None
    ) -> list[Json]:
        """The front's points within limits, best first."""
        points = self.front()["points"]
        chosen = pareto.select(
            [p["metrics"] for p in points], self.recipe.objectives, max=max, min=min
        )
        return [points[index] for index in chosen]

    # -- opening ---------------------------------------------------------------------------------

    def _open(self) -> None:
        """Learn the facts about data and models, take the study's ledger, write the manifest.

        Nothing is written before all of the input was checked. Raises `BadInput` and `Held`.
        """
        check_writable(self.folder)
        if self.storage:
            adopt(self.storage, self.folder, self.recipe)
        try:
            self.facts: Json = open_study(self.folder, self.recipe) or self._learn_facts()
            self.recipe.check_facts(self.facts)
            self.ledger = self._take_ledger()
        except BaseException:
            self.launcher.close()
            raise
        if self.recipe.ledger:
            offers = Offers(self.recipe.ledger, self.ledger.study)
            self.launcher = WithGuests(self.launcher, offers)
        self.dispatch = Dispatch(
            self.launcher,
            self.ledger,
            max_attempts=self.recipe.resources.max_attempts,
            devices=self._devices,
            timed_on=self.untimed.timed_on,
            sealed=self._sealed,
        )
        self.dispatch.on_lost = lambda work, lost: self.watch.trial_lost(work.key, lost.message)

    def _take_ledger(self) -> Ledger:
        """The ledger, held by this driver, and the manifest beside it."""
        where = self.recipe.ledger or self.folder / "ledger"
        ledger = Ledger(where, ledger_key(self.folder))
        try:
            ledger.take(wait=self.watch.note)
            open_study(self.folder, self.recipe)  # another driver may have begun it meanwhile
            clear_unfinished(self.folder / "stages")
            if not (self.folder / RECIPE).exists():
                write_atomically(self.folder / RECIPE, self.recipe.source)
            write_manifest(self.folder, self.recipe, self.facts)
            if self.storage:
                self.storage.publish([self.folder / RECIPE, self.folder / MANIFEST])
        except BaseException:
            ledger.close()
            raise
        return ledger

    def _close(self) -> None:
        """Free what runs, say so in the ledger, and let another driver take the study."""
        try:
            self.dispatch.abandon("the driver ended")
        finally:
            self.launcher.close()
            self.ledger.close()

    def _learn_facts(self) -> Json:
        """Data and models read for the first time; what a reader must know of them is told once."""
        self.watch.phase("reading data and models")
        facts = self.launcher.facts()
        for note in facts.get("notes", ()):
            self.watch.note(note)
        return facts

    def signature(self, model: str) -> Signature:
        return self._signatures[model]

    @cached_property
    def _signatures(self) -> dict[str, Signature]:
        models = self.facts["models"].items()
        return {name: Signature.model_validate(facts["signature"]) for name, facts in models}

    # -- what the ledger knows -------------------------------------------------------------------

    def _recall(self) -> None:
        """Take in every event of earlier runs, in their order."""
        recipe = self.recipe
        self._search = recipe.search.start(recipe.space, seed=recipe.seed, goal=recipe.goal)
        takes = {
            "asked": self._recall_ask,
            "finished": self._recall_result,
            "measured": self._recall_measured,
            "lost": self._recall_lost,
        }
        past = Past()
        for event in self.ledger.events():
            past.add(event)
            if event.kind in takes:
                takes[event.kind](event)
        self.spent.wall_s = past.wall_s
        self.spent.device_s += past.unended_s
        self._began = self.launcher.now()
        self._take_up()

    def _take_up(self) -> None:
        """What earlier runs have asked for and not finished waits; the rest is told to who looks on."""
        for config in self._asked.values():
            if self.outcomes.get(config.id) is None:
                self._pending.append(("trial", config))
        for outcome in self.outcomes:  # a baseline comes before what is compared with it
            if outcome.role == "baseline":
                if outcome.completed:
                    self.watch.trial_reused(outcome.result)
                continue
            self.watch.trial_reused(outcome.result)
            if self._may_pass(outcome):
                self._pending.append((outcome.role, outcome.result.config))
            else:
                self._number += 1

    def _recall_ask(self, event: Event) -> None:
        ask = Ask(TrialConfig(**event.payload["config"]), event.payload.get("drawn", {}))
        self._search.replay(ask)
        self._count_ask(ask)

    def _recall_result(self, event: Event) -> None:
        result = TrialResult.model_validate(event.payload["result"])
        self.spent.device_s += result.device_seconds * event.payload.get("devices", 1)
        role = event.payload["role"]
        outcome = Outcome(result, self.folder_of(result, role), role=role, reused=True)
        self.outcomes.add(outcome)
        self.learn(outcome)

    def _recall_measured(self, event: Event) -> None:
        outcome = self.outcomes.get(event.key)
        if outcome is None:
            return
        kind, payload = event.payload["kind"], event.payload["measurement"]
        measured = Measurement.model_validate(payload)
        if kind == "test":
            update = {"test": measured, "sha256": event.payload["sha256"]}
            self.outcomes.add(outcome.replaced(outcome.result.model_copy(update=update)))
        elif kind == "speed":
            self.untimed.recall(outcome.joined(measured))
        else:
            self.outcomes.add(outcome.timed_together(measured))

    def _recall_lost(self, event: Event) -> None:
        self.spent.device_s += event.payload["device_seconds"]

    def _may_pass(self, outcome: Outcome) -> bool:
        """Whether a failure is worth another attempt in this run."""
        result = outcome.result
        if not outcome.reused or result.reason not in TRIED_AGAIN:
            return False
        return self.ledger.attempts(result.trial_id) < self.recipe.resources.max_attempts

    # -- trials ----------------------------------------------------------------------------------

    def _run_baselines(self) -> None:
        """The dense model of each base model, before anything that is compared with it."""
        left: deque[Work] = deque()
        for options in self.recipe.models:
            outcome = self.outcomes.baselines.get(options.id)
            if outcome is None or not outcome.completed:
                left.append(self._work("baseline", f"baseline:{options.id}", model=options.id))

        def next_work() -> Work | None:
            if not left:
                return None
            work = left.popleft()
            self._tell_start(work.key, 0, f"dense baseline {work.model}")
            return work

        self._run(next_work, self._baseline_ended)

    def _baseline_ended(self, work: Work, result: Result | Lost) -> None:
        if isinstance(result, Lost):
            raise NoBaseline(f"the dense baseline of {work.model} failed: {result.message}")
        assert isinstance(result, TrialResult)
        self._record(work, result, role="baseline")
        if result.status is not TrialStatus.COMPLETED:
            raise NoBaseline(f"the dense baseline of {work.model} failed: {result.message}")

    def _run_trials(self) -> None:
        """References, what earlier runs have left, and whatever the search asks for."""
        self._pending.extendleft(reversed(list(self._references())))
        self._run(self._next_trial, self._trial_ended)

    def _references(self) -> Iterator[Planned]:
        """The references that are known before the search."""
        for options in self.recipe.models:
            arguments = (self.recipe, options.id, self.signature(options.id))
            yield from dense_int8(*arguments)
            yield from first_layers(*arguments)

    def _run_random_twin(self) -> None:
        if not self.recipe.references.random_twin:
            return
        front, dominated, _ = self.outcomes.split()
        trials = [o.result.config for o in (*front, *dominated) if o.role == "trial"]
        self._pending.extend(("random twin", config) for config in random_twin(trials))
        self._run(self._next_pending, self._trial_ended)

    def _next_trial(self) -> Work | None:
        """The next trial that has to run: one that waits, else one that the search asks for."""
        while True:
            if (work := self._next_pending()) is not None:
                return work
            if self._is_over() or (ask := self._search.ask()) is None:
                return None
            config = ask.config.model_dump(mode="json")
            self.ledger.append(
                "asked", ask.config.id, role="trial", config=config, drawn=dict(ask.drawn)
            )
            self._count_ask(ask)
            self._pending.append(("trial", ask.config))

    def _next_pending(self) -> Work | None:
        """The next that waits and has to run; what need not be trained is recorded as it is met."""
        while self._pending:
            role, config = self._pending.popleft()
            known = self.outcomes.get(config.id)
            if known is not None and not self._may_pass(known):
                continue
            reason = self.outcomes.ruled_out(config, self.signature(config.model))
            if reason is None:
                work = self._work("trial", config.id, config=config)
                self._roles[config.id] = role
                self._number += 1
                self._tell_start(config.id, self._number, self._words(config, role))
                return work
            self._record_ruled_out(config, role, reason)
        return None

    def _record_ruled_out(self, config: TrialConfig, role: str, reason: str) -> None:
        result = TrialResult(
            trial_id=config.id,
            config=config,
            status=TrialStatus.SKIPPED,
            reason=Reason.INFEASIBLE,
            message=reason,
        )
        self._roles[config.id] = role
        self._record(self._work("trial", config.id, config=config), result, role=role)

    def _trial_ended(self, work: Work, result: Result | Lost) -> None:
        assert work.config is not None
        if isinstance(result, Lost):
            self.ledger.append("given_up", work.key, attempt=work.attempt)
            result = TrialResult(
                trial_id=work.key,
                config=work.config,
                status=TrialStatus.FAILED,
                reason=result.reason,
                message=f"{result.message} (attempt {work.attempt})",
            )
        assert isinstance(result, TrialResult)
        self._record(work, result, role=self._roles[work.key])

    def _run(self, next_work: Next, ended: Ended) -> None:
        """Works to their end; what was trained on machines of another kind is timed meanwhile."""

        def heard(work: Work, result: Result | Lost) -> None:
            (self.untimed.ended if work.kind == "speed" else ended)(work, result)

        self.dispatch.run(next_work, heard, at_once=self.untimed.next_work)

    def _is_over(self) -> bool:
        """Whether the budget, or the disk, allows no further trial; said once."""
        self.spent.wall_s += self.launcher.now() - self._began
        self._began = self.launcher.now()
        spent = Spent(
            self.spent.num_trials, self.spent.device_s + self.dispatch.device_s, self.spent.wall_s
        )
        reason = self.recipe.budget.used_up(spent) or self.disk.nearly_full(
            self.outcomes.largest_mb
        )
        if reason is not None:
            self.note_once(f"no further trial is begun: {reason}")
        return reason is not None

    def note_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.watch.note(text)

    # -- recording -------------------------------------------------------------------------------

    def _work(
        self, kind: Kind, key: str, *, model: str = "", config: TrialConfig | None = None
    ) -> Work:
        attempt = self.ledger.attempts(key) + 1
        return Work(kind=kind, key=key, attempt=attempt, model=model, config=config)

    def _sealed(self, work: Work) -> dict[str, str]:
        """Hashes of the artifacts that a work reads, by their folders: its own, and the baselines."""
        if self.storage is None or work.kind == "baseline":
            return {}
        keys = [work.key.removeprefix("test:")] if work.kind == "test" else work.artifacts
        found = [*self.outcomes.baselines.values(), *map(self.outcomes.get, keys)]
        return {
            folder_of(outcome, self.folder): str(outcome.result.sha256)
            for outcome in found
            if outcome is not None and outcome.result.artifact
        }

    def _devices(self, work: Work) -> int:
        """How many a work takes: what only measures runs on one."""
        model = model_of(work)
        return self.recipe.resources.of(model).num_workers if model else 1

    def _record(self, work: Work, result: TrialResult, *, role: str) -> None:
        """Keep a result: in the ledger, then for people as files, then in what the search knows."""
        devices = self._devices(work)
        self.spent.device_s += result.device_seconds * devices
        outcome = Outcome(result, self.folder_of(result, role), role=role, reused=False)
        self.outcomes.add(outcome)
        self.ledger.append(
            "finished",
            work.key,
            attempt=work.attempt,
            role=role,
            devices=devices,
            result=result.model_dump(mode="json"),
            hypervolume=self.outcomes.hypervolume,
        )
        self.write(outcome)
        self.learn(outcome)
        if result.status is not TrialStatus.SKIPPED:
            self.watch.trial_finished(work.key, result)
        if outcome.fingerprint not in ("", self.facts["fingerprint"]):
            self.note_once(
                "machines of different kinds take the latencies of this study: they compare once"
                " all trials have been timed in one pass, at its end"
            )

    def record_failure(self, outcome: Outcome) -> None:
        """A finished trial turns out to be worth nothing."""
        result, role = outcome.result, outcome.role
        key = f"baseline:{result.config.model}" if role == "baseline" else result.trial_id
        work = self._work("baseline" if role == "baseline" else "trial", key, config=result.config)
        self._record(work, result.model_copy(update={"device_seconds": 0.0}), role=role)

    def learn(self, outcome: Outcome) -> None:
        """What the search is told of a result, once it is timed; asked again, it is known under the
        same role."""
        self._roles[outcome.result.trial_id] = outcome.role
        if not outcome.is_timed:
            self.untimed.add(outcome)
        elif outcome.result.trial_id in self._asked:
            self._tell(outcome)

    def _count_ask(self, ask: Ask) -> None:
        """One more configuration asked for; what is known of it already is told at once."""
        self.spent.num_trials += 1
        self._asked[ask.config.id] = ask.config
        known = self.outcomes.get(ask.config.id)
        if known is not None and known.is_timed:
            self._tell(known)

    def _tell(self, outcome: Outcome) -> None:
        result = outcome.result
        self._search.tell(result.config, outcome.metrics or None, result.status)

    def folder_of(self, result: TrialResult, role: str) -> Path:
        """Where a trial lies in the study's folder."""
        if role == "baseline":
            return self.recipe.baseline_folder(self.folder, result.config.model)
        return self.folder / "trials" / result.trial_id

    def write(self, outcome: Outcome) -> None:
        """A result as files for people; the ledger has it already."""
        write_result(outcome.result, outcome.folder)

    # -- telling ---------------------------------------------------------------------------------

    def _hear(self, told: Told) -> None:
        self.ledger.append("stage", told.work.key, attempt=told.work.attempt, stage=told.stage)
        self.watch.stage(told.work.key, told.stage)

    def _tell_start(self, key: str, number: int, text: str) -> None:
        planned = self.num_planned  # a study that was widened may have references of before, too
        self.watch.trial_started(key, number, planned and max(planned, number), text)

    def _words(self, config: TrialConfig, role: str) -> str:
        words = wording.describe(config.model_dump(mode="json"), shown=self._shown)
        return words if role == "trial" else f"{role}: {words}"

    @cached_property
    def num_planned(self) -> int | None:
        """How many trials there will be, references included, where that is known."""
        if len(self._known_ahead) > MAX_SHOWN:
            return None
        return len(self._known_ahead) + self.recipe.references.random_twin

    @cached_property
    def _shown(self) -> list[str]:
        """Options that a line about a trial has to say."""
        return wording.telling_apart(c.model_dump(mode="json") for c in self._known_ahead)

    @cached_property
    def _known_ahead(self) -> set[TrialConfig]:
        """References and what the search asks for, or the first of it."""
        asked = islice(self.recipe.asked(), MAX_SHOWN + 1)
        return {*(config for _, config in self._references()), *asked}


def write_result(result: TrialResult, folder: Path) -> None:
    """A trial's configuration and result, in its folder."""
    config = json.dumps(result.config.model_dump(mode="json"), indent=1)
    write_atomically(folder / "config.json", config, durable=False)
    write_atomically(folder / RESULT, result.model_dump_json(indent=1), durable=False)


def read_result(folder: Path) -> TrialResult | None:
    """The result in a trial's folder, None where there is none that can be read."""
    try:
        return TrialResult.model_validate_json((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
