"""Latency of two artifacts, interleaved, with nothing else running.

A round asks both artifacts the same requests, in alternating order; medians over rounds and
their bootstrap intervals are reported, and the speed-up is the median of the rounds' ratios, so
that a disturbance that hits a whole round cancels out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from orchestrator.measure import MeasureOptions
from orchestrator.measure.fingerprint import fingerprint
from orchestrator.runtimes import Session
from orchestrator.trial import Measurement

Timing = dict[str, float]
Round = Callable[[], Timing]
Requests = Sequence[dict[str, np.ndarray]]
MIN_ROUNDS = 8


def encoder_round(session: Session, requests: Requests) -> Timing:
    """Mean milliseconds a request."""
    start = time.perf_counter()
    for request in requests:
        session.run(request)
    return {"latency_ms": 1e3 * (time.perf_counter() - start) / len(requests)}


def decoder_round(session: Session, prompt: np.ndarray, new_tokens: int) -> Timing:
    """Greedy decoding of one prompt [batch, length]: time to first token, then a token's mean time."""
    start = time.perf_counter()
    logits, cache = session.prefill(prompt)
    token = logits.argmax(-1).reshape(-1, 1)
    first = time.perf_counter()
    for _ in range(new_tokens):
        logits, cache = session.decode(token, cache)
        token = logits.argmax(-1).reshape(-1, 1)
    end = time.perf_counter()
    return {
        "ttft_ms": 1e3 * (first - start),
        "tpot_ms": 1e3 * (end - first) / new_tokens,
        "latency_ms": 1e3 * (end - start),
        "tokens_per_s": prompt.shape[0] * new_tokens / (end - first),
    }


def compare(this: Round, dense: Round, options: MeasureOptions, *, main: str) -> Measurement:
    """Timings of `this` and its `speedup` over `dense`, until the interval of `main` settles.

    Ends when the 95 % interval is within `options.relative_interval` of the median on either
    side, or when `options.max_seconds` are spent; the latter is said in `notes`.
    """
    this(), dense()
    mine: list[Timing] = []
    ratios: list[float] = []
    deadline = time.perf_counter() + options.max_seconds
    settled = False
    with _no_garbage_collection():
        while not settled and (len(mine) < 3 or time.perf_counter() < deadline):
            a, b = _both(this, dense, swap=len(mine) % 2 == 1)
            mine.append(a)
            ratios.append(b["latency_ms"] / a["latency_ms"])
            settled = len(mine) >= MIN_ROUNDS and _width(mine, main) <= options.relative_interval
    return _summary(mine, ratios, () if settled else (_unsettled(mine, main, options),))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _both(this: Round, dense: Round, *, swap: bool) -> tuple[Timing, Timing]:
    if swap:
        b = dense()
        return this(), b
    return this(), dense()


def _summary(mine: list[Timing], ratios: list[float], notes: tuple[str, ...]) -> Measurement:
    samples = {name: np.array([timing[name] for timing in mine]) for name in mine[0]}
    samples["speedup"] = np.array(ratios)
    return Measurement(
        metrics={name: float(np.median(values)) for name, values in samples.items()},
        intervals={name: median_interval(values) for name, values in samples.items()},
        num_examples=len(mine),
        fingerprint=fingerprint(),
        notes=notes,
    )


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the median; 1,000 resamples, the same for equal data."""
    picks = np.random.default_rng(0).integers(0, len(values), (1000, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


def _width(timings: list[Timing], name: str) -> float:
    """The farther half of the interval, relative to the median."""
    values = np.array([timing[name] for timing in timings])
    low, high = median_interval(values)
    median = float(np.median(values))
    return max(high - median, median - low) / median


def _unsettled(timings: list[Timing], name: str, options: MeasureOptions) -> str:
    width = _width(timings, name)
    return (
        f"{name} did not settle: ±{width:.0%} after {len(timings)} rounds in {options.max_seconds:g} s"
        f" (goal ±{options.relative_interval:.0%})"
    )
