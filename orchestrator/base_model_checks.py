"""What is wrong with a base model, found while it is loaded and told as `BadInput`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from orchestrator import hub
from orchestrator.recipe import ModelOptions
from orchestrator.tasks import Task
from orchestrator.trial import BadInput

NOWHERE = (
    "is no folder here, was not downloaded before, and the model hub cannot be reached; name a"
    " folder, or connect to the hub"
)
MAX_REASON = 300  # characters of what a library said
SPECIAL_ONLY = 10  # tokens; what a library makes up where a folder has no tokenizer has fewer
SIMILAR = 0.8  # of two names of options, by difflib's ratio


@contextmanager
def refusals(where: str, name: str | None = None) -> Iterator[None]:
    """Turn whatever a library raises over a model, or over what `name` leads to, into one sentence."""
    here = name is None or Path(name).is_dir() or hub.is_reachable()
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # the libraries raise anything, and here all of it is about input
        raise BadInput([f"{where} {_why(error) if here else NOWHERE}."]) from error


def place_of(options: ModelOptions) -> str:
    """How a sentence about a model begins."""
    return "model.config" if options.config is not None else f"model.name: {options.name}"


def _why(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "needs code of its own to run; read that code, then set model.trust_remote_code: true,"
            " or choose another model"
        )
    if "Unrecognized configuration class" in text:
        kinds = re.findall(r"AutoModelFor\w+", text)
        return f"cannot be used: transformers has no {', '.join(kinds[:1])} of its type"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"cannot be used: {reason[:MAX_REASON].rstrip(' .,;')}"


def source_problems(options: ModelOptions) -> list[str]:
    """What can be said of a model without opening it: paths that lead nowhere, or to something else."""
    named = {"name": options.name}
    if isinstance(options.tokenizer, str):
        named["tokenizer"] = options.tokenizer
    problems = [
        f"model.{key}: there is no folder {name}."
        for key, name in named.items()
        if name and not Path(name).is_dir() and not hub.ID.fullmatch(name)
    ]
    folder = Path(options.name or "")
    if options.name and folder.is_dir() and not (folder / "config.json").exists():
        problems.append(f"model.name: {folder} has no config.json, so it is no model's folder.")
    return problems


def check_config_keys(values: Mapping[str, Any]) -> None:
    """Refuse a `config` of an unknown type, and keys that look like a slip in a known one.

    Other unknown keys pass: a config takes more than it lists.
    """
    model_type = str(values["model_type"])
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=1)
        hint = f"; did you mean `{close[0]}`?" if close else "."
        raise BadInput([f"model.config.model_type names no architecture, got `{model_type}`{hint}"])
    known = AutoConfig.for_model(model_type)
    valid = {*known.to_dict(), *known.attribute_map}
    slips = {
        key: close[0]
        for key in values
        if key not in valid and not hasattr(known, key)
        if (close := difflib.get_close_matches(key, valid, n=1, cutoff=SIMILAR))
    }
    if slips:
        raise BadInput(
            [
                f"model.config.{key} is not an option of {model_type}; did you mean `{meant}`?"
                for key, meant in slips.items()
            ]
        )


def check_labels(options: ModelOptions, config: PretrainedConfig, labels: Sequence[str]) -> None:
    """A model that is fine-tuned already must give the data's labels, in whatever case, in their order."""
    if not labels:
        return
    own = [str(config.id2label[index]) for index in range(config.num_labels)]
    if [name.lower() for name in own] != [name.lower() for name in labels]:
        raise BadInput(
            [
                f"{place_of(options)} was fine-tuned for the labels {', '.join(own)}, but the data"
                f" have {', '.join(labels)}; name them alike and in that order with"
                " task.label_map, or set model.finetuned: false to train a new head."
            ]
        )


def check_weights(
    options: ModelOptions, model: PreTrainedModel, info: Mapping[str, Any], *, new_head: bool
) -> None:
    """Refuse a checkpoint that lacks weights, or has them in other shapes; a new head may be new."""
    missing = set(info["missing_keys"])
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    if new_head:
        backbone = f"{model.base_model_prefix}."
        missing = {name for name in missing if name.startswith(backbone) and "pooler" not in name}
        mismatched = {name for name in mismatched if name.startswith(backbone)}
    told = {"has no weights for": missing, "has weights of other shapes for": mismatched}
    problems = [
        f"{place_of(options)} {what} {len(names)} parts of a {type(model).__name__}, for instance"
        f" {min(names)}; it is no checkpoint of such a model."
        for what, names in told.items()
        if names
    ]
    if problems:
        raise BadInput(problems)


def check_tokenizer(
    options: ModelOptions, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Refuse a tokenizer that knows next to nothing, or more tokens than the model has."""
    where = options.tokenizer if isinstance(options.tokenizer, str) else options.name
    if len(tokenizer) < SPECIAL_ONLY:
        raise BadInput([f"model.tokenizer: {where} has no tokenizer; name one that has."])
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise BadInput(
            [
                f"model.tokenizer: {where} has {len(tokenizer):,} tokens, but the model has"
                f" embeddings for {known:,}; take the tokenizer that belongs to the model."
            ]
        )


def check_kind(options: ModelOptions, task: Task, model: PreTrainedModel) -> None:
    """Refuse a model that is built for another kind of task."""
    both = bool(model.config.is_encoder_decoder)
    if both != (task.kind == "encoder_decoder"):
        what = "an encoder-decoder" if both else "no encoder-decoder"
        raise BadInput([f"{place_of(options)} is {what}, which {task.name} cannot use."])
    if task.kind == "decoder" and _sees_ahead(model):
        raise BadInput(
            [
                f"{place_of(options)} sees the tokens that {task.name} asks it to predict: it is an"
                " encoder; choose a decoder such as gpt2 or llama."
            ]
        )


@torch.no_grad()
def _sees_ahead(model: PreTrainedModel) -> bool:
    """Whether scores depend on tokens that come after them."""
    size = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(8).unsqueeze(0) % size
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + size // 2) % size
    before, after = (model(input_ids=ids).logits[:, :-1] for ids in (tokens, other))
    return not torch.allclose(before, after, atol=1e-4)
