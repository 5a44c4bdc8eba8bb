"""Choosing the tokens of a smaller vocabulary, and rebuilding a tokenizer from them.

Both work on the JSON of the `tokenizers` library, for WordPiece, BPE and Unigram models.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from orchestrator.trial import Infeasible

State = dict[str, Any]
"""tokenizer.json as plain data."""


def choose_tokens(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    size: int,
    num_rows: int,
    needed: Iterable[int] = (),
) -> list[int]:
    """The ids of `size` kept tokens out of `num_rows` embedding rows, in the order of their new ids.

    Special tokens, `needed` ids and whatever spells the rest always stay, then the most frequent
    in `texts`. Special tokens keep their id where it is below `size`. Raises `Infeasible` where
    `size` is too small, or the tokenizer is of another kind.
    """
    assert size <= num_rows
    state = _state(tokenizer)
    ids = _ids(state)
    if max(ids.values()) >= num_rows:
        raise Infeasible(f"the tokenizer has id {max(ids.values())}, the model {num_rows} rows")
    parts = _parts(state, ids)
    special = {token["id"] for token in state["added_tokens"]}
    kept = set(special)
    for token in (*needed, *_alphabet(state, ids)):
        kept |= _closure(token, parts, kept)
    if len(kept) > size:
        raise Infeasible(
            f"vocab_size {size} is too small: {len(kept)} tokens are needed to encode any text"
        )
    counts = _count(state, texts)
    known = set(ids.values())
    ranking = sorted(range(num_rows), key=lambda t: (-counts[t], t not in known, t))
    _fill(kept, ranking, parts=parts, size=size)
    return _order(kept, fixed=special)


def rebuild_tokenizer(
    tokenizer: PreTrainedTokenizerBase, order: Sequence[int]
) -> PreTrainedTokenizerBase:
    """A tokenizer with only the tokens `order`, whose position is their new id."""
    state = _state(tokenizer)
    renumbered = {old: new for new, old in enumerate(order)}
    kept = {token: renumbered[old] for token, old in _ids(state).items() if old in renumbered}
    kept = dict(sorted(kept.items(), key=lambda item: item[1]))
    _REBUILD[state["model"]["type"]](state["model"], kept)
    for token in state["added_tokens"]:
        token["id"] = kept[token["content"]]
    state["added_tokens"].sort(key=lambda token: token["id"])
    _renumber(state.get("post_processor"), kept)
    rebuilt = copy.deepcopy(tokenizer)
    rebuilt.init_kwargs.pop("added_tokens_decoder", None)
    rebuilt._tokenizer = Tokenizer.from_str(json.dumps(state))
    return rebuilt


def _state(tokenizer: PreTrainedTokenizerBase) -> State:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise Infeasible(f"{type(tokenizer).__name__} has no `tokenizers` backend to rebuild")
    state = json.loads(backend.to_str())
    if state["model"]["type"] not in _REBUILD:
        raise Infeasible(f"no {state['model']['type']} tokenizers; known: {list(_REBUILD)}")
    return {**state, "truncation": None, "padding": None}


def _ids(state: State) -> dict[str, int]:
    """Ids of all tokens, added ones too."""
    vocab = state["model"]["vocab"]
    if isinstance(vocab, list):
        vocab = {piece: index for index, (piece, _) in enumerate(vocab)}
    return vocab | {token["content"]: token["id"] for token in state["added_tokens"]}


def _alphabet(state: State, ids: Mapping[str, int]) -> Iterator[int]:
    """The tokens that cannot be spelled by others."""
    model = state["model"]
    if model.get("unk_token") in ids:
        yield ids[model["unk_token"]]
    if model["type"] == "BPE":
        merged = _parts(state, ids)
        yield from (token for token in ids.values() if token not in merged)
        return
    if model.get("unk_id") is not None:
        yield model["unk_id"]
    prefix = model.get("continuing_subword_prefix", "")
    for piece, token in ids.items():
        characters = _characters(piece, prefix)
        if len(characters) == 1 or any(character not in ids for character in characters):
            yield token


def _characters(piece: str, prefix: str) -> list[str]:
    """The shortest pieces that spell `piece`: its characters, each marked as it stands in a word."""
    inside = bool(prefix) and piece.startswith(prefix) and piece != prefix
    first = piece[: len(prefix) + 1] if inside else piece[:1]
    return [first, *(prefix + character for character in piece[len(first) :])]


def _parts(state: State, ids: Mapping[str, int]) -> dict[int, tuple[int, int]]:
    """The two tokens that the first merge which gives a token joins; empty but for BPE."""
    parts: dict[int, tuple[int, int]] = {}
    for left, right in _merges(state["model"]):
        merged = ids[_merged(state["model"], left, right)]
        parts.setdefault(merged, (ids[left], ids[right]))
    return parts


def _merges(model: State) -> Iterator[tuple[str, str]]:
    for merge in model.get("merges", ()):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _merged(model: State, left: str, right: str) -> str:
    return left + right.removeprefix(model["continuing_subword_prefix"] or "")


def _closure(token: int, parts: Mapping[int, tuple[int, int]], kept: set[int]) -> set[int]:
    """A token and all that it is merged from, without what is kept already."""
    found: set[int] = set()
    waiting = [token]
    while waiting:
        token = waiting.pop()
        if token not in kept and token not in found:
            found.add(token)
            waiting += parts.get(token, ())
    return found


def _fill(
    kept: set[int], ranking: Sequence[int], *, parts: Mapping[int, tuple[int, int]], size: int
) -> None:
    """Add tokens in the order of `ranking`, each with its parts, to exactly `size`."""
    while len(kept) < size:  # a token that did not fit may do so once its parts are in
        for token in ranking:
            chain = _closure(token, parts, kept)
            if len(kept) + len(chain) <= size:
                kept |= chain
            if len(kept) == size:
                break


def _order(kept: set[int], *, fixed: set[int]) -> list[int]:
    """Kept ids in the order of their new ids: as before, but `fixed` ids that fit do not move."""
    places = {token for token in fixed if token < len(kept)}
    others = iter(sorted(kept - places))
    return [index if index in places else next(others) for index in range(len(kept))]


def _count(state: State, texts: Iterable[str]) -> Counter[int]:
    """How often each token comes up in `texts`."""
    backend = Tokenizer.from_str(json.dumps(state))
    counts: Counter[int] = Counter()
    rest = iter(texts)
    while chunk := list(islice(rest, 1000)):
        for encoding in backend.encode_batch_fast(chunk, add_special_tokens=False):
            counts.update(encoding.ids)
    return counts


def _rebuild_wordpiece(model: State, kept: dict[str, int]) -> None:
    model["vocab"] = kept


def _rebuild_bpe(model: State, kept: dict[str, int]) -> None:
    model["merges"] = [
        [left, right]
        for left, right in _merges(model)
        if {left, right, _merged(model, left, right)} <= kept.keys()
    ]
    model["vocab"] = kept


def _rebuild_unigram(model: State, kept: dict[str, int]) -> None:
    scores = dict(model["vocab"])
    unlikely = min(scores.values()) - 10.0  # added tokens are found before the model is asked
    if model["unk_id"] is not None:
        model["unk_id"] = kept[model["vocab"][model["unk_id"]][0]]
    model["vocab"] = [[piece, scores.get(piece, unlikely)] for piece in kept]


_REBUILD: dict[str, Callable[[State, dict[str, int]], None]] = {
    "WordPiece": _rebuild_wordpiece,
    "BPE": _rebuild_bpe,
    "Unigram": _rebuild_unigram,
}


def _renumber(processor: State | None, kept: Mapping[str, int]) -> None:
    """Write the new ids into a post-processor, which adds special tokens by id."""
    if processor is None:
        return
    for inner in processor.get("processors", ()):
        _renumber(inner, kept)
    for key in ("sep", "cls"):
        if key in processor:
            processor[key] = [processor[key][0], kept[processor[key][0]]]
    for token in dict(processor.get("special_tokens", {})).values():
        token["ids"] = [kept[name] for name in token["tokens"]]
