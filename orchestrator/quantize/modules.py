"""What a converted model is made of: integer codes with their scales, computing as the runtime will."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from orchestrator.quantize import Numerics, WeightNumerics
from orchestrator.quantize.rounding import dequantize, round_activation


class QuantizedLinear(nn.Module):
    """A linear layer as codes int8 [out, in] and scales float32 [out, groups].

    4-bit codes live in int8 too; runtimes pack them. `numerics.weight` describes these very codes
    (a head tied to a quantized embedding has the embedding's), and `tied_to` names the embedding
    module that shares `codes` and `scales`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        codes: torch.Tensor,
        *,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        numerics: Numerics,
        tied_to: str | None = None,
    ) -> None:
        super().__init__()
        assert numerics.weight is not None
        self.numerics = numerics
        self.out_features, self.in_features = codes.shape
        self.group_size = numerics.weight.group_size if scales.shape[1] > 1 else 0
        self.tied_to = tied_to
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """What the codes stand for, float32 [out, in]."""
        return dequantize(self.codes, self.scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], float32."""
        if self.numerics.activation is None:
            return F.linear(x, self.weight, self.bias)
        assert self.scales.shape[1] == 1, "an integer product needs one scale an output"
        codes, scale = round_activation(x, self.numerics.activation)
        # float64 holds every partial sum of the integer product exactly.
        product = F.linear(codes.double(), self.codes.double()).float()
        y = product * (scale * self.scales.squeeze(1))
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scheme={self.numerics.scheme}"


class QuantizedEmbedding(nn.Module):
    """An embedding table as codes int8 [rows, width] and scales float32 [rows, 1]."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        codes: torch.Tensor,
        *,
        scales: torch.Tensor,
        numerics: WeightNumerics,
        padding_idx: int | None = None,
        tied_to: str | None = None,
    ) -> None:
        super().__init__()
        self.numerics = numerics
        self.num_embeddings, self.embedding_dim = codes.shape
        self.padding_idx = padding_idx
        self.tied_to = tied_to
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.codes[ids] * self.scales[ids]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.numerics.bits}"
