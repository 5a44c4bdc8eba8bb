"""Tiny random models of every family, and what tests ask of all of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 64

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (
        "AutoModelForSequenceClassification",
        {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4}
        | {"num_hidden_layers": 3, "intermediate_size": 40, "initializer_range": 0.2},
    ),
    "bert_masked_lm": (
        "AutoModelForMaskedLM",
        {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4}
        | {"num_hidden_layers": 3, "intermediate_size": 40, "initializer_range": 0.2},
    ),
    "roberta": (
        "AutoModelForSequenceClassification",
        {"model_type": "roberta", "hidden_size": 32, "num_attention_heads": 4}
        | {"num_hidden_layers": 3, "intermediate_size": 40, "initializer_range": 0.2},
    ),
    "distilbert": (
        "AutoModelForSequenceClassification",
        {"model_type": "distilbert", "dim": 32, "n_heads": 4, "n_layers": 3}
        | {"hidden_dim": 40, "initializer_range": 0.2},
    ),
    "gpt2": (
        "AutoModelForCausalLM",
        {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 3, "n_inner": 40}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2},
    ),
    "llama": (
        "AutoModelForCausalLM",
        {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 8}
        | {"num_key_value_heads": 4, "num_hidden_layers": 3, "intermediate_size": 40}
        | {"tie_word_embeddings": True, "pad_token_id": 0, "initializer_range": 0.2},
    ),
    "llama_untied": (
        "AutoModelForSequenceClassification",
        {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 8}
        | {"num_key_value_heads": 4, "num_hidden_layers": 3, "intermediate_size": 40}
        | {"head_dim": 8, "attention_bias": True, "pad_token_id": 0, "initializer_range": 0.2},
    ),
    "t5": (
        "AutoModelForSeq2SeqLM",
        {"model_type": "t5", "d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 3}
        | {"d_ff": 40, "decoder_start_token_id": 0},
    ),
    "t5_gated": (
        "AutoModelForSeq2SeqLM",
        {"model_type": "t5", "d_model": 32, "d_kv": 6, "num_heads": 4, "num_layers": 3}
        | {"num_decoder_layers": 2, "d_ff": 40, "feed_forward_proj": "gated-gelu"}
        | {"decoder_start_token_id": 0},
    ),
}

DECODERS = ("gpt2", "llama", "t5")


def make(family: str, *, attention: str = "sdpa", **options: Any) -> PreTrainedModel:
    """A model with random weights that depend on nothing but `family`."""
    auto, values = CONFIGS[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{"vocab_size": VOCAB, **values, **options})
    auto_class = getattr(transformers, auto)
    model = auto_class.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero biases would hide mistakes
                parameter.normal_(std=0.1)
    return model


def inputs(model: PreTrainedModel, *, rows: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Token ids without special ones; the last row is padded at its end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids.flip(1)
    return given


@torch.no_grad()
def logits(model: PreTrainedModel, given: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """What the model says about `inputs`."""
    return model(**(given or inputs(model))).logits


def loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Some loss that every weight takes part in."""
    return model(**batch).logits.float().log_softmax(-1)[..., 0].neg().mean()
