"""What a torch model says about the rows of a split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from orchestrator.tasks import Encoded, Record, Task

    Batch = dict[str, torch.Tensor]


def predict(
    model: PreTrainedModel, task: Task, encoded: Encoded, *, batch_size: int, device: str
) -> list[Record]:
    """The records of every row, in order. Leaves the model in evaluation mode."""
    records: list[Any] = [None] * len(encoded)
    for indices, logits, batch in answers_of(model, task, encoded, batch_size, device):
        ids = [encoded.ids[index] for index in indices]
        for index, record in zip(indices, task.records(logits, batch, ids), strict=True):
            records[index] = record
    return records


def answers_of(
    model: PreTrainedModel, task: Task, encoded: Encoded, batch_size: int, device: str
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """(row indices, logits as float32, batch), longest rows first, so that little is padding."""
    import torch

    model.to(device).eval()
    order = np.argsort(-row_lengths(encoded), kind="stable")
    for at in range(0, len(order), batch_size):
        indices = order[at : at + batch_size]
        arrays = task.collate(encoded, indices.tolist())
        with torch.no_grad():
            logits = task.logits(model, to_device(arrays, device))
        yield indices, logits.float().cpu().numpy(), arrays


def row_lengths(encoded: Encoded) -> np.ndarray:
    """Tokens of each row, [rows]."""
    return np.array([len(row["input_ids"]) for row in encoded.features])


def to_device(arrays: dict[str, np.ndarray], device: torch.device | str) -> Batch:
    """The arrays as tensors there; nobody waits for the copy."""
    import torch

    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if torch.device(device).type == "cuda":  # a GPU reads by itself only what cannot be swapped out
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
