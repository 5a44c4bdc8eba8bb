"""The model and tokenizer a study starts from: a hub id, a folder, or a config to train from scratch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from orchestrator import base_model_checks as checks
from orchestrator.problems import raise_if
from orchestrator.recipe import ModelOptions, TokenizerOptions
from orchestrator.stages import file_sha256
from orchestrator.tasks import Task
from orchestrator.trial import content_hash

SOURCE_FILES = ("config.json", "*.safetensors", "*.bin")  # what a model's numbers hang on


@dataclass(frozen=True)
class Base:
    """A model as it was found, before any training here. `source` pins what it was."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: dict[str, Any]


def load_base(
    options: ModelOptions, task: Task, *, texts: Iterator[str], labels: Sequence[str], seed: int
) -> Base:
    """Load, or create, the base model with a head for the task's labels.

    Raises `BadInput` for a model that does not exist, asks for remote code, does not fit the task,
    or was fine-tuned on other labels than the data's.
    """
    raise_if(checks.source_problems(options))
    tokenizer = load_tokenizer(options, texts)
    config = load_config(options, tokenizer, labels)
    torch.manual_seed(seed)
    with checks.refusals(checks.place_of(options), options.name):
        model = _load_model(options, task, config, new_head=bool(labels) and not options.finetuned)
    checks.check_tokenizer(options, tokenizer, model)
    checks.check_kind(options, task, model)
    _fit(tokenizer, model)
    return Base(model, tokenizer, source_of(options, config))


def _load_model(
    options: ModelOptions, task: Task, config: PretrainedConfig, *, new_head: bool
) -> PreTrainedModel:
    """The model in evaluation mode; a head of other labels is left out for a new one."""
    auto = task.auto_class()
    if options.config is not None:
        return auto.from_config(config, attn_implementation="sdpa").eval()
    model, info = auto.from_pretrained(
        options.name,
        config=config,
        revision=options.revision,
        dtype=torch.float32,
        trust_remote_code=options.trust_remote_code,
        ignore_mismatched_sizes=True,  # so that they can be told from a head's
        output_loading_info=True,
    )
    checks.check_weights(options, model, info, new_head=new_head)
    return model.eval()


def load_config(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase | None, labels: Sequence[str]
) -> PretrainedConfig:
    """The model's config with the task's label names; token ids follow the tokenizer for a new model."""
    if options.config is not None:
        checks.check_config_keys(options.config)
    with checks.refusals(checks.place_of(options), options.name):
        config = _own_config(options, tokenizer)
    if options.finetuned:
        checks.check_labels(options, config, labels)
    elif labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    if config.pad_token_id is None and tokenizer is not None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _own_config(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase | None
) -> PretrainedConfig:
    if options.config is None:
        return AutoConfig.from_pretrained(
            options.name, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    values = dict(options.config)
    if tokenizer is not None:
        values |= _token_ids(tokenizer)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def load_tokenizer(options: ModelOptions, texts: Iterator[str]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or a byte-level BPE trained on `texts` for a model from scratch."""
    if isinstance(options.tokenizer, TokenizerOptions):
        tokenizer = train_tokenizer(texts, vocab_size=options.tokenizer.vocab_size)
    else:
        tokenizer = _pretrained_tokenizer(options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _pretrained_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    assert not isinstance(options.tokenizer, TokenizerOptions)
    name = options.tokenizer or options.name
    revision = None if options.tokenizer else options.revision
    with checks.refusals(f"model.{'tokenizer' if options.tokenizer else 'name'}: {name}", name):
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=options.trust_remote_code
        )


def _fit(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Let the tokenizer, and whoever loads it later, give what the model takes and no more."""
    longest = num_positions(model) or tokenizer.model_max_length
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in tokenizer.model_input_names if name in accepted]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names


def train_tokenizer(texts: Iterator[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens (Sennrich et al. 2016) with one special token, the end of text."""
    from tokenizers import ByteLevelBPETokenizer

    end = "<|endoftext|>"
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=[end], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer, eos_token=end, bos_token=end, pad_token=end
    )


def source_of(options: ModelOptions, config: PretrainedConfig) -> dict[str, Any]:
    """What pins the base model: a commit of the hub, the hashes of a folder's files, or a config."""
    if options.config is not None:
        return {"config": options.config}
    folder = Path(options.name or "")
    if folder.is_dir():
        files = sorted(path for pattern in SOURCE_FILES for path in folder.glob(pattern))
        return {"name": folder.name, "sha256": {path.name: file_sha256(path) for path in files}}
    return {"name": options.name, "revision": getattr(config, "_commit_hash", options.revision)}


def _token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest input of a model with learned positions; None for one without."""
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", "wpe")):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    return None


def neighbours(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    words: Collection[str],
    *,
    count: int = 15,
) -> dict[str, list[str]]:
    """For each of `words` that is a token the `count` whole words nearest by cosine of its embedding."""
    table = model.get_input_embeddings().weight.detach().float()
    known = whole_words(tokenizer)
    names = list(known)
    rows = table[list(known.values())]
    vectors = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    asked = [place for place, name in enumerate(names) if name in words]
    near: dict[str, list[str]] = {}
    for places in torch.tensor(asked, dtype=torch.long).split(256):
        similar = vectors[places] @ vectors.T
        best = similar.topk(min(count + 1, len(names)), dim=1).indices.tolist()
        for place, found in zip(places.tolist(), best, strict=True):
            near[names[place]] = [names[i] for i in found if i != place][:count]
    return near


def whole_words(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that are a word by themselves, without the mark that some tokenizers put before one."""
    vocabulary = tokenizer.get_vocab()
    marks = ("\u0120", "\u2581")  # of byte-level BPE and of SentencePiece
    mark = next((m for m in marks if any(t.startswith(m) for t in vocabulary)), "")
    words = {t.removeprefix(mark): i for t, i in vocabulary.items() if t.startswith(mark)}
    return {w: i for w, i in words.items() if len(w) > 1 and w.isascii() and w.isalpha()}


@lru_cache(maxsize=16)
def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that encode alike; what the last call set (truncation, padding) is not part."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return content_hash({k: v for k, v in state.items() if k not in ("truncation", "padding")})
