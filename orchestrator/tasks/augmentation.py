"""Made-up training rows for a teacher to answer: Tang et al. 2019 (arXiv:1903.12136).

A student of a few thousand labelled rows sees the teacher at too few places; sentences that are
cut, joined, masked and reworded show it more of what the teacher does.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from pydantic import Field

from orchestrator.tasks import Rows
from orchestrator.trial import Frozen


class Augmentation(Frozen):
    """How `copies` of each row are changed.

    With probability `cut` only a part of it is kept, with `join` a part of another row follows a
    part of it; then each word is masked with probability `mask`, or replaced by one of its
    neighbours in the base model's embedding with probability `replace`.
    """

    copies: int = Field(10, gt=0)
    cut: float = Field(0.25, ge=0, le=1)
    join: float = Field(0.1, ge=0, le=1)
    mask: float = Field(0.1, ge=0, le=1)
    replace: float = Field(0.2, ge=0, le=1)


def augment(
    rows: Rows,
    options: Augmentation,
    *,
    neighbours: Mapping[str, Sequence[str]],
    mask_token: str | None,
    seed: int,
) -> list[tuple[str, ...]]:
    """`options.copies` changed texts a row, copy by copy; words are what white space parts.

    A tokenizer without a mask token masks nothing; a word without neighbours stays.
    """
    rng = random.Random(seed)
    sentences = [[part.split() for part in text] for text in rows.texts]
    changed = []
    for _ in range(options.copies):
        for parts in sentences:
            other = rng.choice(sentences)
            changed.append(
                tuple(
                    " ".join(
                        _reword(
                            _recut(words, other[place], options, rng),
                            options,
                            neighbours,
                            mask_token,
                            rng,
                        )
                    )
                    for place, words in enumerate(parts)
                )
            )
    return changed


def _recut(
    words: list[str], other: list[str], options: Augmentation, rng: random.Random
) -> list[str]:
    """A part of the words, parts of two rows, or the words themselves."""
    if rng.random() < options.cut and len(words) > 3:
        return _part(words, rng, shortest=2)
    if rng.random() < options.join:
        return _part(words, rng) + _part(other, rng)
    return words


def _part(words: list[str], rng: random.Random, *, shortest: int = 1) -> list[str]:
    if len(words) <= shortest:
        return words
    length = rng.randint(shortest, len(words))
    start = rng.randint(0, len(words) - length)
    return words[start : start + length]


def _reword(
    words: list[str],
    options: Augmentation,
    neighbours: Mapping[str, Sequence[str]],
    mask_token: str | None,
    rng: random.Random,
) -> list[str]:
    reworded = []
    for word in words:
        dice = rng.random()
        if dice < options.mask:
            word = mask_token or word
        elif dice < options.mask + options.replace:
            word = rng.choice(neighbours.get(word.lower()) or [word])
        reworded.append(word)
    return reworded
