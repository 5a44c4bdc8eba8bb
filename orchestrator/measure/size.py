"""Bytes on disk and bytes to download."""

from __future__ import annotations

from pathlib import Path

import zstandard

from orchestrator.artifact import model_bytes


def size_metrics(folder: Path) -> dict[str, float]:
    """`size_mb`: graph and weights on disk, in 10⁶ bytes; `download_mb`: the same through zstd.

    Tokenizer, card and predictions do not count. Zeros that no runtime skips show in
    `download_mb` alone.
    """
    files = model_bytes(folder)
    packed = sum(_compressed_length(path) for path in files)
    return {
        "size_mb": sum(path.stat().st_size for path in files) / 1e6,
        "download_mb": packed / 1e6,
    }


def _compressed_length(path: Path) -> int:
    compressor = zstandard.ZstdCompressor(level=9).compressobj()
    length = 0
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            length += len(compressor.compress(chunk))
    return length + len(compressor.flush())
