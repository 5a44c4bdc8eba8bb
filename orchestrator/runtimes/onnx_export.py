"""A model's graphs without their weights: exported once a shape signature, then only filled.

An export takes seconds even for tiny models, and models of one signature differ in their weights
alone. A template is an ONNX file whose weights are inputs, named as the model's parameters. One
for other sizes of the same layers is made of one that exists.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orchestrator.quantize.modules import QuantizedEmbedding, QuantizedLinear
from orchestrator.quantize.rounding import dequantize
from orchestrator.runtimes.onnx_parts import Kind, Part, example, parts
from orchestrator.runtimes.onnx_resize import resize
from orchestrator.runtimes.onnx_rewrite import fuse_attention, keep_norms_apart, name_by_place
from orchestrator.trial import content_hash

VERSION = 2  # raised when a template changes its meaning
OPSET = 23  # the first with attention, RMS norm and rotary embedding as single operators
WEIGHT = "model."  # graph modules hold the model under this name, so weights are called so too
LARGEST_FILE = 2**31 - 2**20  # bytes of weights; protobuf ends at 2 GiB
TRACED = {"batch": 2, "length": 4, "past": 3, "source": 7}
CHECKED = (
    {"batch": 3, "length": 6, "past": 0, "source": 5},
    {"batch": 1, "length": 1, "past": 5, "source": 9},
)
LARGEST_DIFFERENCE = 1e-3  # between graph and torch, as a share of the spread of the output
UNUSED_SETTINGS = {  # of configs and modules: they name things, or belong to training
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "id2label",
    "label2id",
    "problem_type",
    "dtype",
    "training",
}

SIZES = {  # of configs: what pruning changes
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "intermediate_size",
    "n_inner",
    "hidden_dim",
    "d_ff",
}


def templates(model: PreTrainedModel, *, kind: Kind, cache: Path) -> dict[str, ir.Model]:
    """The model's graphs by file name, taken from `cache` or made into it."""
    outline, signature = template_keys(model, kind)
    folder = cache / f"onnx-{outline}-{signature}"
    if not folder.is_dir():
        alike = sorted(cache.glob(f"onnx-{outline}-*[!-]"))
        _make(folder, parts(float_copy(model), kind), alike[:1])
    return {file.name: ir.load(file) for file in sorted(folder.iterdir())}


def template_keys(model: PreTrainedModel, kind: Kind) -> tuple[str, str]:
    """The outline of a model, equal where layers differ in sizes alone, and its signature.

    Models of one signature have the same modules, shapes and settings, and are served by one graph.
    """
    versions = {name: version(name) for name in ("torch", "transformers", "onnxscript")}
    modules = {name: _facts(module) for name, module in model.named_modules()}
    config = {k: v for k, v in model.config.to_dict().items() if k not in UNUSED_SETTINGS}
    config = json.loads(json.dumps(config, default=str))
    outline = {name: _without_sizes(facts) for name, facts in modules.items()}
    base = {k: v for k, v in config.items() if k not in SIZES and not k.endswith("token_id")}
    return (
        content_hash([VERSION, kind, versions, outline, base]),
        content_hash([VERSION, kind, versions, modules, config]),
    )


def float_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 copy on the CPU with plain linear layers and embeddings, and no weight shared."""
    plain = copy.deepcopy(model).cpu()
    for name, module in list(plain.named_modules()):
        if (twin := _float_twin(module)) is not None:
            plain.set_submodule(name, twin)
    for module in plain.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().float().clone()))
    plain.set_attn_implementation("sdpa" if plain._supports_sdpa else "eager")
    return plain.float().eval().requires_grad_(False)


def float_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors by the names that templates give them; codes are absent, linear weights [out, in]."""
    weights: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, QuantizedLinear) and module.bias is not None:
            own["bias"] = module.bias
        if isinstance(module, Conv1D):
            own["weight"] = own["weight"].T
        dotted = f"{WEIGHT}{prefix}." if prefix else WEIGHT
        weights |= {dotted + name: tensor.detach() for name, tensor in own.items()}
    return weights


def weight_inputs(graph: ir.Graph) -> list[ir.Value]:
    """The inputs of a template that stand for weights."""
    return [value for value in graph.inputs if value.name.startswith(WEIGHT)]


def fill(graph: ir.Graph, weights: Mapping[str, torch.Tensor]) -> None:
    """Turn the inputs that are weights into constants; what several share is stored once."""
    stored: dict[int, ir.Value] = {}
    for value in weight_inputs(graph):
        if value.uses():
            first = stored.setdefault(weights[value.name].data_ptr(), value)
            if first is not value:
                value.replace_all_uses_with(first)
    for value in weight_inputs(graph):
        graph.inputs.remove(value)
        if value.uses():
            _store(graph, value, weights[value.name])


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A stored tensor of the graph."""
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value


def save(model: ir.Model, file: Path) -> None:
    """Write one file; where protobuf cannot hold the weights, a second one with them beside it."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, file, external_data=f"{file.name}.data" if size > LARGEST_FILE else None)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()


def _store(graph: ir.Graph, value: ir.Value, tensor: torch.Tensor) -> None:
    """Make `value` a constant, transposed already where that is all that the graph wants of it."""
    transposes = [node for node in value.consumers() if node.op_type == "Transpose"]
    if len(transposes) < len(value.uses()):
        value.const_value = ir.tensor(as_array(tensor), name=value.name)
        graph.register_initializer(value)
        return
    stored = constant(graph, f"{value.name}.T", as_array(tensor.T))
    for node in transposes:
        node.outputs[0].replace_all_uses_with(stored)
        graph.remove(node, safe=True)


def _facts(module: nn.Module) -> dict[str, Any]:
    """What a graph takes from a module; a quantized one has the facts of its float twin."""
    if isinstance(module, QuantizedLinear | Conv1D) or type(module) is nn.Linear:
        weight = module.codes if isinstance(module, QuantizedLinear) else module.weight
        out_in = weight.T.shape if isinstance(module, Conv1D) else weight.shape
        return {"linear": tuple(out_in), "bias": module.bias is not None}
    if isinstance(module, QuantizedEmbedding) or type(module) is nn.Embedding:
        table = module.codes if isinstance(module, QuantizedEmbedding) else module.weight
        return {"embedding": tuple(table.shape)}
    settings = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and name not in ("training", "name_or_path")
    }
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    buffers = {name: _digest(buffer) for name, buffer in module.named_buffers(recurse=False)}
    return {"class": type(module).__qualname__, **settings, **shapes, **buffers}


def _without_sizes(facts: dict[str, Any]) -> dict[str, Any]:
    """What of a module's facts stays when units are taken out of it."""
    return {
        name: None if isinstance(value, tuple) or type(value) is int else value
        for name, value in facts.items()
    }


def _digest(tensor: torch.Tensor) -> str:
    array = as_array(tensor)
    return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def _float_twin(module: nn.Module) -> nn.Module | None:
    """The plain form of a quantized module or a Conv1D; None for what is plain."""
    if isinstance(module, QuantizedEmbedding):
        return nn.Embedding.from_pretrained(dequantize(module.codes, module.scales))
    if isinstance(module, QuantizedLinear):
        weight = dequantize(module.codes, module.scales)
    elif isinstance(module, Conv1D):
        weight = module.weight.T
    else:
        return None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.bias = None if module.bias is None else nn.Parameter(module.bias)
    return linear


def _make(folder: Path, wanted: list[Part], alike: list[Path]) -> None:
    """Make, check and write templates, of those in a folder of `alike` where that can be.

    `folder` appears whole or not at all.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f"{folder.name}-", suffix="-"
    ) as name:
        made, scratch = Path(name, "made"), Path(name)
        made.mkdir()
        for part in wanted:
            if not any(_resized(part, other / part.file, made, scratch) for other in alike):
                ir.save(_export(part), made / part.file)
                _check(part, made / part.file, scratch / part.file)
        try:
            made.rename(folder)
        except OSError:
            assert folder.is_dir()  # another worker was faster, and made the same


def _resized(part: Part, other: Path, made: Path, scratch: Path) -> bool:
    """Whether the template of the same layers in other sizes could be made to serve this part."""
    try:
        model = ir.load(other)
        resize(model, _weight_shapes(part), (*part.inputs, *part.outputs))
        ir.save(model, made / part.file)
        _check(part, made / part.file, scratch / part.file)
    except Exception:  # whatever it is, an export will do; onnxruntime's classes share no base
        return False
    return True


def _export(part: Part) -> ir.Model:
    """The graph of one part. Its weights become inputs before anything is folded or merged."""
    with _quiet():
        program = _program(part)
        graph = program.model.graph
        for name in [n for n, _ in part.module.named_parameters() if n in graph.initializers]:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
        program.optimize()
    for value, port in zip(graph.outputs, part.outputs, strict=True):
        value.shape = ir.Shape(port.shape)
    fuse_attention(program.model)
    keep_norms_apart(program.model)
    name_by_place(program.model)
    # A stack trace a node. The shapes stay: onnxruntime fuses more where it knows them.
    ClearMetadataAndDocStringPass()(program.model)
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    with suppress(ValueError):  # so that it is the same, to the byte, as if it had been resized
        resize(program.model, _weight_shapes(part), (*part.inputs, *part.outputs))
    return program.model


def _weight_shapes(part: Part) -> dict[str, tuple[int, ...]]:
    weights = float_weights(part.module.model)
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _program(part: Part) -> torch.onnx.ONNXProgram:
    """What the exporter makes of a part. Raises RuntimeError with its reason in a line."""
    try:
        return torch.onnx.export(
            part.module,
            example(part, TRACED),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=[port.name for port in part.inputs],
            output_names=[port.name for port in part.outputs],
            dynamic_shapes=_dynamic_shapes(part),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise RuntimeError(f"the exporter refuses {part.file}: {reason}") from error


def _dynamic_shapes(part: Part) -> tuple[Any, ...]:
    """Axis names by argument; those of `*tensors` are one tuple."""
    axes = [port.free_axes for port in part.inputs]
    arguments = inspect.signature(part.module.forward).parameters.values()
    num_named = sum(a.kind is not inspect.Parameter.VAR_POSITIONAL for a in arguments)
    rest = (tuple(axes[num_named:]),) if num_named < len(arguments) else ()
    return (*axes[:num_named], *rest)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check(part: Part, template: Path, scratch: Path) -> None:
    """Compare the filled template with torch, and torch's own masks, at sizes that were not traced."""
    model = ir.load(template)
    fill(model.graph, float_weights(part.module.model))
    save(model, scratch)
    session = onnxruntime.InferenceSession(scratch, providers=["CPUExecutionProvider"])
    part.module.own_mask = False
    for sizes in CHECKED:
        inputs = example(part, sizes)
        with torch.inference_mode():
            expected = part.module(*inputs)
        if isinstance(expected, torch.Tensor):
            expected = (expected,)
        feeds = {p.name: as_array(t) for p, t in zip(part.inputs, inputs, strict=True)}
        found = session.run([port.name for port in part.outputs], feeds)
        for port, served, wanted in zip(part.outputs, found, expected, strict=True):
            _compare(f"{port.name} of {part.file} at {sizes}", served, as_array(wanted))


def _compare(what: str, served: np.ndarray, expected: np.ndarray) -> None:
    """Raises RuntimeError where the exporter changed what the model computes."""
    if served.shape != expected.shape:
        raise RuntimeError(f"{what} has shape {served.shape}, in torch {expected.shape}")
    spread = float(np.ptp(expected)) or 1.0
    difference = float(np.abs(served - expected).max()) / spread
    if not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(
            f"the exported graph does not compute what the model does: {what} differs by "
            f"{difference:.2g} of its spread, and at most {LARGEST_DIFFERENCE:g} may be"
        )
