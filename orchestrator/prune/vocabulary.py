"""A smaller vocabulary: the tokens that the training split uses, and those that spell the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from orchestrator.prune.options import num_kept
from orchestrator.signature import Signature
from orchestrator.trial import Frozen

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orchestrator.prune import PruneContext


class SmallerVocabulary:
    """A model that has its smaller vocabulary, and the tokenizer rebuilt for it."""

    masks: Mapping[str, torch.Tensor] = {}

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, before: int, after: int) -> None:
        self.tokenizer = tokenizer
        self._before, self._after = before, after

    def on_step(self, step: int, num_steps: int) -> None:
        """Nothing to put back."""

    def finish(self) -> None:
        """Nothing to finish."""

    def report(self) -> dict[str, Any]:
        """No zeros; how many tokens are left of how many."""
        kept = {"vocabulary": self._after}
        return {
            "sparsity": 0.0,
            "kept": kept,
            "vocabulary_sparsity": 1 - self._after / self._before,
        }


class Vocabulary(Frozen):
    """Keep `vocab_size` tokens, or all but a share `sparsity` of them.

    Special tokens stay, and whatever is needed to encode any text that could be encoded before;
    the rest are the most frequent in the training split. Words whose tokens went are spelled in
    shorter pieces.
    """

    method: Literal["vocabulary"] = "vocabulary"
    vocab_size: int | None = Field(None, ge=1)
    sparsity: float | None = Field(None, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if (self.vocab_size is None) == (self.sparsity is None):
            raise ValueError(
                "give either `vocab_size` or `sparsity`, but got "
                f"vocab_size={self.vocab_size}, sparsity={self.sparsity}"
            )
        return self

    def plan(self, signature: Signature) -> Signature:
        """Shapes with fewer rows. Raises `Infeasible` for more tokens than there are."""
        before = signature.counts["vocabulary"]
        after = self.vocab_size or num_kept(before, self.sparsity or 0.0)
        return signature.keep({"vocabulary": after})

    def start(self, model: PreTrainedModel, context: PruneContext) -> SmallerVocabulary:
        """Choose tokens, rebuild the tokenizer, and take the other rows out.

        Raises `Infeasible` where fewer tokens are asked for than encoding any text needs.
        """
        from orchestrator.prune.tokens import choose_tokens, rebuild_tokenizer
        from orchestrator.prune.tree import read_signature, referenced_tokens, shrink

        signature = read_signature(model)
        order = choose_tokens(
            context.tokenizer,
            context.texts(),
            size=self.plan(signature).counts["vocabulary"],
            num_rows=signature.counts["vocabulary"],
            needed=referenced_tokens(model),
        )
        shrink(model, {"vocabulary": order})
        return SmallerVocabulary(
            rebuild_tokenizer(context.tokenizer, order),
            before=signature.counts["vocabulary"],
            after=len(order),
        )
