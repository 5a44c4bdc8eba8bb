"""A torch artifact answers as the converted model did, and a stranger can load it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from orchestrator.prune.tree import shrink
from orchestrator.quantize import QuantizeOptions
from orchestrator.quantize.convert import convert
from orchestrator.runtimes import RUNTIMES, Target
from orchestrator.runtimes.torch_loader import DynamicInt8Linear, Int8Linear
from orchestrator.trial import Infeasible

RUNTIME = RUNTIMES["torch"]
TARGET = Target(runtime="torch")
SCHEMES = {
    "none": QuantizeOptions(),
    "bf16": QuantizeOptions(scheme="bf16"),
    "W8A8": QuantizeOptions(scheme="W8A8"),
    "W8A8 embeddings": QuantizeOptions(scheme="W8A8", embeddings=True),
    "W8A16 embeddings": QuantizeOptions(scheme="W8A16", embeddings=True),
    "linear": QuantizeOptions(scheme="linear", granularity="tensor"),
    "linear embeddings": QuantizeOptions(scheme="linear", interval=0.01, embeddings=True),
}


def tiny_bert() -> PreTrainedModel:
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
    )
    return BertForSequenceClassification(config)


def tiny_llama() -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


MODELS = {"bert": tiny_bert, "llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch(rows: int = 3, length: int = 10) -> dict[str, np.ndarray]:
    ids = torch.randint(0, 100, (rows, length)).numpy()
    mask = np.ones_like(ids)
    mask[-1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def converted(model: PreTrainedModel, options: QuantizeOptions) -> PreTrainedModel:
    return convert(model.eval(), RUNTIME.numerics(options, TARGET), ignore=options.ignore)


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, np.ndarray]) -> np.ndarray:
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    return model(**tensors).logits.float().numpy()


def export(model: PreTrainedModel, folder: Path, *, kind: str = "encoder") -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    return RUNTIME.export(model, folder, kind=kind, cache=folder)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_reloaded_artifact_answers_as_the_converted_model(
    model: str, scheme: str, tmp_path: Path
) -> None:
    compressed, inputs = converted(MODELS[model](), SCHEMES[scheme]), batch()
    expected = logits(compressed, inputs)
    export(compressed, tmp_path)
    served = RUNTIME.load(tmp_path, TARGET).run(inputs)
    assert served.dtype == np.float32
    assert np.abs(served - expected).max() < 1e-5
    assert (tmp_path / "load.py").exists() == (scheme not in ("none", "bf16"))


PRUNED = {
    "bert": {"encoder.0.heads": [1, 3], "encoder.1.neurons": range(40), "vocabulary": range(80)},
    "bert, 3 of 4 heads": {"encoder.0.heads": [0, 1, 3], "encoder.1.heads": [1, 2, 3]},
    "llama": {"decoder.0.heads": [1], "decoder.1.neurons": range(40)},
    "gpt2": {"decoder.0.heads": [0, 2, 3], "decoder.1.neurons": range(24)},
}


@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("scheme", ["none", "bf16", "W8A8 embeddings"])
def test_shapes_beyond_the_config_are_served(pruned: str, scheme: str, tmp_path: Path) -> None:
    model, inputs = MODELS[pruned.split(",")[0]](), batch()
    inputs["input_ids"] %= 80
    shrink(model, PRUNED[pruned])
    compressed = converted(model, SCHEMES[scheme])
    expected = logits(compressed, inputs)
    export(compressed, tmp_path)
    assert (tmp_path / "load.py").exists()
    assert np.abs(RUNTIME.load(tmp_path, TARGET).run(inputs) - expected).max() < 1e-5


def test_shapes_within_the_config_are_a_standard_checkpoint(tmp_path: Path) -> None:
    model, inputs = tiny_bert().eval(), batch()
    shrink(model, {"encoder.layers": [1], "encoder.1.neurons": range(40)})
    expected = logits(model, inputs)
    export(model, tmp_path)
    assert not (tmp_path / "load.py").exists()
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert np.abs(logits(reloaded, inputs) - expected).max() < 1e-6


def test_encoder_decoder_is_served(tmp_path: Path) -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100)
    model = T5ForConditionalGeneration(config)
    shrink(model, {"encoder.heads": [1, 2]})
    compressed = converted(model, SCHEMES["W8A8 embeddings"])
    inputs = batch() | {"decoder_input_ids": batch(length=4)["input_ids"]}
    expected = logits(compressed, inputs)
    ports = export(compressed, tmp_path, kind="encoder_decoder")
    assert {port["name"] for port in ports["inputs"]} == set(inputs)
    assert np.abs(RUNTIME.load(tmp_path, TARGET).run(inputs) - expected).max() < 1e-5


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_greedy_decoding_with_the_cache_equals_generate(model: str, tmp_path: Path) -> None:
    compressed = converted(MODELS[model](), SCHEMES["W8A8 embeddings"])
    compressed.generation_config.eos_token_id = None  # so that it does not end early
    prompt = torch.randint(0, 100, (2, 6))
    expected = compressed.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12
    )
    export(compressed, tmp_path, kind="decoder")
    session = RUNTIME.load(tmp_path, TARGET)
    scores, cache = session.prefill(prompt.numpy())
    tokens = []
    for _ in range(12):
        assert scores.shape == (2, 100)
        tokens.append(scores.argmax(-1))
        scores, cache = session.decode(tokens[-1], cache)
    assert np.array_equal(np.stack(tokens, 1), expected[:, 6:].numpy())


STRANGER = """
import sys
sys.modules["orchestrator"] = None  # whatever is installed, it cannot be imported
sys.path.insert(0, sys.argv[1])
import json, torch
from load import load
with torch.inference_mode():
    model = load(sys.argv[1])
    print(json.dumps(model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""


@pytest.mark.slow
def test_a_stranger_loads_it_with_load_py_alone(tmp_path: Path) -> None:
    model = tiny_bert()
    shrink(model, {"encoder.0.heads": [1, 3]})
    compressed = converted(model, SCHEMES["W8A8 embeddings"])
    ids = batch()["input_ids"]
    export(compressed, tmp_path)
    command = [sys.executable, "-I", "-c", STRANGER, str(tmp_path), str(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = np.array(json.loads(done.stdout.splitlines()[-1]))
    assert np.abs(answer - logits(compressed, {"input_ids": ids})).max() < 1e-5


def test_tied_weights_are_stored_once_and_int8_is_a_quarter(tmp_path: Path) -> None:
    sizes = {}
    for scheme in ("none", "W8A8 embeddings"):
        export(converted(tiny_llama(), SCHEMES[scheme]), tmp_path / scheme)
        sizes[scheme] = (tmp_path / scheme / "model.safetensors").stat().st_size
    plain = tiny_llama()
    num_params = sum(p.numel() for p in plain.parameters())
    assert sizes["none"] < 4 * num_params + 4000
    assert sizes["W8A8 embeddings"] < 1.25 * num_params + 8000


@pytest.mark.parametrize("scheme", ["W8A8", "W8A16"])
def test_served_layers_compute_what_torchao_computes(scheme: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    workflow = pytest.importorskip("torchao.quantization.quantize_.workflows")
    dynamic = workflow.QuantizeTensorToInt8Kwargs(
        granularity=torchao.PerRow(), mapping_type=torchao.MappingType.ASYMMETRIC
    )
    layer, x = nn.Linear(64, 48), torch.randn(4, 20, 64) * 3 + 0.5
    numerics = RUNTIME.numerics(QuantizeOptions(scheme=scheme), TARGET)
    ours = convert(nn.Sequential(layer), numerics)[0]
    theirs = torchao.Int8Tensor(
        ours.codes,
        ours.scales,
        [1, 64],
        torch.float32,
        act_quant_kwargs=dynamic if scheme == "W8A8" else None,
    )
    make = DynamicInt8Linear if scheme == "W8A8" else Int8Linear
    served = make(ours.codes, scales=ours.scales, bias=ours.bias)
    with torch.no_grad():
        assert (nn.functional.linear(x, theirs, layer.bias) - ours(x)).abs().max() < 1e-5
        assert (served(x) - ours(x)).abs().max() < 1e-5


def test_what_torch_cannot_serve_is_infeasible_with_its_reason() -> None:
    refused = {
        "one int8 a weight": QuantizeOptions(scheme="W4A16"),
        "none, bf16, W8A8, W8A16, linear, not W2A2": QuantizeOptions(scheme="W2A2"),
        "which scheme bf16 has not": QuantizeOptions(scheme="bf16", embeddings=True),
    }
    for reason, options in refused.items():
        with pytest.raises(Infeasible, match=reason):
            RUNTIME.numerics(options, TARGET)
