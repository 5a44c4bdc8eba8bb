"""Made-up rows are the same for the same seed, and change as much as they are told to."""

from __future__ import annotations

import pytest
import tiny_models
import tiny_tokenizers
import torch
from pydantic import ValidationError

from orchestrator.base_model import neighbours, whole_words
from orchestrator.tasks import Rows
from orchestrator.tasks.augmentation import Augmentation, augment

TEXTS = [("one two three four five six",), ("red green blue cyan pink",), ("so it goes",)]
ROWS = Rows(ids=["a", "b", "c"], texts=TEXTS, labels=[0, 1, 0])
STILL = {"cut": 0.0, "join": 0.0, "mask": 0.0, "replace": 0.0}


def made_up(rows: Rows = ROWS, *, seed: int = 0, copies: int = 30, **options: float):
    return augment(
        rows,
        Augmentation(copies=copies, **(STILL | options)),
        neighbours={"two": ["deux"], "blue": ["bleu"]},
        mask_token="[MASK]",
        seed=seed,
    )


def words_of(texts: list[tuple[str, ...]]) -> set[str]:
    return {word for text in texts for part in text for word in part.split()}


def test_copies_come_one_after_the_other_and_change_nothing_by_themselves() -> None:
    assert made_up(copies=2) == TEXTS + TEXTS


def test_the_same_seed_makes_the_same_rows_and_another_others() -> None:
    options = {"cut": 0.5, "join": 0.5, "mask": 0.2, "replace": 0.2}
    assert made_up(**options) == made_up(**options) != made_up(seed=1, **options)


def test_cut_rows_are_parts_of_their_own() -> None:
    for number, (text,) in enumerate(made_up(cut=1.0)):
        (original,) = TEXTS[number % 3]
        assert text in original and len(text.split()) >= 2
    assert {text for (text,) in made_up(cut=1.0)} > {text for (text,) in TEXTS}


def test_joined_rows_are_a_part_of_their_own_and_a_part_of_any() -> None:
    for number, (text,) in enumerate(made_up(join=1.0)):
        (original,) = TEXTS[number % 3]
        parts = text.split()
        assert any(
            " ".join(parts[:cut]) in original
            and any(" ".join(parts[cut:]) in other for (other,) in TEXTS)
            for cut in range(1, len(parts))
        )


def test_words_are_masked_and_replaced_as_often_as_asked() -> None:
    changed = [text.split() for (text,) in made_up(copies=300, mask=0.3)]
    share = sum(word == "[MASK]" for text in changed for word in text) / sum(map(len, changed))
    assert 0.25 < share < 0.35
    assert {"deux", "bleu"} <= words_of(made_up(replace=1.0))
    assert "two" not in words_of(made_up(replace=1.0)) and "red" in words_of(made_up(replace=1.0))


def test_without_a_mask_token_nothing_is_masked() -> None:
    options = Augmentation(copies=2, **(STILL | {"mask": 1.0}))
    assert augment(ROWS, options, neighbours={}, mask_token=None, seed=0) == TEXTS + TEXTS


def test_both_sentences_of_a_pair_are_changed_apart() -> None:
    pairs = Rows(ids=["a", "b"], texts=[("one two", "uno dos"), ("red green", "rojo verde")])
    for first, second in made_up(pairs, join=1.0):
        assert words_of([(first,)]) <= {"one", "two", "red", "green"}
        assert words_of([(second,)]) <= {"uno", "dos", "rojo", "verde"}


@pytest.mark.parametrize("options", [{"copies": 0}, {"cut": 1.5}, {"mask": -0.1}, {"copy": 3}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Augmentation(**options)


def test_the_neighbours_of_a_word_are_the_words_nearest_to_it() -> None:
    tokenizer = tiny_tokenizers.wordpiece()
    model = tiny_models.make("bert", vocab_size=len(tokenizer))
    words = whole_words(tokenizer)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[words["nobody"]] = table[words["expected"]] + 0.01
    near = neighbours(model, tokenizer, {"nobody", "expected", "nowhere"}, count=3)
    assert set(near) == {"nobody", "expected"}
    assert near["nobody"][0] == "expected" and near["expected"][0] == "nobody"
    assert all(len(found) == 3 and set(found) <= set(words) for found in near.values())


@pytest.mark.parametrize(
    "make", [tiny_tokenizers.byte_level_bpe, tiny_tokenizers.sentencepiece_bpe]
)
def test_pieces_inside_of_words_are_no_words(make) -> None:
    tokenizer = make()
    words = whole_words(tokenizer)
    assert "nobody" in words and "dog" in words
    assert all(w.isalpha() for w in words)
    pieces = {t for t in tokenizer.get_vocab() if t.isascii() and t.isalpha() and len(t) > 1}
    assert pieces - set(words)
    for word, token in words.items():
        assert tokenizer.decode([token]).strip() == word
