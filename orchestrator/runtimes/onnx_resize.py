"""A template made of one for other sizes of the same layers, which an export would take seconds for.

Sizes stand in a template as the shapes of its inputs, and as numbers of heads. Whatever else may
hang on them shows when the result is compared with torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from orchestrator.runtimes.onnx_parts import Port

HEADS = {  # operator: the attributes that count heads, and the input whose last axis they divide
    "Attention": (("q_num_heads", 0), ("kv_num_heads", 1)),
    "RotaryEmbedding": (("num_heads", 0),),
}
Ports = Mapping[str, Sequence[int | str]]


def resize(model: ir.Model, weights: Ports, ports: Sequence[Port]) -> None:
    """Give a template the shapes of `weights` and `ports`. Raises ValueError where they do not fit.

    The size of a head stays what it is.
    """
    graph = model.graph
    counted = [
        (node, name, index, _width(node.inputs[index]) // node.attributes[name].as_int())
        for node in graph
        for name, index in HEADS.get(node.op_type, ())
        if name in node.attributes
    ]
    given = {**weights, **{port.name: port.shape for port in ports}}
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(given[value.name])
    for node, name, index, size in counted:
        heads, rest = divmod(_width(node.inputs[index]), size)
        if rest:
            raise ValueError(f"{node.name} has no whole number of heads of {size}")
        node.attributes[name] = ir.AttrInt64(name, heads)
    _infer_shapes(model)


def _width(value: ir.Value | None) -> int:
    """The last axis of what a linear layer gives, looked up at its weight."""
    node = value.producer() if value is not None else None
    if node is None:
        raise ValueError("heads are counted of something that no linear layer gives")
    if node.op_type not in ("MatMul", "Gemm"):
        return _width(node.inputs[0])
    weight = node.inputs[1]
    turned = weight.producer()
    shape = weight.shape if turned is None else tuple(reversed(turned.inputs[0].shape))
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0)
    return int(shape[0 if transposed else -1])


def _infer_shapes(model: ir.Model) -> None:
    """Shapes in between. Axes that were free stay so, by name."""
    ends = set(model.graph.outputs)
    between = [value for node in model.graph for value in node.outputs if value not in ends]
    before = {value: value.shape for value in between}
    for value in between:
        value.shape = None
    ShapeInferencePass()(model)
    for value, old in before.items():
        if old is None or value.shape is None or len(old) != len(value.shape):
            continue
        axes = zip(old, value.shape, strict=True)
        value.shape = ir.Shape([new if isinstance(was, int) else was for was, new in axes])
