"""Latency of artifacts, interleaved with their dense baseline, with nothing else running.

A sweep asks each artifact one round of the same requests, there and back in turn; medians over
sweeps and their bootstrap intervals are reported, and the speed-up is the median of the sweeps'
ratios, so that a disturbance that hits a whole sweep cancels out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from orchestrator.measure import MeasureOptions
from orchestrator.measure.fingerprint import fingerprint
from orchestrator.runtimes import Session
from orchestrator.trial import Measurement

Timing = dict[str, float]
Round = Callable[[], Timing]
Requests = Sequence[dict[str, np.ndarray]]
MIN_SWEEPS = 8


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
    """Timings of `this` and its `speedup` over `dense`; see `compare_all`."""
    rounds = {"this": this, "dense": dense}
    return compare_all(rounds, {"this": "dense"}, options, main=main)["this"]


def compare_all(
    rounds: Mapping[str, Round],
    dense_of: Mapping[str, str],
    options: MeasureOptions,
    *,
    main: str,
) -> dict[str, Measurement]:
    """Timings of each key of `dense_of` and its `speedup` over the round it names there.

    Sweeps over all `rounds` until each 95 % interval of `main` is within
    `options.relative_interval` of its median on either side, or `options.max_seconds` an artifact
    are spent; the latter is said in `notes`.
    """
    taken: dict[str, list[Timing]] = {name: [] for name in rounds}
    for warm_up in rounds.values():
        warm_up()
    seconds = options.max_seconds * len(dense_of)
    deadline = time.perf_counter() + seconds
    unsettled, sweeps = set(dense_of), 0
    with _no_garbage_collection():
        while unsettled and (sweeps < 3 or time.perf_counter() < deadline):
            _sweep(rounds, taken, back=sweeps % 2 == 1)
            sweeps += 1
            if sweeps >= MIN_SWEEPS:
                unsettled = {
                    n for n in dense_of if _width(taken[n], main) > options.relative_interval
                }
    return {
        name: _summary(
            taken[name],
            taken[dense],
            (_unsettled(taken[name], main, options, seconds),) if name in unsettled else (),
        )
        for name, dense in dense_of.items()
    }


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _sweep(rounds: Mapping[str, Round], taken: Mapping[str, list[Timing]], *, back: bool) -> None:
    for name in reversed(list(rounds)) if back else rounds:
        taken[name].append(rounds[name]())


def _summary(mine: list[Timing], dense: list[Timing], notes: tuple[str, ...]) -> Measurement:
    samples = {name: np.array([timing[name] for timing in mine]) for name in mine[0]}
    samples["speedup"] = (
        np.array([timing["latency_ms"] for timing in dense]) / samples["latency_ms"]
    )
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


def _unsettled(timings: list[Timing], name: str, options: MeasureOptions, seconds: float) -> str:
    width = _width(timings, name)
    return (
        f"{name} did not settle: ±{width:.0%} after {len(timings)} rounds in {seconds:g} s"
        f" (goal ±{options.relative_interval:.0%})"
    )
