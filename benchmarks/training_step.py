"""What our training loop costs beside a bare Accelerate loop, on the same model and batches.

    python benchmarks/training_step.py [--quick] [--json FILE] [--device cpu|cuda] [--size SIZE]

On a CPU, or of `--size minilm`: after each step of our loop the bare loop makes the same step on a twin of the model, so that
whatever else the machine does falls on both; every batch was met once before, since kernels are
made for a shape when it first comes. Three comparisons: the loop alone; our loop holding
magnitude masks at 50 %; our fake-quant (int8 weights by channel, activations by token) beside
torchao's in the bare loop. Goals: 1.03, 1.06 and 1.00.

On a GPU, or of `--size 1b` or `tiny`: a Llama of random weights in bf16, in our loop and in the
bare one, one after the other since two of them do not fit; tokens a second and the share of the
device's peak that the model's own operations make up (MFU); then compiled, with and without
fake-quant. Goals: bare ÷ ours >= 0.98 in time a step, QAT ÷ plain <= 1.35.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    get_scheduler,
)

from orchestrator.batches import epoch_batches
from orchestrator.finetune import (
    FinetuneOptions,
    OnStep,
    finetune,
    uses_bf16,
)
from orchestrator.gang import give_memory_back
from orchestrator.measure.memory import peak_mb, reset_peak
from orchestrator.predict import row_lengths, to_device
from orchestrator.prune import METHODS, PruneContext
from orchestrator.quantize import QuantizeOptions
from orchestrator.quantize.convert import prepare
from orchestrator.runtimes import RUNTIMES, Target
from orchestrator.tasks import Encoded
from orchestrator.tasks.causal_lm import CausalLm
from orchestrator.tasks.text_classification import TextClassification

SEED = 0
WARMUP_STEPS = 3
TASK = TextClassification(data="made up")


@dataclass(frozen=True)
class Setting:
    """`steps` are timed, after a warm-up."""

    steps: int
    batch_size: int
    device: str

    @property
    def options(self) -> FinetuneOptions:
        return FinetuneOptions(
            max_steps=WARMUP_STEPS + self.steps, per_device_train_batch_size=self.batch_size
        )


class BareLoop:
    """What one would write with Accelerate alone, its batches laid out in advance."""

    def __init__(
        self, model: nn.Module, batches: list[dict[str, torch.Tensor]], options: FinetuneOptions
    ) -> None:
        bf16 = uses_bf16(options, batches[0]["input_ids"].device)
        self.accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, fused=True)
        scheduler = get_scheduler(
            "linear", optimizer, num_warmup_steps=2, num_training_steps=len(batches)
        )
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            model.train(), optimizer, scheduler
        )
        self.batches = iter(batches)

    def step(self) -> None:
        loss = self.model(**next(self.batches)).loss
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


@dataclass
class Duel:
    """An `on_step` callback: times the step that our loop has made, then the bare loop's."""

    make_bare: Callable[[], BareLoop]
    sync: Callable[[], None]
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    bare: BareLoop | None = None
    resumed: float = 0.0

    def __call__(self, step: int, num_steps: int) -> None:
        self.sync()
        now = time.perf_counter()
        if step:
            self.ours.append(now - self.resumed)
            self.theirs.append(self._bare_step())
        self.resumed = time.perf_counter()

    def _bare_step(self) -> float:
        self.bare = self.bare or self.make_bare()  # it shares the state of our Accelerator
        began = time.perf_counter()
        self.bare.step()
        self.sync()
        return time.perf_counter() - began


def minilm() -> BertForSequenceClassification:
    """The shape of all-MiniLM-L6-v2 with random weights."""
    torch.manual_seed(SEED)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return BertForSequenceClassification(config)


def sentences(count: int) -> Encoded:
    """Random rows of 5 to 49 tokens, about as SST-2 has them."""
    rng = np.random.default_rng(SEED)
    rows = [rng.integers(1000, 30000, size=length) for length in rng.integers(5, 50, size=count)]
    return Encoded(
        ids=[str(number) for number in range(count)],
        features=[{"input_ids": row, "attention_mask": np.ones_like(row)} for row in rows],
        labels=rng.integers(0, 2, size=count),
    )


def laid_out(encoded: Encoded, setting: Setting) -> list[dict[str, torch.Tensor]]:
    """The batches that our loop will take, in its order."""
    order = epoch_batches(
        row_lengths(encoded), setting.batch_size, np.random.default_rng([SEED, 0]), by_length=True
    )
    return [to_device(TASK.collate(encoded, rows.tolist()), setting.device) for rows in order]


def meet(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """One step on every batch by a model that is thrown away."""
    loop = BareLoop(model, batches, FinetuneOptions())
    for _ in batches:
        loop.step()


def compare(
    setting: Setting, *, ours: nn.Module, theirs: nn.Module, on_step: tuple[OnStep, ...] = ()
) -> dict[str, Any]:
    """Median times and the median ratio of paired steps, with its bootstrap interval."""
    encoded = sentences((WARMUP_STEPS + setting.steps) * setting.batch_size)
    batches = laid_out(encoded, setting)
    meet(copy.deepcopy(ours).to(setting.device), batches)
    duel = Duel(
        make_bare=lambda: BareLoop(theirs.to(setting.device), batches, setting.options),
        sync=torch.cuda.synchronize if setting.device.startswith("cuda") else lambda: None,
    )
    finetune(
        ours,
        TASK,
        encoded,
        setting.options,
        seed=SEED,
        device=setting.device,
        on_step=(*on_step, duel),
    )
    times = 1e3 * np.array([duel.ours, duel.theirs])[:, WARMUP_STEPS:]
    ratios = times[0] / times[1]
    draws = np.random.default_rng(SEED).choice(ratios, size=(2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "ratio": float(np.median(ratios)),
        "interval": [float(low), float(high)],
        "ours_ms": float(np.median(times[0])),
        "bare_ms": float(np.median(times[1])),
    }


def compare_loops(setting: Setting) -> dict[str, Any]:
    model = minilm()
    return compare(setting, ours=model, theirs=copy.deepcopy(model))


def compare_masks(setting: Setting) -> dict[str, Any]:
    """Half of the weights held at zero in our loop, none in the bare one."""
    model = minilm()
    twin = copy.deepcopy(model)
    context: Any = PruneContext(
        tokenizer=None,
        texts=lambda: iter(()),
        batches=lambda count: iter(()),
        loss=lambda model, batch: TASK.loss(TASK.logits(model, batch), batch),
        seed=SEED,
    )
    pruning = METHODS["magnitude"](sparsity=0.5).start(model.to(setting.device), context)
    return compare(setting, ours=model, theirs=twin, on_step=(pruning.on_step,))


def compare_fake_quant(setting: Setting) -> dict[str, Any]:
    """The numerics of torch's W8A8 on both sides, in the same layers."""
    model = minilm()
    twin = copy.deepcopy(model)
    numerics = RUNTIMES["torch"].numerics(QuantizeOptions(scheme="W8A8"), Target(runtime="torch"))
    names = set(prepare(model, numerics))
    config = QATConfig(
        activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel"),
        step="prepare",
    )
    quantize_(twin, config, filter_fn=lambda module, name: name in names)
    return compare(setting, ours=model, theirs=twin)


# -- a large model, on one GPU -----------------------------------------------------------------


PEAKS = {  # bf16 operations a second without sparsity, by what the device's name contains
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Size:
    """A Llama and what it trains on: `rows` of `length` tokens a step, in as many steps as asked."""

    config: dict[str, int]
    rows: int
    length: int
    steps: int

    def model(self, device: str) -> LlamaForCausalLM:
        """With random weights in float32: autocast computes in bf16, and the optimizer needs them."""
        torch.manual_seed(SEED)
        config = LlamaConfig(**self.config, attn_implementation="sdpa")
        with torch.device(device):
            return LlamaForCausalLM(config)

    def blocks(self) -> Encoded:
        """Full rows: nothing is padding."""
        rng = np.random.default_rng(SEED)
        shape = ((WARMUP_STEPS + self.steps) * self.rows, self.length + 1)
        rows = rng.integers(0, self.config["vocab_size"], size=shape)
        asked = np.ones(self.length, dtype=np.int64)
        features = [
            {"input_ids": row[:-1], "attention_mask": asked, "labels": row[1:]} for row in rows
        ]
        return Encoded(ids=[str(number) for number in range(len(rows))], features=features)

    def operations(self, model: nn.Module) -> float:
        """Of a step, forward and backward: 6 a weight and token, and the products of attention."""
        config = self.config
        weights = sum(p.numel() for p in model.parameters())
        weights -= model.get_input_embeddings().weight.numel()  # looked up, not multiplied
        attention = 12 * config["num_hidden_layers"] * config["hidden_size"] * self.length
        return (6 * weights + attention / 2) * self.rows * self.length  # half: it is causal


SIZES = {
    "1b": Size(
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "num_hidden_layers": 20,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 5632,
            "max_position_embeddings": 2048,
        },
        rows=8,
        length=2048,
        steps=30,
    ),
    "tiny": Size(
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
        },
        rows=4,
        length=16,
        steps=4,
    ),
}


def seconds_a_step(ends: list[float]) -> float:
    """The median of the steps after the warm-up."""
    return float(np.median(np.diff(ends)[WARMUP_STEPS - 1 :]))


def our_seconds(
    size: Size, device: str, *, compiled: bool = False, rounds: bool = False
) -> tuple[float, float]:
    """Seconds a step of our loop, and its peak memory in 10⁶ bytes."""
    give_memory_back()
    reset_peak(device)
    model = size.model(device)
    if rounds:
        options = QuantizeOptions(scheme="W8A8")
        prepare(model, RUNTIMES["torch"].numerics(options, Target(runtime="torch")))
    ends: list[float] = []

    def note(step: int, num_steps: int) -> None:
        synchronize(device)
        ends.append(time.perf_counter())

    finetune(
        model,
        CausalLm(data="made up", block_size=size.length),
        size.blocks(),
        large_options(size, compiled=compiled),
        seed=SEED,
        device=device,
        on_step=[note],
    )
    return seconds_a_step(ends[1:]), peak_mb(device)


def large_options(size: Size, *, compiled: bool = False) -> FinetuneOptions:
    return FinetuneOptions(
        max_steps=WARMUP_STEPS + size.steps,
        per_device_train_batch_size=size.rows,
        bf16=True,
        logging_steps=WARMUP_STEPS + size.steps,
        torch_compile=compiled,
    )


def bare_seconds(size: Size, device: str) -> float:
    """Seconds a step of the bare loop on the same rows, in the same precision."""
    give_memory_back()
    task, encoded, rows = CausalLm(data="made up"), size.blocks(), size.rows
    starts = range(0, len(encoded), rows)
    batches = [
        to_device(task.collate(encoded, list(range(at, at + rows))), device) for at in starts
    ]
    for batch in batches:
        batch |= {"shift_labels": batch["labels"], "use_cache": False}  # they are shifted already
    ends: list[float] = []
    loop = BareLoop(size.model(device), batches, large_options(size))
    for _ in batches:
        loop.step()
        synchronize(device)
        ends.append(time.perf_counter())
    return seconds_a_step(ends)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def compare_large(size: Size, device: str) -> dict[str, Any]:
    """The fields of the report. MFU is None on a device whose peak is not in the table."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    peak = next((each for part, each in PEAKS.items() if part in name), None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**size.config))
    operations = size.operations(model)
    ours, memory = our_seconds(size, device)
    bare = bare_seconds(size, device)
    plain, _ = our_seconds(size, device, compiled=True)
    rounded, _ = our_seconds(size, device, compiled=True, rounds=True)
    return {
        "device_name": name,
        "num_params": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": size.rows * size.length / ours,
        "bare_tokens_per_second": size.rows * size.length / bare,
        "compiled_tokens_per_second": size.rows * size.length / plain,
        "mfu": peak and operations / ours / peak,
        "bare_mfu": peak and operations / bare / peak,
        "compiled_mfu": peak and operations / plain / peak,
        "loop_ratio": bare / ours,
        "qat_ratio": rounded / plain,
        "peak_memory_mb": memory,
    }


def shown(report: dict[str, Any]) -> None:
    for name, value in report.items():
        print(f"{name:28} {f'{value:,.3f}' if isinstance(value, float) else value}", flush=True)


# ----------------------------------------------------------------------------------------------


def about(device: str) -> dict[str, Any]:
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def written(report: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; wide intervals")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=["minilm", *SIZES], help="1b on a GPU, else minilm")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: torch finds no CUDA device here")
    size = arguments.size or ("1b" if arguments.device.startswith("cuda") else "minilm")
    if size in SIZES:
        found = about(arguments.device) | compare_large(SIZES[size], arguments.device)
        shown(found)
        written(found, arguments.json)
        return
    setting = Setting(
        steps=7 if arguments.quick else 60,
        batch_size=16 if arguments.quick else 32,
        device=arguments.device,
    )
    report: dict[str, Any] = about(setting.device) | {
        "bf16": uses_bf16(setting.options, torch.device(setting.device)),
        "batch_size": setting.batch_size,
        "steps": setting.steps,
    }
    comparisons = {
        "loop": ("loop_ratio", compare_loops),
        "masks": ("masks_ratio", compare_masks),
        "qat": ("qat_ratio_vs_torchao", compare_fake_quant),
    }
    for name, (ratio, run) in comparisons.items():
        found = run(setting)
        low, high = found["interval"]
        report |= {
            ratio: found["ratio"],
            f"{ratio}_interval": found["interval"],
            f"{name}_ms": found["ours_ms"],
            f"{name}_bare_ms": found["bare_ms"],
        }
        print(
            f"{ratio:22} {found['ratio']:.3f}  [{low:.3f}, {high:.3f}]"
            f"   {found['ours_ms']:.1f} ms beside {found['bare_ms']:.1f} ms",
            flush=True,
        )
    written(report, arguments.json)


if __name__ == "__main__":
    main()
