"""Served by onnxruntime: float32, dynamic int8, and weights of 8 or 4 bits in blocks."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.quantize import ActivationNumerics, Numerics, QuantizeOptions, WeightNumerics
from orchestrator.trial import Infeasible, content_hash

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import ModelProto
    from onnxruntime import InferenceSession
    from transformers import PreTrainedModel

    from orchestrator.runtimes import Session, Target

SMALLEST_BLOCK = 16  # inputs; the blocks of onnxruntime's MatMulNBits are powers of two
SUMS_IN_32_BITS = {"avx512_vnni", "avx_vnni", "amx_int8"}  # as /proc/cpuinfo calls them


class OnnxRuntime:
    """One .onnx file, for encoder-decoders one a part; see `Runtime` for the contract.

    Weights in groups are for size and for decoding on a CPU: at a whole sequence's length
    MatMulNBits is slower than float32 there, with 8 bits 4 to 7 times.
    """

    name = "onnxruntime"
    model_file = "model.onnx"

    def numerics(self, options: QuantizeOptions, target: Target) -> Numerics:
        rules = {
            "none": lambda: None,
            "W8A8": lambda: _integer_product(target),
            "W8A16": lambda: _blocks(options, bits=8),
            "W4A16": lambda: _blocks(options, bits=4),
            "linear": lambda: WeightNumerics(
                bits=8, granularity=options.granularity, interval=options.interval
            ),
        }
        if options.scheme not in rules:
            raise Infeasible(_refusal(options.scheme, served=list(rules)))
        weight = rules[options.scheme]()
        integer = options.scheme == "W8A8"
        # A head that is tied to the embedding takes the embedding's codes into its product.
        table_bits = weight.bits if integer else 8
        return Numerics(
            scheme=options.scheme,
            weight=weight,
            activation=ActivationNumerics(bits=8, granularity="tensor") if integer else None,
            embedding=WeightNumerics(bits=table_bits, granularity="channel")
            if options.embeddings
            else None,
        )

    def check(self, target: Target) -> None:
        _providers(target)

    def export(
        self, model: PreTrainedModel, folder: Path, *, kind: str, cache: Path
    ) -> dict[str, Any]:
        from orchestrator.runtimes.onnx_export import fill, float_weights, save, templates
        from orchestrator.runtimes.onnx_quantize import quantize

        folder.mkdir(parents=True, exist_ok=True)
        weights = float_weights(model)
        described: dict[str, Any] = {"inputs": [], "outputs": []}
        for file, graph_model in templates(model, kind=kind, cache=cache).items():
            quantize(graph_model, model)
            fill(graph_model.graph, weights)
            save(graph_model, folder / file)
            described["inputs"] += [_describe(v, file) for v in graph_model.graph.inputs]
            described["outputs"] += [_describe(v, file) for v in graph_model.graph.outputs]
        return described

    def load(self, folder: Path, target: Target) -> Session:
        """Raises ValueError where there is no model in `folder` or onnxruntime refuses it."""
        if (folder / "decoder.onnx").exists():
            return EncoderDecoderSession(
                _open(folder / "encoder.onnx", target), _open(folder / "decoder.onnx", target)
            )
        session = _open(folder / self.model_file, target)
        if any(port.name == "position_ids" for port in session.get_inputs()):
            return DecoderSession(session)
        return EncoderSession(session)

    def structure(self, folder: Path) -> str:
        import onnx

        return content_hash(
            {
                file.name: _outline(onnx.load(file, load_external_data=False))
                for file in _graphs(folder)
            }
        )


class _WithoutCache:
    """Sessions of models that do not decode token by token."""

    def prefill(self, input_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        raise TypeError(f"{type(self).__name__} has no prompt to fill in; use run")

    def decode(self, token: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        raise TypeError(f"{type(self).__name__} has no cache to decode with; use run")


class EncoderSession(_WithoutCache):
    """Logits [batch, classes]."""

    def __init__(self, session: InferenceSession) -> None:
        self._session = session
        self._names = [port.name for port in session.get_inputs()]

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Inputs that the graph does not take are left out; a missing mask means no padding."""
        ids = inputs["input_ids"]
        feeds = {name: inputs[name] for name in self._names if name in inputs}
        if "attention_mask" not in feeds:
            feeds["attention_mask"] = np.ones_like(ids)
        if "token_type_ids" in self._names and "token_type_ids" not in feeds:
            feeds["token_type_ids"] = np.zeros_like(ids)
        return self._session.run(["logits"], feeds)[0]


@dataclass(frozen=True)
class Cache:
    """Keys and values of the `length` tokens so far, by the name of the input that takes them."""

    length: int
    states: dict[str, np.ndarray]


class DecoderSession:
    """Logits [batch, length, vocabulary], and decoding with a cache of keys and values."""

    def __init__(self, session: InferenceSession) -> None:
        self._session = session
        self._past = [p for p in session.get_inputs() if p.name.startswith("past_key_values.")]

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Positions count from the left, as in training; a missing mask means no padding."""
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        cache = self._empty_cache(len(ids))
        return self._session.run(["logits"], self._feeds(ids, cache, mask))[0]

    def prefill(self, input_ids: np.ndarray) -> tuple[np.ndarray, Cache]:
        """Logits [batch, vocabulary] of the last position of a prompt [batch, length]."""
        return self._step(input_ids, self._empty_cache(len(input_ids)))

    def decode(self, token: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Logits [batch, vocabulary] after one more token a row."""
        return self._step(token.reshape(-1, 1), cache)

    def _step(self, ids: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
        # Binding the cache to the runtime's memory was tried: no faster, and slower for small models.
        logits, *states = self._session.run(None, self._feeds(ids, cache))
        names = (port.name for port in self._past)
        length = cache.length + ids.shape[1]
        return logits[:, -1], Cache(length, dict(zip(names, states, strict=True)))

    def _feeds(
        self, ids: np.ndarray, cache: Cache, mask: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        batch, total = len(ids), cache.length + ids.shape[1]
        return {
            "input_ids": ids,
            "attention_mask": np.ones((batch, total), np.int64) if mask is None else mask,
            "position_ids": np.tile(np.arange(cache.length, total), (batch, 1)),
            **cache.states,
        }

    def _empty_cache(self, batch: int) -> Cache:
        shapes = {port.name: (batch, port.shape[1], 0, port.shape[3]) for port in self._past}
        return Cache(0, {name: np.empty(shape, np.float32) for name, shape in shapes.items()})


class EncoderDecoderSession(_WithoutCache):
    """Logits [batch, length, vocabulary] of `decoder_input_ids`, given the source's `input_ids`."""

    def __init__(self, encoder: InferenceSession, decoder: InferenceSession) -> None:
        self._encoder = encoder
        self._decoder = decoder

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        (hidden,) = self._encoder.run(["hidden_states"], source)
        feeds = {
            "decoder_input_ids": inputs["decoder_input_ids"],
            "hidden_states": hidden,
            "attention_mask": inputs["attention_mask"],
        }
        return self._decoder.run(["logits"], feeds)[0]


def _integer_product(target: Target) -> WeightNumerics:
    """One scale an output. Older x86 processors add pairs of products in 16 bits: 7-bit weights fit."""
    if target.device != "cpu":
        raise Infeasible(
            f"W8A8 is served by onnxruntime on cpu alone, and target.device is {target.device}; "
            "there, choose W8A16, W4A16 or none"
        )
    return WeightNumerics(bits=8 if _sums_in_32_bits() else 7, granularity="channel")


def _sums_in_32_bits() -> bool:
    """Whether this processor multiplies 8-bit integers without saturating in between."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and not SUMS_IN_32_BITS.isdisjoint(cpuinfo.read_text().split())


def _blocks(options: QuantizeOptions, *, bits: int) -> WeightNumerics:
    size = options.group_size
    if size < SMALLEST_BLOCK or size & (size - 1):
        raise Infeasible(
            f"group_size must be a power of two of at least {SMALLEST_BLOCK} for {options.scheme} "
            f"in onnxruntime, but got {size}"
        )
    return WeightNumerics(bits=bits, granularity="group", group_size=size, narrow=False)


def _refusal(scheme: str, *, served: list[str]) -> str:
    known = {"bf16": "its CPU kernels have no bfloat16 matrix product"}
    reason = known.get(scheme, "it has no kernel that computes with these bits")
    return f"onnxruntime does not serve {scheme}: {reason}; it serves {', '.join(served)}"


def _graphs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.onnx"))


def _outline(model: ModelProto) -> str:
    """The graph without the values of weights; integers of 64 bits are shapes and stay."""
    for weight in model.graph.initializer:
        if weight.data_type != weight.INT64:
            for values in ("raw_data", "float_data", "int32_data", "external_data"):
                weight.ClearField(values)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _describe(value: ir.Value, file: str) -> dict[str, Any]:
    """An input or output as artifact.json has it; free axes are names."""
    shape = [size if isinstance(size, int) else size.value for size in value.shape]
    return {"name": value.name, "dtype": value.dtype.numpy().name, "shape": shape, "file": file}


def _open(file: Path, target: Target) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors
    # Threads that wait by spinning would slow down whatever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(file, options, providers=_providers(target))
    except Exception as error:  # onnxruntime's own classes share no base
        raise ValueError(f"{file} is not a model that onnxruntime can load: {error}") from error


def _providers(target: Target) -> list[Any]:
    from onnxruntime import get_available_providers

    if target.device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in get_available_providers():
        raise ValueError(
            f"target.device is {target.device}, but this onnxruntime serves only "
            f"{', '.join(get_available_providers())}; install onnxruntime-gpu"
        )
    index = int(target.device.partition(":")[2] or 0)
    return [("CUDAExecutionProvider", {"device_id": index}), "CPUExecutionProvider"]
