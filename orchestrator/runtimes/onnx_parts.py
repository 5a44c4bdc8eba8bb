"""What a model is exported as: for each graph its file, its computation and its inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

Kind = Literal["encoder", "decoder", "encoder_decoder"]


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; a named axis is free, a number is fixed."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    @property
    def free_axes(self) -> dict[int, str]:
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}


class GraphModule(nn.Module):
    """A model as a function of tensors.

    Transformers builds attention masks from dozens of small operators. Where every layer attends
    to all tokens, one mask made here serves them all: `own_mask`.
    """

    def __init__(self, model: PreTrainedModel, *, own_mask: bool = False) -> None:
        super().__init__()
        self.model = model
        self.own_mask = own_mask


@dataclass(frozen=True)
class Part:
    """One graph of a model; `module.forward` takes `inputs` in order and returns `outputs`."""

    file: str
    module: GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class EncoderGraph(GraphModule):
    """Token ids to class logits; `names` are the model's keyword arguments, in order.

    ONNX wants rotary angles for every row: `own_positions` gives positions to models that have them.
    """

    def __init__(
        self, model: PreTrainedModel, *, names: Sequence[str], own_mask: bool, own_positions: bool
    ) -> None:
        super().__init__(model, own_mask=own_mask)
        self.names = names
        self.own_positions = own_positions

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        inputs = dict(zip(self.names, tensors, strict=True))
        if self.own_mask:
            mask = inputs["attention_mask"].bool()
            inputs["attention_mask"] = mask[:, None, None].expand(-1, -1, mask.shape[1], -1)
        if self.own_positions:
            ids = inputs["input_ids"]
            inputs["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
        return self.model(**inputs).logits


class DecoderGraph(GraphModule):
    """Token ids with the keys and values of earlier tokens to logits and all keys and values.

    One graph serves the prompt, whose past has length 0, and every token after it.
    """

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        if self.own_mask:
            positions = torch.arange(input_ids.shape[1]) + past[0].shape[2]
            causal = torch.arange(attention_mask.shape[1]) <= positions[:, None]
            attention_mask = causal[None, None] & attention_mask[:, None, None].bool()
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers = output.past_key_values.layers
        return output.logits, *(side for layer in layers for side in (layer.keys, layer.values))


class SourceGraph(GraphModule):
    """The encoder of an encoder-decoder: token ids to hidden states."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        encoder = self.model.get_encoder()
        return encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class TargetGraph(GraphModule):
    """The decoder of an encoder-decoder: all target ids so far to their logits, without a cache."""

    def forward(
        self,
        decoder_input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        return self.model(
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=(hidden_states,),
            attention_mask=attention_mask,
            use_cache=False,
        ).logits


def parts(model: PreTrainedModel, kind: Kind) -> list[Part]:
    """The graphs that serve `model`, which is in floating point."""
    makers = {"encoder": _encoder, "decoder": _decoder, "encoder_decoder": _encoder_decoder}
    return makers[kind](model)


def example(part: Part, sizes: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
    """Random inputs of the given sizes; where there are several rows, the last ends in padding."""
    sizes = {**sizes, "total": sizes["past"] + sizes["length"]}
    generator = torch.Generator().manual_seed(0)
    return tuple(_random_input(part, port, sizes, generator) for port in part.inputs)


def _random_input(
    part: Part, port: Port, sizes: Mapping[str, int], generator: torch.Generator
) -> torch.Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in port.shape]
    if port.name == "attention_mask":
        mask = torch.ones(shape, dtype=port.dtype)
        mask[1:][-1:, -2:] = 0
        return mask
    if port.name == "position_ids":
        return torch.arange(sizes["past"], sizes["total"]).repeat(shape[0], 1)
    if port.dtype == torch.float32:
        return torch.randn(shape, generator=generator)
    vocabulary = part.module.model.get_input_embeddings().weight.shape[0]
    high = 2 if port.name == "token_type_ids" else vocabulary
    return torch.randint(high, shape, generator=generator)


def _encoder(model: PreTrainedModel) -> list[Part]:
    accepted = inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    rotary = any(name.endswith("rotary_emb") for name, _ in model.named_modules())
    module = EncoderGraph(
        model,
        names=names,
        own_mask=_attends_to_all(model) and not causal,
        own_positions=rotary and "position_ids" in accepted,
    )
    logits = Port("logits", torch.float32, ("batch", model.config.num_labels))
    return [Part("model.onnx", module, tuple(_tokens(name) for name in names), (logits,))]


def _decoder(model: PreTrainedModel) -> list[Part]:
    inputs = [_tokens("input_ids"), _tokens("attention_mask", "total"), _tokens("position_ids")]
    outputs = [_logits_of_tokens(model)]
    for layer, (num_heads, head_dim) in enumerate(_cache_shapes(model)):
        for side in ("key", "value"):
            past, total = (("batch", num_heads, axis, head_dim) for axis in ("past", "total"))
            inputs.append(Port(f"past_key_values.{layer}.{side}", torch.float32, past))
            outputs.append(Port(f"present.{layer}.{side}", torch.float32, total))
    module = DecoderGraph(model, own_mask=_attends_to_all(model))
    return [Part("model.onnx", module, tuple(inputs), tuple(outputs))]


def _encoder_decoder(model: PreTrainedModel) -> list[Part]:
    ids, mask = _tokens("input_ids", "source"), _tokens("attention_mask", "source")
    hidden = Port("hidden_states", torch.float32, ("batch", "source", model.config.hidden_size))
    target = _tokens("decoder_input_ids"), hidden, mask
    return [
        Part("encoder.onnx", SourceGraph(model), (ids, mask), (hidden,)),
        Part("decoder.onnx", TargetGraph(model), target, (_logits_of_tokens(model),)),
    ]


def _tokens(name: str, axis: str = "length") -> Port:
    return Port(name, torch.int64, ("batch", axis))


def _logits_of_tokens(model: PreTrainedModel) -> Port:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return Port("logits", torch.float32, ("batch", "length", vocabulary))


def _cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Key-value heads and head size of every layer, which pruning may have made unequal."""
    token = torch.ones(1, 1, dtype=torch.int64)
    output = model(input_ids=token, attention_mask=token, use_cache=True)
    return [(layer.keys.shape[1], layer.keys.shape[3]) for layer in output.past_key_values.layers]


def _attends_to_all(model: PreTrainedModel) -> bool:
    """Whether one mask serves every layer: no sliding windows or the like."""
    config = model.config
    windows = [getattr(config, name, None) for name in ("sliding_window", "local_attention")]
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return model._supports_sdpa and not any(windows) and types == {"full_attention"}
