"""Activation checkpointing: a layer keeps its input alone, and computes again in the backward pass.

Chen et al. 2016 (https://arxiv.org/abs/1604.06174). Memory for activations becomes that of one
layer and the inputs of all; a step computes about a third more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from orchestrator.trial import Infeasible

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_recomputes(model: PreTrainedModel) -> None:
    """Raise `Infeasible` for a model whose layers cannot compute again."""
    if not model.supports_gradient_checkpointing:
        raise Infeasible(
            f"finetune.gradient_checkpointing: a {type(model).__name__} cannot compute its layers"
            " again; leave it out, or choose another model"
        )


@contextmanager
def recomputed(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Inside, layers compute again in the backward pass, if that is `wanted`. Raises `Infeasible`.

    Each of them draws the same dropout again, and every rank takes the same layers in the same
    order, so that what ranks do together in a layer (one activation scale over all of their rows)
    they do together again.
    """
    if not wanted:
        yield
        return
    check_recomputes(model)
    _enable(model)
    try:
        yield
    finally:
        _disable(model)


def _enable(model: PreTrainedModel) -> None:
    # The reentrant kind would drop gradients where a layer's input has none (frozen embeddings).
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers' newer name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def _disable(model: PreTrainedModel) -> None:
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
    model.disable_input_require_grads()  # hooks on embeddings that the former leave
    for module in model.modules():
        vars(module).pop("_gradient_checkpointing_func", None)
