"""An onnxruntime artifact answers as the converted model did, in its own shapes and bits."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny_models
import torch
from params import slow_but
from torch import nn
from transformers import PreTrainedModel

from orchestrator.quantize import QuantizeOptions
from orchestrator.quantize.convert import convert
from orchestrator.runtimes import RUNTIMES, Session, Target, onnx_export
from orchestrator.runtimes import onnxruntime as runtime_module
from orchestrator.runtimes.onnx_quantize import pack
from orchestrator.trial import Infeasible

RUNTIME = RUNTIMES["onnxruntime"]
TARGET = Target()
SUMMED = (
    3e-5  # that float32 logits may differ by, as a share of their spread, from other orders of sums
)
KINDS = {
    "bert": "encoder",
    "roberta": "encoder",
    "distilbert": "encoder",
    "gpt2": "decoder",
    "llama": "decoder",
}
SIZES = {  # group sizes divide them, and none is the vocabulary's
    "gpt2": {"n_inner": 80},
    "distilbert": {"hidden_dim": 80},
}
OPTIONS = [
    QuantizeOptions(scheme=scheme, embeddings=embeddings, group_size=16)
    for scheme in ("W8A8", "W8A16", "W4A16", "linear")
    for embeddings in (False, True)
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family is exported once for all tests of this file."""
    return tmp_path_factory.mktemp("cache")


def make(family: str) -> PreTrainedModel:
    return tiny_models.make(family, **SIZES.get(family, {"intermediate_size": 80}))


def converted(model: PreTrainedModel, options: QuantizeOptions) -> PreTrainedModel:
    return convert(copy.deepcopy(model), RUNTIME.numerics(options, TARGET))


def export(model: PreTrainedModel, folder: Path, cache: Path) -> Path:
    """The folder, with the model in it."""
    kinds = {"Seq2Seq": "encoder_decoder", "CausalLM": "decoder", "LMHead": "decoder"}
    name = type(model).__name__
    kind = next((kind for word, kind in kinds.items() if word in name), "encoder")
    if model.config.is_encoder_decoder:
        kind = "encoder_decoder"
    RUNTIME.export(model, folder, kind=kind, cache=cache)
    return folder


def difference(model: PreTrainedModel, session: Session, *, rows: int, length: int) -> float:
    """The largest between torch and served logits of real tokens, as a share of their spread."""
    given = tiny_models.inputs(model, rows=rows, length=length)
    expected = tiny_models.logits(model, given).numpy()
    served = session.run({name: tensor.numpy() for name, tensor in given.items()})
    assert served.shape == expected.shape
    assert served.dtype == np.float32
    if expected.ndim == 3 and not model.config.is_encoder_decoder:
        real = given["attention_mask"].bool().numpy()
        served, expected = served[real], expected[real]
    return float(np.abs(served - expected).max() / np.ptp(expected))


def stored(file: Path) -> dict[str, ir.TensorProtocol]:
    """The constants of a model file."""
    initializers = ir.load(file).graph.initializers.values()
    return {value.name: value.const_value for value in initializers}


def optimized_operators(file: Path, scratch: Path) -> Counter[str]:
    """What onnxruntime runs after its own optimizations."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(scratch)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in ir.load(scratch).graph)


def greedy(session: Session, prompt: np.ndarray, num_tokens: int) -> list[int]:
    logits, state = session.prefill(prompt)
    tokens = []
    for _ in range(num_tokens):
        tokens.append(int(logits.argmax()))
        logits, state = session.decode(np.array([tokens[-1]]), state)
    return tokens


@pytest.mark.parametrize("family", slow_but(KINDS, "bert", "gpt2"))
def test_a_float_model_is_served_as_torch_computes_it_at_any_shape(family, cache, tmp_path):
    model = make(family)
    session = RUNTIME.load(export(model, tmp_path, cache), TARGET)
    assert difference(model, session, rows=1, length=3) < SUMMED
    assert difference(model, session, rows=5, length=21) < SUMMED


@pytest.mark.parametrize("family", KINDS)
def test_every_scheme_is_served_as_the_converted_model_computes_it(family, cache, tmp_path):
    model = make(family)
    for options in OPTIONS:
        quantized = converted(model, options)
        folder = export(quantized, tmp_path / f"{options.scheme}-{options.embeddings}", cache)
        session = RUNTIME.load(folder, TARGET)
        found = [difference(quantized, session, rows=3, length=n) for n in range(3, 14)]
        # Where a rounded input lies on the edge, the last bit of a float decides on its code.
        worst = 0.1 if options.scheme == "W8A8" else 1e-5
        assert np.median(found) < 1e-5, (options, found)
        assert max(found) < worst, (options, found)


def test_a_second_model_of_the_same_shapes_is_not_exported_again(cache, tmp_path, monkeypatch):
    export(make("bert"), tmp_path / "first", cache)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("exported again"))
    other = make("bert")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.config.id2label = {0: "bad", 1: "good"}
    session = RUNTIME.load(export(other, tmp_path / "second", cache), TARGET)
    assert difference(other, session, rows=3, length=9) < SUMMED


def test_a_model_of_other_shapes_or_settings_is_another_template():
    key = onnx_export.template_keys(make("bert"), kind="encoder")
    assert onnx_export.template_keys(make("bert"), kind="encoder") == key
    smaller = tiny_models.make("bert", intermediate_size=48)
    assert onnx_export.template_keys(smaller, kind="encoder") != key
    fewer_heads = tiny_models.make("bert", intermediate_size=80, num_attention_heads=2)
    assert onnx_export.template_keys(fewer_heads, kind="encoder") != key


def test_an_export_that_changes_the_numbers_is_refused_and_not_kept(tmp_path, monkeypatch):
    def break_gelu(model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "Gelu":
                node.op_type = "Relu"
                node.attributes.clear()

    monkeypatch.setattr(onnx_export, "keep_norms_apart", break_gelu)
    with pytest.raises(RuntimeError, match=r"logits of model\.onnx at .* differs by"):
        export(make("distilbert"), tmp_path / "model", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_files_are_as_small_as_their_bits(cache, tmp_path):
    sizes, codes = {}, {}
    for scheme in ("none", "W8A8", "W8A16", "W4A16"):
        model = converted(make("bert"), QuantizeOptions(scheme=scheme, group_size=16))
        file = export(model, tmp_path / scheme, cache) / "model.onnx"
        sizes[scheme] = file.stat().st_size
        codes[scheme] = sum(t.nbytes for name, t in stored(file).items() if "codes" in name)
    assert codes["W8A8"] == codes["W8A16"] == 2 * codes["W4A16"]
    assert sizes["W4A16"] < sizes["W8A8"] < sizes["none"]
    assert sizes["none"] - sizes["W8A8"] > 2.5 * codes["W8A8"]


@pytest.mark.parametrize("scheme", ["none", "W8A8", "W4A16"])
def test_a_tied_head_is_stored_once(scheme, cache, tmp_path):
    options = QuantizeOptions(scheme=scheme, embeddings=scheme != "none", group_size=16)
    model = converted(make("llama"), options)
    tensors = stored(export(model, tmp_path, cache) / "model.onnx")
    tables = [t for t in tensors.values() if {tiny_models.VOCAB, 48} <= set(t.shape)]
    assert len(tables) == 1


def test_pruned_shapes_are_the_shapes_in_the_file(tmp_path):
    model = make("bert")
    first = model.bert.encoder.layer[0]
    attention, width = first.attention.self, model.config.hidden_size
    for name in ("query", "key", "value"):
        setattr(attention, name, nn.Linear(width, width // 2))
    attention.num_attention_heads, attention.all_head_size = 2, width // 2
    first.attention.output.dense = nn.Linear(width // 2, width)
    first.intermediate.dense, first.output.dense = nn.Linear(width, 24), nn.Linear(24, width)
    model = converted(model.eval(), QuantizeOptions(scheme="W8A8"))

    folder = export(model, tmp_path / "model", tmp_path / "cache")
    shapes = {name: tuple(t.shape) for name, t in stored(folder / "model.onnx").items()}
    layer = "model.bert.encoder.layer.{}.{}.codes"
    assert shapes[layer.format(0, "attention.self.query")] == (32, 16)
    assert shapes[layer.format(0, "attention.output.dense")] == (16, 32)
    assert shapes[layer.format(0, "intermediate.dense")] == (32, 24)
    assert shapes[layer.format(1, "attention.self.query")] == (32, 32)
    assert difference(model, RUNTIME.load(folder, TARGET), rows=3, length=9) < 2e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("scheme", ["none", "W8A8"])
def test_greedy_tokens_with_the_cache_are_those_of_torch(family, scheme, cache, tmp_path):
    model = converted(make(family), QuantizeOptions(scheme=scheme))
    prompt = tiny_models.inputs(model, rows=1, length=9)["input_ids"]
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 9:]
    session = RUNTIME.load(export(model, tmp_path, cache), TARGET)
    assert greedy(session, prompt.numpy(), 64) == expected.tolist()


def test_decoding_step_by_step_gives_the_logits_of_the_whole(cache, tmp_path):
    session = RUNTIME.load(export(make("llama"), tmp_path, cache), TARGET)
    ids = np.random.default_rng(0).integers(5, tiny_models.VOCAB, (3, 8))
    whole = session.run({"input_ids": ids})
    logits, state = session.prefill(ids[:, :5])
    np.testing.assert_allclose(logits, whole[:, 4], atol=1e-5)
    for position in range(5, 8):
        logits, state = session.decode(ids[:, position], state)
        np.testing.assert_allclose(logits, whole[:, position], atol=1e-5)


def test_integer_products_run_as_fused_operators(cache, tmp_path):
    model = converted(make("bert"), QuantizeOptions(scheme="W8A8"))
    file = export(model, tmp_path, cache) / "model.onnx"
    operators = optimized_operators(file, tmp_path / "optimized.onnx")
    # query, key and value of three layers share an input; three more products a layer do not.
    assert operators["MatMulIntegerToFloat"] == 9
    assert operators["DynamicQuantizeMatMul"] == 3 * 3 + 1
    assert operators["MatMulInteger"] == 0
    assert operators["Attention"] == 3
    assert operators["Transpose"] + operators["Reshape"] == 0
    assert operators["SkipLayerNormalization"] == 0


def test_the_description_names_what_goes_in_and_out(cache, tmp_path):
    described = RUNTIME.export(make("llama"), tmp_path, kind="decoder", cache=cache)
    inputs = {entry["name"]: entry for entry in described["inputs"]}
    outputs = {entry["name"]: entry for entry in described["outputs"]}
    assert inputs["input_ids"]["dtype"] == "int64"
    assert inputs["attention_mask"]["shape"] == ["batch", "total"]
    assert inputs["past_key_values.2.value"]["shape"] == ["batch", 4, "past", 6]
    assert outputs["logits"]["shape"] == ["batch", "length", tiny_models.VOCAB]
    assert outputs["present.0.key"]["dtype"] == "float32"
    assert len(inputs) == 3 + 2 * 3 and len(outputs) == 1 + 2 * 3


def test_codes_are_packed_low_half_first():
    codes = np.array([[-8, 7, 0, 1], [1, 2, 3, 4]], np.int8)
    packed = pack(codes, bits=4, block_size=2)
    assert packed.tolist() == [[[0xF0], [0x98]], [[0xA9], [0xCB]]]
    assert pack(codes, bits=8, block_size=4).tolist() == [
        [[120, 135, 128, 129]],
        [[129, 130, 131, 132]],
    ]


def test_what_cannot_be_served_is_refused_with_the_reason():
    def refuse(reason: str, target: Target = TARGET, **options: object) -> None:
        with pytest.raises(Infeasible, match=reason):
            RUNTIME.numerics(QuantizeOptions(**options), target)

    refuse("no bfloat16 matrix product; it serves none, W8A8", scheme="bf16")
    refuse("does not serve W2A16", scheme="W2A16")
    refuse("power of two of at least 16 for W4A16 .* got 24", scheme="W4A16", group_size=24)
    refuse("got 8", scheme="W8A16", group_size=8)
    refuse("cuda:0", Target(device="cuda:0"), scheme="W8A8")


def test_processors_that_saturate_get_seven_bits(monkeypatch):
    options = QuantizeOptions(scheme="W8A8", embeddings=True)
    monkeypatch.setattr(runtime_module, "_sums_in_32_bits", lambda: True)
    assert RUNTIME.numerics(options, TARGET).weight.bits == 8
    monkeypatch.setattr(runtime_module, "_sums_in_32_bits", lambda: False)
    numerics = RUNTIME.numerics(options, TARGET)
    assert numerics.weight.bits == numerics.embedding.bits == 7
    assert numerics.activation.bits == 8


def test_an_artifact_that_cannot_be_loaded_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"model\.onnx is not a model that onnxruntime can load"):
        RUNTIME.load(tmp_path, TARGET)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="can load: "):
        RUNTIME.load(tmp_path, TARGET)


def test_a_device_that_onnxruntime_does_not_have_is_named(cache, tmp_path):
    folder = export(make("bert"), tmp_path, cache)
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime serves on CUDA")
    with pytest.raises(ValueError, match="target.device is cuda:0, .* CPUExecutionProvider"):
        RUNTIME.load(folder, Target(device="cuda:0"))


@pytest.mark.slow
def test_an_encoder_decoder_is_served_in_two_parts(cache, tmp_path):
    model = tiny_models.make("t5", d_ff=64)
    for scheme in ("none", "W8A8", "W4A16"):
        options = QuantizeOptions(scheme=scheme, embeddings=scheme != "none", group_size=16)
        quantized = converted(model, options)
        folder = export(quantized, tmp_path / scheme, cache)
        assert {file.name for file in folder.iterdir()} == {"encoder.onnx", "decoder.onnx"}
        session = RUNTIME.load(folder, TARGET)
        assert difference(quantized, session, rows=3, length=11) < 2e-3


@pytest.mark.slow
def test_a_decoder_with_a_class_head_is_served_as_an_encoder(cache, tmp_path):
    model = tiny_models.make("llama_untied")
    session = RUNTIME.load(export(model, tmp_path, cache), TARGET)
    assert difference(model, session, rows=3, length=11) < SUMMED
