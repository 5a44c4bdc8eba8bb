"""What a study will cost, from the seconds that the stages of a dry run took.

Training grows with the positions of its batches and the size of the model; a teacher's answers,
scores and the comparison of trained with served grow with rows, importance with its batches; a
graph is exported once a depth, and timed once a shape and scheme; the rest takes what it takes. Every trial is counted as if it
ended on the front, which is scored on test too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache

from orchestrator.facts import Json
from orchestrator.recipe import Recipe
from orchestrator.signature import Signature
from orchestrator.space import num_steps, planned
from orchestrator.trial import TrialConfig

FIXED = ("load", "prepare", "augment", "convert", "greedy", "command")
SPEED = ("latency", "memory")
FORWARD = 1 / 3  # of a training step: the backward pass is twice as much


def path_of(config: TrialConfig) -> str:
    """The path that a configuration takes through the stages."""
    methods = " + ".join(method["method"] for method in config.prune) or "none"
    scheme = config.quantize["scheme"]
    training = " QAT" if config.quantize["qat"] else ""
    tables = " + embeddings" if config.quantize["embeddings"] else ""
    return f"{config.model}: {methods} × {scheme}{training}{tables}"


class Cost:
    """Device-seconds of the parts of a study.

    `baselines` are the rows of a dry run by model and `paths` those by path, `num_tried` is how
    many data rows each of them had of every split, `workers_tried` how many shared each model's
    training. Workers share that work; the rest one of them does while the others wait.
    """

    def __init__(
        self,
        recipe: Recipe,
        facts: Json,
        *,
        baselines: Mapping[str, Json],
        paths: Mapping[str, Json],
        num_tried: int,
        workers_tried: Mapping[str, int],
    ) -> None:
        self.recipe, self.models = recipe, facts["models"]
        self.num_test = facts["num_rows"]["test"]
        self.baselines, self.paths = baselines, paths
        self.num_tried, self.workers_tried = num_tried, workers_tried
        self._exported: set[str] = set()
        self._timed: set[str] = set()
        self._answered: set[str] = set()
        self._trained: set[str] = set()
        self.signature = cache(self._signature)

    def study_s(self, configs: Iterable[TrialConfig]) -> float:
        """The baselines and all configurations, those left out whose path did not work."""
        for done in (self._exported, self._timed, self._answered, self._trained):
            done.clear()
        total = sum(self.baseline_s(model.id) for model in self.recipe.models)
        return total + sum(self.trial_s(config) for config in configs)

    def baseline_s(self, model: str) -> float:
        """The grid, each of it scored on validation, the winner's further training, and one artifact."""
        row, facts = self.baselines[model], self.models[model]
        budgets = self.recipe.baseline_budgets(model)
        validation = facts["num_validation"] * facts["mean_length"]
        scoring = FORWARD * validation * row["training"]["position_seconds"]
        training = sum(self._training_s(budget, row, model) for budget in budgets)
        config = TrialConfig(**row["config"])
        return self._all(model, training, len(budgets) * scoring + self._artifact_s(config, row))

    def trial_s(self, config: TrialConfig) -> float:
        """One configuration, 0 where its path did not work. Asked in the study's order."""
        row = self.paths.get(path_of(config))
        if row is None or not row["works"]:
            return 0.0
        if self._is_trained(config):
            return self._all(config.model, 0.0, self._artifact_s(config, row))
        larger = self._work(config) / self._work(TrialConfig(**row["config"]))
        training = larger * self._training_s(config.finetune, row, config.model)
        overhead = max(0.0, row["stage_seconds"]["finetune"] - row["training"]["seconds"])
        answers = self._answers_s(config)
        pruning = self._prune_s(config, row)
        alone = overhead + answers + pruning + self._artifact_s(config, row)
        return self._all(config.model, training, alone)

    def _all(self, model: str, training: float, alone: float) -> float:
        """Of all workers of a gang, from seconds of those that were tried."""
        workers = self.recipe.resources.of(model).num_workers
        return float(training * self.workers_tried[model] + alone * workers)

    def _is_trained(self, config: TrialConfig) -> bool:
        """Whether an earlier configuration has the same training, so that there is none to do."""
        if not num_steps(config.finetune, self.models[config.model]["num_train"]):
            return False
        rounded = config.quantize if config.quantize["qat"] else None
        training = [config.model, config.prune, config.finetune, config.seed, rounded]
        return _is_known(json.dumps(training, sort_keys=True), self._trained)

    # -- parts -----------------------------------------------------------------------------------

    def _training_s(self, finetune: Json, row: Json, model: str) -> float:
        """Optimizer steps: rows of similar length come together, others are padded as they were here."""
        facts, training = self.models[model], row["training"]
        batch = min(finetune["per_device_train_batch_size"], _num_rows(finetune, facts))
        padding = 1.0 if finetune["group_by_length"] else _padding(training)
        positions = batch * finetune["gradient_accumulation_steps"] * facts["mean_length"] * padding
        steps = num_steps(finetune, facts["num_train"])
        return float(steps * positions * training["position_seconds"])

    def _work(self, config: TrialConfig) -> float:
        """What one position costs while training, in multiply-accumulates."""
        length = max(1, round(self.models[config.model]["mean_length"]))
        forward = planned(config, self.signature(config.model)).macs(length=length)
        asks = self._asks_live(config.finetune["distillation"])
        return forward / FORWARD + asks * self.signature(config.model).macs(length=length)

    def _asks_live(self, distillation: Json | None) -> bool:
        """Whether the dense model runs beside the student."""
        if distillation is None:
            return False
        return bool(self.recipe.task.kind != "encoder" or distillation["hidden"])

    def _prune_s(self, config: TrialConfig, row: Json) -> float:
        """One-shot importance as it was timed, by its batches; gradual importance as training steps."""
        facts, growth, gradual = self.models[config.model], 1.0, 0.0
        for section in config.prune:
            if section.get("importance") != "taylor":
                continue
            wanted = section["num_batches"] * self.recipe.calibration_batch_size
            rows = min(wanted, facts["num_train"])
            if section["schedule"] == "gradual":
                updates = min(
                    section["num_updates"], num_steps(config.finetune, facts["num_train"])
                )
                positions = updates * rows * facts["mean_length"]
                gradual += positions * row["training"]["position_seconds"]
            else:
                growth = max(growth, rows / min(rows, self.num_tried))
        return float(growth * row["stage_seconds"]["prune"] + gradual)

    def _answers_s(self, config: TrialConfig) -> float:
        """A teacher's answers beforehand, once a study for the same rows."""
        augmentation = config.finetune["augmentation"]
        lesson = json.dumps([config.model, augmentation], sort_keys=True)
        rows = [row for row in self.paths.values() if row["works"] and _is_of(config.model, row)]
        tried = [row for row in rows if "answers" in row["stage_seconds"]]
        if not tried or config.finetune["distillation"] is None or lesson in self._answered:
            return 0.0
        self._answered.add(lesson)
        copies = 1 + (augmentation["copies"] if augmentation else 0)
        answered = max(1, self.num_tried // copies) * copies
        rows_wanted = _num_rows(config.finetune, self.models[config.model])
        seconds = tried[0]["stage_seconds"]["answers"] / _padding(tried[0]["training"])
        return float(seconds * rows_wanted / min(answered, rows_wanted))

    def _artifact_s(self, config: TrialConfig, row: Json) -> float:
        """From a trained model to its numbers."""
        facts, seconds = self.models[config.model], row["stage_seconds"]
        validation = facts["num_validation"]
        test = self.num_test if self.recipe.task.kind == "encoder" else validation
        checked = min(self.recipe.measure.num_check_inputs, validation)
        check = seconds["check"] * checked / min(self.num_tried, checked)
        quality = seconds["quality"] * (validation + test) / min(self.num_tried, validation)
        fixed = sum(seconds.get(stage, 0.0) for stage in FIXED)
        return float(fixed + check + quality + self._export_s(config) + self._speed_s(config))

    def _export_s(self, config: TrialConfig) -> float:
        """The longest export of the model for a new depth, the shortest where its graph is resized."""
        seconds = self._seconds_of(config.model, ("export",))
        again = _is_known(self._shape(config, only="layers"), self._exported)
        return min(seconds) if again else max(seconds)

    def _speed_s(self, config: TrialConfig) -> float:
        """Timings and memory as they were taken for any path of the model, of a new structure alone."""
        quantize = {name: v for name, v in config.quantize.items() if not name.startswith("qat")}
        structure = json.dumps([self._shape(config), quantize], sort_keys=True)
        if _is_known(structure, self._timed):
            return 0.0
        return max(self._seconds_of(config.model, SPEED))

    def _seconds_of(self, model: str, stages: tuple[str, ...]) -> list[float]:
        """What `stages` took, in each path of a model that works."""
        rows = [self.baselines[model], *self.paths.values()]
        return [
            sum(row["stage_seconds"].get(stage, 0.0) for stage in stages)
            for row in rows
            if row["works"] and _is_of(model, row)
        ]

    def _shape(self, config: TrialConfig, *, only: str = "") -> str:
        """How many units each group has, of groups whose name ends so."""
        counts = planned(config, self.signature(config.model)).counts
        kept = {group: count for group, count in counts.items() if group.endswith(only)}
        return json.dumps([config.model, kept], sort_keys=True)

    def _signature(self, model: str) -> Signature:
        return Signature.model_validate(self.models[model]["signature"])


def _is_known(key: str, known: set[str]) -> bool:
    """Whether it was asked about before; from now on it is known."""
    again = key in known
    known.add(key)
    return again


def _num_rows(finetune: Json, facts: Json) -> int:
    """Rows of an epoch."""
    copies = finetune["augmentation"]["copies"] if finetune["augmentation"] else 0
    return int(facts["num_train"] * (1 + copies))


def _padding(training: Json) -> float:
    """Positions of the batches for each of their tokens."""
    return float(training["positions"] / training["tokens"]) if training["tokens"] else 1.0


def _is_of(model: str, row: Json) -> bool:
    return bool(row["config"]["model"] == model)
