"""The loop: ask → place → measure → tell, then the front. Resuming is the same code.

What is finished is read back from the study's folder and is not run again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

from orchestrator import front as fronts
from orchestrator import pareto
from orchestrator.artifact import DamagedArtifact, read_predictions
from orchestrator.front import Json, Outcome
from orchestrator.launch import Launcher
from orchestrator.launch.inline import Inline
from orchestrator.ledger import Ledger
from orchestrator.manifest import (
    check_writable,
    read_manifest,
    refuse_other_study,
    write_manifest,
)
from orchestrator.recipe import Recipe
from orchestrator.references import dense_int8, first_layers, random_twin
from orchestrator.report import wording, write_report
from orchestrator.signature import Signature
from orchestrator.space import infeasible, predict
from orchestrator.stages import write_atomically
from orchestrator.trial import (
    Reason,
    TrialConfig,
    TrialResult,
    TrialStatus,
)

RESULT = "measurement.json"
TRIED_AGAIN = {Reason.OOM, Reason.TIMEOUT, Reason.ERROR}  # the others would end the same way


class Watch(Protocol):
    """Who looks on while a study runs.

    `phase` begins work that belongs to no trial, `note` tells what a reader of the numbers must
    know, `trial_reused` is for what an earlier run has done. Trial 0 is the dense baseline.
    """

    def phase(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def trial_started(self, number: int, total: int, text: str) -> None: ...
    def stage(self, text: str) -> None: ...
    def trial_finished(self, result: TrialResult) -> None: ...
    def trial_reused(self, result: TrialResult) -> None: ...


class Silent:
    """Nobody looks on."""

    def phase(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def trial_started(self, number: int, total: int, text: str) -> None: ...
    def stage(self, text: str) -> None: ...
    def trial_finished(self, result: TrialResult) -> None: ...
    def trial_reused(self, result: TrialResult) -> None: ...


class NoBaseline(Exception):
    """The dense model could not be trained, exported or measured: no trial can be judged."""


class Study:
    """One run of a recipe in one folder.

    `run()` does what is not done yet and returns front.json; `front()` reads it; `select()`
    chooses from it.
    """

    def __init__(
        self, recipe: Recipe, *, launcher: Launcher | None = None, watch: Watch | None = None
    ) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.output_dir)
        self.launcher = launcher or Inline(recipe, self.folder)
        self.watch = watch or Silent()
        self.outcomes: dict[str, Outcome] = {}
        self.baselines: dict[str, Outcome] = {}

    # -- the sentence ----------------------------------------------------------------------------

    def run(self) -> Json:
        """Finish the study. Raises `BadInput`, and `NoBaseline` when the dense model failed."""
        self._open()
        try:
            self._run_baselines()
            for role, config in self._planned():
                self._outcome(config, role=role)
            self._run_search()
            self._run_random_twin()
            return self._conclude()
        finally:
            self.ledger.close()
            self.launcher.close()

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
        """Check or write the manifest, and learn the facts about data and models."""
        check_writable(self.folder)
        manifest = read_manifest(self.folder)
        if manifest is not None:
            refuse_other_study(self.folder, manifest["identity"], self.recipe.identity())
        self.facts: Json = manifest["facts"] if manifest else self._learn_facts()
        self.recipe.check_facts(self.facts)
        self.ledger = Ledger(self.folder / "ledger", self.recipe.name)
        if manifest is None:
            write_atomically(self.folder / "recipe.yaml", self.recipe.source)
        write_manifest(self.folder, self.recipe, self.facts)

    def _learn_facts(self) -> Json:
        """Data and models read for the first time; what a reader must know of them is told once."""
        self.watch.phase("reading data and models")
        facts = self.launcher.facts()
        for note in facts.get("notes", ()):
            self.watch.note(note)
        return facts

    def signature(self, model: str) -> Signature:
        return Signature.model_validate(self.facts["models"][model]["signature"])

    # -- trials ----------------------------------------------------------------------------------

    def _run_baselines(self) -> None:
        for options in self.recipe.models:
            folder = self.recipe.baseline_folder(self.folder, options.id)
            result = read_result(folder)
            reused = result is not None and result.status is TrialStatus.COMPLETED
            if result is None or not reused:
                result = self._run_baseline(options.id, folder)
            else:
                self.watch.trial_reused(result)
            if result.status is not TrialStatus.COMPLETED:
                raise NoBaseline(f"the dense baseline of {options.id} failed: {result.message}")
            outcome = Outcome(result, folder, role="baseline", reused=reused)
            self.baselines[options.id] = self.outcomes[result.trial_id] = outcome

    def _run_baseline(self, model: str, folder: Path) -> TrialResult:
        self.watch.trial_started(0, self.num_planned, f"dense baseline {model}")
        self.ledger.append("started", f"baseline:{model}")
        result = self.launcher.baseline(model, self.watch.stage)
        self._record(result, folder)
        self.watch.trial_finished(result)
        return result

    def _planned(self) -> Iterator[tuple[str, TrialConfig]]:
        """The references that are known before the search."""
        for options in self.recipe.models:
            arguments = (self.recipe, options.id, self.signature(options.id))
            yield from dense_int8(*arguments)
            yield from first_layers(*arguments)

    def _run_search(self) -> None:
        search = self.recipe.search.start(self.recipe.space, seed=self.recipe.seed)
        while (config := search.ask()) is not None:
            self.ledger.append("asked", config.id, config=config.model_dump(mode="json"))
            outcome = self._outcome(config, role="trial")
            search.tell(config.id, outcome.metrics or None, outcome.result.status)

    def _run_random_twin(self) -> None:
        if not self.recipe.references.random_twin:
            return
        front, dominated, _ = self._split()
        trials = [o.result.config for o in (*front, *dominated) if o.role == "trial"]
        for config in random_twin(trials):
            self._outcome(config, role="random twin")

    def _outcome(self, config: TrialConfig, *, role: str) -> Outcome:
        """What became of a configuration: known already, ruled out, or run now."""
        if config.id in self.outcomes:
            return self.outcomes[config.id]
        folder = self.folder / "trials" / config.id
        result = read_result(folder)
        reused = result is not None and result.reason not in TRIED_AGAIN
        if result is None or not reused:
            result = self._ruled_out(config) or self._run(config, role)
            self._record(result, folder)
        else:
            self.watch.trial_reused(result)
        outcome = Outcome(result, folder, role=role, reused=reused)
        self.outcomes[config.id] = outcome
        return outcome

    def _run(self, config: TrialConfig, role: str) -> TrialResult:
        number = sum(o.role != "baseline" for o in self.outcomes.values()) + 1
        self.watch.trial_started(number, self.num_planned, self._words(config, role))
        self.ledger.append("started", config.id, attempt=self.ledger.attempts(config.id) + 1)
        result = self.launcher.trial(config, self.watch.stage)
        self.watch.trial_finished(result)
        return result

    def _words(self, config: TrialConfig, role: str) -> str:
        words = wording.describe(config.model_dump(mode="json"), shown=self._shown)
        return words if role == "trial" else f"{role}: {words}"

    def _ruled_out(self, config: TrialConfig) -> TrialResult | None:
        """A result without training: it cannot work, breaks a limit, or is dominated at best."""
        signature = self.signature(config.model)
        reason = infeasible(config, signature, self.recipe)
        if reason is None:
            known = predict(config, signature, self.recipe)
            reason = self._over_limit(known) or self._dominated_at_best(config, known)
        if reason is None:
            return None
        return TrialResult(
            trial_id=config.id,
            config=config,
            status=TrialStatus.SKIPPED,
            reason=Reason.INFEASIBLE,
            message=reason,
        )

    def _over_limit(self, known: dict[str, float]) -> str | None:
        for limit in self.recipe.limits:
            if limit.name in known and not limit.allows(known[limit.name]):
                return (
                    f"its {limit.name} of {known[limit.name]:.4g} breaks the limit before training"
                )
        return None

    def _dominated_at_best(self, config: TrialConfig, known: dict[str, float]) -> str | None:
        """Ruled out when a finished trial is at least as good as dense, at no more of any known cost.

        Needs every other objective to be known from the shape.
        """
        quality = self.recipe.task.quality
        costs = [o for o in self.recipe.objectives if o.name != quality]
        if not all(o.name in known for o in costs):
            return None
        dense = self.baselines[config.model].metrics
        best = {quality: dense[quality]} | known
        hopeful = pareto.normalise([best], self.recipe.objectives)[0]
        for outcome in self.outcomes.values():
            if outcome.completed:
                rival = pareto.normalise([outcome.metrics], self.recipe.objectives)[0]
                if pareto.dominates(rival, hopeful):
                    return f"{outcome.result.trial_id} dominates it even at the dense model's {quality}"
        return None

    def _record(self, result: TrialResult, folder: Path) -> None:
        """Keep a result: for people as files, for the study in the ledger."""
        config = json.dumps(result.config.model_dump(mode="json"), indent=1)
        write_atomically(folder / "config.json", config)
        write_atomically(folder / RESULT, result.model_dump_json(indent=1))
        self.ledger.append(
            "finished",
            result.trial_id,
            attempt=max(1, self.ledger.attempts(result.trial_id)),
            status=result.status.value,
            reason=result.reason.value if result.reason else None,
            device_seconds=result.device_seconds,
        )

    # -- the front -------------------------------------------------------------------------------

    def _split(self) -> tuple[list[Outcome], list[Outcome], list[Outcome]]:
        return fronts.split_outcomes(
            list(self.outcomes.values()), self.recipe.objectives, self.recipe.limits
        )

    def _conclude(self) -> Json:
        """Score the front on the test split, write front.json and the report, drop what is dominated."""
        self.watch.phase("scoring the front on the test split")
        while untested := self._untested():
            for outcome in untested:
                self._test(outcome)
        front, dominated, over = self._split()
        if self.recipe.keep == "front":
            for outcome in (*dominated, *over):
                self._drop(outcome)
        text = self._front_json(front, dominated, over)
        write_atomically(self.folder / "front.json", json.dumps(text, indent=1))
        write_report(self.folder)
        return text

    def _references(self) -> list[Outcome]:
        own = [o for o in self.outcomes.values() if o.role not in ("trial", "baseline")]
        return [o for o in own if o.completed]

    def _untested(self) -> list[Outcome]:
        """What is to be scored on the test split: the front, baselines and references."""
        front, _, _ = self._split()
        shown = [*self.baselines.values(), *self._references(), *front]
        return [o for o in shown if o.result.test is None and o.result.artifact is not None]

    def _test(self, outcome: Outcome) -> None:
        """Score an artifact; one that is damaged fails its trial."""
        result = outcome.result
        assert result.artifact is not None
        try:
            measured, sha256 = self.launcher.test(outcome.folder / result.artifact, result.config)
        except DamagedArtifact as error:
            outcome.result = _damaged(result, error)
            self._record(outcome.result, outcome.folder)
            if outcome.role == "baseline":
                raise NoBaseline(f"{error}; the same command makes it again") from error
            return
        outcome.result = result.model_copy(update={"test": measured, "sha256": sha256})
        write_atomically(outcome.folder / RESULT, outcome.result.model_dump_json(indent=1))
        self.ledger.append("measured", result.trial_id, test=measured.metrics)

    def _drop(self, outcome: Outcome) -> None:
        """Delete a dominated artifact; its command builds it again."""
        if outcome.role != "trial" or outcome.result.artifact is None:
            return
        shutil.rmtree(outcome.folder / outcome.result.artifact, ignore_errors=True)
        outcome.result = outcome.result.model_copy(update={"artifact": None})
        write_atomically(outcome.folder / RESULT, outcome.result.model_dump_json(indent=1))

    def _front_json(
        self, front: list[Outcome], dominated: list[Outcome], over: list[Outcome]
    ) -> Json:
        baseline = next(iter(self.baselines.values()))
        objectives = self.recipe.objectives
        reference_point = pareto.reference_point(objectives)
        records = {o.result.trial_id: self._records(o) for o in front}
        close = fronts.within_noise(front, self.recipe.task, records)
        outcomes = list(self.outcomes.values())

        def points(group: list[Outcome]) -> list[Json]:
            runtime = self.recipe.target.runtime
            return [
                fronts.point(
                    o, study=self.folder, runtime=runtime, close=close.get(o.result.trial_id, ())
                )
                for o in group
            ]

        return {
            "schema": 1,
            "study": self.recipe.name,
            "quality": self.recipe.task.quality,
            "target": self.recipe.target.model_dump(mode="json"),
            "fingerprint": self.facts["fingerprint"],
            "objectives": [{"name": o.name, "direction": o.direction} for o in objectives],
            "limits": [limit.model_dump(mode="json") for limit in self.recipe.limits],
            "reference_point": reference_point,
            "hypervolume": fronts.hypervolume(front, baseline.metrics, objectives, reference_point),
            "baseline": points([baseline])[0],
            "points": points(front),
            "references": points([*self.baselines.values(), *self._references()]),
            "dominated": points(dominated),
            "over_limit": points(over),
            "trials": fronts.counts(outcomes),
            "all_trials": [fronts.trial_row(o) for o in outcomes],
            "device_seconds": sum(o.result.device_seconds for o in outcomes),
        }

    def _records(self, outcome: Outcome) -> list[Json]:
        if outcome.result.artifact is None:
            return []
        return read_predictions(outcome.folder / outcome.result.artifact, "validation")

    @cached_property
    def num_planned(self) -> int:
        """How many trials there will be, references included."""
        return len(self._known_ahead) + self.recipe.references.random_twin

    @cached_property
    def _shown(self) -> list[str]:
        """Options that a line about a trial has to say."""
        return wording.telling_apart(c.model_dump(mode="json") for c in self._known_ahead)

    @cached_property
    def _known_ahead(self) -> set[TrialConfig]:
        """References and what the search asks for."""
        return {*(config for _, config in self._planned()), *self.recipe.asked()}


def _damaged(result: TrialResult, error: DamagedArtifact) -> TrialResult:
    """A result whose artifact can no longer be trusted."""
    return TrialResult(
        trial_id=result.trial_id,
        config=result.config,
        status=TrialStatus.FAILED,
        reason=Reason.ERROR,
        message=str(error),
        device_seconds=result.device_seconds,
    )


def read_result(folder: Path) -> TrialResult | None:
    """The recorded result of a trial's folder, None where there is none that can be read."""
    try:
        return TrialResult.model_validate_json((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
