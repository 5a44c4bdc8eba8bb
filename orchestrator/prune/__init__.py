"""HOW weights go. One file a method; this file holds the contract and the catalog.

To add a method: write one frozen pydantic class that has the members of `PruneMethod` in a
new file here, and give it a line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.plugins import build
from orchestrator.prune.magnitude import Magnitude
from orchestrator.prune.n_m import NM
from orchestrator.prune.none import NoPruning
from orchestrator.prune.structured import Structured
from orchestrator.prune.threshold import Threshold
from orchestrator.prune.vocabulary import Vocabulary
from orchestrator.signature import Signature

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Batch = dict[str, torch.Tensor]
    Scores = dict[str, torch.Tensor]
    Once = Callable[[PreTrainedModel, dict[str, Any], Callable[[], Scores]], Scores]


def compute_anew(
    model: PreTrainedModel, inputs: dict[str, Any], compute: Callable[[], Scores]
) -> Scores:
    """Share nothing, as for weights that no other trial will have."""
    return compute()


@dataclass(kw_only=True)
class PruneContext:
    """What a method may look at: the training split and nothing else.

    `texts` yields raw training texts, `batches(n)` yields n encoded training batches on the
    model's device, `loss(model, batch)` is the task's mean loss. All methods of a trial share one
    context, whose `tokenizer`, of which batches are made, is always the last one that was rebuilt.
    `once(model, inputs, compute)` gives what `compute` finds by the name of a weight, which trials
    that look at the same weights with the same `inputs` share.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Callable[[], Iterator[str]]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[PreTrainedModel, Batch], torch.Tensor]
    seed: int
    once: Once = compute_anew


class Pruning(Protocol):
    """A method at work on one model.

    `on_step(step, num_steps)` is called with the steps taken before the first optimizer step and
    with k after the k-th; masks are put back there, gradual schedules move there. Where the first
    call is not for 0, training goes on: what was masked is zero. `finish()` makes the
    sparsity final: after it no mask is needed and structured tensors have their final shapes.
    `tokenizer` is set when the method rebuilt it (vocabulary), else None. `masks` are the factors,
    0 or 1, that hold until the next step, by weight name; each broadcasts to its weight.
    `report()` says what was reached, as JSON values ({"sparsity": 0.5, ...}).
    """

    tokenizer: PreTrainedTokenizerBase | None

    @property
    def masks(self) -> Mapping[str, torch.Tensor]: ...

    def on_step(self, step: int, num_steps: int) -> None: ...
    def finish(self) -> None: ...
    def report(self) -> dict[str, Any]: ...


class PruneMethod(Protocol):
    """A frozen pydantic class: its fields are the options a recipe may set.

    `plan` computes the shapes that will come out, with numpy alone, and raises `Infeasible`;
    `start` prunes (or begins to prune) `model` in place.
    """

    method: str

    def plan(self, signature: Signature) -> Signature: ...
    def start(self, model: PreTrainedModel, context: PruneContext) -> Pruning: ...


METHODS: dict[str, type[PruneMethod]] = {
    "none": NoPruning,
    "threshold": Threshold,
    "magnitude": Magnitude,
    "n_m": NM,
    "structured": Structured,
    "vocabulary": Vocabulary,
}


def load_methods(sections: Iterable[Mapping[str, Any]]) -> list[PruneMethod]:
    """The methods that a configuration's `prune` lists, in the order they are applied."""
    return [build(METHODS, section, key="method", what="pruning method") for section in sections]
