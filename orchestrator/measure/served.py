"""An artifact and all its numbers: written, reloaded in its runtime, and asked real inputs."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator import artifact as artifacts
from orchestrator.measure.fingerprint import fingerprint
from orchestrator.measure.latency import Round, compare, decoder_round, encoder_round
from orchestrator.measure.memory import peak_memory_mb
from orchestrator.measure.quality import (
    inputs_of,
    largest_difference,
    served_batches,
    served_records,
)
from orchestrator.measure.size import size_metrics
from orchestrator.prune.tree import read_signature
from orchestrator.runtimes import Session
from orchestrator.signature import Signature
from orchestrator.tasks import Split
from orchestrator.trial import Measurement, TrialConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orchestrator.bench import Bench

GREEDY_TOKENS = 64


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

    def describe(self, model: PreTrainedModel) -> dict[str, float]:
        """What the model's shape alone says: parameters, zeros, multiply-accumulates, cache."""
        signature = read_signature(model)
        weights = [p for p in model.parameters() if p.ndim > 1]
        zeros = sum(int((p == 0).sum()) for p in weights)
        target = self.bench.target
        shape = {
            "num_params": float(signature.num_params),
            "sparsity": zeros / sum(p.numel() for p in weights),
            "macs": float(signature.macs(batch=target.batch_size, length=self.mean_length)),
        }
        if self.bench.task.kind == "decoder":
            tokens = target.batch_size * (target.prompt_tokens + target.new_tokens)
            shape["kv_cache_mb"] = kv_bytes_a_token(signature) * tokens / 1e6
        return shape

    @cached_property
    def mean_length(self) -> int:
        """Mean tokens of a validation row."""
        rows = self.bench.encoded("validation", self.tokenizer).features
        return round(float(np.mean([len(row["input_ids"]) for row in rows])))

    def check_batches(self) -> list[dict[str, np.ndarray]]:
        """The real inputs on which trained and served logits are compared."""
        batches = served_batches(
            self.bench.task,
            self.bench.encoded("validation", self.tokenizer),
            self.bench.target,
            max_length=self.bench.max_length(self.config.model),
            rows=self.bench.recipe.measure.num_check_inputs,
        )
        return [batch for _, batch in batches]

    def answer(self, model: PreTrainedModel) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
        """The trained model as something that answers batches, float32."""
        import torch

        def logits(batch: dict[str, np.ndarray]) -> np.ndarray:
            tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
            with torch.inference_mode():
                return self.bench.task.logits(model, tensors).float().numpy()

        return logits

    def export(self, model: PreTrainedModel) -> None:
        """Write the folder that is deployed, whole, with its hashes."""
        bench = self.bench
        self.folder.mkdir(parents=True, exist_ok=True)
        ports = bench.runtime.export(
            model, self.folder, kind=bench.task.kind, cache=bench.stages.folder / "graphs"
        )
        model.config.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        description = {
            **ports,
            "trial_id": self.config.id,
            "config": self.config.model_dump(mode="json"),
            "task": bench.task.name,
            "max_length": bench.max_length(self.config.model),
            "padding": {"token_id": self.tokenizer.pad_token_id, "to": bench.target.padding},
            "labels": bench.labels,
            "target": bench.target.model_dump(mode="json"),
        }
        artifacts.seal(self.folder, description)


def measure_served(
    served: Served,
    trained: PreTrainedModel,
    converted: PreTrainedModel,
    shape: dict[str, float],
    *,
    is_baseline: bool,
    stage: Callable[[str], None],
) -> tuple[Measurement, dict[str, Any]]:
    """Every number of an artifact on the validation split.

    `trained` is the model as training left it, `converted` what was exported of it.
    """
    bench, config = served.bench, served.config
    stage("check")
    details: dict[str, Any] = {
        "served_difference": largest_difference(
            served.answer(trained), served.session, served.check_batches()
        )
    }
    if bench.task.kind == "decoder":
        details["greedy_tokens_equal"] = _greedy_equal(served, converted)
    stage("quality")
    dense = None if is_baseline else dense_predictions(bench, config.model, "validation")
    quality = measure_quality(served, "validation", dense)
    stage("latency")
    timing = measure_latency(served)
    stage("memory")
    longest = min(bench.max_length(config.model), 4 * served.mean_length)
    memory = peak_memory_mb(served.folder, bench.target, length=longest)
    metrics = shape | size_metrics(served.folder) | {"peak_memory_mb": memory}
    measurement = Measurement(
        metrics=metrics | quality.metrics | timing.metrics | _own_command(served),
        intervals=quality.intervals | timing.intervals,
        num_examples=quality.num_examples,
        fingerprint=fingerprint(),
        notes=timing.notes,
    )
    return measurement, details


def measure_test_split(folder: Path, bench: Bench) -> Measurement:
    """Quality of a finished artifact on the test split."""
    from transformers import AutoTokenizer

    description = artifacts.verify(folder)
    config = TrialConfig(**description["config"])
    served = Served(bench, config, folder, AutoTokenizer.from_pretrained(folder))
    baseline = bench.recipe.baseline_folder(bench.folder, config.model) / "artifact"
    dense = None
    if folder.resolve() != baseline.resolve():
        dense = dense_predictions(bench, config.model, "test")
    return measure_quality(served, "test", dense)


def dense_predictions(bench: Bench, model: str, split: Split) -> list[dict[str, Any]]:
    """What the dense baseline's artifact said about each row of a split; [] if it was not asked."""
    folder = bench.recipe.baseline_folder(bench.folder, model) / "artifact"
    return artifacts.read_predictions(folder, split)


def kv_bytes_a_token(signature: Signature) -> int:
    """Bytes of float32 keys and values that one token adds to the cache."""
    return sum(2 * 4 * a.num_kv_heads * a.head_dim for a in signature.attentions)


def measure_quality(
    served: Served, split: Split, dense: list[dict[str, Any]] | None, *, keep: bool = True
) -> Measurement:
    """Scores of a split with intervals; the answers are kept beside the artifact unless told not to."""
    bench = served.bench
    encoded = bench.encoded(split, served.tokenizer)
    length = bench.max_length(served.config.model)
    records = served_records(served.session, bench.task, encoded, bench.target, max_length=length)
    if keep:
        artifacts.write_predictions(served.folder, split, records)
    estimates = bench.task.metrics(records, dense or None)
    return Measurement(
        metrics={name: estimate[0] for name, estimate in estimates.items()},
        intervals={name: (estimate[1], estimate[2]) for name, estimate in estimates.items()},
        num_examples=len(records),
    )


def measure_latency(served: Served) -> Measurement:
    """Timings of an artifact, interleaved with the dense baseline's (or its own, if it is that)."""
    bench, model = served.bench, served.config.model
    dense = served
    folder = bench.recipe.baseline_folder(bench.folder, model) / "artifact"
    if folder.resolve() != served.folder.resolve():
        dense = Served(bench, served.config, folder, bench.base(model).tokenizer)
        dense.__dict__["session"] = bench.dense_session(model)
    main = "tpot_ms" if bench.task.kind == "decoder" else "latency_ms"
    return compare(_one_round(served), _one_round(dense), bench.recipe.measure, main=main)


def _one_round(served: Served) -> Round:
    """A round of requests of the target's shape, taken from validation over all its lengths."""
    bench, target = served.bench, served.bench.target
    encoded = bench.encoded("validation", served.tokenizer)
    if bench.task.kind == "decoder":
        ids = np.concatenate([row["input_ids"] for row in encoded.features[:64]])
        size = target.batch_size * target.prompt_tokens
        prompt = np.resize(ids, size).reshape(target.batch_size, target.prompt_tokens)
        return lambda: decoder_round(served.session, prompt, target.new_tokens)
    count = bench.recipe.measure.num_inputs
    rows = np.linspace(0, len(encoded) - 1, count * target.batch_size).astype(int)
    length = bench.max_length(served.config.model) if target.padding == "max_length" else None
    requests = [
        inputs_of(bench.task.collate(encoded, rows[i::count].tolist(), length=length))
        for i in range(count)
    ]
    return lambda: encoder_round(served.session, requests)


def _own_command(served: Served) -> dict[str, float]:
    """Metrics from the user's own script: `target.command ARTIFACT`, a JSON object of numbers out.

    Raises RuntimeError with the script's last words when it fails.
    """
    command = served.bench.target.command
    if command is None:
        return {}
    words = [*shlex.split(command), str(served.folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"target.command ended with {done.returncode}: {done.stderr[-500:]}")
    return {name: float(value) for name, value in json.loads(done.stdout).items()}


def _greedy_equal(served: Served, model: PreTrainedModel) -> int:
    """How many of the first 64 greedy tokens the served model and the converted one agree on."""
    import torch

    encoded = served.bench.encoded("validation", served.tokenizer)
    prompt = encoded.features[0]["input_ids"][None, : served.bench.target.prompt_tokens]
    ids = torch.from_numpy(prompt)
    with torch.inference_mode():
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY_TOKENS,
            min_new_tokens=GREEDY_TOKENS,
            do_sample=False,
        )[0, ids.shape[1] :].tolist()
    logits, cache = served.session.prefill(prompt)
    found = []
    for _ in range(GREEDY_TOKENS):
        found.append(int(logits.reshape(-1).argmax()))
        logits, cache = served.session.decode(np.array([[found[-1]]]), cache)
    pairs = list(zip(found, expected, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
