"""Tiny tokenizers of each kind, trained on a few sentences."""

from __future__ import annotations

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog barks!",
    "Pruning removes weights; quantization rounds what remains of them.",
    "A film so thoughtful, so unbelievably well acted, that nobody left early.",
    "Nobody expected the thoughtful ending; everybody expected a dull one.",
] * 5

OTHER_TEXTS = [
    "An unexpectedly quantized fox left.",
    "Thoughtfully rounded weights jump over lazy remains!",
    "the the the dog, a dog; dogs",
]


def wordpiece(*, vocab_size: int = 120) -> PreTrainedTokenizerFast:
    """Lower-cased WordPiece with BERT's special tokens, all of them but padding at odd places."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **dict(zip(names, special, strict=True))
    )


def byte_level_bpe(*, vocab_size: int = 400, roberta: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE; as GPT-2 has it, with its one special token last, or as RoBERTa does."""
    first = ["<s>", "<pad>", "</s>", "<unk>"] if roberta else []
    last = "<mask>" if roberta else "<|endoftext|>"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([last])
    if not roberta:
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {last}",
            pair=f"$A {last} $B {last}",
            special_tokens=[(last, backend.token_to_id(last))],
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=last, bos_token=last, pad_token=last
        )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **dict(zip(names, [*first, last], strict=True))
    )


def sentencepiece_bpe(*, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """BPE over characters that falls back to bytes, as Llama 2 has it."""
    special = ["<unk>", "<s>", "</s>"]
    spaces = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = spaces
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    codes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special + codes, show_progress=False
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(TEXTS, trainer)
    vocab, merges = _vocab_and_merges(trained)
    backend.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def unigram(*, vocab_size: int = 150) -> PreTrainedTokenizerFast:
    """A Unigram model with special tokens at both ends, as T5 has them."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens(["<extra_id_0>"])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _vocab_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
