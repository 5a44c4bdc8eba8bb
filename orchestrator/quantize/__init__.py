"""HOW bits go: prepare (fake-quant before training) and convert (real codes after).

Both are built from the numerics that the serving runtime declares, never from a scheme's name:
what is trained is what is served.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.trial import Frozen

Granularity = Literal["tensor", "token", "channel", "group"]


# The last layer of a classification head has a row a label: it weighs a few kilobytes, and the
# logits hang on it. Tables of a few rows cost more to look up rounded than they save.
ALWAYS_FLOAT = (
    "classifier",
    "classifier.out_proj",
    "classification_head.out_proj",
    "score",
    "qa_outputs",
    "token_type_embeddings",
    "relative_attention_bias",
)
"""Endings of module names that stay in floating point under every scheme."""


class WeightNumerics(Frozen):
    """How weights are rounded. `channel` is one scale an output row, `group` one a row and block of inputs.

    `interval` fixes the scale instead of taking it from the weights (scheme `linear`).
    `narrow` leaves out the lowest code, so that the range is symmetric (int8: -127..127).
    """

    bits: int
    granularity: Granularity
    group_size: int = 0
    symmetric: bool = True
    narrow: bool = True
    interval: float | None = None


class ActivationNumerics(Frozen):
    """How the input of a matrix product is rounded while serving: one scale a call (`tensor`) or a row (`token`)."""

    bits: int
    granularity: Granularity
    symmetric: bool = False
    signed: bool = False


class Numerics(Frozen):
    """How a runtime rounds under one scheme. `weight` None means floating point in `dtype`."""

    scheme: str
    weight: WeightNumerics | None = None
    activation: ActivationNumerics | None = None
    embedding: WeightNumerics | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class QuantizeOptions(Frozen):
    """A recipe's quantization section.

    `qat` trains with fake-quant from `qat_start` (a share of the optimizer steps) on; without it
    the trained model is rounded afterwards. `embeddings` rounds embedding tables to 8 bits too.
    `ignore` lists module names, or their endings, that stay in floating point. `group_size` is
    for group-wise schemes, `interval` and `granularity` for `linear` alone.
    """

    scheme: str = "none"
    qat: bool = False
    qat_start: float = Field(0.0, ge=0.0, lt=1.0)
    group_size: int = Field(32, gt=0)
    embeddings: bool = False
    ignore: tuple[str, ...] = ()
    interval: float | None = Field(None, gt=0)
    granularity: Literal["tensor", "channel"] = "channel"
