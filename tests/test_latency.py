"""Latencies are medians over interleaved rounds, and say when they did not settle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from orchestrator.measure import MeasureOptions
from orchestrator.measure.latency import compare, compare_all, decoder_round, median_interval


def rounds(values: list[float]):
    source = itertools.cycle(values)
    return lambda: {"latency_ms": next(source)}


def test_a_steady_latency_settles_and_its_speedup_is_the_ratio() -> None:
    found = compare(rounds([2.0]), rounds([6.0]), MeasureOptions(), main="latency_ms")
    assert found.metrics == {"latency_ms": 2.0, "speedup": 3.0}
    assert found.intervals["speedup"] == (3.0, 3.0)
    assert found.notes == ()


def test_a_disturbance_of_whole_rounds_does_not_move_the_speedup() -> None:
    noise = [1.0, 5.0, 1.0, 9.0, 1.0]
    options = MeasureOptions(max_seconds=0.2)
    found = compare(rounds(noise), rounds([4 * n for n in noise]), options, main="latency_ms")
    assert found.metrics["speedup"] == pytest.approx(4.0)


def test_a_latency_that_does_not_settle_says_so() -> None:
    wild = np.random.default_rng(0).lognormal(0, 3, 1000).tolist()
    options = MeasureOptions(max_seconds=0.05)
    found = compare(rounds(wild), rounds(wild), options, main="latency_ms")
    assert "did not settle" in found.notes[0]


def test_several_take_turns_there_and_back_each_beside_its_own_dense_model():
    asked: list[str] = []

    def one(name: str, value: float):
        return lambda: asked.append(name) or {"latency_ms": value}

    asks = {
        "dense a": one("A", 6.0),
        "dense b": one("B", 8.0),
        "a": one("a", 2.0),
        "b": one("b", 1.0),
    }
    dense_of = {"a": "dense a", "b": "dense b"}
    found = compare_all(asks, dense_of, MeasureOptions(), main="latency_ms")
    assert {key: one.metrics["speedup"] for key, one in found.items()} == {"a": 3.0, "b": 8.0}
    assert "".join(asked).startswith("ABab" + "ABab" + "baBA" + "ABab")


def test_the_interval_covers_the_median() -> None:
    values = np.random.default_rng(0).normal(10, 1, 200)
    low, high = median_interval(values)
    assert low < np.median(values) < high and high - low < 1


def test_a_decoder_round_counts_one_prefill_and_the_tokens_after_it() -> None:
    class Counting:
        calls: list[str] = []

        def prefill(self, ids: np.ndarray):
            self.calls.append("prefill")
            return np.eye(5)[[3]], None

        def decode(self, token: np.ndarray, cache: object):
            self.calls.append(f"decode {token.item()}")
            return np.eye(5)[[2]], cache

    session = Counting()
    timing = decoder_round(session, np.ones((1, 4), np.int64), 3)  # type: ignore[arg-type]
    assert session.calls == ["prefill", "decode 3", "decode 2", "decode 2"]
    assert timing["latency_ms"] == pytest.approx(timing["ttft_ms"] + 3 * timing["tpot_ms"])
