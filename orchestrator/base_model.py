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

from orchestrator.recipe import ModelOptions
from orchestrator.stages import file_sha256
from orchestrator.tasks import Task
from orchestrator.trial import BadInput, content_hash

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

    Raises `BadInput` for a model that does not exist, asks for remote code, or was fine-tuned on
    other labels than the data's.
    """
    tokenizer = load_tokenizer(options, texts)
    config = load_config(options, tokenizer, labels)
    torch.manual_seed(seed)
    auto = task.auto_class()
    if options.config is not None:
        model = auto.from_config(config, attn_implementation="sdpa")
    else:
        model = auto.from_pretrained(
            options.name,
            config=config,
            revision=options.revision,
            dtype=torch.float32,
            trust_remote_code=options.trust_remote_code,
            ignore_mismatched_sizes=not options.finetuned,  # a head for other labels is made anew
        )
    _fit(tokenizer, model)
    return Base(model.eval(), tokenizer, source_of(options, config))


def load_config(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase | None, labels: Sequence[str]
) -> PretrainedConfig:
    """The model's config with the task's label names; token ids follow the tokenizer for a new model."""
    if options.config is not None:
        values = dict(options.config)
        if tokenizer is not None:
            values |= _token_ids(tokenizer)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    else:
        config = _pretrained_config(options)
    if options.finetuned:
        _check_labels(options, config, labels)
    elif labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    if config.pad_token_id is None and tokenizer is not None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def load_tokenizer(options: ModelOptions, texts: Iterator[str]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or a byte-level BPE trained on `texts` for a model from scratch."""
    if isinstance(options.tokenizer, str) or options.tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(
            options.tokenizer or options.name,
            revision=None if options.tokenizer else options.revision,
            trust_remote_code=options.trust_remote_code,
        )
    else:
        tokenizer = train_tokenizer(texts, vocab_size=options.tokenizer.vocab_size)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def _pretrained_config(options: ModelOptions) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            options.name, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except ValueError as error:
        if "trust_remote_code" in str(error):
            problem = (
                f"model.name: {options.name} needs code of its own to run; read that code, then"
                " set model.trust_remote_code: true, or choose another model."
            )
            raise BadInput([problem]) from error
        raise BadInput([f"model.name: {options.name} cannot be used: {error}"]) from error
    except OSError as error:
        problem = f"model.name: {options.name} is neither a folder nor a model that a hub gave: "
        raise BadInput([problem + str(error).splitlines()[0]]) from error


def _token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _check_labels(options: ModelOptions, config: PretrainedConfig, labels: Sequence[str]) -> None:
    """A model that is fine-tuned already must give the data's labels, in whatever case, in their order."""
    if not labels:
        return
    own = [str(config.id2label[index]) for index in range(config.num_labels)]
    if [name.lower() for name in own] != [name.lower() for name in labels]:
        raise BadInput(
            [
                f"model {options.name} was fine-tuned for the labels {own}, but the data have"
                f" {list(labels)}; name them alike and in that order with task.label_map, or set"
                " model.finetuned: false to train a new head."
            ]
        )


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
