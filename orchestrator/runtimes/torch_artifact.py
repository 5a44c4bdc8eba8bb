"""Writing a converted model for torch, and serving what was written."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from orchestrator.quantize.modules import QuantizedLinear
from orchestrator.runtimes import torch_loader
from orchestrator.trial import content_hash

WEIGHTS, SPEC, LOADER = "model.safetensors", "loader.json", "load.py"


class TorchSession:
    """A model that answers arrays with arrays; decoders keep their cache between calls.

    Threads are the whole process's in torch: a session sets its own when it is asked, and leaves
    it at that. Without `threads` it takes those it finds.
    """

    def __init__(self, model: PreTrainedModel, *, device: str, threads: int | None = None) -> None:
        self.model = model.to(device).eval()
        self.device, self.threads = device, threads
        self.accepted = inspect.signature(model.forward).parameters

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        options = {"use_cache": False} if "use_cache" in self.accepted else {}
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return _array(self._call(**tensors, **options).logits)

    def prefill(self, input_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        """Logits [batch, vocabulary] after the last token of each row, and the cache."""
        options = {"logits_to_keep": 1} if "logits_to_keep" in self.accepted else {}
        output = self._call(input_ids=torch.from_numpy(input_ids), use_cache=True, **options)
        return _array(output.logits[:, -1]), output.past_key_values

    def decode(self, token: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
        """One token a row ([batch] or [batch, 1]); the cache is changed in place."""
        ids = torch.from_numpy(token.reshape(-1, 1))
        output = self._call(input_ids=ids, past_key_values=cache, use_cache=True)
        return _array(output.logits[:, -1]), output.past_key_values

    @torch.inference_mode()
    def _call(self, **inputs: Any) -> Any:
        if self.threads not in (None, torch.get_num_threads()):
            torch.set_num_threads(self.threads)
        on_device = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        return self.model(**on_device)


def load_model(folder: Path) -> PreTrainedModel:
    """The model of an artifact: a standard checkpoint, or one with its own loader."""
    if (folder / SPEC).exists():
        return torch_loader.load(folder)
    (architecture,) = AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, architecture).from_pretrained(folder, dtype="auto")


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """A standard Hugging Face checkpoint where config.json says all, else one with load.py."""
    config = _accepted_config(model)
    fresh = _fresh(model, config)
    attributes = _attributes_beyond(fresh, model)
    if not config and not attributes and _shapes(model) == _shapes(fresh):
        model.save_pretrained(folder, max_shard_size="1000GB")
        return
    tensors, shared = _stored_once(model)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    spec = {
        "class": type(model).__name__,
        "config": config,
        "linear": _linear_kind(model),
        "attributes": attributes,
        "shared": shared,
    }
    (folder / SPEC).write_text(json.dumps(spec, indent=1) + "\n")
    shutil.copyfile(torch_loader.__file__, folder / LOADER)
    model.config.save_pretrained(folder)


def ports(model: PreTrainedModel, *, kind: str) -> dict[str, Any]:
    """Names, dtypes and shapes of what goes in and comes out, for artifact.json."""
    names = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    if kind == "encoder_decoder":
        names.append("decoder_input_ids")
    last = [model.config.num_labels] if kind == "encoder" else ["length", model.config.vocab_size]
    return {
        "inputs": [
            {"name": name, "dtype": "int64", "shape": ["batch", "length"]} for name in names
        ],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", *last]}],
    }


def structure(folder: Path) -> str:
    """See `Runtime.structure`: the header of the weights' file, and what says how they are used."""
    about: dict[str, Any] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (it is no dict)
            part = weights.get_slice(name)
            about[name] = [part.get_dtype(), part.get_shape()]
    written = [folder / name for name in (SPEC, "config.json")]
    texts = {path.name: path.read_text() for path in written if path.exists()}
    return content_hash([about, texts])


def _array(logits: torch.Tensor) -> np.ndarray:
    return logits.float().cpu().numpy()


def _accepted_config(model: PreTrainedModel) -> dict[str, int]:
    """Changes to the config that its class needs to make a model at all, most often none.

    Some classes refuse a number of heads that does not divide the hidden size; one head always
    does, and the real number is then among the attributes.
    """
    try:
        _fresh(model, {})
    except ValueError:
        names = ("num_attention_heads", "num_key_value_heads")
        return {name: 1 for name in names if hasattr(model.config, name)}
    return {}


def _fresh(model: PreTrainedModel, changes: Mapping[str, int]) -> PreTrainedModel:
    """What config.json and changes to it would give, without memory."""
    config = type(model.config).from_dict(model.config.to_dict())
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return type(model)(config)


def _attributes_beyond(fresh: nn.Module, model: nn.Module) -> dict[str, dict[str, float]]:
    """By module: numbers, such as a count of heads and the scale it gives, that differ in `fresh`."""
    others = dict(fresh.named_modules())
    changed = {
        name: {
            key: value
            for key, value in vars(module).items()
            if type(value) in (int, float) and vars(others[name]).get(key) != value
        }
        for name, module in model.named_modules()
        if name in others and type(others[name]) is type(module)
    }
    return {name: attributes for name, attributes in changed.items() if attributes}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _stored_once(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors, each under its first name, and the other names by which it is used."""
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model.state_dict().items():
        original = first.setdefault((tensor.data_ptr(), tensor.shape), name)
        if original == name:
            tensors[name] = tensor.contiguous()
        else:
            shared[name] = original
    return tensors, shared


def _linear_kind(model: nn.Module) -> str:
    """How the linear layers with codes compute, in the loader's words."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if any(layer.numerics.activation is not None for layer in layers):
        return "dynamic"
    is_plain = any(layer.numerics.scheme == "linear" for layer in layers)
    return "dequantized" if is_plain else "weight only"
