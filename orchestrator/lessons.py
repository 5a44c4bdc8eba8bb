"""What trials train on: the training split or more rows than that, and the teacher that answers them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from orchestrator.base_model import neighbours
from orchestrator.distill import CachedTeacher, HiddenDistance, LiveTeacher, cached_teacher
from orchestrator.predict import row_lengths
from orchestrator.prune.tree import layers_of
from orchestrator.tasks import Encoded, Rows
from orchestrator.tasks.augmentation import Augmentation, augment
from orchestrator.trial import Frozen

if TYPE_CHECKING:
    from orchestrator.bench import Bench

VERSION = 2
Note = Callable[[str], None]
Teacher = Callable[[np.ndarray, dict[str, torch.Tensor]], torch.Tensor]


class Source(Frozen):
    """Where a lesson comes from: folders that any rank of a gang can open.

    `answers` holds what the dense baseline said of each row, and the rows that `augmentation`
    made; `dense` is the baseline itself where it is to answer while others train.
    """

    answers: str = ""
    dense: str = ""
    augmentation: Augmentation | None = None


@dataclass(frozen=True)
class Lesson:
    """`rows` to train on, or the training split itself where they are None.

    `teacher` answers them by their index, where there is one; `key` is the lesson's name.
    """

    key: str
    rows: Rows | None
    teacher: Teacher | None


PLAIN = Lesson("train", None, None)


def taught(
    model: str, augmentation: Augmentation | None, bench: Bench, *, layers: bool, note: Note
) -> Source:
    """The lesson of the dense baseline, by its `layers` too if asked for.

    It answers beforehand where a row has one answer and no more is asked.
    """
    is_live = bench.task.kind != "encoder" or layers
    dense = str(bench.dense(model).folder / "baseline") if is_live else ""
    if is_live and augmentation is None:
        return Source(dense=dense)
    answers = _answers(model, augmentation, bench, note)
    return Source(answers=str(answers), dense=dense, augmentation=augmentation)


def open_lesson(source: Source, bench: Bench, live: PreTrainedModel | None) -> Lesson:
    """The lesson of a source; `live` is its dense baseline, ready to answer, where it has one."""
    lesson = PLAIN
    if source.answers:
        answers = bench.stages.reach(Path(source.answers))
        lesson = _read(answers, source.augmentation, bench)
    if live is None:
        return lesson
    if bench.task.kind != "encoder":
        return replace(lesson, teacher=LiveTeacher(live, bench.task))
    own = bench.encoded_lesson(lesson, AutoTokenizer.from_pretrained(source.dense))
    return replace(lesson, teacher=LiveTeacher(live, bench.task, own))


def hidden_distance(
    lesson: Lesson, student: Sequence[nn.Module], kept: Sequence[int], encoded: Encoded
) -> HiddenDistance:
    """The distance of the student's layers from the dense layers `kept` that they were.

    `encoded` is the lesson, taught by layers, in the student's tokens.
    """
    teacher = lesson.teacher
    assert isinstance(teacher, LiveTeacher), "the lesson shows no layers"
    dense = layers_of(teacher.model)
    aligned = None
    if teacher.encoded is not None:
        aligned = row_lengths(teacher.encoded) == row_lengths(encoded)
    return HiddenDistance(student, [dense[index] for index in kept], aligned=aligned)


def _answers(model: str, augmentation: Augmentation | None, bench: Bench, note: Note) -> Path:
    """The folder of a lesson whose every row was answered beforehand."""
    inputs = {
        "dense": bench.dense(model).folder.name,
        "augmentation": augmentation and augmentation.model_dump(mode="json"),
        "seed": bench.recipe.seed,
    }

    def build(folder: Path) -> None:
        dense, tokenizer = bench.dense_model(model), bench.base(model).tokenizer
        encoded = bench.encoded("train", tokenizer)
        if augmentation is not None:
            note("augment")
            rows = _with_made_up(
                _real_rows(augmentation, bench),
                dense,
                tokenizer,
                augmentation,
                seed=bench.recipe.seed,
            )
            (folder / "texts.json").write_text(json.dumps(rows.texts))
            encoded = bench.task.encode(rows, tokenizer)
        note("answers")
        answers = cached_teacher(dense, bench.task, encoded, bench.device)
        np.save(folder / "logits.npy", answers.logits)

    return bench.stages.once("answers", inputs, build, version=VERSION)


def _read(folder: Path, augmentation: Augmentation | None, bench: Bench) -> Lesson:
    logits = np.load(folder / "logits.npy", allow_pickle=False)
    rows = None
    if augmentation is not None:
        texts = [tuple(text) for text in json.loads((folder / "texts.json").read_text())]
        rows = _labelled(texts, _real_rows(augmentation, bench), logits)
    return Lesson(folder.name, rows, CachedTeacher(logits))


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` indices, evenly spread."""
    return np.linspace(0, count - 1, min(limit, count)).astype(int).tolist()


def _with_made_up(
    real: Rows,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    augmentation: Augmentation,
    *,
    seed: int,
) -> Rows:
    """Real rows, then the changed copies of them; no labels yet."""
    words = {word.lower() for text in real.texts for part in text for word in part.split()}
    made_up = augment(
        real,
        augmentation,
        neighbours=neighbours(dense, tokenizer, words),
        mask_token=tokenizer.mask_token,
        seed=seed,
    )
    return _numbered(real, [*real.texts, *made_up], labels=None)


def _labelled(texts: list[tuple[str, ...]], real: Rows, logits: np.ndarray) -> Rows:
    """Rows with labels: made-up ones have the teacher's."""
    answers = logits.argmax(-1).tolist()
    return _numbered(real, texts, labels=[*(real.labels or []), *answers[len(real.texts) :]])


def _numbered(real: Rows, texts: Sequence[tuple[str, ...]], labels: list[int] | None) -> Rows:
    ids = [str(number) for number in range(len(texts))]
    return replace(real, ids=ids, texts=texts, labels=labels)


def _real_rows(augmentation: Augmentation, bench: Bench) -> Rows:
    """The training split; of it so much that a dry run's limit of rows holds with the copies."""
    train = bench.rows["train"]
    if bench.rows_limit is None:
        return train
    kept = spread(len(train.ids), max(1, bench.rows_limit // (1 + augmentation.copies)))
    labels = None if train.labels is None else [train.labels[i] for i in kept]
    return _numbered(train, [train.texts[i] for i in kept], labels)
