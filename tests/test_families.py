"""Every family goes through a whole trial: pruned, trained in int8, exported, served and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_study
import tiny_tokenizers
from transformers import PreTrainedTokenizerFast

from orchestrator.artifact import verify
from orchestrator.bench import Bench
from orchestrator.recipe import make_recipe
from orchestrator.run_trial import measure_test, run_baseline, run_trial
from orchestrator.trial import TrialResult, TrialStatus

TOKENIZERS = {
    "bert": tiny_tokenizers.wordpiece,
    "distilbert": tiny_tokenizers.wordpiece,
    "roberta": lambda: tiny_tokenizers.byte_level_bpe(roberta=True),
    "gpt2": tiny_tokenizers.byte_level_bpe,
    "llama": tiny_tokenizers.sentencepiece_bpe,  # grouped-query, tied embeddings
    "t5": tiny_tokenizers.unigram,
}
DECODERS = ("gpt2", "llama")
QUALITY = {
    "gpt2": "perplexity",
    "llama": "perplexity",
    "t5": {"name": "token_accuracy", "direction": "max"},
}
CASES = [("onnxruntime", "bert")]
SLOW = [("onnxruntime", f) for f in ("llama", "roberta", "distilbert", "gpt2", "t5")]
SLOW += [("torch", family) for family in ("distilbert", "gpt2")]
HALF = {"method": "structured", "heads": 0.5, "neurons": 0.5, "num_batches": 1}


def save_model(family: str, folder: Path) -> Path:
    """A checkpoint with random weights and a tokenizer of its family's kind."""
    tokenizer: PreTrainedTokenizerFast = TOKENIZERS[family]()
    tiny_models.make(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def task_of(family: str, folder: Path) -> dict[str, Any]:
    if family == "t5":
        return {"name": "tiny_seq2seq:Reversal", "sentences": tiny_tokenizers.TEXTS[:4]}
    if family in DECODERS:
        data = folder / "text.txt"
        data.write_text("\n".join(tiny_tokenizers.TEXTS * 4) + "\n")
        return {"name": "causal_lm", "data": str(data), "block_size": 16}
    data = tiny_study.write_sentences(folder / "data.csv", rows=120)
    return {"name": "text_classification", "data": str(data), "max_length": 24}


def tiny_bench(family: str, folder: Path, *, runtime: str) -> Bench:
    recipe = make_recipe(
        {
            "output_dir": str(folder / "study"),
            "model": {"id": family, "name": str(save_model(family, folder / "model"))},
            "task": task_of(family, folder),
            "allow_code": True,
            "target": {"runtime": runtime, "prompt_tokens": 8, "new_tokens": 4},
            "objectives": [QUALITY.get(family, "accuracy"), "size_mb"],
            "baseline": {"finetune": {"max_steps": 2, "learning_rate": 1e-3}},
            "measure": {"max_seconds": 0.1, "num_inputs": 2, "num_check_inputs": 16},
        }
    )
    return Bench(recipe, folder / "study", device="cpu")


def trial(bench: Bench) -> TrialResult:
    """Half of the heads and neurons, and two steps through the runtime's rounding, with a teacher."""
    config = bench.recipe.trial_config(
        model=bench.recipe.models[0].id,
        prune=HALF,
        quantize={"scheme": "W8A8", "qat": True, "embeddings": True},
        finetune={"max_steps": 2, "learning_rate": 1e-3, "distillation": {}},
    )
    return run_trial(config, bench, lambda stage: None)


@pytest.mark.parametrize(
    ("runtime", "family"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_a_family_is_compressed_and_served(runtime: str, family: str, tmp_path: Path) -> None:
    bench = tiny_bench(family, tmp_path, runtime=runtime)
    baseline = run_baseline(family, bench, lambda stage: None)
    result = trial(bench)
    for done in (baseline, result):
        assert done.status is TrialStatus.COMPLETED, done.message
        assert done.measurement is not None and done.measurement.fingerprint
        difference = done.details["served_difference"]
        # A float's last bit may turn a rounding over, in few of so small a model's inputs; numerics
        # that differ would show in each.
        assert difference["median_difference"] < 1e-3 * difference["logits_std"]
        if family in DECODERS:
            assert done.details["greedy_tokens_equal"] == 64
    metrics, dense = result.measurement.metrics, baseline.measurement.metrics
    assert metrics["macs"] < 0.7 * dense["macs"]
    assert metrics["size_mb"] < 0.7 * dense["size_mb"]

    folder = bench.folder / "trials" / result.trial_id / "artifact"
    card = (folder / "README.md").read_text()
    assert ("load.py" in card) == (folder / "load.py").exists()
    tested, sha256 = measure_test(folder, result.config, bench)
    assert tested.num_examples > 0 and tested.fingerprint == result.measurement.fingerprint
    assert sha256 != result.sha256 and verify(folder)["trial_id"] == result.trial_id
