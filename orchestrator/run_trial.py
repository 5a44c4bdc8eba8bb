"""One trial from top to bottom: prune → prepare → finetune → convert → export → measure.

Everything that is reported comes from the artifact, reloaded in its runtime.
"""

from __future__ import annotations

import copy
import errno
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from orchestrator.quiet import quiet

    quiet()  # before what talks is imported

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orchestrator import artifact as artifacts
from orchestrator import checkpoint
from orchestrator.alone import this_host
from orchestrator.bench import Bench, Note
from orchestrator.finetune import FinetuneOptions, TrainingReport
from orchestrator.measure.memory import peak_mb, reset_peak
from orchestrator.measure.served import (
    Served,
    compare_with_trained,
    measure_served,
    measure_test_split,
)
from orchestrator.model_card import write_card
from orchestrator.prune import Pruning, compute_anew, load_methods
from orchestrator.prune.tree import layers_of
from orchestrator.quantize import Numerics, QuantizeOptions
from orchestrator.quantize.convert import convert, prepare
from orchestrator.quantize.fake import set_enabled
from orchestrator.space import can_go_on, trains
from orchestrator.training import Assignment, train
from orchestrator.trial import (
    Diverged,
    Infeasible,
    Measurement,
    Preempted,
    Reason,
    Stopped,
    TrialConfig,
    TrialResult,
    TrialStatus,
)

TRAINED_VERSION = 2
DISK_IS_FULL = "the disk is full"
OUT_OF_MEMORY = (
    "can't allocate memory",
    "bad allocation",
    "bad_alloc",
    "Failed to allocate memory",
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
            before = self.seconds.get(self._stage, 0.0)
            self.seconds[self._stage] = round(before + now - self._since, 3)
        this_host().give_way()
        self._stage, self._since = stage, time.perf_counter()
        if stage:
            self.log(stage)
            self._note(stage)

    def log(self, text: str) -> None:
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%H:%M:%S')} {text}\n")


@dataclass(frozen=True)
class Delivered:
    """An artifact that was made and measured; `config` is what it came from."""

    config: TrialConfig
    measurement: Measurement
    sha256: str
    details: dict[str, Any]


def run_trial(config: TrialConfig, bench: Bench, note: Note) -> TrialResult:
    """Compress as `config` says and measure what came out. A failure is a result with its reason."""
    folder = bench.folder / "trials" / config.id
    return _reported(
        config, folder, bench, note, lambda clock: _compress(config, bench, folder, clock)
    )


def run_baseline(model: str, bench: Bench, note: Note) -> TrialResult:
    """Train (once), export and measure the dense model of `model`. A failure is a result too."""
    folder = bench.recipe.baseline_folder(bench.folder, model)

    def dense(clock: Clock) -> Delivered:
        clock("finetune")
        trained = bench.dense(model, note)
        details = {
            "candidates": trained.candidates,
            "peak_training_memory_mb": peak_mb(bench.device),
        }
        served = Served(bench, trained.config, folder / "artifact", bench.base(model).tokenizer)
        dense = bench.dense_model(model)
        return _deliver(dense, dense, served, clock, details)

    first = bench.dense_config(model, bench.recipe.baseline_grid(model)[0])
    return _reported(first, folder, bench, note, dense)


def measure_test(folder: Path, config: TrialConfig, bench: Bench) -> tuple[Measurement, str]:
    """Score a finished trial's artifact on the test split; its new hash, since its card now says so.

    Raises `DamagedArtifact`.
    """
    measurement = measure_test_split(folder, bench)
    write_card(folder, bench, config, test=measurement)
    return measurement, artifacts.reseal(folder)


# -- the stages ----------------------------------------------------------------------------------


def _compress(config: TrialConfig, bench: Bench, folder: Path, clock: Clock) -> Delivered:
    quantize = QuantizeOptions(**config.quantize)
    numerics = bench.runtime.numerics(quantize, bench.target)
    trained = _train_once(config, numerics if quantize.qat else None, bench, clock)

    clock("convert")
    trained.model.cpu().eval()
    converted = _converted(trained.model, numerics, quantize)
    served = Served(bench, config, folder / "artifact", trained.tokenizer)
    return _deliver(trained.model, converted, served, clock, trained.details)


@dataclass(frozen=True)
class Trained:
    """A pruned model at the end of its training, its tokenizer, and what its stages report.

    `gathered` is there where a longer training may go on from it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    details: dict[str, Any]
    gathered: checkpoint.Gathered | None = None


def _train_once(
    config: TrialConfig, numerics: Numerics | None, bench: Bench, clock: Clock
) -> Trained:
    """`_train`, or what it came to in a trial that differs only in what comes after.

    `numerics` are what is trained for, None without QAT.
    """
    ignore = QuantizeOptions(**config.quantize).ignore
    if not trains(FinetuneOptions(**config.finetune)) or bench.steps_limit is not None:
        return _train(config, numerics, bench, clock)
    inputs = bench.training_inputs(config, numerics)
    done: list[Trained] = []

    def build(folder: Path) -> None:
        earlier = bench.shorter_training(config, inputs, version=TRAINED_VERSION)
        going = bench.stages.beside("trained", inputs, version=TRAINED_VERSION)
        done.append(_train(config, numerics, bench, clock, earlier=earlier, going=going))
        trained = done[0]
        trained.model.cpu()
        checkpoint.save(folder, trained.model, trained.tokenizer, trained.details, trained.gathered)

    folder = bench.stages.once("trained", inputs, build, version=TRAINED_VERSION)
    if done:
        return done[0]
    clock("load")
    dense = bench.dense_model(config.model, trained_on=True)
    return Trained(*checkpoint.load(folder, dense, numerics=numerics, ignore=ignore))


def _train(
    config: TrialConfig,
    numerics: Numerics | None,
    bench: Bench,
    clock: Clock,
    *,
    earlier: checkpoint.Earlier | None = None,
    going: Path | None = None,
) -> Trained:
    quantize = QuantizeOptions(**config.quantize)
    options = FinetuneOptions(**config.finetune)

    clock("load")
    model = bench.dense_model(config.model, trained_on=trains(options)).to(bench.device)
    clock("prune")
    pruned = _prune(model, config, bench)

    clock("prepare")
    if numerics is not None:
        prepare(model, numerics, ignore=quantize.ignore)

    training, gathered = _finetune(model, pruned, config, numerics, bench, earlier, going, clock)
    for pruning in pruned.prunings:
        pruning.finish()
    set_enabled(model, True)
    details = {
        "prune": [pruning.report() for pruning in pruned.prunings],
        "training": training.model_dump(mode="json"),
        "peak_training_memory_mb": peak_mb(bench.device),
    }
    if bench.crew is not None:
        details["peak_memory_mb_by_rank"] = bench.crew.peaks_mb
    return Trained(model, pruned.tokenizer, details, gathered)


@dataclass(frozen=True)
class Pruned:
    """Methods at work, in their order, the tokenizer that they leave, and the dense layers."""

    prunings: list[Pruning]
    tokenizer: PreTrainedTokenizerBase
    layers: list[int]


def _prune(model: PreTrainedModel, config: TrialConfig, bench: Bench) -> Pruned:
    dense_layers = layers_of(model)
    context = bench.prune_context(bench.base(config.model).tokenizer, seed=config.seed)
    prunings = []
    for method in load_methods(config.prune):
        prunings.append(method.start(model, context))
        context.tokenizer = prunings[-1].tokenizer or context.tokenizer
    context.once = compute_anew  # from now on the weights are this trial's own
    left = [dense_layers.index(layer) for layer in layers_of(model)]
    return Pruned(prunings, context.tokenizer, left)


def _finetune(
    model: PreTrainedModel,
    pruned: Pruned,
    config: TrialConfig,
    numerics: Numerics | None,
    bench: Bench,
    earlier: checkpoint.Earlier | None,
    going: Path | None,
    clock: Clock,
) -> tuple[TrainingReport, checkpoint.Gathered | None]:
    options, quantize = FinetuneOptions(**config.finetune), QuantizeOptions(**config.quantize)
    assignment = Assignment(
        model=config.model,
        finetune=options,
        seed=config.seed,
        prune=config.prune,
        numerics=numerics,
        ignore=quantize.ignore,
        qat_start=quantize.qat_start,
        layers=tuple(pruned.layers),
        max_steps=bench.steps_limit if trains(options) else 0,
        source=bench.source(config.model, options, clock),
    )
    clock("finetune")
    return train(
        model,
        assignment,
        bench,
        tokenizer=pruned.tokenizer,
        prunings=pruned.prunings,
        earlier=earlier,
        going=going,
        gathers=can_go_on(config),
        rungs=bench.rungs,
    )


def _converted(
    model: PreTrainedModel, numerics: Numerics, quantize: QuantizeOptions
) -> PreTrainedModel:
    """What is exported of a trained model, which stays as it is."""
    return convert(copy.deepcopy(model), numerics, ignore=quantize.ignore, clip_search=True)


def _deliver(
    trained: PreTrainedModel,
    converted: PreTrainedModel,
    served: Served,
    clock: Clock,
    details: dict[str, Any],
) -> Delivered:
    """Export, reload and measure a converted model."""
    shape = served.shape(trained, converted)
    clock("export")
    served.export(converted)
    details = details | compare_with_trained(served, trained, converted, stage=clock)
    measured = measure_served(served, stage=clock)
    measured = measured.model_copy(update={"metrics": shape | measured.metrics})
    write_card(served.folder, served.bench, served.config, validation=measured)
    return Delivered(served.config, measured, artifacts.reseal(served.folder), details)


# -- what becomes of it --------------------------------------------------------------------------


def _reported(
    config: TrialConfig,
    folder: Path,
    bench: Bench,
    note: Note,
    work: Callable[[Clock], Delivered],
) -> TrialResult:
    """Run `work`; whatever stops it becomes a failed result of `config`, with reason and message.

    Raises `Preempted`.
    """
    shutil.rmtree(folder / "artifact", ignore_errors=True)
    clock = Clock(note, folder / "log.txt")
    torch.set_num_threads(bench.num_threads)  # a torch session may have left the target's
    reset_peak(bench.device)
    started = time.perf_counter()
    outcome: dict[str, Any]
    try:
        delivered = work(clock)
        clock("")
        config = delivered.config
        outcome = {
            "status": TrialStatus.COMPLETED,
            "measurement": delivered.measurement,
            "details": delivered.details | {"stage_seconds": clock.seconds},
            "artifact": "artifact",
            "sha256": delivered.sha256,
        }
    except Stopped as error:
        clock.log(str(error))
        shutil.rmtree(folder / "artifact", ignore_errors=True)
        outcome = {"status": TrialStatus.STOPPED, "message": str(error)}
    except Preempted as error:
        clock.log(f"it goes on elsewhere: {error}")
        shutil.rmtree(folder / "artifact", ignore_errors=True)
        raise
    except Exception as error:
        clock.log(traceback.format_exc())
        shutil.rmtree(folder / "artifact", ignore_errors=True)
        reason, message = explain(error)
        if reason is Reason.OOM:
            message += f" (the peak of this process was {peak_mb(bench.device):.0f} MB)"
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
    if isinstance(error, subprocess.TimeoutExpired):
        return Reason.TIMEOUT, text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in text for words in OUT_OF_MEMORY
    ):
        return Reason.OOM, text if text.startswith("out of memory") else f"out of memory: {text}"
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if is_full or "No space left on device" in text:
        return Reason.ERROR, f"{DISK_IS_FULL}: {text}"
    return Reason.ERROR, f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    from orchestrator.one_trial import main

    sys.exit(main())
