"""Scores of a served artifact: the session answers batches exactly as the target would send them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.runtimes import Session, Target
from orchestrator.tasks import Encoded, Record, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GREEDY_TOKENS = 64


def served_batches(
    task: Task, encoded: Encoded, target: Target, *, length: int | None, rows: int | None = None
) -> list[tuple[list[int], dict[str, np.ndarray]]]:
    """The first `rows` rows (all by default) in their own order, at the target's batch size.

    They are padded to `length`, or to the longest of each batch.
    """
    count = len(encoded) if rows is None else min(rows, len(encoded))
    batches = []
    for start in range(0, count, target.batch_size):
        indices = list(range(start, min(start + target.batch_size, count)))
        batches.append((indices, task.collate(encoded, indices, length=length)))
    return batches


def inputs_of(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch without its labels: what a client would send."""
    return {name: value for name, value in batch.items() if name != "labels"}


def served_records(
    session: Session, task: Task, encoded: Encoded, target: Target, *, length: int | None
) -> list[Record]:
    """What the artifact says about every row, at the target's batch and padding."""
    records: list[Record] = []
    for indices, batch in served_batches(task, encoded, target, length=length):
        ids = [encoded.ids[index] for index in indices]
        records += task.records(session.run(inputs_of(batch)), batch, ids)
    return records


def served_difference(
    trained: Callable[[dict[str, np.ndarray]], np.ndarray],
    session: Session,
    batches: Sequence[dict[str, np.ndarray]],
) -> dict[str, Any]:
    """How far served logits are from trained ones on the same batches, beside the logits' spread.

    `median_difference` is over the batches' own largest: it tells numerics that differ from a
    rounding that fell the other way in a few of them, which `max_difference` shows. Positions at
    which nothing is asked, such as padding, do not count.
    """
    differences, spread = [], 0.0
    for batch in batches:
        logits, served = trained(batch), session.run(inputs_of(batch))
        if logits.ndim == 3:  # [batch, length, vocabulary]
            asked = batch["labels"] != -100
            logits, served = logits[asked], served[asked]
        differences.append(float(np.abs(served - logits).max()))
        spread = max(spread, float(logits.std()))
    return {
        "max_difference": max(differences),
        "median_difference": float(np.median(differences)),
        "logits_std": spread,
        "num_inputs": sum(len(batch["input_ids"]) for batch in batches),
    }


def num_equal_tokens(session: Session, model: PreTrainedModel, prompt: np.ndarray) -> int:
    """How many of the first 64 greedy tokens after a prompt [1, length] a model in torch agrees on.

    Fewer than 64 are asked for where the model has learned fewer positions.
    """
    from orchestrator.base_model import num_positions
    from orchestrator.runtimes.torch_artifact import TorchSession

    positions = num_positions(model) or prompt.shape[1] + GREEDY_TOKENS
    count = min(GREEDY_TOKENS, positions - prompt.shape[1])
    found = greedy(session, prompt, count)
    expected = greedy(TorchSession(model, device="cpu"), prompt, count)
    pairs = zip(found, expected, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), count)


def greedy(session: Session, prompt: np.ndarray, count: int) -> list[int]:
    """The `count` likeliest tokens after a prompt [1, length], one after the other."""
    logits, cache = session.prefill(prompt)
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        logits, cache = session.decode(np.array([[tokens[-1]]]), cache)
        tokens.append(int(logits.argmax()))
    return tokens
