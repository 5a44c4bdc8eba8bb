"""One trial from top to bottom: prune → prepare → finetune → convert → export → measure.

Everything that is reported comes from the artifact, reloaded in its runtime.
"""

from __future__ import annotations

import copy
import errno
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from orchestrator import artifact as artifacts
from orchestrator.bench import Bench, Note
from orchestrator.finetune import FinetuneOptions, finetune
from orchestrator.measure.memory import peak_mb, reset_peak
from orchestrator.measure.served import Served, measure_served, measure_test_split
from orchestrator.model_card import write_card
from orchestrator.plugins import build
from orchestrator.prune import METHODS
from orchestrator.quantize import Numerics, QuantizeOptions
from orchestrator.quantize.convert import convert, prepare
from orchestrator.quantize.fake import set_enabled
from orchestrator.trial import (
    Diverged,
    Infeasible,
    Measurement,
    Reason,
    TrialConfig,
    TrialResult,
    TrialStatus,
)


class Clock:
    """Seconds a stage, told as they begin to whoever watches and to the trial's log."""

    def __init__(self, note: Note, log: Path) -> None:
        self.seconds: dict[str, float] = {}
        self._note, self._log = note, log
        self._stage, self._since = "", time.perf_counter()
        log.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, stage: str) -> None:
        """The stage that begins now; "" ends the last one."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = round(now - self._since, 3)
        self._stage, self._since = stage, now
        if stage:
            self.log(stage)
            self._note(stage)

    def log(self, text: str) -> None:
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def run_trial(config: TrialConfig, bench: Bench, note: Note) -> TrialResult:
    """Compress as `config` says and measure what came out. A failure is a result with its reason."""
    folder = bench.folder / "trials" / config.id
    return _reported(
        config, folder, bench.device, note, lambda clock: _compress(config, bench, folder, clock)
    )


def run_baseline(model: str, bench: Bench, note: Note) -> TrialResult:
    """Train (once), export and measure the dense model of `model`."""
    folder = bench.recipe.baseline_folder(bench.folder, model)
    trained = bench.dense(model, note)
    config = trained.config

    def dense(clock: Clock) -> tuple[Measurement, dict[str, Any], str]:
        served = Served(bench, config, folder / "artifact", bench.base(model).tokenizer)
        measurement, details, sha256 = _deliver(
            bench.dense_model(model), served, clock, is_baseline=True
        )
        return measurement, details | {"candidates": trained.candidates}, sha256

    return _reported(config, folder, bench.device, note, dense)


def measure_test(folder: Path, config: TrialConfig, bench: Bench) -> tuple[Measurement, str]:
    """Score a finished trial's artifact on the test split; its new hash, since its card now says so."""
    artifacts.verify(folder)
    measurement = measure_test_split(folder, bench)
    write_card(folder, bench, config, test=measurement)
    return measurement, artifacts.reseal(folder)


def _compress(
    config: TrialConfig, bench: Bench, folder: Path, clock: Clock
) -> tuple[Measurement, dict[str, Any], str]:
    quantize = QuantizeOptions(**config.quantize)
    options = FinetuneOptions(**config.finetune)
    numerics = bench.runtime.numerics(quantize, bench.target)
    trains = options.max_steps != 0
    model = bench.dense_model(config.model, trained_on=trains).to(bench.device)
    tokenizer = bench.base(config.model).tokenizer

    clock("prune")
    prunings = []
    for section in config.prune:
        method = build(METHODS, section, key="method", what="pruning method")
        context = bench.prune_context(tokenizer, seed=config.seed)
        prunings.append(method.start(model, context))
        tokenizer = prunings[-1].tokenizer or tokenizer

    clock("prepare")
    on_step: list[Callable[[int, int], None]] = [pruning.on_step for pruning in prunings]
    if quantize.qat:
        prepare(model, numerics, ignore=quantize.ignore)
        on_step.append(_switch_on(model, quantize.qat_start))

    clock("finetune")
    lesson = bench.lesson(config.model, options)
    training = finetune(
        model,
        bench.task,
        bench.encoded_lesson(lesson, tokenizer),
        options,
        seed=config.seed,
        device=bench.device,
        on_step=on_step,
        teacher=lesson.teacher,
        max_steps=bench.steps_limit if trains else 0,
    )
    for pruning in prunings:
        pruning.finish()
    set_enabled(model, True)

    served = Served(bench, config, folder / "artifact", tokenizer)
    measurement, details, sha256 = _deliver(
        model.cpu().eval(), served, clock, numerics=numerics, quantize=quantize
    )
    details["prune"] = [pruning.report() for pruning in prunings]
    details["training"] = training.model_dump(mode="json")
    return measurement, details, sha256


def _deliver(
    model: PreTrainedModel,
    served: Served,
    clock: Clock,
    *,
    numerics: Numerics | None = None,
    quantize: QuantizeOptions | None = None,
    is_baseline: bool = False,
) -> tuple[Measurement, dict[str, Any], str]:
    """Convert, export, reload and measure a trained model."""
    clock("convert")
    shape = served.describe(model)
    converted = model
    if numerics is not None and quantize is not None:
        converted = convert(copy.deepcopy(model), numerics, ignore=quantize.ignore)

    clock("export")
    served.export(converted)

    measurement, details = measure_served(
        served, model, converted, shape, is_baseline=is_baseline, stage=clock
    )
    write_card(served.folder, served.bench, served.config, validation=measurement)
    return measurement, details, artifacts.reseal(served.folder)


def _switch_on(model: PreTrainedModel, share: float) -> Callable[[int, int], None]:
    """Fake-quant from `share` of the optimizer steps on."""

    def on_step(step: int, num_steps: int) -> None:
        begin = int(share * num_steps)
        if step in (0, begin):
            set_enabled(model, step >= begin)

    return on_step


def _reported(
    config: TrialConfig,
    folder: Path,
    device: str,
    note: Note,
    work: Callable[[Clock], tuple[Measurement, dict[str, Any], str]],
) -> TrialResult:
    """Run `work`; whatever stops it becomes a failed result with a reason and a message."""
    shutil.rmtree(folder / "artifact", ignore_errors=True)
    clock = Clock(note, folder / "log.txt")
    reset_peak(device)
    started = time.perf_counter()
    outcome: dict[str, Any]
    try:
        measurement, details, sha256 = work(clock)
        clock("")
        outcome = {
            "status": TrialStatus.COMPLETED,
            "measurement": measurement,
            "details": details
            | {"stage_seconds": clock.seconds, "peak_training_memory_mb": peak_mb(device)},
            "artifact": "artifact",
            "sha256": sha256,
        }
    except Exception as error:
        clock.log(traceback.format_exc())
        shutil.rmtree(folder / "artifact", ignore_errors=True)
        reason, message = explain(error)
        outcome = {"status": TrialStatus.FAILED, "reason": reason, "message": message}
    seconds = time.perf_counter() - started
    return TrialResult(trial_id=config.id, config=config, device_seconds=seconds, **outcome)


def explain(error: Exception) -> tuple[Reason, str]:
    """The reason of a failure and one line a person can act on."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, Diverged):
        return Reason.DIVERGED, text
    if isinstance(error, Infeasible):
        return Reason.INFEASIBLE, text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return Reason.OOM, f"out of memory: {text}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Reason.ERROR, f"the disk is full: {text}"
    return Reason.ERROR, f"{type(error).__name__}: {text}"
