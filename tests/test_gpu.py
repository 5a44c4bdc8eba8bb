"""What a GPU adds to training. Every body runs on the CPU too, as far as it means something there."""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification, PreTrainedModel

from orchestrator.compiled import missing_compiler
from orchestrator.distill import HiddenDistance, LiveTeacher
from orchestrator.finetune import FinetuneOptions, TrainingReport, finetune
from orchestrator.measure.memory import peak_mb, reset_peak
from orchestrator.predict import to_device
from orchestrator.prune import METHODS, PruneContext
from orchestrator.prune.tree import layers_of
from orchestrator.quantize import QuantizeOptions
from orchestrator.quantize.convert import prepare
from orchestrator.quantize.fake import set_enabled
from orchestrator.recompute import check_recomputes
from orchestrator.runtimes import RUNTIMES, Target
from orchestrator.tasks import Encoded
from orchestrator.tasks.causal_lm import CausalLm
from orchestrator.tasks.text_classification import TextClassification
from orchestrator.trial import Infeasible

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])

TASKS = {
    "bert": TextClassification(data="unread"),
    "llama": CausalLm(data="unread", block_size=12),
}
CASES = ("dense", "masked", "rounded", "taught")


pytestmark = pytest.mark.usefixtures("one_thread")


def rows(family: str, *, equal: bool = False) -> Encoded:
    """48 rows of 3 to 12 tokens, or of 12 each."""
    rng = np.random.default_rng(0)
    lengths = np.full(48, 12) if equal else rng.integers(3, 13, size=48)
    features: list[dict[str, np.ndarray]] = []
    for length in lengths:
        ids = rng.integers(5, tiny_models.VOCAB, size=length)
        features.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        if family == "llama":
            features[-1]["labels"] = np.roll(ids, -1)
    labels = np.arange(48) % 2 if family == "bert" else None
    return Encoded(ids=[str(number) for number in range(48)], features=features, labels=labels)


def train(
    family: str, case: str, device: str, *, equal: bool = False, **changes: Any
) -> tuple[TrainingReport, PreTrainedModel]:
    """A tiny model after some steps; `case` is what lives in the loop."""
    task, encoded = TASKS[family], rows(family, equal=equal)
    attention = "eager" if device == "cpu" else "sdpa"
    model = tiny_models.make(family, attention=attention).to(device)
    arguments: dict[str, Any] = {}
    on_step = []
    if case == "masked":
        context: Any = PruneContext(
            tokenizer=None, texts=lambda: iter(()), batches=lambda count: iter(()),
            loss=tiny_models.loss, seed=0,
        )  # fmt: skip
        options = {"schedule": "gradual", "num_updates": 2, "end": 0.8}
        on_step.append(METHODS["magnitude"](sparsity=0.5, **options).start(model, context).on_step)
    if case == "rounded":
        numerics = RUNTIMES["onnxruntime"].numerics(
            QuantizeOptions(scheme="W8A8"), Target(runtime="onnxruntime")
        )
        prepare(model, numerics)
        on_step.append(lambda step, num_steps: set_enabled(model, step >= num_steps // 3))
    if case == "taught":
        dense = copy.deepcopy(model)
        for weight in dense.parameters():
            weight.data.mul_(1.1)
        arguments["teacher"] = LiveTeacher(dense, task)
        arguments["hidden"] = HiddenDistance(layers_of(model), layers_of(dense))
        changes["distillation"] = {"hidden": 0.5}
    plain = {
        "bf16": False, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "dropout": 0.0,
        "logging_steps": 1,
    }  # fmt: skip
    options = FinetuneOptions(**{**plain, **changes})
    report = finetune(
        model, task, encoded, options, seed=0, device=device, on_step=on_step, **arguments
    )
    return report, model


def losses(report: TrainingReport) -> np.ndarray:
    return np.array([loss for _, loss in report.losses])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", TASKS)
def test_training_comes_to_the_same_as_on_a_cpu(family: str, case: str) -> None:
    here, there = (losses(train(family, case, device)[0]) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(there, here, rtol=2e-2 if case == "rounded" else 1e-3)


# -- layers that compute again -------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", TASKS)
def test_layers_that_compute_again_train_alike(
    family: str, case: str, dropout: float, device: str
) -> None:
    once, _ = train(family, case, device, dropout=dropout)
    again, model = train(family, case, device, dropout=dropout, gradient_checkpointing=True)
    np.testing.assert_allclose(losses(again), losses(once), rtol=1e-6)
    assert not any(getattr(each, "gradient_checkpointing", False) for each in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    copy.deepcopy(model)


def test_a_model_that_cannot_compute_again_is_infeasible() -> None:
    class Once(BertForSequenceClassification):
        supports_gradient_checkpointing = False

    model = tiny_models.make("bert")
    model.__class__ = Once
    with pytest.raises(Infeasible, match="a Once cannot compute its layers again"):
        check_recomputes(model)


@on_each_device
def test_they_compute_twice_a_step(device: str) -> None:
    model, calls = tiny_models.make("llama").to(device), Counter[bool]()
    inside = layers_of(model)[0].mlp.register_forward_pre_hook(
        lambda *_: calls.update([torch.is_grad_enabled()])
    )
    options = FinetuneOptions(max_steps=2, bf16=False, gradient_checkpointing=True)
    finetune(model, TASKS["llama"], rows("llama"), options, seed=0, device=device)
    inside.remove()
    assert calls.total() == 4


@pytest.mark.gpu
@needs_gpu
def test_they_take_less_memory() -> None:
    peaks = []
    for again in (False, True):
        reset_peak("cuda")
        config = {"num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 1024}
        model = tiny_models.make("llama", num_attention_heads=8, **config)
        options = FinetuneOptions(max_steps=3, gradient_checkpointing=again)
        blocks = rows("llama", equal=True)
        finetune(model, TASKS["llama"], blocks, options, seed=0, device="cuda")
        peaks.append(peak_mb("cuda"))
    assert peaks[1] < peaks[0]


# -- compiled layers -----------------------------------------------------------------------------


@pytest.fixture
def compiler(device: str) -> None:
    if missing := missing_compiler(torch.device(device)):
        pytest.skip(f"torch.compile needs {missing}")


@on_each_device
@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("family", "case", "again"),
    [
        ("bert", "masked", False),
        ("bert", "rounded", False),
        ("llama", "taught", False),
        ("llama", "rounded", True),
    ],
)
def test_compiled_layers_train_alike_and_leave_nothing(
    family: str, case: str, again: bool, device: str
) -> None:
    eager, plain = train(family, case, device)
    fast, model = train(family, case, device, torch_compile=True, gradient_checkpointing=again)
    np.testing.assert_allclose(losses(fast), losses(eager), rtol=1e-5)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert not any("forward" in vars(module) for module in model.modules())
    copy.deepcopy(model)


@on_each_device
@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_batches_of_any_length_are_compiled_for_once(
    device: str,
) -> None:
    """Not anew for each of them, nor for each layer."""
    counts = torch._dynamo.utils.counters
    found = []
    for epochs in (1.0, 4.0):
        counts.clear()
        train("bert", "dense", device, torch_compile=True, num_train_epochs=epochs)
        found.append(counts["stats"]["unique_graphs"])
    assert found[0] == found[1] <= 3
    assert not counts["graph_break"]


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "absent-compiler")
    assert missing_compiler(torch.device("cpu")) == (
        "a C++ compiler: there is no absent-compiler (CXX names one)"
    )
    monkeypatch.setenv("CXX", sys.executable)
    assert missing_compiler(torch.device("cpu")) is None


# -- nothing waits for the device ----------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts where the value of a tensor is asked for: by the file that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frame: Any = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            self.files[frame.f_code.co_filename] += 1
        return func(*args, **(kwargs or {}))


@on_each_device
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", TASKS)
def test_no_step_waits_for_the_device(family: str, case: str, device: str) -> None:
    """But for the loss, which a CPU is asked for at each step, and where masks are chosen."""
    with Waits() as waits, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            train(family, case, device, logging_steps=100)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    where = waits.files + Counter(
        each.filename for each in told if "called a synchronizing CUDA" in str(each.message)
    )
    chosen = ("progress.py", "prune/masks.py", "prune/n_m.py", "prune/magnitude.py")
    ours = [path for path in where if "/orchestrator/" in path and not path.endswith(chosen)]
    assert not ours, where


@on_each_device
def test_arrays_arrive_as_they_are(device: str) -> None:
    arrays = {"input_ids": np.arange(6).reshape(2, 3), "logits": np.ones((2, 2), "f4")}
    batch = to_device(arrays, device)
    for name, array in arrays.items():
        assert batch[name].device.type == device
        assert np.array_equal(batch[name].cpu().numpy(), array)
