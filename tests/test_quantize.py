"""What is trained is what is converted, and what is converted is what the runtimes compute."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from orchestrator.quantize import ActivationNumerics, Numerics, WeightNumerics
from orchestrator.quantize.convert import convert, default_ignore, prepare
from orchestrator.quantize.fake import round_again, set_enabled
from orchestrator.quantize.modules import QuantizedEmbedding, QuantizedLinear
from orchestrator.quantize.rounding import (
    dequantize,
    quantize_weight,
    round_activation,
    weight_scales,
)
from orchestrator.trial import Infeasible

INT8 = WeightNumerics(bits=8, granularity="channel")
INT4 = WeightNumerics(bits=4, granularity="group", group_size=16, narrow=False)
PER_TENSOR = ActivationNumerics(bits=8, granularity="tensor")
PER_TOKEN = ActivationNumerics(bits=8, granularity="token", signed=True)

NUMERICS = {
    "W8A16": Numerics(scheme="W8A16", weight=INT8),
    "W4A16": Numerics(scheme="W4A16", weight=INT4),
    "W8A8 per tensor": Numerics(scheme="W8A8", weight=INT8, activation=PER_TENSOR),
    "W8A8 per token": Numerics(scheme="W8A8", weight=INT8, activation=PER_TOKEN),
    "W8A8 embeddings": Numerics(scheme="W8A8", weight=INT8, activation=PER_TENSOR, embedding=INT8),
    "W4A16 embeddings": Numerics(scheme="W4A16", weight=INT4, embedding=INT8),
    "linear tensor": Numerics(scheme="linear", weight=WeightNumerics(bits=8, granularity="tensor")),
    "linear interval": Numerics(
        scheme="linear", weight=WeightNumerics(bits=8, granularity="tensor", interval=0.01)
    ),
}


def tiny_bert() -> nn.Module:
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def tiny_llama(*, tied: bool = True) -> nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> nn.Module:
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=100,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


MODELS = {"bert": tiny_bert, "llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tokens(rows: int = 4, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 100, (rows, length))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def assert_same(trained: torch.Tensor, converted: torch.Tensor, numerics: Numerics) -> None:
    """Equal but for the order of float sums, which may tip a later layer's input to the next code."""
    difference = (trained - converted).abs()
    assert difference.median() < 1e-6
    assert difference.max() < (1e-6 if numerics.activation is None else 2e-3)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheme", NUMERICS)
def test_every_layer_converts_to_what_it_trained_as(model: str, scheme: str) -> None:
    numerics, seen = NUMERICS[scheme], {}
    prepared = MODELS[model]()
    layers = {name: prepared.get_submodule(name) for name in prepare(prepared, numerics)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    logits(prepared, tokens())
    convert(prepared, numerics)
    for name in layers:
        x, trained = seen[name]
        with torch.no_grad():
            assert (prepared.get_submodule(name)(x) - trained).abs().max() < 1e-6


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheme", NUMERICS)
def test_prepared_and_converted_compute_the_same(model: str, scheme: str) -> None:
    numerics, ids = NUMERICS[scheme], tokens()
    plain = MODELS[model]()
    prepared = copy.deepcopy(plain)
    names = prepare(prepared, numerics)
    trained = logits(prepared, ids)
    converted = logits(convert(prepared, numerics), ids)
    assert names
    assert_same(trained, converted, numerics)
    assert (trained - logits(plain, ids)).abs().max() > 1e-5, "nothing was rounded"
    assert torch.equal(converted, logits(convert(plain, numerics), ids)), "depends on prepare"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scheme", ["W8A8 embeddings", "W8A8 per token", "W4A16"])
def test_training_through_rounding_learns_and_converts(
    model: str, autocast: bool, scheme: str
) -> None:
    numerics, ids = NUMERICS[scheme], tokens(8)
    trained = MODELS[model]()
    before = set(trained.state_dict())
    prepare(trained, numerics)
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    labels = ids[:, 0] % 2 if model == "bert" else ids
    losses = []
    for _ in range(3):
        for half in (slice(0, 4), slice(4, 8)):  # two accumulated batches a step
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = trained.train()(input_ids=ids[half], labels=labels[half]).loss
            loss.backward()
        losses.append(loss.item())
        assert all(
            p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32
            for p in trained.parameters()
        )
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert set(trained.state_dict()) == before
    expected = logits(trained, ids)
    assert_same(expected, logits(convert(trained, numerics), ids), numerics)


def test_gradient_passes_straight_through() -> None:
    fake, plain = nn.Linear(16, 8), nn.Linear(16, 8)
    model = nn.Sequential(fake)
    prepare(model, NUMERICS["W8A8 per tensor"])
    converted = convert(copy.deepcopy(model), NUMERICS["W8A8 per tensor"])[0]
    plain.weight = nn.Parameter(converted.weight)
    x = torch.randn(5, 16, requires_grad=True)
    fake(x).square().sum().backward()
    codes, scale = round_activation(x.detach(), PER_TENSOR)
    rounded = (codes * scale).requires_grad_()
    nn.functional.linear(rounded, plain.weight, fake.bias).square().sum().backward()
    assert torch.allclose(x.grad, rounded.grad, atol=1e-5)
    assert torch.allclose(fake.weight.grad, plain.weight.grad, atol=1e-4)


@pytest.mark.parametrize("scheme", ["W8A8 per tensor", "W4A16"])
@pytest.mark.parametrize("model", MODELS)
def test_rounding_again_in_the_backward_pass_changes_nothing(model: str, scheme: str) -> None:
    one = MODELS[model]()
    prepare(one, NUMERICS[scheme])
    other = copy.deepcopy(one)
    round_again(other, lambda weight: True)
    assert any(getattr(module, "rounds_again", False) for module in other.modules())
    ids = tokens()
    for each in (one, other):
        each(input_ids=ids).logits.float().square().mean().backward()
    for (name, mine), (_, theirs) in zip(
        one.named_parameters(), other.named_parameters(), strict=True
    ):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-6), name


def test_shared_input_is_rounded_once_and_never_stale() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(16, 8))
    prepare(model, NUMERICS["W8A8 per tensor"])
    query, key = model
    x = torch.randn(5, 16)
    with torch.no_grad():
        first = query(x)
        assert query.inputs(x) is key.inputs(x)
        x.mul_(2)
        assert not torch.equal(query(x), first)
    assert key.inputs(x).requires_grad is False
    x.requires_grad_()
    assert key.inputs(x).requires_grad, "rounded under no_grad, so it must not be reused"
    copied = copy.deepcopy(model)
    assert copied[0].inputs is copied[1].inputs is not query.inputs


def test_disabled_fake_quant_is_the_plain_model() -> None:
    for make in MODELS.values():
        model, ids = make(), tokens()
        expected = logits(model, ids)
        prepare(model, NUMERICS["W8A8 embeddings"])
        set_enabled(model, False)
        assert torch.equal(logits(model, ids), expected)
        set_enabled(model, True)
        assert not torch.equal(logits(model, ids), expected)


def test_per_tensor_activation_is_onnx_dynamic_quantize_linear() -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    helper, float32, uint8 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])],
        "graph",
        [helper.make_tensor_value_info("x", float32, [None, None])],
        [
            helper.make_tensor_value_info("y", uint8, [None, None]),
            helper.make_tensor_value_info("scale", float32, []),
            helper.make_tensor_value_info("zero", uint8, []),
        ],
    )
    opsets = [helper.make_opsetid("", 18)]
    served = onnxruntime.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    )
    for shift in (-5.0, -1.0, 0.0, 0.5, 5.0):
        x = torch.randn(64, 48) + shift
        y, scale, zero = served.run(None, {"x": x.numpy()})
        codes, ours = round_activation(x, PER_TENSOR)
        assert ours.item() == scale
        assert np.array_equal(codes.numpy(), y.astype(np.float32) - float(zero))
    codes, _ = round_activation(torch.zeros(2, 3), PER_TENSOR)
    assert torch.equal(codes, torch.zeros(2, 3))


def test_codes_fill_the_range_and_zero_rows_stay_zero() -> None:
    weight = torch.randn(8, 32)
    weight[3] = 0
    for numerics, largest in ((INT8, 127), (INT4, 7)):
        codes, scales = quantize_weight(weight, numerics)
        assert codes.dtype == torch.int8 and codes.abs().max() == largest
        assert scales.shape == (8, 32 // numerics.group_size if numerics.group_size else 1)
        assert codes[3].abs().max() == 0 and scales.isfinite().all()
        error = (dequantize(codes, scales) - weight).abs()
        step = scales.repeat_interleave(32 // scales.shape[1], dim=1)
        assert (error <= step / 2 + 1e-7).all()


def test_clip_search_never_rounds_worse() -> None:
    weight = torch.randn(64, 64)
    plain = dequantize(*quantize_weight(weight, INT4))
    clipped = dequantize(*quantize_weight(weight, INT4, clip_search=True))
    assert (clipped - weight).square().mean() < 0.97 * (plain - weight).square().mean()


def test_conv1d_becomes_a_linear_layer() -> None:
    model = nn.Sequential(Conv1D(24, 16))
    numerics = NUMERICS["W8A16"]
    prepare(model, numerics)
    assert model.state_dict()["0.weight"].shape == (16, 24)
    converted = convert(model, numerics)[0]
    assert isinstance(converted, QuantizedLinear)
    assert converted.codes.shape == (24, 16) and converted.codes.is_contiguous()
    assert (converted.in_features, converted.out_features) == (16, 24)


def test_tied_head_shares_the_embedding_codes() -> None:
    model = convert(tiny_llama(), NUMERICS["W4A16 embeddings"])
    table, head = model.model.embed_tokens, model.lm_head
    assert isinstance(table, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    assert head.codes is table.codes and head.scales is table.scales
    assert head.tied_to == "model.embed_tokens" and table.tied_to is None
    assert head.numerics.weight == INT8, "the head's numerics must describe its own codes"


def test_tied_head_stays_float_without_embeddings_and_untied_is_rounded() -> None:
    numerics = NUMERICS["W8A8 per tensor"]
    tied, untied = tiny_llama(), tiny_llama(tied=False)
    assert "lm_head" not in prepare(tied, numerics)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert "lm_head" in prepare(untied, numerics)
    assert "lm_head" not in prepare(tiny_llama(tied=False), numerics, ignore=["lm_head"])


def test_tie_of_an_encoder_decoder_is_kept_whole() -> None:
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=100)
    model, ids = T5ForConditionalGeneration(config).eval(), tokens()
    numerics = NUMERICS["W8A8 embeddings"]
    names = prepare(model, numerics)
    assert {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"} <= set(names)
    assert not any("relative_attention_bias" in name for name in names)
    with torch.no_grad():
        trained = model(input_ids=ids, decoder_input_ids=ids).logits
        convert(model, numerics)
        assert (model(input_ids=ids, decoder_input_ids=ids).logits - trained).abs().max() < 2e-3
    assert model.lm_head.codes is model.shared.codes is model.encoder.embed_tokens.codes


def test_label_head_stays_float_and_ignore_matches_whole_names() -> None:
    model = tiny_bert()
    assert default_ignore(model) == ["bert.embeddings.token_type_embeddings", "classifier"]
    names = prepare(model, NUMERICS["W8A8 embeddings"], ignore=["attention.self.query", "dense"])
    assert "bert.encoder.layer.0.attention.self.key" in names
    assert not any(name.endswith(("query", "dense", "classifier")) for name in names)
    assert "bert.pooler.dense" in prepare(tiny_bert(), NUMERICS["W8A8 per tensor"], ignore=["ense"])


def test_group_size_that_does_not_divide_is_infeasible() -> None:
    odd = WeightNumerics(bits=4, granularity="group", group_size=24)
    for step in (prepare, convert):
        with pytest.raises(Infeasible, match=r"group_size 24 .*query \(32 inputs\)"):
            step(tiny_bert(), Numerics(scheme="W4A16", weight=odd))


def test_interval_too_small_for_eight_bits_is_infeasible() -> None:
    model = tiny_bert()
    model.bert.pooler.dense.weight.detach()[0, 0] = 5.0
    narrow = WeightNumerics(bits=8, granularity="tensor", interval=0.01)
    with pytest.raises(Infeasible, match="pooler.dense; .* fits every layer is 0.03937"):
        convert(model, Numerics(scheme="linear", weight=narrow))


def test_weights_that_grow_out_of_the_interval_while_training_saturate() -> None:
    numerics = NUMERICS["linear interval"]
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(4, 16)
    prepare(model, numerics)
    model[0].weight.detach()[0, 0] = 5.0
    with torch.no_grad():
        trained = model(x)
        assert (convert(model, numerics)(x) - trained).abs().max() < 1e-6
    assert model[0].codes[0, 0] == 127


def test_linear_scheme_is_the_plain_uniform_quantizer() -> None:
    weight = torch.randn(8, 32)
    interval = WeightNumerics(bits=8, granularity="tensor", interval=0.05)
    codes, scales = quantize_weight(weight, interval)
    assert torch.equal(codes.float(), torch.round(weight / 0.05))
    assert torch.allclose(dequantize(codes, scales), 0.05 * torch.round(weight / 0.05))
    per_tensor = weight_scales(weight, WeightNumerics(bits=8, granularity="tensor"))
    assert torch.equal(per_tensor, (weight.abs().max() / 127).expand(8, 1))


def test_bfloat16_numerics_cast_the_model() -> None:
    converted = convert(tiny_bert(), Numerics(scheme="bf16", dtype="bfloat16"))
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
