"""What the trials of one study share on one worker: data, base models, the dense baseline, its session.

All of it is made on first use and kept.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orchestrator import token_files
from orchestrator.alone import this_host
from orchestrator.base_model import Base, load_base, num_positions, tokenizer_key
from orchestrator.base_model_checks import source_problems
from orchestrator.checkpoint import Earlier, Saver, earlier
from orchestrator.compiled import missing_compiler
from orchestrator.dense import Dense, make_dense
from orchestrator.finetune import FinetuneOptions, uses_bf16
from orchestrator.lessons import Lesson, Source, open_lesson, spread, taught
from orchestrator.measure.fingerprint import environment, fingerprint
from orchestrator.notice import Notice
from orchestrator.plugins import find
from orchestrator.predict import predict, row_lengths
from orchestrator.problems import raise_if
from orchestrator.prune import PruneContext
from orchestrator.prune.tree import read_signature
from orchestrator.quantize import Numerics
from orchestrator.recipe import Recipe
from orchestrator.recompute import check_recomputes
from orchestrator.runtimes import RUNTIMES, Session, Target
from orchestrator.score_files import Scores, shared_scores
from orchestrator.space import can_go_on, num_steps
from orchestrator.stages import Claim, Stages, unclaimed
from orchestrator.storage import Storage
from orchestrator.tasks import Encoded, Rows, Split, Task
from orchestrator.tasks.data import collect
from orchestrator.trial import BadInput, Infeasible, TrialConfig, content_hash

if TYPE_CHECKING:
    from orchestrator.rungs import Rungs
    from orchestrator.training import Crew

TOKENS_VERSION = 1
MAX_ENCODED = 8  # splits and lessons that are kept as tokens, the last ones used
Note = Callable[[str], None]


def _ignore(text: str) -> None:
    """Nobody looks on."""


class Bench:
    """The shared things of one study on one worker; `crew` are those that train together with it. A
    batch is trained on in `pieces`, where memory is short.

    `folder` is this worker's own of the study where the recipe has a storage, else all workers'. A
    `claim` is held on what several of them would make. `rows_limit` and `steps_limit` cut every split
    and every training, for a dry run. `timed_on` is the fingerprint of the machines on which speed
    counts, "" where any will do. `rungs` are told how a trial's training goes; after `notice` it goes
    on elsewhere.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        device: str | None = None,
        claim: Claim = unclaimed,
        rows_limit: int | None = None,
        steps_limit: int | None = None,
    ) -> None:
        self.recipe, self.folder = recipe, folder
        self.storage = Storage(recipe.storage, folder) if recipe.storage else None
        self.task, self.target = recipe.task, recipe.target
        self.runtime = find(RUNTIMES, recipe.target.runtime, what="runtime")
        self.device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        self.stages = Stages(
            folder / "stages",
            storage=self.storage,
            claim=claim,
            while_waiting=this_host().give_way,
        )
        self.rows_limit, self.steps_limit = rows_limit, steps_limit
        self.num_threads = torch.get_num_threads()
        self.timed_on = ""
        self.crew: Crew | None = None
        self.pieces = 1
        self.rungs: Rungs | None = None
        self.notice = Notice()
        self._bases: dict[str, Base] = {}
        self._dense: dict[str, Dense] = {}
        self._encoded: dict[tuple[str, str], Encoded] = {}
        self._sources: dict[str, Source] = {}
        self._lessons: dict[str, Lesson] = {}
        self._sessions: dict[str, Session] = {}

    @property
    def has_own_folder(self) -> bool:
        """Whether what lies here is a copy of what the storage has."""
        return self.storage is not None and self.folder != Path(self.recipe.output_dir)

    @property
    def is_timed_here(self) -> bool:
        """Whether speed and memory taken on this machine count."""
        return self.timed_on in ("", fingerprint())

    # -- data ------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> dict[Split, Rows]:
        return self.task.load()

    @cached_property
    def labels(self) -> list[str]:
        return self.task.label_names(self.rows)

    @cached_property
    def data_key(self) -> str:
        """The hash of every row that is trained or scored on, and of how it is read."""
        content = {
            split: [list(rows.ids), [list(text) for text in rows.texts], list(rows.labels or [])]
            for split, rows in self.rows.items()
        }
        return content_hash([content, self.labels, self.task.model_dump(mode="json")])

    def training_texts(self) -> Iterator[str]:
        for text in self.rows["train"].texts:
            yield from text

    def encoded(self, split: Split, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """A split's tokens; evenly spread ones of its rows where there is a `rows_limit`."""
        if self.rows_limit is None:
            return self._mapped(split, self.rows[split], tokenizer)
        whole = self._whole(split, self.rows[split], tokenizer)
        if len(whole) <= self.rows_limit:
            return whole
        kept = spread(len(whole), self.rows_limit)
        return replace(
            whole,
            ids=[whole.ids[i] for i in kept],
            features=[whole.features[i] for i in kept],
            labels=None if whole.labels is None else whole.labels[kept],
        )

    def _whole(self, name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """All of `rows`, which are called `name`, as tokens."""
        encoded = self._encoded.get((name, tokenizer_key(tokenizer)))
        encoded = encoded or self.task.encode(rows, tokenizer)
        self._keep(name, tokenizer, encoded)
        return encoded

    def _mapped(self, name: str, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """The same, from files that the workers of a host share; written by the first of them."""
        whole = self._encoded.get((name, tokenizer_key(tokenizer)))
        if whole is not None and isinstance(whole.features, token_files.MappedFeatures):
            return self._whole(name, rows, tokenizer)
        inputs = {"data": self.data_key, "rows": name, "tokenizer": tokenizer_key(tokenizer)}

        def build(folder: Path) -> None:
            token_files.save(self._whole(name, rows, tokenizer), folder)

        mapped = token_files.load(self.stages.once("tokens", inputs, build, version=TOKENS_VERSION))
        self._keep(name, tokenizer, mapped)
        return mapped

    def _keep(self, name: str, tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> None:
        """Among the last ones used."""
        key = (name, tokenizer_key(tokenizer))
        self._encoded.pop(key, None)
        self._encoded[key] = encoded
        if len(self._encoded) > MAX_ENCODED:
            del self._encoded[next(iter(self._encoded))]

    # -- models ----------------------------------------------------------------------------------

    def base(self, model: str, *, with_weights: bool = False) -> Base:
        """A base model; its weights are given back once the dense baseline stands."""
        found = self._bases.get(model)
        if found is None or (with_weights and found.model.device.type == "meta"):
            self._bases[model] = load_base(
                self.recipe.model_options(model),
                self.task,
                texts=self.training_texts(),
                labels=self.labels,
                seed=self.recipe.seed,
            )
        return self._bases[model]

    def max_length(self, model: str) -> int:
        """The longest input that is ever encoded, in tokens."""
        longest = getattr(self.task, "max_length", None) or getattr(self.task, "block_size", 512)
        return int(min(longest, self.base(model).tokenizer.model_max_length))

    def dense(self, model: str, note: Note = _ignore) -> Dense:
        """The dense baseline: the best on validation of its grid, trained at most once a study."""
        if model not in self._dense:
            self._dense[model] = make_dense(model, self, note)
            self.base(model).model.to("meta")
        return self._dense[model]

    def dense_config(self, model: str, options: FinetuneOptions) -> TrialConfig:
        """The dense baseline as a trial: nothing pruned, nothing rounded."""
        return self.recipe.trial_config(
            model=model, finetune=options.model_dump(mode="json"), seed=self.recipe.seed
        )

    def dense_model(self, model: str, *, trained_on: bool = False) -> PreTrainedModel:
        """A fresh copy of the dense baseline, on the CPU, in evaluation mode.

        `trained_on` is for trials that train: they start where the baseline stood before it was
        given the largest budget of a trial, so that no trial has had more steps than it.
        """
        return self._load(self.dense(model).folder / ("start" if trained_on else "baseline"))

    def _load(self, folder: Path) -> PreTrainedModel:
        loaded = self.task.auto_class().from_pretrained(folder, dtype=torch.float32)
        self.set_attention(loaded)
        return loaded.eval()

    def set_attention(self, model: PreTrainedModel) -> None:
        """The attention that trains fastest: on a CPU the fused one's backward pass is the slower one."""
        model.set_attn_implementation("eager" if self.device == "cpu" else "sdpa")

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        """The task's quality on validation, of a model in torch, which is left as it was."""
        was_training = model.training
        validation = self.encoded("validation", tokenizer)
        size = self.recipe.calibration_batch_size
        records = predict(model, self.task, validation, batch_size=size, device=self.device)
        model.train(was_training)
        return self.task.metrics(records)[self.task.quality][0]

    # -- what stages ask for ---------------------------------------------------------------------

    def training_inputs(self, config: TrialConfig, numerics: Numerics | None) -> dict[str, Any]:
        """All that a trial's trained model hangs on; equal for trials that share their training."""
        options = FinetuneOptions(**config.finetune)
        device = torch.device(self.device)
        return {
            "dense": self.dense(config.model).folder.name,
            "prune": list(config.prune),
            "finetune": config.finetune | {"bf16": uses_bf16(options, device)},
            "seed": config.seed,
            "numerics": numerics and numerics.model_dump(mode="json"),
            "quantize": config.quantize if numerics else None,
            "calibration_batch_size": self.recipe.calibration_batch_size,
        }

    def saver(self, going: Path) -> Saver:
        """What writes down a training, in the folder that is kept for it while it goes on."""
        every = self.recipe.resources.save_steps
        return Saver(going, every, self.storage, self.notice)

    def shorter_training(
        self, config: TrialConfig, inputs: dict[str, Any], *, version: int
    ) -> Earlier | None:
        """The longest of the trainings that differ from this one, of `inputs`, in being shorter.

        None where a schedule hangs on how long the whole is.
        """
        if not can_go_on(config):
            return None
        wanted = num_steps(
            config.finetune, len(self.encoded("train", self.base(config.model).tokenizer))
        )
        found: list[Earlier] = []
        for others, their_version in self.stages.each("trained"):
            if their_version == version and _without_length(others) == _without_length(inputs):
                folder = self.stages.find("trained", others, version=version)
                other = folder and earlier(folder)
                if other and other.step < wanted:
                    found.append(other)
        return max(found, key=lambda one: one.step, default=None)

    def source(self, model: str, options: FinetuneOptions, note: Note = _ignore) -> Source:
        """What a trial trains on. A teacher answers once where a row has one answer."""
        if options.distillation is None:
            return Source()
        layers = options.distillation.hidden > 0
        key = content_hash([model, options.model_dump(mode="json")["augmentation"], layers])
        if key not in self._sources:
            self._sources[key] = taught(model, options.augmentation, self, layers=layers, note=note)
        return self._sources[key]

    def lesson(self, source: Source, *, opens: bool = True) -> Lesson:
        """The lesson of a source, kept; a teacher that answers live only if it `opens`."""
        if not opens:
            return open_lesson(source, self, None)
        key = content_hash(source.model_dump(mode="json"))
        if key not in self._lessons:
            live = self._load(Path(source.dense)).to(self.device) if source.dense else None
            self._lessons[key] = open_lesson(source, self, live)
        return self._lessons[key]

    def encoded_lesson(self, lesson: Lesson, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """A lesson's rows as tokens of a trial's own tokenizer."""
        if lesson.rows is None:
            return self.encoded("train", tokenizer)
        if self.rows_limit is not None:
            return self._whole(lesson.key, lesson.rows, tokenizer)
        return self._mapped(lesson.key, lesson.rows, tokenizer)

    def prune_context(self, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PruneContext:
        """What a pruning method may look at: batches of the training split, shuffled by the seed.

        What it finds of weights is kept for trials that come to the same ones.
        """

        def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
            train = self.encoded("train", context.tokenizer)
            order = np.random.default_rng(seed).permutation(len(train))
            size = self.recipe.calibration_batch_size
            for start in range(0, min(count * size, len(train)), size):
                batch = self.task.collate(train, order[start : start + size].tolist())
                yield {
                    name: torch.from_numpy(value).to(self.device) for name, value in batch.items()
                }

        def loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.task.loss(self.task.logits(model, batch), batch)

        def once(
            model: PreTrainedModel, inputs: dict[str, Any], compute: Callable[[], Scores]
        ) -> Scores:
            looked_at = {
                "data": self.data_key,
                "tokenizer": tokenizer_key(context.tokenizer),
                "batch_size": self.recipe.calibration_batch_size,
                "rows_limit": self.rows_limit,
                "seed": seed,
            }
            return shared_scores(model, inputs | looked_at, compute, stages=self.stages)

        context = PruneContext(
            tokenizer=tokenizer,
            texts=self.training_texts,
            batches=batches,
            loss=loss,
            seed=seed,
            once=once,
        )
        return context

    def dense_session(self, model: str) -> Session:
        """The served dense baseline, loaded once, against which latencies are interleaved."""
        if model not in self._sessions:
            artifact = self.baseline_artifact(model)
            self._sessions[model] = self.runtime.load(artifact, self.target)
        return self._sessions[model]

    def baseline_artifact(self, model: str) -> Path:
        """Where the dense baseline lies as it is served."""
        return self.recipe.baseline_folder(self.folder, model) / "artifact"

    # -- facts for the driver --------------------------------------------------------------------

    def facts(self, *, runs_here: bool = True) -> dict[str, Any]:
        """All that planning needs, as plain data. Raises `BadInput` with every problem of the input.

        Devices are checked if the study `runs_here`.
        """
        self._check_input(devices=runs_here)
        problems: list[str] = []
        models = {options.id: options.id for options in self.recipe.models}
        described = collect(models, self._model_facts, problems)
        raise_if(problems)
        env = environment()
        return {
            "models": described,
            "labels": self.labels,
            "notes": [note for rows in self.rows.values() for note in rows.notes],
            "num_rows": {split: len(rows.ids) for split, rows in self.rows.items()},
            "data": self.data_key,
            "environment": env,
            "fingerprint": fingerprint(env),
        }

    def _model_facts(self, model: str) -> dict[str, Any]:
        base = self.base(model)
        try:
            signature = read_signature(base.model)
            if self.recipe.finetunes_with("gradient_checkpointing"):
                check_recomputes(base.model)
        except Infeasible as reason:
            raise BadInput([f"model {model}: {reason}."]) from reason
        problems = length_problems(self.task, self.target, num_positions(base.model))
        if problems:
            raise BadInput([f"model {model}: {problem}" for problem in problems])
        train = self._whole("train", self.rows["train"], base.tokenizer)
        validation = self._whole("validation", self.rows["validation"], base.tokenizer)
        return {
            "signature": signature.model_dump(mode="json"),
            "source": base.source,
            "num_train": len(train),
            "num_validation": len(validation),
            "mean_length": float(row_lengths(train).mean()),
        }

    def _check_input(self, *, devices: bool) -> None:
        """Raise `BadInput` with the problems of devices, data and models together."""
        problems = [p for options in self.recipe.models for p in source_problems(options)]
        checks: dict[str, Callable[[], object]] = {"data": lambda: self.rows}
        if devices:
            checks["devices"] = self._check_devices
        collect(checks, lambda check: check(), problems)
        raise_if(problems)

    def _check_devices(self) -> None:
        options = [self.recipe.resources.of(model.id) for model in self.recipe.models]
        names = {each.strategy_name for each in options}
        if any(name.startswith("zero") for name in names) and not find_spec("deepspeed"):
            raise BadInput(
                [
                    f"resources.strategy: {max(names)} needs DeepSpeed: pip install slimtune[deepspeed]."
                ]
            )
        missing = missing_compiler(torch.device(self.device))
        if missing and self.recipe.finetunes_with("torch_compile"):
            raise BadInput([f"finetune.torch_compile: needs {missing}."])
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            why = str(error).splitlines()[0].rstrip(".")
            raise BadInput([f"--device: torch cannot use {self.device} here: {why}."]) from error
        try:
            self.runtime.check(self.target)
        except ValueError as error:
            raise BadInput([f"{error}."]) from error


def _without_length(inputs: dict[str, Any]) -> str:
    """What trainings have in common that are one training, stopped at different steps."""
    lengths = {"max_steps": None, "num_train_epochs": None}
    return content_hash(inputs | {"finetune": inputs["finetune"] | lengths})


def length_problems(task: Task, target: Target, positions: int | None) -> list[str]:
    """What a decoder would be asked that is longer than the positions it has learned."""
    if task.kind != "decoder" or positions is None:
        return []
    asked = {
        "task.block_size": getattr(task, "block_size", 0),
        "target.prompt_tokens + target.new_tokens": target.prompt_tokens + target.new_tokens,
    }
    return [
        f"it has {positions} positions, but {name} is {length}."
        for name, length in asked.items()
        if length > positions
    ]


def main() -> None:
    """Answer the driver: a resolved recipe on standard input, its facts (or problems) on the last line."""
    recipe = Recipe.from_resolved(json.load(sys.stdin))
    try:
        with tempfile.TemporaryDirectory() as folder:
            answer = Bench(recipe, Path(folder), device="cpu").facts(runs_here=False)
    except BadInput as error:
        answer = {"problems": error.problems}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
