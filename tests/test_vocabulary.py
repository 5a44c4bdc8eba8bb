"""A smaller vocabulary encodes any text that the larger one could, with the same vectors."""

from __future__ import annotations

import pytest
import tiny_tokenizers
import torch
from tiny_models import make
from tiny_tokenizers import OTHER_TEXTS, TEXTS
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from orchestrator.prune import PruneContext
from orchestrator.prune.tokens import choose_tokens, rebuild_tokenizer
from orchestrator.prune.tree import config_expresses_shapes, read_signature
from orchestrator.prune.vocabulary import Vocabulary
from orchestrator.trial import Infeasible

KINDS = {
    "bert": tiny_tokenizers.wordpiece,
    "bert_masked_lm": tiny_tokenizers.wordpiece,
    "distilbert": tiny_tokenizers.wordpiece,
    "roberta": lambda: tiny_tokenizers.byte_level_bpe(roberta=True),
    "gpt2": tiny_tokenizers.byte_level_bpe,
    "llama": tiny_tokenizers.sentencepiece_bpe,
    "llama_untied": tiny_tokenizers.byte_level_bpe,
    "t5": tiny_tokenizers.unigram,
}


def _context(tokenizer: PreTrainedTokenizerFast) -> PruneContext:
    def unused(*_):
        raise AssertionError("a vocabulary is chosen from texts alone")

    return PruneContext(
        tokenizer=tokenizer, texts=lambda: iter(TEXTS), batches=unused, loss=unused, seed=0
    )


def _model(family: str, tokenizer: PreTrainedTokenizerFast, *, spare_rows: int = 0):
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    return make(family, vocab_size=len(tokenizer) + spare_rows, **ids)


def _smaller(family: str, *, sparsity: float = 0.15, spare_rows: int = 0):
    tokenizer = KINDS[family]()
    model = _model(family, tokenizer, spare_rows=spare_rows)
    before = {
        "table": model.get_input_embeddings().weight.detach().clone(),
        "scorer": getattr(model.get_output_embeddings(), "weight", torch.empty(0)).clone(),
    }
    pruning = Vocabulary(sparsity=sparsity).start(model, _context(tokenizer))
    return model, tokenizer, pruning.tokenizer, before


@pytest.mark.parametrize("family", KINDS)
def test_text_survives_a_round_trip(family):
    _, old, new, _ = _smaller(family)
    assert len(new) < len(old)
    for text in TEXTS + OTHER_TEXTS:
        expected = old.decode(old(text).input_ids, skip_special_tokens=True)
        assert new.decode(new(text).input_ids, skip_special_tokens=True) == expected
    if family not in ("bert", "bert_masked_lm", "distilbert"):  # these lower-case
        assert expected == text


@pytest.mark.parametrize("family", KINDS)
def test_dropped_words_are_spelled_in_pieces_and_nothing_becomes_unknown(family):
    _, old, new, _ = _smaller(family)
    assert sum(len(new(text).input_ids) for text in OTHER_TEXTS) > sum(
        len(old(text).input_ids) for text in OTHER_TEXTS
    )
    for text in OTHER_TEXTS:
        assert old.unk_token_id not in old(text).input_ids or old.unk_token_id is None
        assert new.unk_token_id not in new(text).input_ids or new.unk_token_id is None


@pytest.mark.parametrize("family", KINDS)
def test_kept_tokens_keep_their_vectors(family):
    model, old, new, before = _smaller(family)
    table = model.get_input_embeddings().weight
    assert len(table) == len(new) == model.config.vocab_size
    for token, index in new.get_vocab().items():
        assert torch.equal(table[index], before["table"][old.get_vocab()[token]])
    scorer = model.get_output_embeddings()
    if scorer is not None:
        assert scorer.weight is table or not model.config.tie_word_embeddings
        moved = [old.get_vocab()[token] for token in new.convert_ids_to_tokens(range(len(new)))]
        assert torch.equal(scorer.weight, before["scorer"][moved])


@pytest.mark.parametrize("family", KINDS)
def test_special_tokens_keep_their_meaning(family):
    model, old, new, _ = _smaller(family)
    for name, token in old.special_tokens_map.items():
        assert new.special_tokens_map[name] == token
    for key in ("pad", "bos", "eos"):
        index = getattr(old, f"{key}_token_id")
        config = getattr(model.config, f"{key}_token_id")
        assert (config is None) == (index is None)
        assert config == getattr(new, f"{key}_token_id")
        if model.can_generate():
            assert getattr(model.generation_config, f"{key}_token_id") in (None, config)
    wanted = old.tokenize("a dog", "the fox", add_special_tokens=True)
    special = [token for token in wanted if token in old.all_special_tokens]
    got = new.tokenize("a dog", "the fox", add_special_tokens=True)
    assert [token for token in got if token in new.all_special_tokens] == special
    padding = model.get_input_embeddings().padding_idx
    assert padding is None or padding == new.pad_token_id


@pytest.mark.parametrize("family", KINDS)
def test_the_rebuilt_tokenizer_is_the_same_after_saving(family, tmp_path):
    _, _, new, _ = _smaller(family)
    new.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in OTHER_TEXTS:
        assert loaded(text).input_ids == new(text).input_ids
    assert loaded.get_vocab() == new.get_vocab()


@pytest.mark.parametrize("family", KINDS)
def test_a_text_of_kept_tokens_gives_the_same_logits(family):
    tokenizer = KINDS[family]()
    model = _model(family, tokenizer)
    text = "the dog"
    given = dict(tokenizer(text, return_tensors="pt"))
    given.pop("token_type_ids", None)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"]
    with torch.no_grad():
        before = model(**given).logits
        new = Vocabulary(sparsity=0.1).start(model, _context(tokenizer)).tokenizer
        ids = new(text, return_tensors="pt").input_ids
        given["input_ids"] = ids
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = ids
        after = model(**given).logits
    assert new.convert_ids_to_tokens(ids[0]) == tokenizer.tokenize(text, add_special_tokens=True)
    if before.shape[-1] == tokenizer.vocab_size or before.shape[-1] == len(tokenizer):
        columns = [tokenizer.get_vocab()[t] for t in new.convert_ids_to_tokens(range(len(new)))]
        before = before[..., columns]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_frequent_tokens_stay_and_rare_ones_go():
    tokenizer = tiny_tokenizers.byte_level_bpe()
    order = choose_tokens(tokenizer, ["the the the fox"] * 9, size=270, num_rows=len(tokenizer))
    kept = set(tokenizer.convert_ids_to_tokens(order))
    assert {"Ġthe", "Ġfox"} <= kept
    assert "Ġthoughtful" not in kept


def test_a_kept_merged_token_can_still_be_merged():
    tokenizer = tiny_tokenizers.byte_level_bpe()
    order = choose_tokens(tokenizer, TEXTS, size=300, num_rows=len(tokenizer))
    new = rebuild_tokenizer(tokenizer, order)
    for token in new.get_vocab():
        if token.removeprefix("Ġ").isascii() and token not in new.all_special_tokens:
            assert new.tokenize(tokenizer.convert_tokens_to_string([token])) == [token]


def test_rows_without_a_token_go_first():
    model, _, new, _ = _smaller("gpt2", spare_rows=24, sparsity=0.06)
    assert len(new) == len(KINDS["gpt2"]()) - 1
    assert model.config.vocab_size == len(new)


def test_special_tokens_keep_low_ids():
    _, old, new, _ = _smaller("roberta")
    assert new.pad_token_id == old.pad_token_id == 1
    assert new.mask_token_id != old.mask_token_id  # it was the last


def test_ids_in_a_post_processor_move_with_their_tokens():
    tokenizer = tiny_tokenizers.byte_level_bpe()
    end = ("<|endoftext|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.RobertaProcessing(end, end)]
    )
    new = rebuild_tokenizer(
        tokenizer, choose_tokens(tokenizer, TEXTS, size=300, num_rows=len(tokenizer))
    )
    ids = new("a dog").input_ids
    assert ids[0] == ids[-1] == new.eos_token_id == 299


@pytest.mark.parametrize("family", ["bert_masked_lm", "gpt2", "llama", "t5"])
def test_the_config_says_the_new_vocabulary(family):
    model, *_ = _smaller(family)
    assert config_expresses_shapes(model)


def test_the_plan_has_as_many_rows_as_asked_for():
    model, tokenizer, new, _ = _smaller("gpt2", sparsity=0.1)
    signature = read_signature(_model("gpt2", tokenizer))
    assert Vocabulary(sparsity=0.1).plan(signature) == read_signature(model).model_copy(
        update={"constants": signature.constants}
    )
    assert Vocabulary(vocab_size=300).plan(signature).counts["vocabulary"] == 300


def test_too_few_tokens_are_refused_with_the_number_that_is_needed():
    tokenizer = tiny_tokenizers.byte_level_bpe()
    model = _model("gpt2", tokenizer)
    with pytest.raises(Infeasible, match=r"vocab_size 100 is too small: 257 tokens"):
        Vocabulary(vocab_size=100).start(model, _context(tokenizer))
    with pytest.raises(Infeasible, match="vocabulary has 392 units: 401"):
        Vocabulary(vocab_size=401).plan(read_signature(model))


def test_roberta_needs_its_padding_token_to_stay():
    tokenizer = tiny_tokenizers.byte_level_bpe()  # pads with its last token
    model = _model("roberta", tokenizer)
    with pytest.raises(Infeasible, match="padding"):
        Vocabulary(sparsity=0.1).start(model, _context(tokenizer))


@pytest.mark.parametrize("options", [{}, {"vocab_size": 9, "sparsity": 0.5}])
def test_exactly_one_size_has_to_be_given(options):
    with pytest.raises(ValueError, match="either `vocab_size` or `sparsity`"):
        Vocabulary(**options)


@pytest.mark.realdata
def test_gpt2s_own_tokenizer_survives(shared_data):
    from transformers import GPT2Tokenizer

    folder = shared_data / "gpt2_tokenizer"
    old = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    new = rebuild_tokenizer(old, choose_tokens(old, TEXTS, size=2000, num_rows=50257))
    assert len(new) == 2000
    for text in [*TEXTS, *OTHER_TEXTS, "Ünïcödé ☕ 漢字\n\ttabs  and   spaces"]:
        assert new.decode(new(text).input_ids) == text
    assert all(new(text).input_ids != old(text).input_ids for text in TEXTS)
    assert new.tokenize(TEXTS[0]) == old.tokenize(TEXTS[0])
