"""Scores of a served artifact: the session answers batches exactly as the target would send them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from orchestrator.runtimes import Session, Target
from orchestrator.tasks import Encoded, Record, Task


def served_batches(
    task: Task, encoded: Encoded, target: Target, *, max_length: int, rows: int | None = None
) -> list[tuple[list[int], dict[str, np.ndarray]]]:
    """The first `rows` rows (all by default) in their own order, at the target's batch and padding."""
    count = len(encoded) if rows is None else min(rows, len(encoded))
    length = max_length if target.padding == "max_length" else None
    batches = []
    for start in range(0, count, target.batch_size):
        indices = list(range(start, min(start + target.batch_size, count)))
        batches.append((indices, task.collate(encoded, indices, length=length)))
    return batches


def inputs_of(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch without its labels: what a client would send."""
    return {name: value for name, value in batch.items() if name != "labels"}


def served_records(
    session: Session, task: Task, encoded: Encoded, target: Target, *, max_length: int
) -> list[Record]:
    """What the artifact says about every row, at the target's batch and padding."""
    records: list[Record] = []
    for indices, batch in served_batches(task, encoded, target, max_length=max_length):
        ids = [encoded.ids[index] for index in indices]
        records += task.records(session.run(inputs_of(batch)), batch, ids)
    return records


def largest_difference(
    trained: Callable[[dict[str, np.ndarray]], np.ndarray],
    session: Session,
    batches: Sequence[dict[str, np.ndarray]],
) -> dict[str, Any]:
    """How far served logits are from trained ones on the same batches, beside the logits' spread.

    A decoder's padded positions are nobody's answer and do not count.
    """
    worst, spread = 0.0, 0.0
    for batch in batches:
        logits, served = trained(batch), session.run(inputs_of(batch))
        if logits.ndim == 3:  # [batch, length, vocabulary]
            real = batch["attention_mask"].astype(bool)
            logits, served = logits[real], served[real]
        worst = max(worst, float(np.abs(served - logits).max()))
        spread = max(spread, float(logits.std()))
    rows = sum(len(batch["input_ids"]) for batch in batches)
    return {"max_difference": worst, "logits_std": spread, "num_inputs": rows}
