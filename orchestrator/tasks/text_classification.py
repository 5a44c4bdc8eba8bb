"""Naming the class of a sentence or of a pair of sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PrivateAttr, field_validator

from orchestrator.predict import to_device
from orchestrator.problems import nearest, raise_if
from orchestrator.tasks import Encoded, Estimate, Kind, Record, Rows, Split
from orchestrator.tasks.data import (
    Table,
    cell_text,
    collate,
    empty_cells,
    few,
    missing_columns,
    not_labels,
    read_splits,
)
from orchestrator.tasks.statistics import (
    matched,
    mean_difference,
    percentile_interval,
    resample,
    wilson,
)
from orchestrator.trial import Frozen

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Rows as they were read: a label is still a name."""

    ids: list[str]
    texts: list[tuple[str, ...]]
    labels: list[str]

    def take(self, indices: Sequence[int]) -> Labelled:
        return Labelled(
            ids=[self.ids[index] for index in indices],
            texts=[self.texts[index] for index in indices],
            labels=[self.labels[index] for index in indices],
        )


class TextClassification(Frozen):
    """`data` is a file, a folder or a hub data set (at `data_revision`); `train`, `validation` and `test` name its parts.

    A part that is not named is cut off train, by class and seeded, and never used for another
    purpose. `columns` names the columns of files that have no header. `label_map` gives labels
    their names; classes are numbered in its order, and without it in the order of their names.
    `drop_leaks` takes rows out of train whose text is in validation or test too.
    `class_weights` are in class order; "balanced" weighs a class by the inverse of its frequency.
    """

    kind: ClassVar[Kind] = "encoder"
    quality: ClassVar[str] = "accuracy"
    comparable_vocabulary: ClassVar[bool] = True

    name: Literal["text_classification"] = "text_classification"
    data: str
    data_config: str | None = None
    data_revision: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    validation_share: float = Field(0.1, gt=0, lt=1)
    test_share: float = Field(0.1, gt=0, lt=1)
    split_seed: int = 0
    columns: tuple[str, ...] | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    label_map: dict[str, str] | None = None
    max_length: int = Field(128, ge=4)
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    drop_leaks: bool = True

    _balanced: list[float] | None = PrivateAttr(None)

    @field_validator("label_map", mode="before")
    @classmethod
    def _text_keys(cls, value: Any) -> Any:
        """YAML reads `0: negative` with a number for a key."""
        if not isinstance(value, Mapping):
            return value
        return {cell_text(key): name for key, name in value.items()}

    def load(self) -> dict[Split, Rows]:
        problems: list[str] = []
        tables = read_splits(
            self.data,
            problems,
            names={"train": self.train, "validation": self.validation, "test": self.test},
            data_config=self.data_config,
            data_revision=self.data_revision,
            columns=self.columns,
        )
        for split, table in tables.items():
            needed = self._needed_columns()
            found = missing_columns(table, needed) or empty_cells(table, needed.values())
            problems += found or self._table_problems(split, table)
        raise_if(problems)
        parts = self._with_all_splits({s: self._labelled(s, t) for s, t in tables.items()})
        parts, notes = self._without_leaks(parts)
        names = self._class_names(parts["train"])
        raise_if(self._label_problems(parts, names))
        return {split: _rows(part, split, names, notes[split]) for split, part in parts.items()}

    def label_names(self, rows: dict[Split, Rows]) -> list[str]:
        return list(rows["train"].label_names)

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        sentences = [[text[part] for text in rows.texts] for part in range(len(rows.texts[0]))]
        limit = min(self.max_length, tokenizer.model_max_length)
        tokens = tokenizer(*sentences, truncation=True, max_length=limit)
        columns = {
            name: [np.array(values, dtype=np.int64) for values in tokens[name]] for name in tokens
        }
        return Encoded(
            ids=rows.ids,
            features=[
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ],
            labels=None if rows.labels is None else np.array(rows.labels, dtype=np.int64),
            padding={"input_ids": tokenizer.pad_token_id or 0},
        )

    def collate(
        self, encoded: Encoded, indices: Sequence[int], *, length: int | None = None
    ) -> dict[str, np.ndarray]:
        return collate(encoded, indices, length=length)

    def logits(self, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[batch, classes]"""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return model(**inputs).logits

    def loss(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Cross entropy, a mean over rows: class weights scale a row, never the count of rows."""
        from torch.nn import functional as F

        labels = batch["labels"]
        if self.class_weights is None:
            return F.cross_entropy(logits, labels)
        given = {"weights": np.array(self._weights(), "f4")}
        weights = to_device(given, logits.device)["weights"].to(logits.dtype)
        return F.cross_entropy(logits, labels, weight=weights, reduction="sum") / len(labels)

    def distillation_loss(
        self,
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        batch: dict[str, torch.Tensor],
        *,
        temperature: float,
    ) -> torch.Tensor:
        from torch.nn import functional as F

        student = F.log_softmax(logits.float() / temperature, dim=-1)
        teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
        divergence = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
        return divergence * temperature**2

    def records(
        self, logits: np.ndarray, batch: dict[str, np.ndarray], ids: Sequence[str]
    ) -> list[Record]:
        return [
            {"id": id, "logits": scores, "label": label}
            for id, scores, label in zip(
                ids, logits.tolist(), batch["labels"].tolist(), strict=True
            )
        ]

    def metrics(
        self, records: Sequence[Record], dense: Sequence[Record] | None = None
    ) -> dict[str, Estimate]:
        labels, predicted = _answers(records)
        scores = {
            "accuracy": wilson(int((labels == predicted).sum()), len(records)),
            **_class_scores(labels, predicted),
        }
        if dense is not None:
            _, reference = _answers(matched(records, dense))
            scores["agreement"] = wilson(int((predicted == reference).sum()), len(records))
        return scores

    def paired_difference(self, records: Sequence[Record], other: Sequence[Record]) -> Estimate:
        labels, predicted = _answers(records)
        _, others = _answers(matched(records, other))
        return mean_difference(1.0 * (predicted == labels) - 1.0 * (others == labels))

    # -- reading and checking --------------------------------------------------------------------

    def _needed_columns(self) -> dict[str, str]:
        """Option -> the column it names."""
        needed = {"text_column": self.text_column, "label_column": self.label_column}
        if self.text_pair_column is not None:
            needed["text_pair_column"] = self.text_pair_column
        return needed

    def _text_columns(self) -> list[str]:
        return [self.text_column] + ([self.text_pair_column] if self.text_pair_column else [])

    def _table_problems(self, split: Split, table: Table) -> list[str]:
        """What is wrong with the labels of one table."""
        wrong = not_labels(table, self.label_column) if split == "train" else []
        return wrong or self._map_problems(split, table)

    def _map_problems(self, split: Split, table: Table) -> list[str]:
        """Where `label_map` and the labels of a table do not match."""
        if self.label_map is None:
            return []
        found = set(table.texts(self.label_column))
        problems = [
            f"task.label_map has no name for the label `{label}` of {table.name}"
            f"{nearest(label, self.label_map)}"
            for label in sorted(found - set(self.label_map))
        ]
        if split == "train":
            problems += [
                f"task.label_map names `{label}`, which {table.name} does not have"
                f"{nearest(label, found)}"
                for label in self.label_map
                if label not in found
            ]
        return few(problems)

    def _labelled(self, split: Split, table: Table) -> Labelled:
        labels = table.texts(self.label_column)
        texts = list(zip(*(table.texts(column) for column in self._text_columns()), strict=True))
        if self.label_map is not None:
            labels = [self.label_map[label] for label in labels]
        return Labelled(
            ids=[f"{split}-{row}" for row in range(len(labels))], texts=texts, labels=labels
        )

    def _with_all_splits(self, parts: dict[Split, Labelled]) -> dict[Split, Labelled]:
        """Cut off train what was not given."""
        shares: dict[Split, float] = {"test": self.test_share, "validation": self.validation_share}
        wanted = {split: share for split, share in shares.items() if split not in parts}
        cut = _stratified(parts["train"].labels, wanted, seed=self.split_seed)
        empty = [split for split, rows in cut.items() if not rows]
        raise_if(
            [
                f"train has too few rows ({len(parts['train'].ids)}) to cut off a {split} split;"
                f" name a file in task.{split}."
                for split in empty
            ]
        )
        whole = {**parts, **{split: parts["train"].take(rows) for split, rows in cut.items()}}
        return {split: whole[split] for split in ("train", "validation", "test")}

    def _without_leaks(
        self, parts: dict[Split, Labelled]
    ) -> tuple[dict[Split, Labelled], dict[Split, tuple[str, ...]]]:
        """Train without the texts of the other splits, and what each split shares with others."""
        texts = {split: set(part.texts) for split, part in parts.items()}
        held_out = texts["validation"] | texts["test"]
        train = parts["train"]
        kept = [row for row, text in enumerate(train.texts) if text not in held_out]
        leaks = len(train.texts) - len(kept)
        notes: dict[Split, tuple[str, ...]] = {"train": (), "validation": (), "test": ()}
        if leaks:
            what = "dropped" if self.drop_leaks else "kept (task.drop_leaks: false)"
            notes["train"] = (f"{leaks} rows of train are in validation or test too: {what}",)
        shared = len(texts["validation"] & texts["test"])
        if shared:
            notes["test"] = (f"validation and test share {shared} texts",)
        if self.drop_leaks and leaks:
            parts = {**parts, "train": train.take(kept)}
        return parts, notes

    def _class_names(self, train: Labelled) -> list[str]:
        """Class names in index order; numbers are ordered as numbers."""
        found = set(train.labels)
        if self.label_map is not None:
            return [name for name in dict.fromkeys(self.label_map.values()) if name in found]
        if all(name.isdecimal() for name in found):
            return sorted(found, key=int)
        return sorted(found)

    def _label_problems(self, parts: Mapping[Split, Labelled], names: Sequence[str]) -> list[str]:
        """What is wrong with the classes as a whole."""
        problems = []
        if len(names) < 2:
            found = f"the one class `{names[0]}`" if names else "no rows left"
            problems.append(f"train has {found}; a classifier needs at least two classes.")
        for split, part in parts.items():
            unknown = Counter(label for label in part.labels if label not in set(names))
            problems += few(
                [
                    f"{split} has the label `{label}` in {count} of {len(part.labels)} rows, which"
                    " train does not have"
                    f"{nearest(label, names)}"
                    for label, count in sorted(unknown.items())
                ]
            )
        if isinstance(self.class_weights, tuple) and len(self.class_weights) != len(names):
            problems.append(
                f"task.class_weights has {len(self.class_weights)} weights for {len(names)} classes"
                f" ({', '.join(names)})."
            )
        return problems

    def _weights(self) -> list[float]:
        """Loss weights in class order; balanced ones are read off the training data, once."""
        if isinstance(self.class_weights, tuple):
            return list(self.class_weights)
        if self._balanced is None:
            rows = self.load()["train"]
            counts = np.bincount(np.array(rows.labels), minlength=len(rows.label_names))
            self._balanced = (counts.sum() / (len(counts) * counts)).tolist()
        return self._balanced


def _rows(part: Labelled, split: Split, names: Sequence[str], notes: tuple[str, ...]) -> Rows:
    index = {name: number for number, name in enumerate(names)}
    return Rows(
        ids=part.ids,
        texts=part.texts,
        labels=[index[label] for label in part.labels],
        split=split,
        label_names=tuple(names),
        notes=notes,
    )


def _stratified(
    labels: Sequence[str], shares: Mapping[Split, float], *, seed: int
) -> dict[Split, list[int]]:
    """Row indices by split: each class gives its share to each, the rest is train."""
    rng = np.random.default_rng(seed)
    cut: dict[Split, list[int]] = {split: [] for split in ("train", *shares)}
    kinds = np.array(labels)
    for kind in dict.fromkeys(labels):
        rows = rng.permutation(np.flatnonzero(kinds == kind)).tolist()
        for split, share in shares.items():
            count = round(share * (kinds == kind).sum())
            cut[split] += rows[:count]
            rows = rows[count:]
        cut["train"] += rows
    return {split: sorted(rows) for split, rows in cut.items()}


def _answers(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions, [rows] each."""
    if not records:
        raise ValueError("metrics need at least one record, got none")
    labels = np.array([record["label"] for record in records])
    return labels, np.array([record["logits"] for record in records]).argmax(-1)


def _class_scores(labels: np.ndarray, predicted: np.ndarray) -> dict[str, Estimate]:
    """Macro F1 and the accuracy of the worst class, by bootstrap over rows.

    Rows with the same label and prediction count as one kind. A class that does not occur in a
    sample has no score there.
    """
    kinds, counts = np.unique(np.stack([labels, predicted]), axis=1, return_counts=True)
    classes = np.unique(kinds)[:, None]
    is_label, is_predicted = kinds[0] == classes, kinds[1] == classes  # [classes, kinds]

    def scores(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        right = counts @ (is_label & is_predicted).T
        actual, claimed = counts @ is_label.T, counts @ is_predicted.T
        with np.errstate(invalid="ignore"):
            return (
                np.nanmean(2 * right / (actual + claimed), axis=-1),
                np.nanmin(right / actual, axis=-1),
            )

    values, resampled = scores(counts), scores(resample(counts))
    return {
        name: percentile_interval(value, draws)
        for name, value, draws in zip(
            ("f1", "worst_class_accuracy"), values, resampled, strict=True
        )
    }
