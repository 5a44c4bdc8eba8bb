"""slimtune inside Ray Tune, for those who run a `Tuner` already: its trials, and its searchers.

A trial whose configuration cannot work, or whose training diverges, ends as an error with the
reason. Tune has two ways to end a trial without the metric that it was run for: an error, or a
last result in which the metric is NaN. Schedulers and searchers are told of an error and leave the
trial out; a NaN goes into medians (MedianStoppingRule then stops nobody any more) and stays behind
as a trial that runs for ever (OptunaSearch). Where `FailureConfig` tries an error again, one that
would end the same way is answered from the study's folder, and nothing is trained twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.search import Searcher as TuneSearcher

from orchestrator.artifact import DamagedArtifact, verify
from orchestrator.facts import facts_of
from orchestrator.launch.ray_cluster import check_room, gang_shape
from orchestrator.launch.ray_gang import reason_of, why_lost
from orchestrator.launch.ray_tune_workers import Workers
from orchestrator.manifest import check_writable, open_study
from orchestrator.param_space import configure, in_short
from orchestrator.recipe import Recipe, load_recipe
from orchestrator.rungs import Standing
from orchestrator.search import Ask
from orchestrator.signature import Signature
from orchestrator.space import infeasible, predict
from orchestrator.study import read_result
from orchestrator.trial import (
    BadInput,
    Infeasible,
    Reason,
    TrialConfig,
    TrialResult,
    TrialStatus,
)

Json = dict[str, Any]
ALWAYS = {Reason.DIVERGED, Reason.INFEASIBLE}  # another attempt would end the same way


class TrialFailed(Exception):
    """A trial came to no measurement; the message says why."""


@dataclass(frozen=True)
class About:
    """What the trials of one recipe have in common."""

    recipe: Recipe
    folder: Path
    signatures: Mapping[str, Signature]
    num_rungs: int
    device: str | None

    def ruled_out(self, config: TrialConfig) -> str | None:
        """Why a configuration need not be trained: it cannot work, or breaks a limit by its shape."""
        signature = self.signatures[config.model]
        if (reason := infeasible(config, signature, self.recipe)) is not None:
            return reason
        known = predict(config, signature, self.recipe)
        broken = (
            f"its {limit.name} of {known[limit.name]:.4g} breaks the limit before training"
            for limit in self.recipe.limits
            if limit.name in known and not limit.allows(known[limit.name])
        )
        return next(broken, None)

    def folder_of(self, config: TrialConfig) -> Path:
        return self.folder / "trials" / config.id


def _about(recipe: str | Path | Recipe, *, num_rungs: int = 1, device: str | None = None) -> About:
    """Raises `BadInput` with all that is wrong with the recipe, its data and its models."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if recipe.storage:
        rule = "Tune's trials share output_dir, and take their artifacts from there; leave it out."
        raise BadInput([f"storage: {rule}"])
    folder = Path(recipe.output_dir).resolve()
    check_writable(folder)
    facts = open_study(folder, recipe) or facts_of(recipe)
    recipe.check_facts(facts)
    models = facts["models"].items()
    signatures = {name: Signature.model_validate(model["signature"]) for name, model in models}
    return About(recipe, folder, signatures, num_rungs, device)


def trainable(
    recipe: str | Path | Recipe, *, num_rungs: int = 4, device: str | None = None
) -> type[CompressionTrial]:
    """The trials of a recipe, as what a `Tuner` takes.

    Each reports `num_rungs` times: evenly during its training, with its `loss` and its quality on
    validation as it is then, and at its end with all measurements of its artifact. Raises
    `BadInput`.
    """
    about = _about(recipe, num_rungs=num_rungs, device=device)
    about.folder.mkdir(parents=True, exist_ok=True)  # workers see it, or do not share this disk
    return type(about.recipe.name, (CompressionTrial,), {"about": about})


class CompressionTrial(tune.Trainable):
    """One trial as Tune drives it. The work is done by processes of its own, kept for the next one.

    A result's `training_iteration` is the rung. An actor that is reused keeps its workers.
    """

    about: ClassVar[About]

    @classmethod
    def default_resource_request(cls, config: Json) -> tune.PlacementGroupFactory:
        """What the recipe's resources say, a bundle a worker. Tune asks before any trial starts.

        Raises `BadInput` where `config` has what no configuration has, or leaves something open.
        """
        recipe = cls.about.recipe
        try:
            model = configure(recipe, config).model
        except Infeasible:  # the trial will tell
            model = recipe.models[0].id
        nodes = [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
        shape = gang_shape(
            recipe.resources,
            nodes,
            use_gpus=cls.about.device != "cpu",
            options=recipe.resources.of(model),
        )
        if nodes:
            check_room(shape, recipe.resources, nodes)
        workers = [dict(shape.amounts)] * shape.num_workers
        labels = {"bundle_label_selector": [dict(shape.labels)] * shape.num_workers}
        return tune.PlacementGroupFactory([{}, *workers], **labels if shape.labels else {})

    def setup(self, config: Json) -> None:
        self._workers: Workers | None = None
        self._begin(config)

    def reset_config(self, new_config: Json) -> bool:
        self._stop()
        self._begin(new_config)
        return True

    def step(self) -> Json:
        """The next report. Raises `TrialFailed`."""
        if self._refused:
            raise TrialFailed(self._refused)
        assert self._config is not None
        if not self._has_begun and (known := self._known(self._config)) is not None:
            return self._finished(known)
        said = self._hear(self._config)
        if isinstance(said, TrialResult):
            return self._finished(said)
        return _report(said, self.about.recipe.task.quality)

    def cleanup(self) -> None:
        self._stop()
        if self._workers is not None:
            self._workers.end()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: what is done of a trial lies in the study's folder, and it goes on from there."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""

    # -- one trial -------------------------------------------------------------------------------

    def _begin(self, config: Json) -> None:
        self._config: TrialConfig | None = None
        self._refused = ""
        self._has_begun, self._pieces = False, 1
        try:
            self._config = configure(self.about.recipe, config)
            reason = self.about.ruled_out(self._config)
        except Infeasible as error:
            reason = str(error)
        if reason is not None:
            self._refused = f"{Reason.INFEASIBLE}: {reason}"

    def _known(self, config: TrialConfig) -> TrialResult | None:
        """What an earlier attempt has found, where another would find the same."""
        folder = self.about.folder_of(config)
        result = read_result(folder)
        if result is None or result.reason is not None:
            return result if result and result.reason in ALWAYS else None
        try:
            verify(folder / "artifact")
        except DamagedArtifact:
            return None
        return result if result.measurement and result.measurement.is_timed else None

    def _hear(self, config: TrialConfig) -> Standing | TrialResult:
        """How it stands at the next rung, or its result. It is begun where it does not run yet."""
        while True:
            if self._workers is None:
                self._workers = self._started()
            if not self._has_begun:
                self._workers.begin(config, self._pieces)
                self._has_begun = True
            try:
                said = self._workers.hear()
            except RayError as error:
                said = _died(error, config)
            if isinstance(said, TrialResult):
                self._has_begun = False
                if self._workers.are_broken:
                    self._end_workers()
                if said.reason is Reason.OOM and self._pieces == 1:
                    self._pieces = 2  # once more, with half the rows a call
                    continue
            return said

    def _started(self) -> Workers:
        resources = self.trial_resources
        if not resources.head_bundle_is_empty:
            rule = "resources: a trial takes what its recipe says; leave tune.with_resources out."
            raise BadInput([rule])
        about = self.about
        arguments = {
            "recipe": about.recipe.resolved(),
            "folder": str(about.folder),
            "device": about.device,
        }
        return Workers(resources.bundles, arguments, num_rungs=about.num_rungs)

    def _finished(self, result: TrialResult) -> Json:
        """All that Tune is told of a trial at its end. Raises `TrialFailed`."""
        if result.measurement is None:
            own = self._config is not None and result.trial_id == self._config.id
            who = "" if own else "the dense baseline failed: "
            raise TrialFailed(f"{who}{result.reason or result.status}: {result.message}")
        metrics = result.measurement.metrics
        for objective in self.about.recipe.objectives:
            if not math.isfinite(metrics.get(objective.name, math.nan)):
                raise TrialFailed(f"its {objective.name} is {metrics.get(objective.name)}")
        return _told(result, self.about)

    def _stop(self) -> None:
        """End what runs, so that it leaves nothing half written behind."""
        if self._has_begun and self._workers is not None:
            self._workers.stop()
            if self._workers.are_broken:
                self._end_workers()
        self._has_begun = False

    def _end_workers(self) -> None:
        if self._workers is not None:
            self._workers.end()
        self._workers = None


# -- what is reported ----------------------------------------------------------------------------


def _report(standing: Standing, quality: str) -> Json:
    found = asdict(standing)
    score = found.pop("quality")
    rung = found.pop("rung")
    return {tune.result.TRAINING_ITERATION: rung, **found} | (
        {} if score is None else {quality: score}
    )


def _told(result: TrialResult, about: About) -> Json:
    """Plain values under plain names: every logger of Tune takes these."""
    measured, folder = result.measurement, about.folder_of(result.config)
    assert measured is not None
    training = result.details.get("training", {})
    bounds = {
        f"{name}_{end}": bound
        for name, interval in measured.intervals.items()
        for end, bound in zip(("low", "high"), interval, strict=True)
    }
    told = {
        **measured.metrics,
        **bounds,
        tune.result.TRAINING_ITERATION: about.num_rungs,
        "status": result.status.value,
        "slimtune_id": result.trial_id,
        "artifact": str(folder / "artifact"),
        "sha256": result.sha256,
        "fingerprint": measured.fingerprint,
        "device_seconds": result.device_seconds,
        tune.result.DONE: True,
    }
    if training.get("losses"):
        steps = training["steps"]
        told |= {"step": steps, "num_steps": steps, "loss": training["losses"][-1][1]}
    return told


def _died(error: RayError, config: TrialConfig) -> TrialResult:
    """What becomes of a trial one of whose processes is gone."""
    return TrialResult(
        trial_id=config.id,
        config=config,
        status=TrialStatus.FAILED,
        reason=reason_of(error),
        message=why_lost(error),
    )


# -- searchers -----------------------------------------------------------------------------------


class Searcher(TuneSearcher):
    """The recipe's own searcher as a `search_alg`: what it would ask in a study, it suggests here.

    It is told all objectives and limits of the recipe, and names no metric to Tune, whose own is
    for its schedulers and for `get_best_result`. What cannot work is not suggested.
    `TuneConfig(num_samples=-1)` takes all that it has.
    """

    def __init__(self, recipe: str | Path | Recipe) -> None:
        super().__init__()
        self._about = _about(recipe)
        self._events: list[Json] = []
        self._start()

    def _start(self) -> None:
        recipe = self._about.recipe
        self._search = recipe.search.start(recipe.space, seed=recipe.seed, goal=recipe.goal)
        self._running: dict[str, TrialConfig] = {}

    def suggest(self, trial_id: str) -> Json | str:
        while (ask := self._search.ask()) is not None:
            config = ask.config.model_dump(mode="json")
            self._events.append({"ask": config, "drawn": dict(ask.drawn), "trial_id": trial_id})
            if self._about.ruled_out(ask.config) is None:
                self._running[trial_id] = ask.config
                return in_short(ask.config, self._about.recipe)
            self._tell(ask.config, None, TrialStatus.SKIPPED)
        return str(TuneSearcher.FINISHED)

    def on_trial_complete(
        self, trial_id: str, result: Json | None = None, error: bool = False
    ) -> None:
        config = self._running.pop(trial_id, None)
        if config is None:
            return
        if error or result is None or result.get("status") != TrialStatus.COMPLETED:
            status = TrialStatus.FAILED if error else TrialStatus.STOPPED
            self._tell(config, None, status)
            return
        values = {n: float(v) for n, v in result.items() if type(v) in (int, float)}
        self._tell(config, values, TrialStatus.COMPLETED)

    def _tell(
        self, config: TrialConfig, values: dict[str, float] | None, status: TrialStatus
    ) -> None:
        told = {"tell": config.model_dump(mode="json"), "values": values, "status": status.value}
        self._events.append(told)
        self._search.tell(config, values, status)

    # -- kept by Tune, for Tuner.restore ---------------------------------------------------------

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(json.dumps(self._events), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        self._replay(json.loads(Path(checkpoint_path).read_text(encoding="utf-8")))

    def _replay(self, events: list[Json]) -> None:
        """Ask and tell again what was asked and told."""
        self._start()
        self._events = list(events)
        for event in events:
            if "ask" in event:
                config = TrialConfig(**event["ask"])
                self._search.replay(Ask(config, event["drawn"]))
                self._running[event["trial_id"]] = config
            else:
                config = TrialConfig(**event["tell"])
                self._running = {n: c for n, c in self._running.items() if c.id != config.id}
                self._search.tell(config, event["values"], TrialStatus(event["status"]))

    def __getstate__(self) -> Json:
        """As plain data: what a search keeps in memory is made of its events again."""
        kept = {"_metric": self._metric, "_mode": self._mode}
        return kept | {"about": self._about, "events": self._events}

    def __setstate__(self, state: Json) -> None:
        self._about, events = state.pop("about"), state.pop("events")
        self.__dict__.update(state)
        self._replay(events)
