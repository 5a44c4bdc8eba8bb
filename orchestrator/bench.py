"""What the trials of one study share on one worker: data, base models, the dense baseline, its session.

All of it is made on first use and kept.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orchestrator.base_model import Base, load_base, neighbours, tokenizer_key
from orchestrator.finetune import (
    CachedTeacher,
    FinetuneOptions,
    cached_teacher,
    finetune,
    live_teacher,
    predict,
)
from orchestrator.measure.fingerprint import environment, fingerprint
from orchestrator.prune import PruneContext
from orchestrator.prune.tree import read_signature
from orchestrator.recipe import Recipe
from orchestrator.runtimes import RUNTIMES, Session
from orchestrator.stages import Stages
from orchestrator.tasks import Encoded, Rows, Split
from orchestrator.tasks.augmentation import Augmentation, augment
from orchestrator.trial import BadInput, TrialConfig, content_hash

DENSE_VERSION = 2
ANSWERS_VERSION = 1
Teacher = Callable[[np.ndarray, dict[str, torch.Tensor]], torch.Tensor]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Dense:
    """The trained dense model: where its checkpoints lie, and how it came to be.

    `config` is the trial configuration that describes it, `candidates` what it is the best of.
    """

    folder: Path
    config: TrialConfig
    candidates: list[dict[str, Any]]


@dataclass(frozen=True)
class Lesson:
    """Rows to train on and, where there is one, the teacher that answers them by their index."""

    rows: Rows
    teacher: Teacher | None


class Bench:
    """The shared things of one study on one worker. `rows_limit` cuts every split, for a dry run."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        device: str | None = None,
        rows_limit: int | None = None,
        steps_limit: int | None = None,
    ) -> None:
        self.recipe, self.folder = recipe, folder
        self.task, self.target = recipe.task, recipe.target
        self.runtime = RUNTIMES[recipe.target.runtime]
        self.device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        self.stages = Stages(folder / "stages")
        self.rows_limit, self.steps_limit = rows_limit, steps_limit
        self._bases: dict[str, Base] = {}
        self._encoded: dict[tuple[str, str], Encoded] = {}
        self._lessons: dict[str, Lesson] = {}
        self._sessions: dict[str, Session] = {}

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
        """A split's tokens, encoded once a tokenizer; cut to `rows_limit`."""
        return head_rows(self._whole(split, tokenizer), self.rows_limit)

    def _whole(self, split: Split, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        key = (split, tokenizer_key(tokenizer))
        if key not in self._encoded:
            self._encoded[key] = self.task.encode(self.rows[split], tokenizer)
        return self._encoded[key]

    # -- models ----------------------------------------------------------------------------------

    def base(self, model: str) -> Base:
        if model not in self._bases:
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
        return int(getattr(self.task, "max_length", None) or getattr(self.task, "block_size", 512))

    def dense(self, model: str, note: Note = lambda text: None) -> Dense:
        """The dense baseline: the best on validation of its grid, trained at most once a study."""
        base = self.base(model)
        grid = self.recipe.baseline_grid(model)
        inputs = {
            "base": base.source,
            "tokenizer": tokenizer_key(base.tokenizer),
            "data": self.data_key,
            "grid": [options.model_dump(mode="json") for options in grid],
            "seed": self.recipe.seed,
            "limits": [self.rows_limit, self.steps_limit],
        }

        def build(folder: Path) -> None:
            start, baseline, options, candidates = self._train_dense(base, grid, note)
            start.save_pretrained(folder / "start")
            baseline.save_pretrained(folder / "baseline")
            base.tokenizer.save_pretrained(folder / "baseline")
            config = self.dense_config(model, options)
            text = {"config": config.model_dump(mode="json"), "candidates": candidates}
            (folder / "dense.json").write_text(json.dumps(text, indent=1))

        folder = self.stages.once("dense", inputs, build, version=DENSE_VERSION)
        found = json.loads((folder / "dense.json").read_text())
        return Dense(folder, TrialConfig(**found["config"]), found["candidates"])

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
        folder = self.dense(model).folder / ("start" if trained_on else "baseline")
        loaded = self.task.auto_class().from_pretrained(folder, dtype=torch.float32)
        return loaded.eval()

    def _train_dense(
        self, base: Base, grid: list[FinetuneOptions], note: Note
    ) -> tuple[PreTrainedModel, PreTrainedModel, FinetuneOptions, list[dict[str, Any]]]:
        """Where trials start, the baseline, the winner's options, and how all candidates did.

        The best of the grid on validation is where trials start. It is then trained on for the
        largest budget that any trial gets, and the better of the two is the baseline.
        """
        candidates: list[dict[str, Any]] = []
        best: tuple[float, PreTrainedModel, FinetuneOptions] | None = None
        for number, options in enumerate(grid, 1):
            note(f"dense {number}/{len(grid)}")
            model = copy.deepcopy(base.model)
            score = self._train_and_score(model, base, options, candidates)
            if best is None or score > best[0]:
                best = (score, model, options)
        assert best is not None
        score, start, options = best
        longer = self.recipe.continued_baseline(options)
        if longer is None:
            return start, start, options, candidates
        note("dense, continued")
        continued = copy.deepcopy(start)
        better = self._train_and_score(continued, base, longer, candidates, continued=True)
        return start, continued if better > score else start, options, candidates

    def _train_and_score(
        self,
        model: PreTrainedModel,
        base: Base,
        options: FinetuneOptions,
        candidates: list[dict[str, Any]],
        *,
        continued: bool = False,
    ) -> float:
        """Fine-tune in place; quality on validation, larger is better; adds a line to `candidates`."""
        train = self.encoded("train", base.tokenizer)
        report = finetune(
            model,
            self.task,
            train,
            options,
            seed=self.recipe.seed,
            device=self.device,
            max_steps=self.steps_limit,
        )
        validation = self.encoded("validation", base.tokenizer)
        records = predict(model, self.task, validation, batch_size=32, device=self.device)
        value = self.task.metrics(records)[self.task.quality][0]
        model.cpu()
        candidates.append(
            {
                "finetune": options.model_dump(mode="json"),
                "continued": continued,
                self.task.quality: value,
                "steps": report.steps,
                "seconds": report.seconds,
                "step_seconds": report.step_seconds,
                "losses": report.losses,
            }
        )
        return value * self.recipe.sign(self.task.quality)

    # -- what stages ask for ---------------------------------------------------------------------

    def lesson(self, model: str, options: FinetuneOptions) -> Lesson:
        """What a trial trains on. With a teacher, its logits are computed once where a row has one answer."""
        if options.distillation is None:
            return Lesson(self.rows["train"], None)
        key = content_hash([model, options.model_dump(mode="json")["augmentation"]])
        if key not in self._lessons:
            if self.task.kind == "encoder":
                self._lessons[key] = self._answered_rows(model, options.augmentation)
            else:
                dense = self.dense_model(model).to(self.device)
                self._lessons[key] = Lesson(self.rows["train"], live_teacher(dense, self.task))
        return self._lessons[key]

    def _answered_rows(self, model: str, augmentation: Augmentation | None) -> Lesson:
        """Training rows, and made-up ones beside them, with the dense baseline's logits [rows, classes]."""
        tokenizer, dense = self.base(model).tokenizer, self.dense(model)
        train = self.rows["train"]
        inputs = {
            "dense": dense.folder.name,
            "augmentation": augmentation and augmentation.model_dump(mode="json"),
            "seed": self.recipe.seed,
        }

        def build(folder: Path) -> None:
            teacher = self.dense_model(model)
            texts = list(train.texts)
            if augmentation is not None:
                texts += augment(
                    train,
                    augmentation,
                    neighbours=neighbours(teacher, tokenizer),
                    mask_token=tokenizer.mask_token,
                    seed=self.recipe.seed,
                )
            rows = replace(train, ids=[str(i) for i in range(len(texts))], texts=texts, labels=None)
            encoded = head_rows(self.task.encode(rows, tokenizer), self.rows_limit)
            answers = cached_teacher(teacher.to(self.device), self.task, encoded, self.device)
            np.save(folder / "logits.npy", answers.logits)
            (folder / "texts.json").write_text(json.dumps(texts))

        folder = self.stages.once("answers", inputs, build, version=ANSWERS_VERSION)
        logits = np.load(folder / "logits.npy", allow_pickle=False)
        texts = [tuple(text) for text in json.loads((folder / "texts.json").read_text())]
        labels = [*(train.labels or []), *logits.argmax(-1).tolist()[len(train.texts) :]]
        labels += [0] * (len(texts) - len(labels))  # a dry run has answers for its first rows alone
        ids = [str(number) for number in range(len(texts))]
        rows = replace(train, ids=ids, texts=texts, labels=labels)
        return Lesson(rows, CachedTeacher(logits))

    def encoded_lesson(self, lesson: Lesson, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """A lesson's rows as tokens of a trial's own tokenizer."""
        if lesson.rows is self.rows["train"]:
            return self.encoded("train", tokenizer)
        return head_rows(self.task.encode(lesson.rows, tokenizer), self.rows_limit)

    def prune_context(self, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PruneContext:
        """What a pruning method may look at: batches of the training split, shuffled by the seed."""

        def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
            train = self.encoded("train", tokenizer)
            order = np.random.default_rng(seed).permutation(len(train))
            size = self.recipe.calibration_batch_size
            for start in range(0, min(count * size, len(train)), size):
                batch = self.task.collate(train, order[start : start + size].tolist())
                yield {
                    name: torch.from_numpy(value).to(self.device) for name, value in batch.items()
                }

        def loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.task.loss(self.task.logits(model, batch), batch)

        return PruneContext(
            tokenizer=tokenizer,
            texts=self.training_texts,
            batches=batches,
            loss=loss,
            seed=seed,
        )

    def dense_session(self, model: str) -> Session:
        """The served dense baseline, loaded once, against which latencies are interleaved."""
        if model not in self._sessions:
            artifact = self.recipe.baseline_folder(self.folder, model) / "artifact"
            self._sessions[model] = self.runtime.load(artifact, self.target)
        return self._sessions[model]

    # -- facts for the driver --------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """All that planning needs, as plain data."""
        env = environment()
        models = {}
        for options in self.recipe.models:
            base = self.base(options.id)
            train = self._whole("train", base.tokenizer)
            lengths = [len(row["input_ids"]) for row in train.features]
            models[options.id] = {
                "signature": read_signature(base.model).model_dump(mode="json"),
                "source": base.source,
                "num_train": len(train),
                "num_validation": len(self._whole("validation", base.tokenizer)),
                "mean_length": float(np.mean(lengths)),
            }
        return {
            "models": models,
            "labels": self.labels,
            "num_rows": {split: len(rows.ids) for split, rows in self.rows.items()},
            "data": self.data_key,
            "environment": env,
            "fingerprint": fingerprint(env),
        }


def head_rows(encoded: Encoded, limit: int | None) -> Encoded:
    """The first `limit` rows; all of them for None."""
    if limit is None or len(encoded) <= limit:
        return encoded
    labels = None if encoded.labels is None else encoded.labels[:limit]
    return replace(
        encoded, ids=encoded.ids[:limit], features=encoded.features[:limit], labels=labels
    )


def main() -> None:
    """Answer the driver: a resolved recipe on standard input, its facts (or problems) on the last line."""
    recipe = Recipe.from_resolved(json.load(sys.stdin))
    try:
        with tempfile.TemporaryDirectory() as folder:
            answer = Bench(recipe, Path(folder), device="cpu").facts()
    except BadInput as error:
        answer = {"problems": error.problems}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
