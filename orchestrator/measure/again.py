"""Measuring an artifact that exists, on the machine at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from orchestrator.alone import this_host
from orchestrator.artifact import verify
from orchestrator.bench import Bench
from orchestrator.measure import MeasureOptions
from orchestrator.measure.fingerprint import fingerprint
from orchestrator.measure.latency import compare, decoder_round, encoder_round
from orchestrator.measure.memory import example_inputs, peak_memory_mb
from orchestrator.measure.served import Served, measure_latencies, measure_served, measure_speed
from orchestrator.measure.size import size_metrics
from orchestrator.plugins import find
from orchestrator.recipe import Recipe
from orchestrator.runtimes import RUNTIMES, Target
from orchestrator.trial import Measurement, TrialConfig


def measure_in_study(artifact: Path, recipe: Recipe, study: Path) -> Measurement:
    """Quality on validation, latency beside the dense baseline, size and memory, the user's command."""
    return measure_served(_served(artifact, Bench(recipe, study, device="cpu")), keep=False)


def time_together(artifacts: Mapping[str, Path], bench: Bench) -> dict[str, Measurement]:
    """Latencies of a study's artifacts by key, in one pass interleaved with their dense baselines.

    Raises `DamagedArtifact`.
    """
    return measure_latencies({key: _served(folder, bench) for key, folder in artifacts.items()})


def speeds(
    artifacts: Mapping[str, Path], bench: Bench, stage: Callable[[str], None]
) -> dict[str, Measurement]:
    """Speed and memory of a study's artifacts by key, which other machines have made.

    Raises `DamagedArtifact`.
    """
    return {
        key: measure_speed(_served(folder, bench), stage=stage) for key, folder in artifacts.items()
    }


def _served(folder: Path, bench: Bench) -> Served:
    config = TrialConfig(**verify(folder)["config"])
    return Served(bench, config, folder, AutoTokenizer.from_pretrained(folder))


def measure_alone(artifact: Path, description: dict[str, Any]) -> Measurement:
    """Latency on made-up tokens of half the maximal length, size and memory; no data needed."""
    target = Target(**description["target"])
    session = find(RUNTIMES, target.runtime, what="runtime").load(artifact, target)
    length = max(1, description["max_length"] // 2)
    inputs = example_inputs(description, batch=target.batch_size, length=length)
    prompt = np.ones((target.batch_size, target.prompt_tokens), np.int64)
    decoder = description["kind"] == "decoder"

    def one_round() -> dict[str, float]:
        if decoder:
            return decoder_round(session, prompt, target.new_tokens)
        return encoder_round(session, [inputs])

    main = "tpot_ms" if decoder else "latency_ms"
    with this_host().alone():
        timing = compare(one_round, one_round, MeasureOptions(), main=main)
    metrics = {name: value for name, value in timing.metrics.items() if name != "speedup"}
    memory = peak_memory_mb(artifact, target, length=length)
    return Measurement(
        metrics=metrics | size_metrics(artifact) | {"peak_memory_mb": memory},
        intervals={name: timing.intervals[name] for name in metrics},
        fingerprint=fingerprint(),
        notes=(*timing.notes, f"latency on made-up inputs of {length} tokens"),
    )
