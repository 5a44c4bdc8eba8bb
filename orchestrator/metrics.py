"""The metrics there are: which way each is better, and which task gives which."""

from __future__ import annotations

from typing import Literal

DIRECTIONS: dict[str, Literal["min", "max"]] = {
    "accuracy": "max",
    "f1": "max",
    "worst_class_accuracy": "max",
    "agreement": "max",
    "perplexity": "min",
    "bleu": "max",
    "chrf": "max",
    "rouge_l": "max",
    "latency_ms": "min",
    "speedup": "max",
    "ttft_ms": "min",
    "tpot_ms": "min",
    "tokens_per_s": "max",
    "kv_cache_mb": "min",
    "size_mb": "min",
    "download_mb": "min",
    "peak_memory_mb": "min",
    "macs": "min",
    "num_params": "min",
    "sparsity": "max",
}
"""Which way each metric is better."""

SHARES = frozenset({"accuracy", "worst_class_accuracy", "f1", "agreement", "sparsity"})
"""Metrics between 0 and 1; no other is below 0."""

DECODER_METRICS = frozenset({"ttft_ms", "tpot_ms", "tokens_per_s", "kv_cache_mb"})
QUALITY_METRICS: dict[str, frozenset[str]] = {
    "encoder": frozenset({"accuracy", "f1", "worst_class_accuracy", "agreement"}),
    "decoder": frozenset({"perplexity"}),
    "encoder_decoder": frozenset({"bleu", "chrf", "rouge_l"}),
}


def metrics_of(kind: str) -> frozenset[str]:
    """Every metric that is measured for tasks of a kind."""
    elsewhere = frozenset().union(*QUALITY_METRICS.values()) - QUALITY_METRICS[kind]
    if kind != "decoder":
        elsewhere |= DECODER_METRICS
    return frozenset(DIRECTIONS) - elsewhere
