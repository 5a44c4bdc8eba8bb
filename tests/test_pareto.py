"""The front is the one that the literature and other libraries know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator import pareto
from orchestrator.pareto import Objective

ACCURACY = Objective(name="accuracy", direction="max", min=0.8)
LATENCY = Objective(name="latency_ms", direction="min", max=10.0)
METRICS = [
    {"accuracy": 0.90, "latency_ms": 9.0, "size_mb": 90.0},  # best quality
    {"accuracy": 0.88, "latency_ms": 3.0, "size_mb": 20.0},  # the knee
    {"accuracy": 0.70, "latency_ms": 2.5, "size_mb": 15.0},  # fastest, below the limit
    {"accuracy": 0.85, "latency_ms": 4.0, "size_mb": 20.0},  # dominated by the knee
    {"accuracy": float("nan"), "latency_ms": 1.0, "size_mb": 1.0},
]


def test_front_keeps_what_nothing_dominates_in_either_direction():
    points = pareto.normalise(METRICS, [ACCURACY, LATENCY])
    assert pareto.front(points).tolist() == [0, 1, 2]
    assert pareto.dominates(points[1], points[3])
    assert not pareto.dominates(points[3], points[1])


def test_equal_points_are_all_kept_and_do_not_dominate_each_other():
    assert pareto.front([[1, 2], [1, 2], [2, 1], [2, 2]]).tolist() == [0, 1, 2]
    assert not pareto.dominates([1, 2], [1, 2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_never_helps(bad):
    points = [[1.0, 1.0], [bad, 0.0]]
    assert pareto.front(points).tolist() == [0]
    assert pareto.hypervolume(points, [2, 2]) == 1.0
    assert pareto.exclusive_contribution(points, [2, 2]).tolist() == [1.0, 0.0]


def test_a_missing_metric_keeps_a_point_off_the_front():
    points = pareto.normalise(
        [{"accuracy": 0.9}, {"accuracy": 0.5, "latency_ms": 1.0}], [ACCURACY, LATENCY]
    )
    assert pareto.front(points).tolist() == [1]


def test_no_points_make_an_empty_front_of_no_volume():
    nothing = pareto.normalise([], [ACCURACY, LATENCY])
    assert nothing.shape == (0, 2)
    assert pareto.front(nothing).tolist() == []
    assert pareto.hypervolume(nothing, [1, 1]) == 0.0
    assert pareto.select([], [ACCURACY], max={"latency_ms": 1.0}) == []
    with pytest.raises(ValueError, match="at least one point"):
        pareto.knee(nothing)


def test_ranks_hold_every_point_once():
    fronts = pareto.fronts_by_rank([[3, 3], [1, 1], [2, 2], [1, 2], [np.nan, 0]])
    assert [front.tolist() for front in fronts] == [[1, 4], [3], [2], [0]]


def test_dense_has_the_same_volume_on_every_machine():
    objectives = [ACCURACY, LATENCY]
    reference = pareto.normalise([pareto.reference_point(objectives)], objectives)[0]
    volumes = []
    for dense in ({"accuracy": 0.9, "latency_ms": 9.0}, {"accuracy": 0.4, "latency_ms": 1.0}):
        half = {"accuracy": dense["accuracy"], "latency_ms": dense["latency_ms"] / 2}
        points = pareto.normalised_by_baseline([dense, half], dense, objectives)
        volumes.append(pareto.hypervolume(points, reference))
        np.testing.assert_allclose(points, [[-1, 1], [-1, 0.5]])
    # quality reaches from 0.5 to 1, latency from 1.1 down to 0.5
    assert volumes == pytest.approx([0.5 * 0.6, 0.5 * 0.6])


def test_a_baseline_of_zero_is_a_difference():
    sparsity = Objective(name="sparsity", direction="max")
    points = pareto.normalised_by_baseline([{"sparsity": 0.5}], {"sparsity": 0.0}, [sparsity])
    assert points.tolist() == [[-1.5]]


def test_perplexity_may_double_and_costs_may_not():
    objectives = [Objective(name=name, direction="min") for name in ("perplexity", "size_mb")]
    assert pareto.reference_point(objectives) == {"perplexity": 2.0, "size_mb": 1.1}


def test_knee_is_the_point_that_bulges_most():
    assert pareto.knee(pareto.normalise(METRICS, [ACCURACY, LATENCY])) == 1
    assert pareto.knee([[0, 10, 10], [10, 0, 10], [10, 10, 0], [2, 2, 2], [11, 11, 11]]) == 3


def test_knee_does_not_depend_on_units():
    points = np.array([[0.0, 1.0], [0.2, 0.3], [0.5, 0.2], [1.0, 0.0]])
    assert pareto.knee(points) == pareto.knee(points * [1e6, 1e-6] + [5, -3]) == 1


@pytest.mark.parametrize(
    ("points", "index"),
    [
        ([[5.0, 5.0]], 0),
        ([[1.0, 2.0], [1.0, 2.0]], 0),
        ([[1.0, 7.0], [1.0, 6.0]], 1),
        ([[0.0, 0.0, 9.0], [4.0, 4.0, 0.0]], 0),  # one point best in two objectives
    ],
)
def test_knee_of_a_front_without_a_plane(points, index):
    assert pareto.knee(points) == index


def test_select_keeps_limits_and_orders_by_the_first_objective():
    objectives = [LATENCY, ACCURACY]
    assert pareto.select(METRICS[:4], objectives) == [2, 1, 3, 0]
    assert pareto.select(METRICS[:4], objectives, min={"accuracy": 0.85}) == [1, 3, 0]
    assert pareto.select(METRICS, objectives, min={"accuracy": 0.85}, max={"size_mb": 20}) == [1, 3]


def test_select_names_the_metrics_there_are():
    with pytest.raises(ValueError, match="no point has a metric latency; there are accuracy, lat"):
        pareto.select(METRICS, [ACCURACY], max={"latency": 3.0})


def test_limits_hold_at_their_value_and_not_for_nan():
    assert pareto.within_limits({"accuracy": 0.8, "latency_ms": 10.0}, [ACCURACY, LATENCY])
    assert not pareto.within_limits({"accuracy": 0.79, "latency_ms": 1.0}, [ACCURACY, LATENCY])
    assert not pareto.within_limits({"accuracy": float("nan"), "latency_ms": 1.0}, [ACCURACY])


def pagmo_cases(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, int | None, float]]:
    """(points, reference, asked index, answer) of one file of the pagmo2 suite."""
    numbers = iter(path.read_text().split())
    for _ in range(int(next(numbers))):
        dimension, count = int(next(numbers)), int(next(numbers))
        values = np.array([float(next(numbers)) for _ in range(dimension * (count + 1))])
        rows = values.reshape(count + 1, dimension)
        asked = int(next(numbers)) if path.name.startswith("e_") else None
        yield rows[1:], rows[0], asked, float(next(numbers))


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["t100_d2_n128", "t100_d3_n128", "t1_d3_n2048", "t1_d5_n1024"])
def test_hypervolume_is_that_of_pagmo(shared_data, name):
    for points, reference, _, answer in pagmo_cases(pagmo_file(shared_data, f"c_max_{name}")):
        assert pareto.hypervolume(points, reference) == pytest.approx(answer, rel=1e-10)


@pytest.mark.realdata
@pytest.mark.parametrize("dimension", [2, 3, 5])
def test_exclusive_contribution_is_that_of_pagmo(shared_data, dimension):
    for points, reference, asked, answer in pagmo_cases(
        pagmo_file(shared_data, f"e_max_d{dimension}")
    ):
        contribution = pareto.exclusive_contribution(points, reference)
        assert contribution[asked] == pytest.approx(answer, abs=1e-10)


@pytest.mark.realdata
@pytest.mark.parametrize("dimension", [2, 3])
def test_least_contributor_is_that_of_pagmo(shared_data, dimension):
    for points, reference, _, answer in pagmo_cases(
        pagmo_file(shared_data, f"lc_max_d{dimension}")
    ):
        contribution = pareto.exclusive_contribution(points, reference)
        assert contribution[int(answer)] == pytest.approx(contribution.min(), abs=1e-12)


@pytest.mark.realdata
def test_sorting_is_that_of_optuna(shared_data):
    for case in optuna_expected(shared_data)["nondominated_sorting"]:
        ranks = np.full(len(case["values"]), -1)
        for rank, indices in enumerate(pareto.fronts_by_rank(floats(case["values"]))):
            ranks[indices] = rank
        assert ranks.tolist() == case["ranks"], case["values"]


@pytest.mark.realdata
def test_hypervolume_is_that_of_optuna(shared_data):
    for case in optuna_expected(shared_data)["hypervolume"]:
        volume = pareto.hypervolume(floats(case["points"]), floats(case["ref"]))
        assert volume == pytest.approx(float(case["hv"])), case["name"]


def pagmo_file(shared_data: Path, name: str) -> Path:
    return shared_data / "pareto_pagmo2_hv" / "testcases" / name


def optuna_expected(shared_data: Path) -> dict:
    return json.loads((shared_data / "pareto_optuna" / "expected.json").read_text())


def floats(values: list) -> np.ndarray:
    """JSON numbers, infinities written as strings."""
    return np.array(values, dtype=object).astype(np.float64)
