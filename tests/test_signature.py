"""What shapes, sizes and multiply-accumulates are said to be is what models have."""

from __future__ import annotations

import pytest
from tiny_models import CONFIGS, inputs, make
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.prune.tree import read_signature, shrink, signature_from_config
from orchestrator.quantize import Numerics, WeightNumerics
from orchestrator.signature import Signature, Weight, check_divides, weight_bytes
from orchestrator.trial import Infeasible


@pytest.mark.parametrize("family", CONFIGS)
def test_a_signature_comes_from_a_config_alone(family):
    auto, _ = CONFIGS[family]
    model = make(family)
    assert signature_from_config(model.config.to_dict(), auto) == read_signature(model)


@pytest.mark.parametrize("family", CONFIGS)
def test_parameters_are_counted_once(family):
    model = make(family)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert read_signature(model).num_params == expected


@pytest.mark.parametrize("family", CONFIGS)
def test_macs_are_those_that_torch_counts(family):
    model = make(family, attention="eager")  # the counter does not know sdpa on CPU
    given = inputs(model, rows=3, length=11)
    with FlopCounterMode(display=False) as counter:
        model(**given)
    assert read_signature(model).macs(batch=3, length=11) == counter.get_total_flops() // 2


@pytest.mark.parametrize("family", CONFIGS)
def test_keep_says_the_shapes_that_shrink_gives(family):
    model = make(family)
    signature = read_signature(model)
    counts = {
        group.name: {"heads": 3, "neurons": 17, "layers": 2, "vocabulary": 50}[group.kind]
        for group in signature.groups
    }
    planned = signature.keep(counts)
    shrink(model, {name: range(count) for name, count in counts.items()})
    assert planned == read_signature(model)
    assert planned.num_params < signature.num_params
    assert planned.macs(length=8) < signature.macs(length=8)


@pytest.mark.parametrize("counts", [{"encoder.0.heads": 5}, {"encoder.0.heads": 0}, {"nothing": 1}])
def test_keep_refuses_units_that_are_not_there(counts):
    with pytest.raises(Infeasible, match=next(iter(counts))):
        read_signature(make("bert")).keep(counts)


def test_models_that_compute_differently_have_different_keys():
    keys = [make("llama", rms_norm_eps=eps) for eps in (1e-6, 1e-6, 1e-5)]
    first, same, other = (read_signature(model).key for model in keys)
    assert first == same != other


def test_unknown_families_are_refused_with_the_known_ones():
    with pytest.raises(Infeasible, match=r"'mamba'.*'bert'.*'t5'"):
        signature_from_config({"model_type": "mamba"}, "AutoModelForCausalLM")


def _signature(*weights: Weight, tied: dict[str, str] | None = None) -> Signature:
    return Signature(
        model_type="x", architecture="X", hidden_size=8, weights=weights, groups=(), tied=tied or {}
    )


TABLE = Weight(name="table.weight", shape=(100, 8), role="embedding")
HEAD = Weight(name="head.weight", shape=(100, 8), role="linear")
UP = Weight(name="up.weight", shape=(12, 8), role="linear", layer="stack.0")
CONV = Weight(name="conv.weight", shape=(8, 12), role="conv1d", layer="stack.0")
BIAS = Weight(name="up.bias", shape=(12,), role="bias", layer="stack.0")


@pytest.mark.parametrize("weight", [UP, CONV])
@pytest.mark.parametrize(
    ("numerics", "expected"),
    [
        (WeightNumerics(bits=8, granularity="channel"), 96 + 4 * 12),
        (WeightNumerics(bits=8, granularity="tensor"), 96 + 4),
        (WeightNumerics(bits=4, granularity="group", group_size=4), 48 + 4 * 24),
        (WeightNumerics(bits=8, granularity="channel", symmetric=False), 96 + 12 + 4 * 12),
    ],
)
def test_bytes_of_codes_and_scales(weight, numerics, expected):
    scheme = Numerics(scheme="x", weight=numerics)
    assert weight_bytes(_signature(weight, BIAS), numerics=scheme) == expected + 4 * 12


def test_bytes_of_what_stays_floating_point():
    signature = _signature(TABLE, UP, BIAS)
    assert weight_bytes(signature, numerics=Numerics(scheme="none")) == 4 * (800 + 96 + 12)
    half = Numerics(scheme="bf16", dtype="bfloat16")
    assert weight_bytes(signature, numerics=half) == 2 * (800 + 96 + 12)
    int8 = Numerics(scheme="W8A8", weight=WeightNumerics(bits=8, granularity="tensor"))
    assert weight_bytes(signature, numerics=int8, ignore=("up",)) == 4 * (800 + 96 + 12)


def test_a_tied_head_is_stored_once_as_its_embedding():
    tied = _signature(TABLE, HEAD, tied={"head.weight": "table.weight"})
    rounding = WeightNumerics(bits=8, granularity="channel")
    float_table = Numerics(scheme="W8A8", weight=rounding)
    int8_table = Numerics(scheme="W8A8", weight=rounding, embedding=rounding)
    assert weight_bytes(tied, numerics=float_table) == 4 * 800
    assert weight_bytes(tied, numerics=int8_table) == 800 + 4 * 100
    assert weight_bytes(tied, numerics=int8_table, ignore=("head",)) == 4 * 800
    assert weight_bytes(_signature(TABLE, HEAD), numerics=float_table) == 4 * 800 + 800 + 4 * 100


def test_a_group_size_that_does_not_divide_is_refused_with_weight_and_sizes():
    check_divides(_signature(UP, CONV), 4)
    with pytest.raises(Infeasible, match=r"group size 3 .* 8 inputs of conv\.weight"):
        check_divides(_signature(UP, CONV), 3, ignore=("up",))


def test_prunable_weights_are_the_linear_ones_inside_layers():
    names = {weight.name for weight in read_signature(make("bert")).prunable_weights()}
    assert len(names) == 3 * 6
    assert not any("classifier" in n or "pooler" in n or "embeddings" in n for n in names)
    fewer = read_signature(make("bert")).prunable_weights(ignore=("output.dense",))
    assert len(fewer) == 3 * 4


def test_signatures_survive_json():
    signature = read_signature(make("t5"))
    assert Signature.model_validate_json(signature.model_dump_json()) == signature
    assert isinstance(signature.macs(length=4), int)
