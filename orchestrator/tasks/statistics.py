"""95 % intervals: Wilson's for a share, the percentile bootstrap for everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from orchestrator.tasks import Estimate, Record

NUM_RESAMPLES = 1000
SEED = 0
Z_95 = 1.959963984540054


def wilson(successes: int, count: int) -> Estimate:
    """A share with its score interval (Wilson 1927), which holds near 0 and 1 and for few rows."""
    share, z2 = successes / count, Z_95**2 / count
    center = (share + z2 / 2) / (1 + z2)
    half = Z_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return share, max(0.0, center - half), min(1.0, center + half)


def resample(counts: np.ndarray) -> np.ndarray:
    """How often each kind of row occurs in each of 1,000 bootstrap samples: [resamples, kinds].

    `counts` [kinds] says how often it occurs in the data. Drawing kinds by a multinomial is the
    same as drawing rows with replacement, at a cost that does not grow with equal rows.
    """
    rng = np.random.default_rng(SEED)
    return rng.multinomial(counts.sum(), counts / counts.sum(), size=NUM_RESAMPLES)


def percentile_interval(value: float | np.ndarray, resampled: np.ndarray) -> Estimate:
    """`value` with the central 95 % of its resampled values [resamples]."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(value), float(low), float(high)


def mean_difference(differences: np.ndarray) -> Estimate:
    """The mean of paired differences [rows] with its bootstrap interval over rows."""
    values, counts = np.unique(differences, return_counts=True)
    return percentile_interval(differences.mean(), resample(counts) @ values / len(differences))


def matched(records: Sequence[Record], other: Sequence[Record]) -> list[Record]:
    """`other` in the order of `records`. Raises ValueError unless both hold the same rows."""
    by_id = {record["id"]: record for record in other}
    if len(by_id) != len(records) or any(record["id"] not in by_id for record in records):
        raise ValueError(
            f"paired scores need the same rows in both, got {len(records)} and {len(by_id)} rows"
            f" of which {sum(record['id'] in by_id for record in records)} are in both"
        )
    return [by_id[record["id"]] for record in records]
