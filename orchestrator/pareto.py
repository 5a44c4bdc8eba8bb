"""Which points are worth having: dominance, front, hypervolume, knee, selection.

Metrics are turned once, by `normalise`, into an array [points, objectives] that is minimised;
everything below it knows nothing of directions. A value that is missing or not finite never
helps a point: such points are on no front and add no volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from orchestrator.trial import Frozen

Metrics = Mapping[str, float]
Points = NDArray[np.float64]  # [points, objectives], to be minimised
Indices = NDArray[np.intp]

WORST_COST = 1.1  # where nothing counts any more, in units of the dense model: costs,
WORST_SCORE = 0.5  # qualities that are maximised,
WORST_PERPLEXITY = 2.0  # and the one that is minimised


class Objective(Frozen):
    """A metric, the direction in which it is better, and limits that a point has to keep."""

    name: str
    direction: Literal["min", "max"]
    max: float | None = None
    min: float | None = None

    def allows(self, value: float) -> bool:
        """Whether `value` keeps the limits; a value that is not a number keeps none."""
        over = self.max is not None and not value <= self.max
        under = self.min is not None and not value >= self.min
        return not (over or under)


def normalise(values: Sequence[Metrics], objectives: Sequence[Objective]) -> Points:
    """Metrics as an array [points, objectives] to minimise; NaN where a metric is missing."""
    signs = [1.0 if objective.direction == "min" else -1.0 for objective in objectives]
    names = [objective.name for objective in objectives]
    rows = [[metrics.get(name, np.nan) for name in names] for metrics in values]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names)) * signs


def normalised_by_baseline(
    values: Sequence[Metrics], baseline: Metrics, objectives: Sequence[Objective]
) -> Points:
    """Like `normalise`, in units of the dense baseline, which itself comes out as 1 (or -1).

    Where the baseline is 0 (say its sparsity) the difference to it counts instead.
    """

    def relative(metrics: Metrics, name: str) -> float:
        dense = baseline[name]
        return 1.0 + (metrics.get(name, np.nan) - dense) / (abs(dense) or 1.0)

    names = [objective.name for objective in objectives]
    return normalise([{name: relative(m, name) for name in names} for m in values], objectives)


def reference_point(objectives: Sequence[Objective]) -> dict[str, float]:
    """The worst values that still count towards hypervolume, in units of the dense baseline.

    Costs may be 1.1 times dense; scores may halve and perplexity may double. It depends on no
    measurement, so hypervolumes of two runs compare; `normalise` turns it into an array.
    """

    def worst(objective: Objective) -> float:
        if objective.direction == "max":
            return WORST_SCORE
        return WORST_PERPLEXITY if objective.name == "perplexity" else WORST_COST

    return {objective.name: worst(objective) for objective in objectives}


def within_limits(metrics: Metrics, objectives: Sequence[Objective]) -> bool:
    """Whether a point keeps every limit of the objectives."""
    return all(o.allows(metrics.get(o.name, float("nan"))) for o in objectives)


def dominates(a: ArrayLike, b: ArrayLike) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    a, b = np.asarray(a), np.asarray(b)
    return bool(np.all(a <= b) and np.any(a < b))


def front(points: ArrayLike) -> Indices:
    """Indices of the points that no other dominates, in order; equal points are all kept."""
    points = np.asarray(points, dtype=np.float64)
    finite = _finite(points)
    return finite[_undominated(points[finite])]


def fronts_by_rank(points: ArrayLike) -> list[Indices]:
    """Non-dominated sorting (Goldberg 1989): the front, the front of what is left, and so on.

    Every point is in exactly one; infinite values rank like others, NaN counts as infinitely bad.
    """
    points = np.asarray(points, dtype=np.float64)
    points = np.where(np.isnan(points), np.inf, points)
    left = np.arange(len(points))
    fronts = []
    while len(left):
        best = _undominated(points[left])
        fronts.append(left[best])
        left = left[~best]
    return fronts


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Volume between the points and `reference` (Zitzler & Thiele 1998)."""
    points = np.asarray(points, dtype=np.float64)
    finite = _finite(points)
    return float(moocore.hypervolume(points[finite], ref=reference)) if len(finite) else 0.0


def exclusive_contribution(points: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    """How much hypervolume would be lost without each point; 0 for one of two equal points."""
    points = np.asarray(points, dtype=np.float64)
    finite = _finite(points)
    contribution = np.zeros(len(points))
    if len(finite):
        contribution[finite] = moocore.hv_contributions(
            points[finite], ref=reference, ignore_dominated=False
        )
    return contribution


def knee(points: ArrayLike) -> int:
    """Index of the point of the front that bulges most towards the ideal (Das 1999).

    Objectives are scaled to [0, 1] over the front; the plane goes through the best point of each
    objective, and the knee lies farthest below it. Where these points span no such plane (fewer
    points than objectives, one point best in two), the plane is sum = 1: the smallest sum wins.
    Raises ValueError when no point is finite.
    """
    points = np.asarray(points, dtype=np.float64)
    candidates = front(points)
    if not len(candidates):
        raise ValueError("a knee needs at least one point with finite objectives, got none")
    low, high = points[candidates].min(axis=0), points[candidates].max(axis=0)
    varies = high > low
    scaled = ((points[candidates] - low)[:, varies]) / (high - low)[varies]
    return int(candidates[np.argmin(scaled @ _plane(scaled))])


def select(
    points: Sequence[Metrics],
    objectives: Sequence[Objective],
    *,
    max: Mapping[str, float] | None = None,
    min: Mapping[str, float] | None = None,
) -> list[int]:
    """Indices of the points that keep the limits, the best in the first objective first.

    Limits may name any metric. Raises ValueError for one that no point has.
    """
    limits = [
        Objective(name=name, direction="min", max=value) for name, value in (max or {}).items()
    ]
    limits += [
        Objective(name=name, direction="max", min=value) for name, value in (min or {}).items()
    ]
    known = sorted({name for metrics in points for name in metrics})
    unknown = sorted({limit.name for limit in limits} - set(known))
    if unknown and points:
        raise ValueError(
            f"no point has a metric {', '.join(unknown)}; there are {', '.join(known)}"
        )
    kept = [i for i, metrics in enumerate(points) if within_limits(metrics, limits)]
    order = normalise(points, objectives)
    return sorted(kept, key=lambda i: tuple(order[i]))


def _finite(points: Points) -> Indices:
    """Indices of the rows without NaN or infinity."""
    assert points.ndim == 2, f"points are [points, objectives], got {points.shape=}"
    return np.flatnonzero(np.isfinite(points).all(axis=1))


def _undominated(points: Points) -> NDArray[np.bool_]:
    """Mask of the rows that no other row dominates."""
    if not len(points):
        return np.zeros(0, dtype=bool)
    return cast("NDArray[np.bool_]", moocore.is_nondominated(points, keep_weakly=True))


def _plane(scaled: Points) -> NDArray[np.floating]:
    """Normal n of the plane x · n = 1 through the best point of each objective."""
    num_objectives = scaled.shape[1]
    ones = np.ones(num_objectives)
    # ties in one objective go to the point that is best in the others
    extremes = [np.lexsort((scaled.sum(axis=1), scaled[:, i]))[0] for i in range(num_objectives)]
    try:
        normal = np.linalg.solve(scaled[extremes], ones)
    except np.linalg.LinAlgError:
        return ones
    return normal if np.all(normal > 0) else ones
