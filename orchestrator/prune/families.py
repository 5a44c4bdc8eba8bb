"""The families of models that structured pruning knows: where their modules are, what each does.

To add one: describe its stacks here and give it a line in `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.trial import Infeasible


@dataclass(frozen=True, kw_only=True)
class AttentionModules:
    """An attention block of a layer, all paths below the layer.

    `query`, `key` and `value` may be one fused module, which holds them side by side. `module`
    has the attributes: `head_dim` is read, `num_heads` and `width` (heads × head_dim) are kept
    right where they exist. `position_bias` is an embedding [buckets, heads] of the first layer;
    blocks that are `shared` over their stack keep the same heads in all layers.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    head_dim: str
    num_heads: str = ""
    width: str = ""
    group: str = "heads"
    shared: bool = False
    position_bias: str = ""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack of layers; `layers` is its ModuleList below the base model.

    `up` and `down` are the feed-forward modules below a layer, those of `up` that it has.
    `num_layers` is the model config's name for its depth.
    """

    name: str
    layers: str
    attentions: tuple[AttentionModules, ...]
    up: tuple[str, ...]
    down: str
    num_layers: str = "num_hidden_layers"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family of models is built.

    `num_heads` and `num_kv_heads` are the config's names where it can say them apart from the
    head's size, `num_neurons` that of the feed-forward width. `pools` tells whether a sequence
    classifier's head sees one vector a sequence, or every token. `counts_from_padding` tells
    that positions begin after the id of the padding token, which therefore cannot change.
    """

    stacks: tuple[Stack, ...]
    num_neurons: str
    num_heads: str = ""
    num_kv_heads: str = ""
    pools: bool = True
    counts_from_padding: bool = False


BERT = Family(
    stacks=(
        Stack(
            name="encoder",
            layers="encoder.layer",
            attentions=(
                AttentionModules(
                    module="attention.self",
                    query="attention.self.query",
                    key="attention.self.key",
                    value="attention.self.value",
                    output="attention.output.dense",
                    head_dim="attention_head_size",
                    num_heads="num_attention_heads",
                    width="all_head_size",
                ),
            ),
            up=("intermediate.dense",),
            down="output.dense",
        ),
    ),
    num_neurons="intermediate_size",
)

ROBERTA = replace(BERT, counts_from_padding=True)

DISTILBERT = Family(
    stacks=(
        Stack(
            name="encoder",
            layers="transformer.layer",
            attentions=(
                AttentionModules(
                    module="attention",
                    query="attention.q_lin",
                    key="attention.k_lin",
                    value="attention.v_lin",
                    output="attention.out_lin",
                    head_dim="attention_head_size",
                    num_heads="n_heads",
                ),
            ),
            up=("ffn.lin1",),
            down="ffn.lin2",
            num_layers="n_layers",
        ),
    ),
    num_neurons="hidden_dim",
)

GPT2 = Family(
    stacks=(
        Stack(
            name="decoder",
            layers="h",
            attentions=(
                AttentionModules(
                    module="attn",
                    query="attn.c_attn",
                    key="attn.c_attn",
                    value="attn.c_attn",
                    output="attn.c_proj",
                    head_dim="head_dim",
                    num_heads="num_heads",
                    width="split_size",
                ),
            ),
            up=("mlp.c_fc",),
            down="mlp.c_proj",
            num_layers="n_layer",
        ),
    ),
    num_neurons="n_inner",
    pools=False,
)

LLAMA = Family(
    stacks=(
        Stack(
            name="decoder",
            layers="layers",
            attentions=(
                AttentionModules(
                    module="self_attn",
                    query="self_attn.q_proj",
                    key="self_attn.k_proj",
                    value="self_attn.v_proj",
                    output="self_attn.o_proj",
                    head_dim="head_dim",
                ),
            ),
            up=("mlp.gate_proj", "mlp.up_proj"),
            down="mlp.down_proj",
        ),
    ),
    num_neurons="intermediate_size",
    num_heads="num_attention_heads",
    num_kv_heads="num_key_value_heads",
    pools=False,
)


def _t5_attention(path: str, *, group: str = "heads", position_bias: str = "") -> AttentionModules:
    """All blocks of a stack add one position bias, so they keep the same heads."""
    return AttentionModules(
        module=path,
        query=f"{path}.q",
        key=f"{path}.k",
        value=f"{path}.v",
        output=f"{path}.o",
        head_dim="key_value_proj_dim",
        num_heads="n_heads",
        width="inner_dim",
        group=group,
        shared=True,
        position_bias=position_bias,
    )


_T5_SELF_ATTENTION = _t5_attention(
    "layer.0.SelfAttention", position_bias="layer.0.SelfAttention.relative_attention_bias"
)


def _t5_stack(
    name: str, *, attentions: tuple[AttentionModules, ...], feed_forward: str, num_layers: str
) -> Stack:
    return Stack(
        name=name,
        layers=f"{name}.block",
        attentions=attentions,
        up=tuple(f"{feed_forward}.{up}" for up in ("wi", "wi_0", "wi_1")),
        down=f"{feed_forward}.wo",
        num_layers=num_layers,
    )


T5 = Family(
    stacks=(
        _t5_stack(
            "encoder",
            attentions=(_T5_SELF_ATTENTION,),
            feed_forward="layer.1.DenseReluDense",
            num_layers="num_layers",
        ),
        _t5_stack(
            "decoder",
            attentions=(
                _T5_SELF_ATTENTION,
                _t5_attention("layer.1.EncDecAttention", group="cross_heads"),
            ),
            feed_forward="layer.2.DenseReluDense",
            num_layers="num_decoder_layers",
        ),
    ),
    num_neurons="d_ff",
    num_heads="num_heads",
)

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "distilbert": DISTILBERT,
    "gpt2": GPT2,
    "llama": LLAMA,
    "t5": T5,
}


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`. Raises `Infeasible` for one that is not known."""
    if model_type not in FAMILIES:
        raise Infeasible(f"no dependency tree for {model_type!r} models; known: {list(FAMILIES)}")
    return FAMILIES[model_type]
