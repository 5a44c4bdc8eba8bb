"""ON what a model is tuned and scored. One file a task; this file holds the contract and the catalog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]
Kind = Literal["encoder", "decoder", "encoder_decoder"]
Record = dict[str, Any]
Estimate = tuple[float, float, float]  # value, low, high of its 95 % interval


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One split as text: `texts[i]` is a sentence, a pair of sentences or a document; `labels[i]` its class.

    `notes` are sentences a reader must know: rows dropped, rows that two splits share.
    """

    ids: Sequence[str]
    texts: Sequence[tuple[str, ...]]
    labels: Sequence[int] | None = None
    split: Split = "train"
    label_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One split as tokens. `features[i]` maps a model input's name to an integer vector [length_i].

    Where every position has an answer of its own, `features[i]["labels"]` holds them, and `labels`
    is None. `padding` is what fills up an input, 0 for those it does not name.
    """

    ids: Sequence[str]
    features: Sequence[dict[str, np.ndarray]]
    labels: np.ndarray | None = None  # [rows]
    padding: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)


class Task(Protocol):
    """A frozen pydantic class; its fields are the options of the recipe's `task` section.

    Nothing here imports torch until a method that takes a model is called.
    """

    kind: ClassVar[Kind]
    quality: ClassVar[str]  # the metric that limits and comparisons mean by default
    comparable_vocabulary: ClassVar[bool]  # whether `quality` compares models of two vocabularies

    @property
    def name(self) -> str: ...

    def load(self) -> dict[Split, Rows]:
        """Read and check the data. Raises `BadInput` with every problem found."""

    def label_names(self, rows: dict[Split, Rows]) -> list[str]:
        """Class names in index order, empty where the task has none."""

    def auto_class(self) -> Any:
        """The transformers Auto class that loads a model for this task."""

    def encode(self, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Encoded: ...

    def collate(
        self, encoded: Encoded, indices: Sequence[int], *, length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Arrays [batch, length] of int64, padded to the longest row or to `length`; `labels` beside them.

        `labels` are what the logits of the same place should say (a decoder's are already one token
        ahead), -100 where nothing is asked; the losses are means over the others.
        """

    def logits(self, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The model's raw scores for a batch (its `labels` are not passed on)."""

    def loss(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss, a scalar."""

    def distillation_loss(
        self,
        logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        batch: dict[str, torch.Tensor],
        *,
        temperature: float,
    ) -> torch.Tensor:
        """Hinton et al. 2015: T² KL(teacher ‖ student), a mean over what `loss` is a mean over."""

    def records(
        self, logits: np.ndarray, batch: dict[str, np.ndarray], ids: Sequence[str]
    ) -> list[Record]:
        """What one served batch said about each row: JSON values that `metrics` needs, {"id": …, …}."""

    def metrics(
        self, records: Sequence[Record], dense: Sequence[Record] | None = None
    ) -> dict[str, Estimate]:
        """Scores with their intervals; `dense` are the dense model's records of the same rows (for `agreement`)."""

    def paired_difference(self, records: Sequence[Record], other: Sequence[Record]) -> Estimate:
        """Difference of `quality`, records minus other, over the same rows, by paired bootstrap."""


from orchestrator.tasks.causal_lm import CausalLm  # noqa: E402 (they need the contract above)
from orchestrator.tasks.text_classification import TextClassification  # noqa: E402

TASKS: dict[str, type[Task]] = {
    "text_classification": TextClassification,
    "causal_lm": CausalLm,
}
