"""What every pruning method promises, and that a shrunk model computes what the masked one does."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import tiny_tokenizers
import torch
from tiny_models import CONFIGS, DECODERS, inputs, logits, loss, make
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from orchestrator.prune import METHODS, PruneContext, load_methods
from orchestrator.prune.magnitude import Magnitude
from orchestrator.prune.n_m import NM
from orchestrator.prune.options import Scheduled
from orchestrator.prune.structured import Structured
from orchestrator.prune.threshold import Threshold
from orchestrator.prune.tree import (
    config_expresses_shapes,
    read_signature,
    removals,
    shrink,
)
from orchestrator.trial import Infeasible

FAMILIES = list(CONFIGS)


def context(model, *, seed=0, tokenizer=None):
    def batches(num_batches):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num_batches):
            batch = inputs(model)
            ids = torch.randint(5, 40, batch["input_ids"].shape, generator=generator)
            yield batch | {"input_ids": ids}

    return PruneContext(
        tokenizer=tokenizer,
        texts=lambda: iter(tiny_tokenizers.TEXTS),
        batches=batches,
        loss=loss,
        seed=seed,
    )


def train(model, prunings=(), *, num_steps=6):
    """A few steps with momentum, which would move masked weights were they not put back."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for pruning in prunings:
        pruning.on_step(0, num_steps)
    for step in range(1, num_steps + 1):
        loss(model, inputs(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for pruning in prunings:
            pruning.on_step(step, num_steps)
        yield step
    for pruning in prunings:
        pruning.finish()
    model.eval()


def weights_of(model, **options):
    names = [weight.name for weight in read_signature(model).prunable_weights(**options)]
    return {name: model.get_parameter(name).detach() for name in names}


def zeros(model, **options):
    return {name: weight == 0 for name, weight in weights_of(model, **options).items()}


def zero_share(masks):
    return sum(mask.sum().item() for mask in masks.values()) / sum(
        m.numel() for m in masks.values()
    )


# -- the tree ------------------------------------------------------------------------------------


def silence(model, group, units):
    """Let nothing read what these heads or neurons give, in their layer's output matrix."""
    parts = [part for part in group.slices if part.weight.endswith("weight")]
    for part in parts:
        module = model.get_submodule(part.weight.removesuffix(".weight"))
        is_input = isinstance(module, torch.nn.Linear | Conv1D)
        is_input &= part.dim == (0 if isinstance(module, Conv1D) else 1)
        if is_input:
            for unit in units:
                first = part.start + unit * part.size
                module.weight.data.narrow(part.dim, first, part.size).zero_()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shrunk_units_compute_what_masked_ones_do(family, kind, attention):
    model = make(family, attention=attention)
    masked = copy.deepcopy(model)
    keep = {}
    for group in read_signature(model).groups_of(kind):
        keep[group.name] = [1, 3] if kind == "heads" else list(range(0, 40, 3))
        silence(masked, group, set(range(group.num_units)) - set(keep[group.name]))
    before = logits(model)
    shrink(model, keep)
    torch.testing.assert_close(logits(model), logits(masked), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    for group in read_signature(model).groups_of(kind):
        assert group.num_units == len(keep[group.name])


def skip_layer(model, path):
    """Make a layer the identity: by zeros where it adds to its input, else by going around it."""
    layer = model.get_submodule(path)
    outputs = [
        module
        for name, module in layer.named_modules()
        if name.endswith(("c_proj", "o_proj", "down_proj", ".o", ".wo"))
    ]
    for parameter in (p for module in outputs for p in module.parameters()):
        parameter.data.zero_()
    if not outputs:
        layer.forward = lambda hidden_states, *_, **__: hidden_states


@pytest.mark.parametrize("dropped", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_layers_compute_what_skipped_ones_do(family, dropped):
    model = make(family)
    skipped = copy.deepcopy(model)
    lists = {
        "encoder.layers": ["bert.encoder.layer", "roberta.encoder.layer"]
        + ["distilbert.transformer.layer", "encoder.block"],
        "decoder.layers": ["transformer.h", "model.layers", "decoder.block"],
    }
    keep = {}
    for group in read_signature(model).groups_of("layers"):
        path = next(p for p in lists[group.name] if p in dict(model.named_modules()))
        keep[group.name] = [i for i in range(group.num_units) if i != dropped]
        if dropped < group.num_units:
            skip_layer(skipped, f"{path}.{dropped}")
    shrink(model, keep)
    torch.testing.assert_close(logits(model), logits(skipped), atol=1e-5, rtol=1e-5)
    assert model.config.num_hidden_layers == 2
    assert config_expresses_shapes(model)


@pytest.mark.parametrize("family", DECODERS)
def test_shrunk_decoders_generate_with_a_cache_as_without(family):
    model = make(family)
    keep = {"heads": [0, 2], "neurons": range(21), "layers": [0, 2]}
    groups = [group for group in read_signature(model).groups if group.kind in keep]
    shrink(model, {group.name: keep[group.kind] for group in groups})
    ids = inputs(model)["input_ids"][:1]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_is_rebuilt_from_the_dense_one_and_its_removals(family):
    model, rebuilt = make(family), make(family)
    Structured(heads=0.5, neurons=0.4, layers=0.3).start(model, context(model))
    saved = copy.deepcopy(model.state_dict())
    for keep in json.loads(json.dumps(removals(model))):
        shrink(rebuilt, keep)
    rebuilt.load_state_dict(saved)
    torch.testing.assert_close(logits(rebuilt), logits(model))
    assert read_signature(rebuilt) == read_signature(model)


@pytest.mark.parametrize(
    ("family", "heads", "expresses"),
    [("bert", 0.5, False), ("gpt2", 0.5, False), ("llama", 0.5, True), ("t5", 0.5, True)]
    + [("bert", 0.0, True), ("gpt2", 0.0, True), ("distilbert", 0.0, True)],
)
def test_whether_a_config_says_the_shapes(family, heads, expresses):
    model = make(family)
    assert config_expresses_shapes(model)
    Structured(heads=heads, neurons=0.5, layers=0.3).start(model, context(model))
    assert config_expresses_shapes(model) == expresses


def test_a_config_is_left_alone_where_it_would_refuse_the_heads():
    model = make("llama", hidden_size=32, head_dim=4)
    Structured(heads=0.25).start(model, context(model))  # 6 heads do not divide 32
    assert model.config.num_attention_heads == 8
    assert not config_expresses_shapes(model)


def test_a_shrunk_llama_is_an_ordinary_checkpoint(tmp_path):
    model = make("llama")
    Structured(heads=0.5, neurons=0.5, layers=0.3).start(model, context(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model))


def test_layers_stay_first_where_attention_is_scaled_by_their_index():
    model = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(Infeasible, match="only the first layers"):
        shrink(model, {"decoder.layers": [0, 2]})
    shrink(model, {"decoder.layers": [0, 1]})


def test_tied_weights_stay_tied():
    model = make("t5")
    shrink(model, {"vocabulary": range(40)})
    tables = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head)
    assert len({id(module.weight) for module in tables}) == 1
    assert model.shared.num_embeddings == model.lm_head.out_features == 40


def test_an_encoder_decoder_is_pruned_trained_and_still_computes_what_the_masked_one_does():
    model = make("t5")
    method = Structured(
        heads=0.5, neurons=0.5, layers=0.3, schedule="gradual", begin=0.0, end=0.5, num_batches=2
    )
    pruning = method.start(model, context(model))
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    for _ in train(model, [], num_steps=1):
        pruning.on_step(1, 1)
    assert any(not torch.equal(weight, before[n]) for n, weight in weights_of(model).items())
    masked = logits(model)
    pruning.finish()
    torch.testing.assert_close(logits(model), masked, atol=1e-5, rtol=1e-5)
    counts = read_signature(model).counts
    assert counts["encoder.heads"] == counts["decoder.cross_heads"] == 2
    assert counts["decoder.layers"] == 2
    assert counts["decoder.1.neurons"] == 20


# -- every method --------------------------------------------------------------------------------

OPTIONS = {
    "none": [{}],
    "threshold": [{"threshold": 0.1}, {"threshold": 0.5, "unit": "std"}],
    "magnitude": [
        {"sparsity": 0.5},
        {"sparsity": 0.7, "scope": "global", "importance": "taylor", "num_batches": 2},
        {"sparsity": 0.5, "importance": "random"},
    ],
    "n_m": [{}, {"n": 1, "m": 8, "importance": "random"}],
    "structured": [
        {"heads": 0.5, "neurons": 0.5, "num_batches": 2},
        {"heads": 0.25, "layers": 0.3, "importance": "magnitude", "layer_choice": "importance"},
        {"neurons": 0.9, "layers": 0.6, "importance": "random", "layer_choice": "first"},
    ],
    "vocabulary": [{"sparsity": 0.05}],
}

CASES = [
    (name, options | ({"schedule": schedule} if schedule else {}))
    for name, several in OPTIONS.items()
    for options in several
    for schedule in (
        ("before", "gradual", "after") if issubclass(METHODS[name], Scheduled) else (None,)
    )
]


TOKENIZER = functools.cache(tiny_tokenizers.wordpiece)


def start(name, options, *, seed=0):
    """A model that a method has begun to prune, and what the method plans."""
    tokenizer = TOKENIZER()
    model = make("bert", vocab_size=len(tokenizer))
    (method,) = load_methods([{"method": name, **options}])
    planned = method.plan(read_signature(model))
    return model, method.start(model, context(model, seed=seed, tokenizer=tokenizer)), planned


def test_every_method_is_tested():
    assert OPTIONS.keys() == METHODS.keys()
    for name, method in METHODS.items():
        assert method.model_fields["method"].default == name


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_methods_reach_what_they_plan_and_finish_once(name, options):
    model, pruning, planned = start(name, options)
    for _ in train(model, [pruning]):
        pass
    assert read_signature(model) == planned
    report = pruning.report()
    assert json.loads(json.dumps(report)) == report
    before = copy.deepcopy(model.state_dict())
    pruning.finish()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert pruning.report() == report
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_methods_do_all_their_work_without_training(name, options):
    model, pruning, planned = start(name, options)
    pruning.on_step(0, 0)
    pruning.finish()
    assert read_signature(model) == planned
    if name != "none":
        assert pruning.report()["sparsity"] > 0 or name == "vocabulary"


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_same_seed_gives_the_same_model(name, options):
    states = []
    for _ in range(2):
        model, pruning, _ = start(name, options, seed=3)
        pruning.finish()
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", [name for name in METHODS if name != "vocabulary"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_prunes_every_family(name, family):
    model = make(family)
    (method,) = load_methods([{"method": name, **OPTIONS[name][0]}])
    planned = method.plan(read_signature(model))
    pruning = method.start(model, context(model))
    pruning.finish()
    assert read_signature(model) == planned
    assert torch.isfinite(logits(model)).all()
    assert (pruning.report()["sparsity"] > 0) == (name != "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magnitude", "sparsity": 1.0}, "less than 1"),
        ({"method": "magnitude", "sparsity": -0.1}, "greater than or equal to 0"),
        ({"method": "structured", "heads": 1.5}, "less than 1"),
        ({"method": "structured", "begin": 0.5, "end": 0.5}, "`begin < end` must hold"),
        ({"method": "n_m", "n": 4, "m": 4}, "`n < m` must hold"),
        ({"method": "threshold", "threshold": -1}, "greater than or equal to 0"),
        ({"method": "none", "sparsity": 0.5}, "not permitted"),
    ],
)
def test_bad_options_are_refused_with_the_rule(options, message):
    with pytest.raises(ValueError, match=message):
        load_methods([options])


# -- zeros ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_magnitude_gives_the_sparsity_asked_for(family, scope, importance):
    model, untouched = make(family), make(family)
    method = Magnitude(sparsity=0.6, scope=scope, importance=importance, num_batches=2)
    pruning = method.start(model, context(model))
    masks = zeros(model)
    assert zero_share(masks) == pytest.approx(0.6, abs=1e-3)
    assert pruning.report()["sparsity"] == pytest.approx(zero_share(masks))
    by_matrix = {round(mask.float().mean().item(), 2) for mask in masks.values()}
    assert (by_matrix == {0.6}) == (scope == "layer")
    for name, parameter in untouched.named_parameters():
        assert name in masks or torch.equal(parameter, model.get_parameter(name))


def test_magnitude_takes_the_smallest_weights():
    model = make("bert")
    before = {name: weight.abs().clone() for name, weight in weights_of(model).items()}
    Magnitude(sparsity=0.5).start(model, context(model))
    for name, mask in zeros(model).items():
        assert before[name][mask].max() <= before[name][~mask].min()


def test_taylor_takes_what_the_loss_does_not_feel_and_leaves_gradients_alone():
    model = make("gpt2")
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.data[:, :20] = 9.0  # large weights of neurons that nothing reads
    model.transformer.h[1].mlp.c_proj.weight.data[:20] = 0.0
    weight.grad = torch.ones_like(weight)
    weight.requires_grad_(False)
    method = Magnitude(sparsity=0.5, importance="taylor", num_batches=2)
    method.start(model, context(model))
    assert (weight[:, :20] == 0).all()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert not weight.requires_grad
    assert not model.training
    assert all(p.grad is None for p in model.parameters() if p is not weight)


def test_taylor_looks_at_the_model_without_dropout():
    masks = []
    for training in (False, True):
        model = make("bert").train(training)
        method = Magnitude(sparsity=0.5, importance="taylor", num_batches=2)
        method.start(model, context(model))
        assert model.training == training
        masks.append(torch.cat([mask.flatten() for mask in zeros(model).values()]))
    assert torch.equal(*masks)


def test_random_importance_depends_on_the_seed_alone():
    masks = []
    for seed in (1, 1, 2):
        model = make("bert")
        Magnitude(sparsity=0.5, importance="random").start(model, context(model, seed=seed))
        masks.append(torch.cat([mask.flatten() for mask in zeros(model).values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("unit", ["absolute", "std"])
def test_threshold_takes_all_weights_up_to_it(unit):
    model = make("bert")
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    pruning = Threshold(threshold=0.3, unit=unit).start(model, context(model))
    for name, mask in zeros(model).items():
        limit = 0.3 * (before[name].std() if unit == "std" else 1.0)
        assert torch.equal(mask, before[name].abs() <= limit)
    assert pruning.report()["sparsity"] == zero_share(zeros(model))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_n_m_zeros_lie_in_blocks_along_the_inputs(family):
    model = make(family)
    NM().start(model, context(model))
    for name, mask in zeros(model).items():
        module = model.get_submodule(name.removesuffix(".weight"))
        rows = mask.t() if isinstance(module, Conv1D) else mask
        assert (rows.reshape(-1, 4).sum(dim=1) == 2).all()


def test_n_m_refuses_inputs_that_blocks_do_not_divide():
    model = make("bert", intermediate_size=42)
    with pytest.raises(Infeasible, match=r"blocks of 4 .* 42 inputs of .*output\.dense\.weight"):
        NM().plan(read_signature(model))
    NM(ignore=("output.dense",)).plan(read_signature(model))


@pytest.mark.parametrize(
    "method",
    [Magnitude(sparsity=0.5, ignore=("query", "output.dense.weight")), NM(ignore=("query",))],
)
def test_ignored_weights_are_left_alone(method):
    model = make("bert")
    method.start(model, context(model))
    for name, mask in zeros(model).items():
        assert mask.any().item() != name.removesuffix(".weight").endswith(
            tuple(end.removesuffix(".weight") for end in method.ignore)
        )


# -- schedules -----------------------------------------------------------------------------------


def test_zeros_hold_through_every_step():
    model = make("bert")
    pruning = Magnitude(sparsity=0.5).start(model, context(model))
    masks = zeros(model)
    for _ in train(model, [pruning]):
        assert all(torch.equal(mask, masks[name]) for name, mask in zeros(model).items())


def test_zeros_hold_in_a_model_that_other_methods_cut_later():
    model = make("bert")
    first = Magnitude(sparsity=0.5).start(model, context(model))
    second = Structured(heads=0.5, layers=0.3, layer_choice="first").start(model, context(model))
    masks = zeros(model)
    for _ in train(model, [first, second]):
        assert all(torch.equal(mask, masks[name]) for name, mask in zeros(model).items())


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "random"])
def test_a_gradual_schedule_follows_the_cubic_and_brings_nothing_back(importance):
    model = make("bert")
    method = Magnitude(
        sparsity=0.8,
        importance=importance,
        num_batches=1,
        schedule="gradual",
        begin=0.2,
        end=0.8,
        num_updates=3,
    )
    pruning = method.start(model, context(model))
    assert zero_share(zeros(model)) == 0
    reached, before = [], zeros(model)
    for _ in train(model, [pruning], num_steps=10):
        now = zeros(model)
        assert all((now[name] | ~before[name]).all() for name in now)
        reached.append(zero_share(now))
        before = now
    shares = [0, 0, 0, 19 / 27, 19 / 27, 26 / 27, 26 / 27, 1, 1, 1]
    assert reached == pytest.approx([0.8 * share for share in shares], abs=2e-3)


def test_after_prunes_at_the_end_alone():
    model = make("bert")
    pruning = Magnitude(sparsity=0.5, schedule="after").start(model, context(model))
    for _ in train(model, [pruning]):
        assert zero_share(zeros(model)) == 0
    assert zero_share(zeros(model)) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradually_masked_units_go_without_changing_the_model(family):
    model = make(family)
    method = Structured(heads=0.5, neurons=0.5, schedule="gradual", end=0.7, num_batches=1)
    pruning = method.start(model, context(model))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    steps = train(model, [], num_steps=4)
    for step in steps:
        pruning.on_step(step, 4)
        assert {name: p.shape for name, p in model.named_parameters()} == shapes
    masked = logits(model)
    pruning.finish()
    torch.testing.assert_close(logits(model), masked, atol=1e-5, rtol=1e-5)
    assert read_signature(model).num_params < sum(shape.numel() for shape in shapes.values())


# -- structure -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "kept"), [("first", [0, 1, 2]), ("spread", [0, 2, 5]), ("importance", [1, 3, 4])]
)
def test_which_layers_stay(choice, kept):
    model = make("bert", num_hidden_layers=6)
    for index in (0, 2, 5):
        for parameter in model.bert.encoder.layer[index].parameters():
            parameter.data.mul_(1e-3)
    before = [layer.output.dense.weight.clone() for layer in model.bert.encoder.layer]
    method = Structured(layers=0.5, layer_choice=choice, importance="magnitude")
    method.start(model, context(model))
    for layer, index in zip(model.bert.encoder.layer, kept, strict=True):
        assert torch.equal(layer.output.dense.weight, before[index])


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_heads_that_do_nothing_go_first(family, importance):
    model = make(family)
    group = next(g for g in read_signature(model).groups_of("heads"))
    parts = [part for part in group.slices if part.weight.endswith("weight")]
    for part in parts:
        weight = model.get_parameter(part.weight).data
        weight.narrow(part.dim, part.start + part.size, part.size).mul_(1e-3)
    kept = [
        model.get_parameter(parts[0].weight).narrow(
            parts[0].dim, start * parts[0].size, parts[0].size
        )
        for start in (0, 2, 3)
    ]
    expected = torch.cat([part.clone() for part in kept], dim=parts[0].dim)
    Structured(heads=0.25, importance=importance, num_batches=2).start(model, context(model))
    now = model.get_parameter(parts[0].weight)
    assert torch.equal(now.narrow(parts[0].dim, 0, expected.shape[parts[0].dim]), expected)


def test_at_least_one_unit_stays():
    model = make("bert")
    Structured(heads=0.99, neurons=0.99, layers=0.99).start(model, context(model))
    counts = read_signature(model).counts
    assert counts["encoder.layers"] == counts["encoder.0.heads"] == counts["encoder.0.neurons"] == 1
    assert torch.isfinite(logits(model)).all()


def test_masks_are_put_back_in_one_call(monkeypatch):
    model = make("bert")
    pruning = Magnitude(sparsity=0.5).start(model, context(model))
    pruning.on_step(0, 10)
    calls = []
    put_back = torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *args: calls.append(put_back(*args)))
    monkeypatch.setattr(type(model), "get_parameter", None)  # nothing is looked up either
    pruning.on_step(1, 10)
    assert len(calls) == 1


def test_masked_units_stay_masked_beside_others_that_do_nothing():
    model = make("t5")
    method = Structured(neurons=0.5, schedule="gradual", end=1.0, num_updates=3, num_batches=1)
    pruning = method.start(model, context(model))

    def alive():
        rows = [layer.layer[-1].DenseReluDense.wi.weight for layer in model.decoder.block]
        return [weight.abs().sum(dim=1) > 0 for weight in rows]

    pruning.on_step(2, 3)
    for layer, still in zip(model.decoder.block, alive(), strict=True):
        silent = still.nonzero()[:10]  # their gradients, times their weights, are zero too
        layer.layer[-1].DenseReluDense.wo.weight.data[:, silent] = 0.0
    pruning.on_step(3, 3)
    assert [int(still.sum()) for still in alive()] == [20, 20, 20]
    masked = logits(model)
    pruning.finish()
    torch.testing.assert_close(logits(model), masked, atol=1e-5, rtol=1e-5)
