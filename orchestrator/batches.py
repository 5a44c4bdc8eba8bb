"""Which rows a step trains on, in what order, and which rank of a gang takes which of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.ranks import Ranks

if TYPE_CHECKING:
    from orchestrator.tasks import Encoded, Task

    Arrays = dict[str, np.ndarray]

POOL = 50  # batches that are sorted by length together


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank sees: row `indices` and what the task made of them.

    `share` is that of the whole step's labels which are in it: the step's loss is the sum of the
    ranks' mean losses, each times its share. A rank that has no row left repeats one at a share
    of 0, so that all ranks make the same calls. `batch_share` is that of the batch which the
    ranks have split among them.
    """

    indices: np.ndarray
    arrays: Arrays
    share: float
    batch_share: float


def num_calls(accumulation: int, ranks: Ranks, pieces: int = 1) -> int:
    """Forward passes of each rank in a step of `accumulation` batches.

    Ranks take whole batches where these can be dealt out evenly, and else rows of each batch. What
    a rank takes of a batch it takes in `pieces`, where memory is short.
    """
    batches = accumulation if splits_batches(accumulation, ranks) else accumulation // ranks.size
    return batches * pieces


def splits_batches(accumulation: int, ranks: Ranks) -> bool:
    return accumulation % ranks.size != 0


def micro_batches(
    task: Task,
    encoded: Encoded,
    lengths: np.ndarray,
    *,
    batch_size: int,
    by_length: bool,
    seed: int,
    begin: int = 0,
) -> Iterator[tuple[np.ndarray, Arrays]]:
    """Row indices and arrays of one batch after the other, epoch after epoch without end.

    The first `begin` are left out.
    """
    every = _batches_without_end(lengths, batch_size, by_length=by_length, seed=seed)
    for indices in itertools.islice(every, begin, None):
        yield indices, task.collate(encoded, indices.tolist())


def dealt_out(
    batches: Iterator[tuple[np.ndarray, Arrays]], ranks: Ranks, pieces: int = 1
) -> list[MicroBatch]:
    """What this rank does of a step over `batches`."""
    whole = _taken(list(batches), ranks)
    if pieces == 1:
        return whole
    return [piece for micro in whole for piece in _in_pieces(micro, pieces)]


def _taken(found: list[tuple[np.ndarray, Arrays]], ranks: Ranks) -> list[MicroBatch]:
    counts = [_num_labels(arrays) for _, arrays in found]
    total = max(1, sum(counts))
    if not splits_batches(len(found), ranks):
        return [
            MicroBatch(*found[at], counts[at] / total, counts[at] / total)
            for at in range(ranks.rank, len(found), ranks.size)
        ]
    return [
        _rows_of(*batch, count / total, total, ranks)
        for batch, count in zip(found, counts, strict=True)
    ]


def _rows_of(
    indices: np.ndarray, arrays: Arrays, batch_share: float, total: int, ranks: Ranks
) -> MicroBatch:
    """Every `size`-th row, padded as the whole batch is: what is served in one call stays so."""
    rows = slice(ranks.rank, None, ranks.size)
    is_spare = ranks.rank >= len(indices)
    if is_spare:
        rows = slice(0, 1)
    own = {name: np.ascontiguousarray(array[rows]) for name, array in arrays.items()}
    share = 0.0 if is_spare else _num_labels(own) / total
    return MicroBatch(indices[rows], own, share, batch_share)


def _in_pieces(micro: MicroBatch, pieces: int) -> Iterator[MicroBatch]:
    """Some of its rows at a time; where there are too few, one of them again at no share."""
    num_labels = max(1, _num_labels(micro.arrays))
    for piece in range(pieces):
        is_spare = piece >= len(micro.indices)
        rows = slice(0, 1) if is_spare else slice(piece, None, pieces)
        own = {name: np.ascontiguousarray(array[rows]) for name, array in micro.arrays.items()}
        share = 0.0 if is_spare else micro.share * _num_labels(own) / num_labels
        yield MicroBatch(micro.indices[rows], own, share, micro.batch_share)


def _num_labels(arrays: Arrays) -> int:
    return int(np.count_nonzero(arrays["labels"] != -100))


def _batches_without_end(
    lengths: np.ndarray, batch_size: int, *, by_length: bool, seed: int
) -> Iterator[np.ndarray]:
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, epoch])
        yield from epoch_batches(lengths, batch_size, rng, by_length=by_length)


def epoch_batches(
    lengths: np.ndarray, batch_size: int, rng: np.random.Generator, *, by_length: bool
) -> list[np.ndarray]:
    """Every row once, in random order; `by_length` sorts within pools of 50 batches first."""
    order = rng.permutation(len(lengths))
    if by_length:
        pools = [
            order[at : at + POOL * batch_size] for at in range(0, len(order), POOL * batch_size)
        ]
        order = np.concatenate([pool[np.argsort(-lengths[pool], kind="stable")] for pool in pools])
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    if by_length:
        batches = [batches[place] for place in rng.permutation(len(batches))]
    return batches
