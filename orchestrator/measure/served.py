"""An artifact and all its numbers: written, reloaded in its runtime, and asked real inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator import artifact as artifacts
from orchestrator.alone import this_host
from orchestrator.base_model import tokenizer_key
from orchestrator.measure.command import run_command
from orchestrator.measure.fingerprint import fingerprint
from orchestrator.measure.latency import Round, compare_all, decoder_round, encoder_round
from orchestrator.measure.memory import peak_memory_mb
from orchestrator.measure.quality import (
    inputs_of,
    num_equal_tokens,
    served_batches,
    served_difference,
    served_records,
)
from orchestrator.measure.shape import shape_metrics
from orchestrator.measure.size import size_metrics
from orchestrator.predict import row_lengths
from orchestrator.runtimes import Session
from orchestrator.tasks import Encoded, Split
from orchestrator.trial import Measurement, TrialConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orchestrator.bench import Bench

SPEED, SPEED_VERSION = "speed.json", 1
NOT_ALONE = "latency was taken while others computed on this host and did not give way"


@dataclass
class Served:
    """The artifact of one trial: `folder`, and the tokenizer that goes with it."""

    bench: Bench
    config: TrialConfig
    folder: Path
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def session(self) -> Session:
        return self.bench.runtime.load(self.folder, self.bench.target)

    @property
    def is_baseline(self) -> bool:
        return self.folder.resolve() == self.bench.baseline_artifact(self.config.model).resolve()

    def encoded(self, split: Split) -> Encoded:
        return self.bench.encoded(split, self.tokenizer)

    @cached_property
    def mean_length(self) -> int:
        """Mean tokens of a validation row."""
        return round(float(row_lengths(self.encoded("validation")).mean()))

    @property
    def padded_length(self) -> int | None:
        """What every input is padded to; None where the longest of a batch decides."""
        if self.bench.target.padding == "longest":
            return None
        return self.bench.max_length(self.config.model)

    @property
    def longest_length(self) -> int:
        """Tokens of the longest input that validation asks for, padding included."""
        return self.padded_length or int(row_lengths(self.encoded("validation")).max())

    def shape(self, trained: PreTrainedModel, converted: PreTrainedModel) -> dict[str, float]:
        """What is known without asking: parameters, zeros, multiply-accumulates, cache."""
        bench = self.bench
        length = self.padded_length or self.mean_length
        return shape_metrics(trained, converted, bench.target, kind=bench.task.kind, length=length)

    def export(self, model: PreTrainedModel) -> None:
        """Write the folder that is deployed, whole, with its hashes."""
        bench = self.bench
        about = {
            "trial_id": self.config.id,
            "config": self.config.model_dump(mode="json"),
            "task": bench.task.name,
            "max_length": bench.max_length(self.config.model),
            "padding": {"token_id": self.tokenizer.pad_token_id, "to": bench.target.padding},
            "labels": bench.labels,
            "target": bench.target.model_dump(mode="json"),
        }
        artifacts.write(
            self.folder,
            model,
            self.tokenizer,
            bench.runtime,
            kind=bench.task.kind,
            cache=bench.stages.folder / "graphs",
            about=about,
        )


def measure_served(
    served: Served, *, stage: Callable[[str], None] = lambda text: None, keep: bool = True
) -> Measurement:
    """Every number of an artifact that it takes to serve it, on the validation split.

    Unless told not to, its answers are kept beside it. Speed and memory are left out where this is
    not a machine of the target's kind.
    """
    stage("quality")
    quality = measure_quality(served, "validation", keep=keep)
    metrics = size_metrics(served.folder) | quality.metrics
    untimed = {"metrics": metrics, "fingerprint": "", "is_timed": False}
    quality = quality.model_copy(update=untimed)
    if not served.bench.is_timed_here:
        return quality
    return quality.joined(measure_speed(served, stage=stage, keep=keep))


def measure_speed(
    served: Served, *, stage: Callable[[str], None] = lambda text: None, keep: bool = True
) -> Measurement:
    """Speed and memory of an artifact on this machine, and what the user's own command says.

    Unless told not to, they are what was found for an artifact of the same structure, if there was
    one in this study.
    """
    measured = _measure_structure(served, stage) if keep else _time(served, stage)
    command = served.bench.target.command
    if command is None:
        return measured
    stage("command")
    own = Measurement(metrics=run_command(command, served.folder), fingerprint=fingerprint())
    return measured.joined(own)


def _measure_structure(served: Served, stage: Callable[[str], None]) -> Measurement:
    """Speed and memory, taken once for artifacts that differ in the values of weights alone.

    What was not taken alone is not kept.
    """
    bench = served.bench
    inputs = {
        "structure": bench.runtime.structure(served.folder),
        "dense": served.config.model,
        "is_baseline": served.is_baseline,
        "tokenizer": tokenizer_key(served.tokenizer),
        "data": bench.data_key,
        "target": bench.target.model_dump(mode="json"),
        "measure": bench.recipe.measure.model_dump(mode="json"),
        "fingerprint": fingerprint(),
    }
    found = bench.stages.find("speed", inputs, version=SPEED_VERSION)
    if found is not None:
        return Measurement.model_validate_json((found / SPEED).read_text())
    measured = _time(served, stage)
    if NOT_ALONE not in measured.notes:
        text = measured.model_dump_json()

        def write(folder: Path) -> None:
            (folder / SPEED).write_text(text)

        bench.stages.once("speed", inputs, write, version=SPEED_VERSION)
    return measured


def _time(served: Served, stage: Callable[[str], None]) -> Measurement:
    """Timings, and the peak memory of a process that serves it."""
    stage("latency")
    timing = measure_latency(served)
    stage("memory")
    memory = peak_memory_mb(served.folder, served.bench.target, length=served.longest_length)
    return timing.model_copy(update={"metrics": timing.metrics | {"peak_memory_mb": memory}})


def compare_with_trained(
    served: Served,
    trained: PreTrainedModel,
    converted: PreTrainedModel,
    *,
    stage: Callable[[str], None],
) -> dict[str, Any]:
    """How far the artifact is from what was trained, and for decoders from what was converted.

    Both models are on the CPU, whatever the artifact is served on.
    """
    stage("check")
    bench, validation = served.bench, served.encoded("validation")
    batches = served_batches(
        bench.task,
        validation,
        bench.target,
        length=served.padded_length,
        rows=bench.recipe.measure.num_check_inputs,
    )
    inputs = [batch for _, batch in batches]
    difference = served_difference(_answers(served, trained), served.session, inputs)
    details: dict[str, Any] = {"served_difference": difference}
    if bench.task.kind == "decoder":
        stage("greedy")
        prompt = validation.features[0]["input_ids"][None, : bench.target.prompt_tokens]
        details["greedy_tokens_equal"] = num_equal_tokens(served.session, converted, prompt)
    return details


def measure_test_split(folder: Path, bench: Bench) -> Measurement:
    """Quality of a finished artifact on the test split. Raises `DamagedArtifact`."""
    from transformers import AutoTokenizer

    config = TrialConfig(**artifacts.verify(folder)["config"])
    served = Served(bench, config, folder, AutoTokenizer.from_pretrained(folder))
    return measure_quality(served, "test")


def measure_quality(served: Served, split: Split, *, keep: bool = True) -> Measurement:
    """Scores of a split with intervals.

    `agreement` is with what the dense baseline's artifact answered, if it was asked.
    """
    bench = served.bench
    records = served_records(
        served.session,
        bench.task,
        served.encoded(split),
        bench.target,
        length=served.padded_length,
    )
    if keep:
        artifacts.write_predictions(served.folder, split, records)
    dense = records
    if not served.is_baseline:
        baseline = bench.baseline_artifact(served.config.model)
        dense = artifacts.read_predictions(baseline, split)
    estimates = bench.task.metrics(records, dense or None)
    return Measurement(
        metrics={name: estimate[0] for name, estimate in estimates.items()},
        intervals={name: (estimate[1], estimate[2]) for name, estimate in estimates.items()},
        num_examples=len(records),
        fingerprint=fingerprint(),
        notes=bench.rows[split].notes,
    )


def measure_latency(served: Served) -> Measurement:
    """Timings of an artifact, interleaved with the dense baseline's (or its own, if it is that)."""
    return measure_latencies({"": served})[""]


def measure_latencies(served: Mapping[str, Served]) -> dict[str, Measurement]:
    """Timings of artifacts of one study by key, all loaded at once and asked in turn.

    Each is interleaved with its model's dense baseline. Nothing else computes on this host
    meanwhile; where others did not give way, a note says so.
    """
    bench = next(iter(served.values())).bench
    dense = {f"dense {one.config.model}": _dense_beside(one) for one in served.values()}
    rounds = {key: _one_round(one) for key, one in {**dense, **served}.items()}
    dense_of = {key: f"dense {one.config.model}" for key, one in served.items()}
    main = "tpot_ms" if bench.task.kind == "decoder" else "latency_ms"
    with this_host().alone() as is_alone:
        timings = compare_all(rounds, dense_of, bench.recipe.measure, main=main)
    if is_alone:
        return timings
    return {
        key: one.model_copy(update={"notes": (*one.notes, NOT_ALONE)})
        for key, one in timings.items()
    }


def _dense_beside(served: Served) -> Served:
    """The dense baseline of an artifact's model, itself if it is that."""
    if served.is_baseline:
        return served
    bench, model = served.bench, served.config.model
    folder = bench.baseline_artifact(model)
    dense = Served(bench, served.config, folder, bench.base(model).tokenizer)
    dense.__dict__["session"] = bench.dense_session(model)
    return dense


def _one_round(served: Served) -> Round:
    """A round of requests of the target's shape, taken from validation over all its lengths."""
    bench, target = served.bench, served.bench.target
    encoded = served.encoded("validation")
    if bench.task.kind == "decoder":
        ids = np.concatenate([row["input_ids"] for row in encoded.features[:64]])
        size = target.batch_size * target.prompt_tokens
        prompt = np.resize(ids, size).reshape(target.batch_size, target.prompt_tokens)
        return lambda: decoder_round(served.session, prompt, target.new_tokens)
    count = bench.recipe.measure.num_inputs
    rows = _rows_over_lengths(served, count * target.batch_size)
    requests = [
        inputs_of(bench.task.collate(encoded, rows[i::count].tolist(), length=served.padded_length))
        for i in range(count)
    ]
    return lambda: encoder_round(served.session, requests)


def _rows_over_lengths(served: Served, count: int) -> np.ndarray:
    """Indices of `count` validation rows, evenly over all lengths that the dense model sees.

    A smaller vocabulary has lengths of its own, but is asked the same rows.
    """
    bench = served.bench
    tokenizer = bench.base(served.config.model).tokenizer
    by_length = np.argsort(row_lengths(bench.encoded("validation", tokenizer)), kind="stable")
    return by_length[np.linspace(0, len(by_length) - 1, count).astype(int)]


def _answers(
    served: Served, model: PreTrainedModel
) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A model in torch, on the CPU, as something that answers batches, float32."""
    import torch

    def logits(batch: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        with torch.inference_mode():
            return served.bench.task.logits(model, tensors).float().numpy()

    return logits
