"""Our own codes and scales in a graph: nothing is rounded here, only written as onnxruntime computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape
from torch import nn

from orchestrator.quantize.modules import QuantizedEmbedding, QuantizedLinear
from orchestrator.runtimes.onnx_export import WEIGHT, as_array, constant, weight_inputs

MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators
FLOAT = ir.DataType.FLOAT


def quantize(model: ir.Model, source: nn.Module) -> None:
    """Put the codes of every quantized module of `source` in the place of its weight."""
    model.opset_imports[MICROSOFT] = 1
    _Writer(model.graph).write(source)
    RemoveUnusedNodesPass()(model)
    model.graph.sort()


def pack(codes: np.ndarray, *, bits: int, block_size: int) -> np.ndarray:
    """Signed codes [out, in] as MatMulNBits stores them: uint8 [out, blocks, bytes a block].

    Codes are shifted to be unsigned; of two 4-bit codes the first has the low half of the byte.
    """
    shifted = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        shifted = shifted[:, ::2] | shifted[:, 1::2] << 4
    return shifted.reshape(codes.shape[0], -1, block_size * bits // 8)


class _Writer:
    """Rewrites one graph; codes that modules share and rounded inputs that products share are kept once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.weights = {value.name: value for value in weight_inputs(graph)}
        self.stored: dict[int, ir.Value] = {}
        self.rounded: dict[ir.Value, tuple[ir.Value, ...]] = {}

    def write(self, source: nn.Module) -> None:
        for name, module in source.named_modules():
            weight = self.weights.get(f"{WEIGHT}{name}.weight")
            if weight is None or not isinstance(module, QuantizedLinear | QuantizedEmbedding):
                continue
            for node in _users(weight):
                if isinstance(module, QuantizedEmbedding):
                    self.embedding(node, name, module)
                else:
                    self.linear(node, name, module)

    def embedding(self, node: ir.Node, name: str, module: QuantizedEmbedding) -> None:
        """Gather codes and scales of the rows, then multiply."""
        assert node.op_type == "Gather"
        tape, ids = Tape(), node.inputs[1]
        scales = self.shared(f"{name}.scales", module.scales)
        codes = tape.op("Gather", [self.shared(f"{name}.codes", module.codes), ids])
        codes = tape.op("Cast", [codes], {"to": FLOAT})
        _replace(node, tape, tape.op("Mul", [codes, tape.op("Gather", [scales, ids])]))

    def linear(self, node: ir.Node, name: str, module: QuantizedLinear) -> None:
        """A MatMul, or a Gemm with its bias."""
        assert node.op_type in ("MatMul", "Gemm")
        tape = Tape()
        if module.numerics.activation is not None:
            product = self.integers
        elif module.numerics.weight.granularity == "group":
            product = self.blocks
        else:
            product = self.floats
        result = product(tape, node.inputs[0], name, module)
        if node.op_type == "Gemm" and len(node.inputs) == 3:
            result = tape.op("Add", [result, node.inputs[2]])
        _replace(node, tape, result)

    def integers(self, tape: Tape, x: ir.Value, name: str, module: QuantizedLinear) -> ir.Value:
        """An integer product, in the pattern that onnxruntime fuses into one operator."""
        if x not in self.rounded:
            self.rounded[x] = tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
        codes, scale, zero_point = self.rounded[x]
        scales = self.constant(f"{name}.scales", as_array(module.scales).reshape(-1))
        if module.tied_to is None:
            weight = self.constant(f"{name}.codes", as_array(module.codes).T)
        else:
            weight = tape.op(
                "Transpose", [self.shared(f"{name}.codes", module.codes)], {"perm": [1, 0]}
            )
        product = tape.op("MatMulInteger", [codes, weight, zero_point])
        product = tape.op("Cast", [product], {"to": FLOAT})
        return tape.op("Mul", [product, tape.op("Mul", [scale, scales])])

    def blocks(self, tape: Tape, x: ir.Value, name: str, module: QuantizedLinear) -> ir.Value:
        """A float product with weights that are unpacked on the way, block by block."""
        out, width = module.codes.shape
        bits, block = module.numerics.weight.bits, module.numerics.weight.group_size
        packed = pack(as_array(module.codes), bits=bits, block_size=block)
        codes = self.constant(f"{name}.codes", packed)
        scales = self.constant(f"{name}.scales", as_array(module.scales).reshape(-1))
        attributes = {"K": width, "N": out, "bits": bits, "block_size": block}
        return tape.op("MatMulNBits", [x, codes, scales], attributes, domain=MICROSOFT)

    def floats(self, tape: Tape, x: ir.Value, name: str, module: QuantizedLinear) -> ir.Value:
        """A float product with weights that are unpacked while loading, which folds constants.

        Not by DequantizeLinear: onnxruntime turns that into a product with rounded inputs.
        """
        codes = self.shared(f"{name}.codes", module.codes)
        weight = tape.op("Cast", [codes], {"to": FLOAT})
        weight = tape.op("Mul", [weight, self.shared(f"{name}.scales", module.scales)])
        return tape.op("MatMul", [x, tape.op("Transpose", [weight], {"perm": [1, 0]})])

    def shared(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """What an embedding and a tied head both use."""
        if tensor.data_ptr() not in self.stored:
            self.stored[tensor.data_ptr()] = self.constant(name, as_array(tensor))
        return self.stored[tensor.data_ptr()]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Modules that are called several times find what the first call stored."""
        known = self.graph.initializers.get(WEIGHT + name)
        return constant(self.graph, WEIGHT + name, array) if known is None else known


def _users(weight: ir.Value) -> list[ir.Node]:
    """The nodes that compute with a weight, straight or transposed."""
    users: list[ir.Node] = []
    for node in weight.consumers():
        users += node.outputs[0].consumers() if node.op_type == "Transpose" else [node]
    return users


def _replace(node: ir.Node, tape: Tape, result: ir.Value) -> None:
    """Let the nodes of `tape`, which end in `result`, stand for `node`."""
    old = node.outputs[0]
    node.graph.insert_before(node, tape.nodes)
    result.name, result.shape, result.type = old.name, old.shape, old.type
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
