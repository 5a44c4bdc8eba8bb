"""A sequence-to-sequence task of a user's own, small enough for a test: say a sentence backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.nn import functional as F

from orchestrator.tasks import Encoded, Estimate, Record, Rows, Split
from orchestrator.tasks.data import collate
from orchestrator.tasks.statistics import matched, percentile_interval, resample, wilson
from orchestrator.trial import Frozen


class Reversal(Frozen):
    """The tokens of each sentence, in reverse order; `copies` sentences a split."""

    kind: ClassVar[str] = "encoder_decoder"
    quality: ClassVar[str] = "token_accuracy"
    comparable_vocabulary: ClassVar[bool] = False

    name: Literal["tiny_seq2seq:Reversal"] = "tiny_seq2seq:Reversal"
    sentences: tuple[str, ...]
    copies: int = 2

    def load(self) -> dict[Split, Rows]:
        texts = [(text,) for text in self.sentences] * self.copies
        ids = [str(number) for number in range(len(texts))]
        return {s: Rows(ids=ids, texts=texts, split=s) for s in ("train", "validation", "test")}

    def label_names(self, rows: dict[Split, Rows]) -> list[str]:
        return []

    def auto_class(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def encode(self, rows: Rows, tokenizer: Any) -> Encoded:
        tokens = [np.array(tokenizer(text)["input_ids"][:12]) for (text,) in rows.texts]
        features = [
            {"input_ids": row, "attention_mask": np.ones_like(row), "labels": row[::-1][:-1]}
            for row in tokens
        ]
        return Encoded(ids=rows.ids, features=features)

    def collate(
        self, encoded: Encoded, indices: Sequence[int], *, length: int | None = None
    ) -> dict[str, np.ndarray]:
        batch = collate(encoded, indices, length=length)
        shifted = np.roll(np.maximum(batch["labels"], 0), 1, axis=1)
        shifted[:, 0] = 0
        return {**batch, "decoder_input_ids": shifted}

    def logits(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits

    def loss(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def distillation_loss(
        self,
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        batch: dict[str, torch.Tensor],
        *,
        temperature: float,
    ) -> torch.Tensor:
        student, teacher = (x / temperature for x in (logits, teacher_logits))
        return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")

    def records(
        self, logits: np.ndarray, batch: dict[str, np.ndarray], ids: Sequence[str]
    ) -> list[Record]:
        asked = batch["labels"] != -100
        right = (logits.argmax(-1) == batch["labels"]) & asked
        return [
            {"id": id, "right": int(hits), "num_tokens": int(count)}
            for id, hits, count in zip(ids, right.sum(-1), asked.sum(-1), strict=True)
        ]

    def metrics(
        self, records: Sequence[Record], dense: Sequence[Record] | None = None
    ) -> dict[str, Estimate]:
        totals = (sum(record[key] for record in records) for key in ("right", "num_tokens"))
        return {"token_accuracy": wilson(*totals)}

    def paired_difference(self, records: Sequence[Record], other: Sequence[Record]) -> Estimate:
        rows, others = (_totals(found) for found in (records, matched(records, other)))
        counts = resample(np.ones(len(rows), dtype=int))
        value = _share(rows.sum(0)) - _share(others.sum(0))
        return percentile_interval(value, _share(counts @ rows) - _share(counts @ others))


def _totals(records: Sequence[Record]) -> np.ndarray:
    """Right tokens and all tokens of each row: [rows, 2]."""
    return np.array([(record["right"], record["num_tokens"]) for record in records], dtype=float)


def _share(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]
