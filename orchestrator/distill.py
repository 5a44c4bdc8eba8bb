"""Distillation: the dense baseline as the teacher of a trial, by its answers and by its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field

from orchestrator.predict import answers_of, to_device
from orchestrator.ranks import Ranks
from orchestrator.trial import Frozen

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from orchestrator.predict import Batch
    from orchestrator.tasks import Encoded, Task

    Teacher = Callable[[np.ndarray, Batch], torch.Tensor]


class Distillation(Frozen):
    """loss = alpha · distillation + (1 - alpha) · task + hidden · distance.

    Distillation is Hinton et al. 2015 (arXiv:1503.02531). The distance is that of hidden states,
    layer by layer as in Jiao et al. 2020 (TinyBERT, arXiv:1909.10351): each layer that is left
    beside the dense layer it was, as a share of the variance over the dense layer's positions.
    """

    alpha: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(2.0, gt=0)
    hidden: float = Field(0.0, ge=0)


# -- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedTeacher:
    """Logits [rows, classes] that were computed before training."""

    logits: np.ndarray

    def __call__(self, indices: np.ndarray, batch: Batch) -> torch.Tensor:
        device = next(iter(batch.values())).device
        return to_device({"logits": self.logits[indices]}, device)["logits"]


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that answers while the student trains; `model` is on the student's device.

    `encoded` are the rows in the teacher's own tokens, where the student may have others.
    """

    model: PreTrainedModel
    task: Task
    encoded: Encoded | None = None

    def __call__(self, indices: np.ndarray, batch: Batch) -> torch.Tensor:
        import torch

        if self.encoded is not None:
            arrays = self.task.collate(self.encoded, indices.tolist())
            batch = to_device(arrays, next(iter(batch.values())).device)
        self.model.eval()
        with torch.no_grad():
            return self.task.logits(self.model, batch)


def cached_teacher(
    model: PreTrainedModel, task: Task, encoded: Encoded, device: str, *, batch_size: int = 64
) -> CachedTeacher:
    """A teacher that has answered every row of `encoded` once; for tasks with one answer a row."""
    logits: list[Any] = [None] * len(encoded)
    for indices, answers, _ in answers_of(model, task, encoded, batch_size, device):
        assert answers.ndim == 2, "a row has more than one answer: use a LiveTeacher"
        for index, answer in zip(indices, answers, strict=True):
            logits[index] = answer
    return CachedTeacher(np.stack(logits))


# -- layers --------------------------------------------------------------------------------------


class HiddenDistance:
    """How far the outputs of a student's layers are from those of the teacher's, pair by pair.

    Inside `with`, a call speaks of the last forward pass of both since it was told to `listen`.
    `aligned` [rows] says in which rows the two read the same number of tokens; the others do not
    count. Where `ranks` split a batch, what each adds is relative to the spread over all of their
    rows.
    """

    ranks = Ranks()

    def __init__(
        self,
        student: Sequence[nn.Module],
        teacher: Sequence[nn.Module],
        *,
        aligned: np.ndarray | None = None,
    ) -> None:
        assert len(student) == len(teacher)
        self._sides = (student, teacher)
        self._aligned = aligned
        self._outputs: dict[nn.Module, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._listens = True

    def listen(self) -> None:
        """To the next forward pass; a backward pass that computes layers again is not one."""
        self._listens = True

    def __enter__(self) -> Self:
        for layer in (layer for side in self._sides for layer in side):
            self._hooks.append(layer.register_forward_hook(self._keep))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._outputs.clear()

    def __call__(
        self, indices: np.ndarray, batch: Batch, *, is_spare: bool = False
    ) -> torch.Tensor:
        """The mean over pairs of |student - teacher|² ÷ |teacher - its mean|², a scalar.

        A batch that is spare adds nothing. It listens no more.
        """
        import torch

        counted = torch.ones_like(batch["input_ids"], dtype=torch.float32)
        if "attention_mask" in batch:
            counted = counted * batch["attention_mask"]
        if self._aligned is not None:
            aligned = {"aligned": self._aligned[indices, None]}
            counted = counted * to_device(aligned, counted.device)["aligned"]
        pairs = [
            tuple(self._outputs[layer] for layer in pair) for pair in zip(*self._sides, strict=True)
        ]
        self._listens = False
        self._outputs.clear()
        if is_spare:
            counted = torch.zeros_like(counted)
        return torch.stack([_distance(*pair, counted, self.ranks) for pair in pairs]).mean()

    def _keep(self, layer: nn.Module, _: object, output: Any) -> None:
        if self._listens:
            self._outputs[layer] = output[0] if isinstance(output, tuple) else output


def _distance(
    student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor, ranks: Ranks
) -> torch.Tensor:
    """For hidden states [rows, length, width]; `counted` [rows, length] is 1 where they count.

    Rows that count are no longer than the shorter of two paddings.
    """
    length = min(student.shape[1], teacher.shape[1])
    weight = counted[:, :length, None]
    student, teacher = student[:, :length].float(), teacher[:, :length].float()
    mean = ranks.total((teacher * weight).sum((0, 1))) / ranks.total(weight.sum()).clamp(min=1)
    spread = ranks.total(((teacher - mean).square() * weight).sum())
    return ((student - teacher).square() * weight).sum() / spread.clamp(min=1e-9)
