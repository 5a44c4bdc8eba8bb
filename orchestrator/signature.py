"""A model's signature: names, shapes and roles of its weights, and what must be pruned together.

It is plain data, made once on the meta device in a worker process, on which `plan` computes
exact shapes, sizes and multiply-accumulates with no tensor library at hand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from orchestrator.trial import Frozen, Infeasible, content_hash

if TYPE_CHECKING:
    from orchestrator.quantize import Numerics, WeightNumerics

GroupKind = Literal["heads", "neurons", "layers", "vocabulary"]


class Weight(Frozen):
    """One stored tensor; `linear` weights are [out, in], `conv1d` [in, out].

    `layer` names the stack and index it belongs to ("encoder.3"), or "" outside of all layers.
    `positions` is how often a linear weight is applied: once a token, once a sequence.
    """

    name: str
    shape: tuple[int, ...]
    role: Literal["linear", "conv1d", "embedding", "norm", "bias", "other"]
    layer: str = ""
    positions: Literal["token", "sequence"] = "token"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_linear(self) -> bool:
        """Whether it multiplies activations."""
        return self.role in ("linear", "conv1d")

    @property
    def in_features(self) -> int:
        """Length of the inputs of a linear weight."""
        assert self.is_linear
        return self.shape[0] if self.role == "conv1d" else self.shape[1]

    @property
    def rows(self) -> int:
        """Outputs of a linear weight, entries of an embedding: what `channel` scales belong to."""
        return self.shape[1] if self.role == "conv1d" else self.shape[0]

    def is_ignored(self, endings: Sequence[str]) -> bool:
        """Whether one of `endings` is its name, its module's, or the last dotted parts of either."""
        module = self.name.rpartition(".")[0]
        return any(
            f".{name}".endswith(f".{end}") for name in (self.name, module) for end in endings
        )


class Slice(Frozen):
    """Unit u of a group owns indices [start + u * size, start + (u + 1) * size) of `weight`.

    The indices run along `dim`.
    """

    weight: str
    dim: int
    size: int = 1
    start: int = 0


class Group(Frozen):
    """Units that can be removed one by one; removing a unit removes its part of every slice.

    For `layers` the slices are empty: a unit is a whole layer, named by `Weight.layer`.
    """

    name: str
    kind: GroupKind
    num_units: int
    slices: tuple[Slice, ...] = ()
    layer: str = ""

    @property
    def stack(self) -> str:
        """For `layers`: what the names of its units begin with ("encoder")."""
        assert self.kind == "layers"
        return self.name.rpartition(".")[0]


class Attention(Frozen):
    """One attention block, for counting: its heads belong to group `group`."""

    layer: str
    group: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


class Signature(Frozen):
    """Everything about a model's shape that pruning, planning and exporting need.

    `tied` maps the name of a weight to the one that is stored in its place. `head` is the module
    that gives the logits, "" for a model without one. `constants` is the hash of what else its
    forward pass reads from the config (activation, epsilon, rotary base, …).
    """

    model_type: str
    architecture: str
    hidden_size: int
    weights: tuple[Weight, ...]
    groups: tuple[Group, ...]
    attentions: tuple[Attention, ...] = ()
    tied: dict[str, str] = {}
    head: str = ""
    constants: str = ""

    @property
    def key(self) -> str:
        """Equal for models whose weights have equal names and shapes: one graph serves them all."""
        return content_hash(self.model_dump(mode="json"))

    @property
    def counts(self) -> dict[str, int]:
        """Number of units by group."""
        return {group.name: group.num_units for group in self.groups}

    @property
    def num_params(self) -> int:
        """Number of stored parameters; tied ones count once."""
        return sum(weight.size for weight in self.weights if weight.name not in self.tied)

    def keep(self, counts: Mapping[str, int]) -> Signature:
        """The signature after `counts[group]` units are kept in each named group.

        Whole layers go from the end. Raises `Infeasible` for a group that the model lacks and for
        a count outside of 1 … `num_units`.
        """
        counts = {**self.counts, **self._checked(counts)}
        removed = {name: self.counts[name] - count for name, count in counts.items()}
        dropped = {
            f"{group.stack}.{index}"
            for group in self.groups_of("layers")
            for index in range(counts[group.name], group.num_units)
        }
        cuts = self._cuts(removed)
        weights = tuple(_cut(w, cuts) for w in self.weights if w.layer not in dropped)
        names = {weight.name for weight in weights}
        return self.model_copy(
            update={
                "weights": weights,
                "groups": tuple(
                    _shrunk(group, count=counts[group.name], names=names, cuts=cuts)
                    for group in self.groups
                    if group.layer not in dropped or not group.layer
                ),
                "attentions": tuple(
                    _with_heads(attention, count=counts[attention.group])
                    for attention in self.attentions
                    if attention.layer not in dropped
                ),
                "tied": {name: stored for name, stored in self.tied.items() if name in names},
            }
        )

    def groups_of(self, kind: GroupKind) -> tuple[Group, ...]:
        """The groups of one kind."""
        return tuple(group for group in self.groups if group.kind == kind)

    def linear_weights(self) -> tuple[Weight, ...]:
        """All weights that multiply activations, tied ones among them."""
        return tuple(weight for weight in self.weights if weight.is_linear)

    def prunable_weights(self, *, ignore: Sequence[str] = ()) -> tuple[Weight, ...]:
        """Linear weights inside the layers: what unstructured methods may set to zero."""
        return tuple(w for w in self.linear_weights() if w.layer and not w.is_ignored(ignore))

    def quantizable_weights(self, *, ignore: Sequence[str] = ()) -> tuple[Weight, ...]:
        """Linear weights stored on their own: one tied to an embedding stays what that is."""
        return tuple(
            weight
            for weight in self.linear_weights()
            if weight.name not in self.tied and not weight.is_ignored(ignore)
        )

    def macs(self, *, batch: int = 1, length: int) -> int:
        """Multiply-accumulates of one forward pass over `batch` rows of `length` tokens.

        Linear layers and the two products of each attention, its mask not considered.
        """
        uses = {"token": batch * length, "sequence": batch}
        linear = sum(weight.size * uses[weight.positions] for weight in self.linear_weights())
        width = sum(attention.num_heads * attention.head_dim for attention in self.attentions)
        return linear + 2 * width * batch * length * length

    def _checked(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        for name, count in counts.items():
            if name not in self.counts:
                raise Infeasible(f"no group {name!r} in this model; it has {list(self.counts)}")
            if not 1 <= count <= self.counts[name]:
                raise Infeasible(f"{name} has {self.counts[name]} units: {count} cannot be kept")
        return counts

    def _cuts(self, removed: Mapping[str, int]) -> _Cuts:
        cuts: _Cuts = defaultdict(list)
        for group in self.groups:
            for part in group.slices:
                cuts[part.weight, part.dim].append((part.start, removed[group.name] * part.size))
        return cuts


_Cuts = dict[tuple[str, int], list[tuple[int, int]]]  # (weight, dim) → [(start, indices gone)]


def _cut(weight: Weight, cuts: _Cuts) -> Weight:
    shape = tuple(
        length - sum(gone for _, gone in cuts.get((weight.name, dim), ()))
        for dim, length in enumerate(weight.shape)
    )
    return weight.model_copy(update={"shape": shape})


def _shrunk(group: Group, *, count: int, names: set[str], cuts: _Cuts) -> Group:
    slices = tuple(_moved(part, cuts) for part in group.slices if part.weight in names)
    return group.model_copy(update={"num_units": count, "slices": slices})


def _moved(part: Slice, cuts: _Cuts) -> Slice:
    gone = sum(gone for start, gone in cuts[part.weight, part.dim] if start < part.start)
    return part.model_copy(update={"start": part.start - gone})


def _with_heads(attention: Attention, *, count: int) -> Attention:
    queries = attention.num_heads // attention.num_kv_heads
    return attention.model_copy(update={"num_heads": count * queries, "num_kv_heads": count})


def check_divides(signature: Signature, group_size: int, *, ignore: Sequence[str] = ()) -> None:
    """Raise `Infeasible` unless `group_size` divides the inputs of every quantizable weight."""
    for weight in signature.quantizable_weights(ignore=ignore):
        if weight.in_features % group_size:
            raise Infeasible(
                f"group size {group_size} does not divide the {weight.in_features} inputs of "
                f"{weight.name}"
            )


def weight_bytes(signature: Signature, *, numerics: Numerics, ignore: Sequence[str] = ()) -> int:
    """Bytes of all stored weights under `numerics`: codes, scales and what stays floating point.

    A weight tied to an embedding is stored once, as the embedding is, which stays floating point
    where either of them is ignored.
    """
    ignored = {
        signature.tied.get(w.name, w.name) for w in signature.weights if w.is_ignored(ignore)
    }
    roundings: dict[str, WeightNumerics | None] = {
        "linear": numerics.weight,
        "conv1d": numerics.weight,
        "embedding": numerics.embedding,
    }
    float_bytes = {"float32": 4, "bfloat16": 2}[numerics.dtype]
    total = 0
    for weight in signature.weights:
        if weight.name in signature.tied:
            continue
        rounding = None if weight.name in ignored else roundings.get(weight.role)
        total += _code_bytes(weight, rounding) if rounding else weight.size * float_bytes
    return total


def _code_bytes(weight: Weight, rounding: WeightNumerics) -> int:
    """Packed codes, a float32 scale for each block, and a code as zero point where asymmetric."""
    num_scales = {
        "tensor": 1,
        "channel": weight.rows,
        "group": weight.size // max(rounding.group_size, 1),
    }[rounding.granularity]
    num_codes = weight.size + (0 if rounding.symmetric else num_scales)
    return math.ceil(num_codes * rounding.bits / 8) + 4 * num_scales
