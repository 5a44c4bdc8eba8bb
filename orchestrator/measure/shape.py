"""What a model's tensors say before anyone asks it: parameters, zeros, multiply-accumulates, cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from orchestrator.prune.tree import read_signature
from orchestrator.signature import Signature

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from orchestrator.runtimes import Target


def shape_metrics(
    trained: PreTrainedModel,
    converted: PreTrainedModel,
    target: Target,
    *,
    kind: str,
    length: int,
) -> dict[str, float]:
    """`macs` are those of a batch of `length` tokens a row, `sparsity` counts what is stored."""
    signature = read_signature(trained)
    shape = {
        "num_params": float(signature.num_params),
        "sparsity": sparsity(converted),
        "macs": float(signature.macs(batch=target.batch_size, length=length)),
    }
    if kind == "decoder":
        tokens = target.batch_size * (target.prompt_tokens + target.new_tokens)
        bytes_a_number = 2 if converted.dtype == torch.bfloat16 else 4
        shape["kv_cache_mb"] = bytes_a_number * cached_numbers(signature) * tokens / 1e6
    return shape


def sparsity(model: nn.Module) -> float:
    """Share of zeros in all matrices that a converted model stores, codes or numbers."""
    stored = [*model.parameters()] + [b for name, b in model.named_buffers() if _is_codes(name)]
    matrices = [tensor for tensor in stored if tensor.ndim > 1]
    zeros = sum(int((tensor == 0).sum()) for tensor in matrices)
    return zeros / sum(tensor.numel() for tensor in matrices)


def cached_numbers(signature: Signature) -> int:
    """Keys and values that one token adds to the cache."""
    return sum(2 * a.num_kv_heads * a.head_dim for a in signature.attentions)


def _is_codes(name: str) -> bool:
    return name.rpartition(".")[2] == "codes"
