"""The dependency tree of a model: which slices of which tensors go together, and removing them.

`read_signature` makes the groups of units from a family's description, and `shrink` takes units
out, so that a shrunk model computes what the full one would with these units masked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orchestrator.prune.families import AttentionModules, Family, Stack, family_of
from orchestrator.signature import Attention, Group, Signature, Slice, Weight
from orchestrator.trial import Infeasible, content_hash

# What a config says that the graph of a forward pass does not depend on.
_LABELS = ("architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version")


_REMOVALS: WeakKeyDictionary[PreTrainedModel, list[dict[str, list[int]]]] = WeakKeyDictionary()


def read_signature(model: PreTrainedModel) -> Signature:
    """The signature of a model, on any device, meta too. Raises `Infeasible` for other families."""
    family = family_of(model.config.model_type)
    groups: list[Group] = []
    attentions: list[Attention] = []
    for stack, path in _stacks(model):
        for modules in stack.attentions:
            found = _read_attention(model, modules, stack=stack, path=path)
            groups += found[0]
            attentions += found[1]
        groups += _neuron_groups(model, stack, path)
        depth = len(model.get_submodule(path))
        groups.append(Group(name=f"{stack.name}.layers", kind="layers", num_units=depth))
    return Signature(
        model_type=model.config.model_type,
        architecture=type(model).__name__,
        hidden_size=model.config.hidden_size,
        weights=tuple(_weights(model, family)),
        groups=(*groups, _vocabulary(model)),
        attentions=tuple(attentions),
        tied={name: names[0] for names in parameter_names(model).values() for name in names[1:]},
        head=_head(model),
        constants=_constants(model.config, family),
    )


def signature_from_config(config: Mapping[str, Any], auto_class_name: str) -> Signature:
    """The signature of the model that `auto_class_name` makes from `config`, without its weights.

    `config` is a config.json as plain data, `auto_class_name` for instance "AutoModelForCausalLM".
    """
    family_of(config["model_type"])
    made = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, auto_class_name).from_config(made)
    return read_signature(model)


def shrink(model: PreTrainedModel, keep: Mapping[str, Sequence[int]]) -> None:
    """Keep these units of each named group and remove the others, in place.

    Tensors, modules' attributes and, where it can say so, the config follow; so do the token ids
    in the configs when the vocabulary shrinks, whose units take their new ids from their order.
    Raises `Infeasible` as `Signature.keep` does.
    """
    family = family_of(model.config.model_type)
    signature = read_signature(model)
    signature.keep({name: len(units) for name, units in keep.items()})
    if "vocabulary" in keep:
        _renumber_tokens(model, keep["vocabulary"], family)
    _select(model, [group for group in signature.groups if group.name in keep], keep)
    for stack, path in _stacks(model):
        _keep_layers(model, stack, path, keep.get(f"{stack.name}.layers"))
        _refresh_attributes(model, stack, path)
    _refresh_config(model, family)
    done = {name: [int(unit) for unit in units] for name, units in keep.items()}
    _REMOVALS[model] = [*removals(model), done]


def removals(model: PreTrainedModel) -> list[dict[str, list[int]]]:
    """Every `keep` that the model was shrunk by so far, in their order."""
    return list(_REMOVALS.get(model, ()))


def config_expresses_shapes(model: PreTrainedModel) -> bool:
    """Whether a model made from its config alone has the very shapes of this one."""
    try:
        config = _remade(model.config)
        with torch.device("meta"):
            fresh = type(model)(config)
    except (ValueError, StrictDataclassError):
        return False
    return _shapes(fresh) == _shapes(model)


def referenced_tokens(model: PreTrainedModel) -> list[int]:
    """Ids of the vocabulary's rows that the model's configs name, such as padding."""
    num_rows = len(model.get_input_embeddings().weight)
    found: set[int] = set()
    for config in (*_configs(model), *_generation_configs(model)):
        for key, value in vars(config).items():
            if key.endswith("_token_id") and value is not None:
                found.update(value if isinstance(value, list) else [value])
    return sorted(token for token in found if 0 <= token < num_rows)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of every stack, first to last."""
    return [layer for _, path in _stacks(model) for layer in model.get_submodule(path).children()]


# -- reading -------------------------------------------------------------------------------------


def _prefix(model: PreTrainedModel) -> str:
    """What the names of the base model's weights begin with: "bert.", or "" for a bare one."""
    name = model.base_model_prefix
    return "" if model.base_model is model else f"{name}."


def _stacks(model: PreTrainedModel) -> Iterator[tuple[Stack, str]]:
    """The stacks that the model has, each with the path of its ModuleList."""
    modules = dict(model.named_modules())
    for stack in family_of(model.config.model_type).stacks:
        path = _prefix(model) + stack.layers
        if path in modules:
            yield stack, path


def parameter_names(model: PreTrainedModel) -> dict[int, list[str]]:
    """All names of each parameter, by its identity; tied ones have several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return names


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _weights(model: PreTrainedModel, family: Family) -> Iterator[Weight]:
    layers = {f"{path}.": stack.name for stack, path in _stacks(model)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, kind = name.rpartition(".")
        yield Weight(
            name=name,
            shape=tuple(parameter.shape),
            role=_role(model.get_submodule(module), kind),
            layer=_layer(name, layers),
            positions="sequence" if _is_pooled(name, model, family) else "token",
        )


def _layer(name: str, layers: Mapping[str, str]) -> str:
    for path, stack in layers.items():
        if name.startswith(path):
            return f"{stack}.{name.removeprefix(path).partition('.')[0]}"
    return ""


def _role(module: nn.Module, kind: str) -> Any:
    """The role of the parameter `kind` ("weight", "bias") of a module."""
    if kind == "bias":
        return "bias"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "norm" if "norm" in type(module).__name__.lower() else "other"


def _is_pooled(name: str, model: PreTrainedModel, family: Family) -> bool:
    """Whether a weight is applied once a sequence: a pooler, or a head on a pooled vector."""
    if ".pooler." in f".{name}":
        return True
    outside = not name.startswith(_prefix(model))
    classifies = type(model).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice"))
    return family.pools and classifies and outside


def _read_attention(
    model: PreTrainedModel, modules: AttentionModules, *, stack: Stack, path: str
) -> tuple[list[Group], list[Attention]]:
    """The head groups of one kind of attention, one a layer or one for the whole stack."""
    groups: list[Group] = []
    attentions: list[Attention] = []
    for index in range(len(model.get_submodule(path))):
        layer = f"{stack.name}.{index}"
        slices, heads, kv_heads, head_dim = _head_slices(model, modules, f"{path}.{index}")
        name = f"{stack.name if modules.shared else layer}.{modules.group}"
        attentions.append(
            Attention(
                layer=layer, group=name, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
            )
        )
        if modules.shared and groups:
            groups = [groups[0].model_copy(update={"slices": groups[0].slices + slices})]
        else:
            groups.append(
                Group(
                    name=name,
                    kind="heads",
                    num_units=kv_heads,
                    slices=slices,
                    layer="" if modules.shared else layer,
                )
            )
    return groups, attentions


def _head_slices(
    model: PreTrainedModel, modules: AttentionModules, layer: str
) -> tuple[tuple[Slice, ...], int, int, int]:
    """Slices of one block's heads, and its number of heads, of kv heads, and a head's size.

    A unit is a key and value head with all the query heads that share it.
    """
    inputs = (modules.query, modules.key, modules.value)
    widths = [_size(model, f"{layer}.{name}", "out") // inputs.count(name) for name in inputs]
    head_dim = getattr(model.get_submodule(f"{layer}.{modules.module}"), modules.head_dim)
    kv_heads = widths[1] // head_dim
    slices: list[Slice] = []
    start: dict[str, int] = defaultdict(int)
    for name, width in zip(inputs, widths, strict=True):
        slices += _out_slices(model, f"{layer}.{name}", size=width // kv_heads, start=start[name])
        start[name] += width
    slices.append(_in_slice(model, f"{layer}.{modules.output}", size=widths[0] // kv_heads))
    bias = f"{layer}.{modules.position_bias}"
    if modules.position_bias and bias in dict(model.named_modules()):
        slices.append(Slice(weight=f"{bias}.weight", dim=1))
    return tuple(slices), widths[0] // head_dim, kv_heads, head_dim


def _neuron_groups(model: PreTrainedModel, stack: Stack, path: str) -> Iterator[Group]:
    for index, layer in enumerate(model.get_submodule(path)):
        own = dict(layer.named_modules())
        prefix = f"{path}.{index}"
        slices = [_in_slice(model, f"{prefix}.{stack.down}")]
        for up in stack.up:
            if up in own:
                slices += _out_slices(model, f"{prefix}.{up}")
        yield Group(
            name=f"{stack.name}.{index}.neurons",
            kind="neurons",
            num_units=_size(model, f"{prefix}.{stack.down}", "in"),
            slices=tuple(slices),
            layer=f"{stack.name}.{index}",
        )


def _vocabulary(model: PreTrainedModel) -> Group:
    """Rows of the embedding and of the head that scores tokens, tied or not."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    owned = [table, *(head.parameters(recurse=False) if head is not None else ())]
    names = parameter_names(model)
    rows = dict.fromkeys(name for parameter in owned for name in names[id(parameter)])
    slices = tuple(Slice(weight=name, dim=0) for name in rows)
    return Group(name="vocabulary", kind="vocabulary", num_units=len(table), slices=slices)


def _head(model: PreTrainedModel) -> str:
    """The module that gives the logits: a language model's head, or the last linear layer."""
    scorer = model.get_output_embeddings()
    prefix = _prefix(model)
    for name, module in reversed(list(model.named_modules())):
        if module is scorer:
            return name
        outside = bool(prefix) and not name.startswith(prefix)
        if scorer is None and outside and isinstance(module, nn.Linear):
            return name
    return ""


def _constants(config: PretrainedConfig, family: Family) -> str:
    """Hash of what the config says beyond shapes and labels; of token ids, padding alone."""
    shapes = {"vocab_size", family.num_neurons, family.num_heads, family.num_kv_heads}
    shapes |= {stack.num_layers for stack in family.stacks}
    values = {
        key: value
        for key, value in config.to_dict().items()
        if key not in shapes
        and key not in _LABELS
        and not key.startswith("_")
        and (key == "pad_token_id" or not key.endswith("_token_id"))
    }
    return content_hash(values)


def _size(model: nn.Module, path: str, side: str) -> int:
    """Length of the inputs ("in") or outputs ("out") of a linear module."""
    module = model.get_submodule(path)
    return module.weight.shape[_dim(module, side)]


def _dim(module: nn.Module, side: str) -> int:
    transposed = isinstance(module, Conv1D)
    return int((side == "in") != transposed)


def _out_slices(model: PreTrainedModel, path: str, *, size: int = 1, start: int = 0) -> list[Slice]:
    """Slices of the outputs of a linear module: its weight's and, where it has one, its bias's."""
    module = model.get_submodule(path)
    weight = Slice(weight=f"{path}.weight", dim=_dim(module, "out"), size=size, start=start)
    if module.bias is None:
        return [weight]
    return [weight, Slice(weight=f"{path}.bias", dim=0, size=size, start=start)]


def _in_slice(model: PreTrainedModel, path: str, *, size: int = 1) -> Slice:
    dim = _dim(model.get_submodule(path), "in")
    return Slice(weight=f"{path}.weight", dim=dim, size=size)


# -- shrinking -----------------------------------------------------------------------------------


def _select(
    model: PreTrainedModel, groups: Iterable[Group], keep: Mapping[str, Sequence[int]]
) -> None:
    """Take the kept units' slices out of every tensor of `groups`."""
    parts: dict[str, dict[int, list[tuple[Slice, Group]]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        for part in group.slices:
            parts[part.weight][part.dim].append((part, group))
    smaller: dict[nn.Parameter, nn.Parameter] = {}
    for name, dims in parts.items():
        old = model.get_parameter(name)
        if old in smaller:  # tied: cut under its first name
            continue
        data = old.detach()
        for dim, owned in dims.items():
            index = _kept_indices(data.shape[dim], owned, keep)
            data = data.index_select(dim, torch.tensor(index, device=data.device))
        smaller[old] = nn.Parameter(data, requires_grad=old.requires_grad)
    for module in model.modules():
        _replace_parameters(module, smaller)


def _kept_indices(
    length: int, owned: Sequence[tuple[Slice, Group]], keep: Mapping[str, Sequence[int]]
) -> list[int]:
    """Indices of a dimension that stay: the kept units' in their order, and what no unit owns."""
    indices: list[int] = []
    position = 0
    for part, group in sorted(owned, key=lambda pair: pair[0].start):
        units = keep[group.name]
        assert len(set(units)) == len(units) and 0 <= min(units) <= max(units) < group.num_units
        indices += range(position, part.start)
        for unit in units:
            first = part.start + unit * part.size
            indices += range(first, first + part.size)
        position = part.start + group.num_units * part.size
    return indices + list(range(position, length))


def _replace_parameters(module: nn.Module, smaller: Mapping[nn.Parameter, nn.Parameter]) -> None:
    replaced = {
        name: smaller[parameter]
        for name, parameter in module.named_parameters(recurse=False)
        if parameter in smaller
    }
    for name, parameter in replaced.items():
        setattr(module, name, parameter)
    if "weight" not in replaced:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def _keep_layers(
    model: PreTrainedModel, stack: Stack, path: str, units: Sequence[int] | None
) -> None:
    layers = model.get_submodule(path)
    if units is None or len(units) == len(layers):
        return
    kept = sorted(units)
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False) and kept[-1] >= len(kept):
        raise Infeasible(
            "attention is scaled by the layer's index here, so only the first layers can be kept"
        )
    for modules in stack.attentions:
        if modules.position_bias and kept[0] != 0:
            _move_position_bias(layers[0], layers[kept[0]], modules)
    model.set_submodule(path, nn.ModuleList(layers[index] for index in kept))
    for index, layer in enumerate(model.get_submodule(path)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


def _move_position_bias(old: nn.Module, new: nn.Module, modules: AttentionModules) -> None:
    """The first layer computes the position bias for all that follow."""
    path, _, name = modules.position_bias.rpartition(".")
    setattr(new.get_submodule(path), name, old.get_submodule(modules.position_bias))
    setattr(new.get_submodule(path), f"has_{name}", True)


def _refresh_attributes(model: PreTrainedModel, stack: Stack, path: str) -> None:
    """Tell attention modules how many heads they have now."""
    for layer in model.get_submodule(path):
        for modules in stack.attentions:
            module = layer.get_submodule(modules.module)
            width = _size(layer, modules.output, "in")
            if modules.width:
                setattr(module, modules.width, width)
            if modules.num_heads:
                setattr(module, modules.num_heads, width // getattr(module, modules.head_dim))


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """The model's config and its copies that parts of the model hold."""
    held = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in held if isinstance(c, PretrainedConfig)}.values())


def _remade(config: PretrainedConfig) -> PretrainedConfig:
    """What config.json would give. Raises where its own checks refuse the values."""
    return type(config).from_dict(config.to_dict())


def _renumber_tokens(model: PreTrainedModel, order: Sequence[int], family: Family) -> None:
    """Let every token id that the model or its configs hold name the row it named before."""
    renumbered = {old: new for new, old in enumerate(order)}
    padding = model.config.pad_token_id
    if family.counts_from_padding and renumbered.get(padding, padding) != padding:
        raise Infeasible(
            f"{model.config.model_type} counts positions from its padding token, whose id has to"
            f" stay {padding}, not become {renumbered[padding]}"
        )
    for config in (*_configs(model), *_generation_configs(model)):
        for key, value in list(vars(config).items()):
            if key.endswith("_token_id"):
                setattr(config, key, _renumber(value, renumbered))
    table = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is table:
            module.padding_idx = renumbered.get(module.padding_idx)


def _generation_configs(model: PreTrainedModel) -> list[Any]:
    found = getattr(model, "generation_config", None)
    return [found] if found is not None else []


def _renumber(value: Any, renumbered: Mapping[int, int]) -> Any:
    """New id, or ids, of a config's value; None for a token that is gone."""
    if isinstance(value, list):
        return [renumbered[token] for token in value if token in renumbered]
    return renumbered.get(value)


def _refresh_config(model: PreTrainedModel, family: Family) -> None:
    """Write what the config can say: the vocabulary, depths, and widths that all layers share."""
    signature = read_signature(model)
    for stack, path in _stacks(model):
        depth = signature.counts[f"{stack.name}.layers"]
        setattr(model.config, stack.num_layers, depth)
        own = getattr(model.get_submodule(path.rpartition(".")[0]), "config", model.config)
        if own is not model.config:
            own.num_hidden_layers = depth
    neurons = {group.num_units for group in signature.groups_of("neurons")}
    heads = {(attention.num_heads, attention.num_kv_heads) for attention in signature.attentions}
    for config in _configs(model):
        config.vocab_size = signature.counts["vocabulary"]
        if len(neurons) == 1:
            setattr(config, family.num_neurons, *neurons)
        if len(heads) == 1:
            _write_heads(config, family, *next(iter(heads)))
    for module in model.modules():
        if hasattr(module, "vocab_size"):
            module.vocab_size = signature.counts["vocabulary"]


def _write_heads(config: PretrainedConfig, family: Family, heads: int, kv_heads: int) -> None:
    """Write the number of heads unless the config's own checks refuse it."""
    values = {family.num_heads: heads, family.num_kv_heads: kv_heads}
    before = {name: getattr(config, name) for name in values if name}
    for name in before:
        setattr(config, name, values[name])
    try:
        _remade(config)
    except (ValueError, StrictDataclassError):
        for name, value in before.items():
            setattr(config, name, value)
