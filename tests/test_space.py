"""What a space offers, what is one configuration and what is two, and what is refused unseen."""

from __future__ import annotations

import pytest

from orchestrator.parameters import Choice, Range
from orchestrator.recipe import Recipe, make_recipe
from orchestrator.signature import Attention, Group, Signature, Slice, Weight
from orchestrator.space import Space, draw, grid, infeasible, predict, resolve
from orchestrator.trial import BadInput, Infeasible, TrialConfig

STRUCTURED = {"method": "structured", "heads": 0.5}


def space(**sections: object) -> Space:
    return Space(**{"model": ("m",), "finetune": {"max_steps": 5}, **sections})


def names(config: TrialConfig) -> list[str]:
    return [method["method"] for method in config.prune]


# -- drawing -------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_choices_with_the_last_turning_fastest():
    offered = space(prune={"choice": ["none", STRUCTURED]}, quantize={"choice": ["none", "W8A8"]})
    drawn = [(names(c), c.quantize["scheme"]) for c in grid(offered)]
    assert drawn == [
        ([], "none"),
        ([], "W8A8"),
        (["structured"], "none"),
        (["structured"], "W8A8"),
    ]


def test_parameters_of_an_alternative_exist_only_where_it_was_chosen():
    structured = {"method": "structured", "heads": {"choice": [0.25, 0.5]}}
    offered = space(prune={"choice": ["none", structured]})
    assert [len(config.prune) for config in grid(offered)] == [0, 1, 1]
    asked: list[str] = []

    def first(path: str, parameter: Choice | Range) -> float:
        asked.append(path)
        return parameter.grid()[0]

    draw(offered, first)
    assert asked == ["prune"]


def test_the_same_key_in_two_alternatives_is_two_parameters():
    offered = space(
        prune={
            "choice": [
                {"method": "magnitude", "sparsity": {"choice": [0.1, 0.2]}},
                {"method": "vocabulary", "sparsity": {"choice": [0.3, 0.4, 0.5]}},
            ]
        }
    )
    places: dict[str, int] = {}

    def note(path: str, parameter: Choice | Range) -> float:
        places[path] = len(parameter.grid())
        return parameter.grid()[-1] if path == "prune" else parameter.grid()[0]

    draw(offered, note)
    assert places == {"prune": 2, "prune.choice.1.sparsity": 3}


@pytest.mark.parametrize("prune", ["magnitude", "none"])
def test_when_asks_ahead_of_its_turn_and_sets_the_default_otherwise(prune):
    """The condition in `prune` looks at `quantize`, which is drawn later."""
    begin = {"choice": [0.1, 0.2], "when": {"quantize.scheme": ["W8A8", "W4A16"]}}
    method = {"method": "magnitude", "sparsity": 0.5, "schedule": "gradual", "begin": begin}
    offered = space(
        prune=method if prune == "magnitude" else "none", quantize={"choice": ["none", "W8A8"]}
    )
    drawn = {
        (c.quantize["scheme"], c.prune[0]["begin"] if c.prune else None) for c in grid(offered)
    }
    expected = {("none", 0.0), ("W8A8", 0.1), ("W8A8", 0.2)}
    assert drawn == (expected if prune == "magnitude" else {("none", None), ("W8A8", None)})


def test_otherwise_stands_in_where_a_condition_does_not_hold():
    offered = space(
        quantize={"choice": ["none", "W8A8"]},
        finetune={
            "max_steps": {"choice": [50], "when": {"quantize.scheme": "W8A8"}, "otherwise": 7}
        },
    )
    assert [c.finetune["max_steps"] for c in grid(offered)] == [7, 50]


def test_conditions_on_a_list_of_methods_hold_for_any_of_them():
    steps = {"choice": [9], "when": {"prune.method": "vocabulary"}, "otherwise": 1}
    methods = [STRUCTURED, {"choice": ["none", {"method": "vocabulary", "sparsity": 0.5}]}]
    drawn = [
        (names(c), c.finetune["max_steps"])
        for c in grid(space(prune=methods, finetune={"max_steps": steps}))
    ]
    assert drawn == [(["structured"], 1), (["structured", "vocabulary"], 9)]


def test_several_models_are_one_more_choice():
    drawn = [config.model for config in grid(space(model=("a", "b"), quantize="W8A8"))]
    assert drawn == ["a", "b"]


def test_forbidden_combinations_are_never_drawn():
    offered = space(
        prune={"choice": ["none", STRUCTURED]},
        quantize={"choice": ["W8A8", "W4A16"]},
        forbid=[{"prune.method": "structured", "quantize.scheme": "W4A16"}],
    )
    drawn = [(names(c), c.quantize["scheme"]) for c in grid(offered)]
    assert (["structured"], "W4A16") not in drawn
    assert len(drawn) == 3
    without = space(prune={"choice": ["none", STRUCTURED]}, forbid=[{"prune.method": "none"}])
    assert [names(c) for c in grid(without)] == [["structured"]]


def test_options_that_do_not_go_together_are_left_out_of_a_grid():
    both = {"method": "vocabulary", "sparsity": 0.5, "vocab_size": {"choice": [None, 300]}}
    assert [c.prune[0]["vocab_size"] for c in grid(space(prune=both))] == [None]
    with pytest.raises(Infeasible, match="vocab_size"):
        resolve(model="m", prune={"method": "vocabulary"})


# -- ranges --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "points"),
    [
        ({"range": [2, 5]}, (2, 3, 4, 5)),
        ({"range": [2, 7], "step": 2}, (2, 4, 6)),
        ({"range": [0.1, 0.3], "step": 0.1}, (0.1, 0.2, 0.3)),
        ({"range": [0.0, 1.0], "num": 3}, (0.0, 0.5, 1.0)),
        ({"range": [1e-5, 1e-3], "log": True, "num": 3}, (1e-5, 1e-4, 1e-3)),
        ({"range": [1, 100], "log": True, "num": 3}, (1, 10, 100)),
    ],
)
def test_points_of_a_range_on_a_grid(given, points):
    found = Range(**given).grid()
    assert found == points
    assert [type(value) for value in found] == [type(value) for value in points]


def test_a_range_without_points_cannot_be_searched_as_a_grid():
    with pytest.raises(ValueError, match="`num`"):
        Range(range=(0.0, 1.0)).grid()


@pytest.mark.parametrize(
    "given",
    [
        {"range": [2, 5]},
        {"range": [0.2, 0.5]},
        {"range": [1e-5, 1e-3], "log": True},
        {"range": [1, 100], "log": True},
        {"range": [0.0, 1.0], "step": 0.25},
    ],
)
def test_samples_fill_a_range_and_never_leave_it(given):
    import numpy as np

    rng = np.random.default_rng(0)
    parameter = Range(**given)
    low, high = parameter.range
    values = [parameter.sample(rng) for _ in range(400)]
    assert all(low <= value <= high for value in values)
    assert all(isinstance(value, type(low)) for value in values)
    middle = (low * high) ** 0.5 if parameter.log else (low + high) / 2
    assert 0.3 < sum(value <= middle for value in values) / 400 < 0.75


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"range": [5, 2]}, "low < high"),
        ({"range": [0, 1], "log": True}, "low > 0"),
        ({"range": ["a", 1]}, "range"),
        ({"range": [0, 1], "nmu": 3}, "did you mean `num`"),
        ({"choice": []}, "is empty"),
        ({"choice": [1], "range": [0, 1]}, "range is not a key of `choice`"),
    ],
)
def test_malformed_parameters_are_told_with_their_place(given, rule):
    with pytest.raises(BadInput) as caught:
        _ = space(finetune={"max_steps": given}).tree
    assert "space.finetune.max_steps" in str(caught.value)
    assert rule in str(caught.value)


# -- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"quantize": "none"}, {"quantize": {"scheme": "none", "qat": True, "embeddings": True}}),
        ({"quantize": "W8A8"}, {"quantize": {"scheme": "W8A8", "qat_start": 0.5}}),
        ({"quantize": "W8A8"}, {"quantize": {"scheme": "W8A8", "interval": 0.1, "group_size": 8}}),
        ({"prune": "none"}, {"prune": ["none", "none"]}),
        ({"prune": STRUCTURED}, {"prune": [STRUCTURED]}),
        ({"prune": STRUCTURED}, {"prune": {**STRUCTURED, "neurons": 0, "begin": 0.3}}),
        ({"finetune": {"max_steps": 0}}, {"finetune": {"max_steps": 0, "learning_rate": 1.0}}),
        ({"finetune": {"num_train_epochs": 0}}, {"finetune": {"max_steps": 0}}),
        ({"finetune": {"max_steps": 3}}, {"finetune": {"max_steps": 3, "num_train_epochs": 9}}),
    ],
)
def test_configurations_that_mean_the_same_have_one_id(one, other):
    assert resolve(model="m", **one).id == resolve(model="m", **other).id


@pytest.mark.parametrize(
    "other",
    [
        {"quantize": {"scheme": "W8A8", "qat": True}},
        {"quantize": {"scheme": "W8A8", "embeddings": True}},
        {"prune": STRUCTURED},
        {"finetune": {"max_steps": 3, "learning_rate": 1e-3}},
        {"finetune": {"max_steps": 3, "distillation": {}}},
        {"seed": 1},
        {"model": "n"},
    ],
)
def test_configurations_that_differ_in_meaning_have_different_ids(other):
    first = {"model": "m", "quantize": "W8A8", "finetune": {"max_steps": 3}}
    assert resolve(**first).id != resolve(**{**first, **other}).id


def test_the_order_of_methods_matters():
    vocabulary = {"method": "vocabulary", "sparsity": 0.5}
    there = resolve(model="m", prune=[STRUCTURED, vocabulary])
    back = resolve(model="m", prune=[vocabulary, STRUCTURED])
    assert there.id != back.id


def test_every_option_is_written_out():
    config = resolve(model="m", prune=STRUCTURED)
    assert config.prune[0]["neurons"] == 0.0
    assert config.quantize["qat"] is False
    assert config.finetune["learning_rate"] > 0


# -- feasibility and prediction ------------------------------------------------------------------


def two_layers(hidden: int = 64, neurons: int = 96) -> Signature:
    """A decoder of two layers with four heads of 16."""
    weights = [Weight(name="embed.weight", shape=(300, hidden), role="embedding")]
    groups = [Group(name="layers", kind="layers", num_units=2)]
    attentions = []
    for i in range(2):
        own = {"layer": f"layers.{i}", "role": "linear"}
        shapes = {"q": (64, hidden), "o": (hidden, 64), "up": (neurons, hidden)}
        shapes |= {"down": (hidden, neurons)}
        weights += [
            Weight(name=f"layers.{i}.{n}.weight", shape=s, **own) for n, s in shapes.items()
        ]
        heads = (
            Slice(weight=f"layers.{i}.q.weight", dim=0, size=16),
            Slice(weight=f"layers.{i}.o.weight", dim=1, size=16),
        )
        middle = (
            Slice(weight=f"layers.{i}.up.weight", dim=0),
            Slice(weight=f"layers.{i}.down.weight", dim=1),
        )
        layer = f"layers.{i}"
        groups += [
            Group(name=f"{layer}.heads", kind="heads", num_units=4, slices=heads, layer=layer),
            Group(
                name=f"{layer}.neurons",
                kind="neurons",
                num_units=neurons,
                slices=middle,
                layer=layer,
            ),
        ]
        attentions.append(
            Attention(layer=layer, group=f"{layer}.heads", num_heads=4, num_kv_heads=4, head_dim=16)
        )
    groups.append(
        Group(
            name="vocabulary",
            kind="vocabulary",
            num_units=300,
            slices=(Slice(weight="embed.weight", dim=0),),
        )
    )
    return Signature(
        model_type="llama",
        architecture="LlamaForCausalLM",
        hidden_size=hidden,
        weights=tuple(weights),
        groups=tuple(groups),
        attentions=tuple(attentions),
    )


def recipe(task: str = "causal_lm", runtime: str = "onnxruntime") -> Recipe:
    quality = {"causal_lm": "perplexity", "text_classification": "accuracy"}[task]
    return make_recipe(
        {
            "model": {"name": "some/model", "id": "m"},
            "task": {"name": task, "data": "some/data"},
            "target": {"runtime": runtime},
            "objectives": [quality, "size_mb"],
        }
    )


TRAINED = {"max_steps": 3}


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"prune": {"method": "n_m", "m": 7, "n": 3}}, "blocks of 7"),
        ({"prune": {"method": "structured", "neurons": 0.5}, "quantize": "W4A16"}, "group size 32"),
        (
            {"quantize": {"scheme": "W8A8", "qat": True}, "finetune": {"max_steps": 0}},
            "budget is 0",
        ),
        (
            {"prune": {**STRUCTURED, "schedule": "gradual"}, "finetune": {"max_steps": 0}},
            "gradual structured",
        ),
        ({"prune": {"method": "vocabulary", "sparsity": 0.5}}, "across vocabularies"),
        ({"quantize": "bf16"}, "bf16"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(sections, reason):
    config = resolve(model="m", **{"finetune": TRAINED, **sections})
    told = infeasible(config, two_layers(), recipe())
    assert told is not None
    assert reason in told


def test_qat_needs_weights_that_are_rounded():
    config = resolve(model="m", quantize={"scheme": "bf16", "qat": True}, finetune=TRAINED)
    told = infeasible(config, two_layers(), recipe(runtime="torch"))
    assert told is not None
    assert "nothing to train" in told


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"prune": STRUCTURED, "quantize": {"scheme": "W8A8", "qat": True}},
        {"prune": [STRUCTURED, {"method": "structured", "layers": 0.5}]},
        {"prune": {"method": "n_m"}, "quantize": "W8A16"},
        {"quantize": {"scheme": "W4A16", "qat": True}},
        {"prune": {**STRUCTURED, "schedule": "gradual"}},
    ],
)
def test_what_can_work_is_not_refused(sections):
    config = resolve(model="m", **{"finetune": TRAINED, **sections})
    assert infeasible(config, two_layers(), recipe()) is None


def test_a_classifier_may_lose_words_and_still_learn_from_its_teacher():
    config = resolve(
        model="m",
        prune={"method": "vocabulary", "sparsity": 0.5},
        finetune={**TRAINED, "distillation": {}},
    )
    assert infeasible(config, two_layers(), recipe("text_classification")) is None


def test_predicted_sizes_follow_shapes_and_bits():
    dense = two_layers()

    def known(**sections: object) -> dict[str, float]:
        return predict(resolve(model="m", **sections), dense, recipe(), length=10)

    params = 300 * 64 + 2 * (2 * 64 * 64 + 2 * 96 * 64)
    assert known()["num_params"] == params
    assert known()["size_mb"] == pytest.approx(4 * params / 1e6)
    assert known()["macs"] == dense.macs(length=10)
    half = known(prune={"method": "structured", "heads": 0.5, "neurons": 0.5})
    assert half["num_params"] == 300 * 64 + 2 * (2 * 64 * 32 + 2 * 48 * 64)
    assert half["macs"] < known()["macs"]
    bytes_ = [known(quantize=scheme)["size_mb"] for scheme in ("none", "W8A8", "W4A16")]
    assert bytes_ == sorted(bytes_, reverse=True)
    assert "macs" not in predict(resolve(model="m"), dense, recipe())
