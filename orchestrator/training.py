"""One training, by this process alone or by all ranks of its gang.

In a gang rank 0 leads: it hands the training out as plain data beside a folder with the weights,
and gets them back. The others follow, and hold no more of the model than the strategy lets them.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from orchestrator import checkpoint, shards
from orchestrator.alone import this_host
from orchestrator.checkpoint import Earlier, Gathered, Saver, gather
from orchestrator.distill import HiddenDistance
from orchestrator.finetune import FinetuneOptions, OnStep, TrainingReport, finetune, steps_of
from orchestrator.lessons import Lesson, Source, hidden_distance, open_lesson
from orchestrator.measure.memory import peak_mb
from orchestrator.prune import Pruning
from orchestrator.prune.tree import layers_of
from orchestrator.quantize import Numerics
from orchestrator.quantize.convert import prepare
from orchestrator.quantize.fake import round_again, set_enabled
from orchestrator.ranks import Ranks, watch_nccl
from orchestrator.resources import GangOptions
from orchestrator.rungs import Rungs, Telling
from orchestrator.skeleton import make_skeleton
from orchestrator.spread_masks import Chooser, SpreadMasks, schedules
from orchestrator.storage import Storage, remove_folder
from orchestrator.strategies import Strategy, make_strategy
from orchestrator.trial import Diverged, Frozen, Preempted, content_hash

if TYPE_CHECKING:
    from orchestrator.bench import Bench
    from orchestrator.tasks import Encoded

WEIGHTS = checkpoint.WEIGHTS
ENDLESS = timedelta(days=365)  # those that follow wait as long as rank 0 exports and measures


class Assignment(Frozen):
    """A training as plain data.

    `model` is the recipe's name of it, `prune` the methods that are at work on it, `numerics` what
    it is prepared for, with fake-quant from `qat_start` on. `layers` are those of the dense model
    that are left. `max_steps` goes before the options' own.
    """

    model: str
    finetune: FinetuneOptions
    seed: int
    prune: tuple[dict[str, Any], ...] = ()
    numerics: Numerics | None = None
    ignore: tuple[str, ...] = ()
    qat_start: float = 0.0
    layers: tuple[int, ...] = ()
    max_steps: int | None = None
    source: Source = Source()


def train(
    model: PreTrainedModel,
    assignment: Assignment,
    bench: Bench,
    *,
    tokenizer: PreTrainedTokenizerBase,
    prunings: Sequence[Pruning] = (),
    earlier: Earlier | None = None,
    going: Path | None = None,
    gathers: bool = False,
    rungs: Rungs | None = None,
) -> tuple[TrainingReport, Gathered | None]:
    """Fine-tune `model` in place. `prunings` are at work on it, and `rungs` are told how it goes.

    It goes on from `earlier`, or from further along where it was interrupted: `going` is the folder
    that is kept for it meanwhile. The optimizer's state comes too if it `gathers`. Raises
    `Diverged`, `Preempted`, and whatever `rungs` raise.
    """
    if bench.pieces > 1:
        check_pieces(assignment)
    saver = bench.saver(going) if going else None
    last = saver.last() if saver else None
    if last and (earlier is None or last.step > earlier.step):
        earlier = last
    together = bench.crew is not None and bench.crew.trains(assignment.model)
    run = bench.crew.lead if bench.crew is not None and together else _alone
    try:
        trained = run(
            model,
            assignment,
            bench,
            tokenizer,
            prunings,
            earlier,
            saver,
            gathers=gathers,
            rungs=rungs,
        )
    except Diverged:
        if saver:
            saver.forget()
        raise
    if saver:
        saver.forget()
    return trained


def check_pieces(assignment: Assignment) -> None:
    """Raise MemoryError where rows cannot be taken a few at a time with the same result."""
    numerics, distillation = assignment.numerics, assignment.finetune.distillation
    if assignment.finetune.per_device_train_batch_size == 1:
        raise MemoryError("out of memory, and one row at a time is the least")
    if numerics is not None and numerics.activation and numerics.activation.granularity == "tensor":
        raise MemoryError("out of memory, and in parts its activations would have other scales")
    if distillation is not None and distillation.hidden:
        raise MemoryError("out of memory, and in parts hidden states would have another spread")


def _alone(
    model: PreTrainedModel,
    assignment: Assignment,
    bench: Bench,
    tokenizer: PreTrainedTokenizerBase,
    prunings: Sequence[Pruning],
    earlier: Earlier | None,
    saver: Saver | None,
    *,
    gathers: bool,
    rungs: Rungs | None,
) -> tuple[TrainingReport, Gathered | None]:
    def score() -> float:
        return bench.score(model, tokenizer)

    return _finetuned(
        model,
        assignment,
        bench,
        bench.lesson(assignment.source),
        tokenizer,
        on_step=[pruning.on_step for pruning in prunings],
        earlier=earlier,
        saver=saver,
        gathers=gathers,
        pieces=bench.pieces,
        told=rungs and rungs.during(score),
    )


def _finetuned(
    model: PreTrainedModel,
    assignment: Assignment,
    bench: Bench,
    lesson: Lesson,
    tokenizer: PreTrainedTokenizerBase,
    *,
    on_step: Sequence[OnStep],
    gathers: bool,
    told: Telling | None = None,
    **arguments: Any,
) -> tuple[TrainingReport, Gathered | None]:
    """`finetune` as the assignment says, with the optimizer's state if it `gathers`."""
    found: list[Gathered] = []
    encoded = bench.encoded_lesson(lesson, tokenizer)
    report = finetune(
        model,
        bench.task,
        encoded,
        assignment.finetune,
        seed=assignment.seed,
        device=bench.device,
        on_step=[*on_step, *_each_step(model, assignment), *([told.on_step] if told else [])],
        on_log=told and told.on_log,
        teacher=lesson.teacher,
        hidden=_hidden(model, assignment, lesson, encoded),
        max_steps=assignment.max_steps,
        on_end=(lambda *trained: found.append(gather(*trained))) if gathers else None,
        **arguments,
    )
    return report, found[0] if found else None


def _each_step(model: PreTrainedModel, assignment: Assignment) -> list[OnStep]:
    """Fake-quant from its share of the steps on; and who measures on this host goes first."""

    is_on: list[bool] = []

    def switch_on(step: int, num_steps: int) -> None:
        wanted = step >= int(assignment.qat_start * num_steps)
        if is_on != [wanted]:
            set_enabled(model, wanted)
            is_on[:] = [wanted]

    def give_way(step: int, num_steps: int) -> None:
        this_host().give_way()

    return [switch_on, give_way] if assignment.numerics else [give_way]


def _hidden(
    model: PreTrainedModel, assignment: Assignment, lesson: Lesson, encoded: Encoded
) -> HiddenDistance | None:
    distillation = assignment.finetune.distillation
    if distillation is None or not distillation.hidden:
        return None
    return hidden_distance(lesson, layers_of(model), assignment.layers, encoded)


# -- a gang --------------------------------------------------------------------------------------


def join_ranks(device: str, folder: Path, *, timeout_s: float) -> None:
    """Make the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Where they do not, it is this process alone. A rank that waits for the others for `timeout_s`
    ends; on a GPU it leaves in the study's `folder` what it waited for.
    """
    first = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in first.items():
        os.environ.setdefault(name, value)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        watch_nccl(folder / "nccl")
    alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    place = {} if "MASTER_ADDR" in os.environ else alone
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **place)


class Part(Frozen):
    """What every rank is told of a training: the assignment, where it starts, and who holds what.

    `step` of its steps were taken before; what the optimizer had gathered then is in `earlier`.
    """

    start: str
    assignment: Assignment
    options: GangOptions
    earlier: str = ""
    step: int = 0
    progress: dict[str, Any] | None = None
    going: str = ""
    gathers: bool = False
    pieces: int = 1


class Crew:
    """The ranks of this process group, which train a model together as `options(model)` say.

    `is_broken` while a training runs, and for good where it ended on this rank alone.
    """

    def __init__(self, options: Callable[[str], GangOptions]) -> None:
        self.options = options
        self.ranks = Ranks.here()
        self.peaks_mb: list[float] = []
        self.is_broken = False
        self._orders = torch.distributed.new_group(backend="gloo", timeout=ENDLESS)

    def trains(self, model: str) -> bool:
        """Whether a model's trainings are for all ranks."""
        return self.ranks.size > 1 or self.options(model).strategy_name != "single"

    def lead(
        self,
        model: PreTrainedModel,
        assignment: Assignment,
        bench: Bench,
        tokenizer: PreTrainedTokenizerBase,
        prunings: Sequence[Pruning],
        earlier: Earlier | None,
        saver: Saver | None,
        *,
        gathers: bool,
        rungs: Rungs | None,
    ) -> tuple[TrainingReport, Gathered | None]:
        """`train`, as rank 0 of all. `rungs` are told the loss alone. Raises what that does."""
        if self.is_broken:
            raise RuntimeError("a rank of this gang has failed: the others do not listen any more")
        encoded = bench.encoded_lesson(bench.lesson(assignment.source, opens=False), tokenizer)
        num_steps = steps_of(assignment.finetune, len(encoded), assignment.max_steps)
        begin = earlier.step if earlier else 0
        if earlier:
            earlier.place(model)
        for pruning in prunings:
            pruning.on_step(begin, num_steps)
        key = content_hash(assignment.model_dump(mode="json"))
        for left in bench.stages.folder.glob(f".start-{key}-*"):  # by a gang that was killed
            shutil.rmtree(left, ignore_errors=True)
        start = bench.stages.folder / f".start-{key}-{secrets.token_hex(4)}"
        start.mkdir(parents=True)
        storage = self._storage(bench)
        try:
            checkpoint.save(start, model.cpu(), tokenizer, {})
            bench.base(assignment.model).model.config.save_pretrained(start)
            if not schedules(assignment.prune):
                _empty(model)
            if storage:
                storage.send(start)
            options = self.options(assignment.model)
            part = Part(
                start=str(start),
                assignment=assignment,
                options=options,
                earlier=str(earlier.folder) if earlier else "",
                step=begin,
                progress=earlier.progress if earlier else None,
                going=str(saver.folder) if saver else "",
                gathers=gathers,
                pieces=bench.pieces,
            )
            self.is_broken = True  # until all have done their part
            self._orders_out(part.model_dump_json())
            told = rungs and rungs.during(None)
            report, weights, gathered = self._do(part, bench, Chooser(model, prunings), told)
        finally:
            remove_folder(start, storage)
        for name, value in weights.items():
            model.get_parameter(name).data = value
        model.to(bench.device).eval()
        return report, gathered

    def follow(self, bench: Bench, *, after_each: Callable[[], None] = lambda: None) -> None:
        """Do this rank's part of every training that rank 0 leads, until it dismisses."""
        while order := self.ranks.told(group=self._orders):
            with suppress(Diverged, Preempted):  # on every rank at the same step
                self._do(Part.model_validate_json(order), bench, None)
            after_each()
        torch.distributed.destroy_process_group()  # its threads may not outlive the interpreter

    def dismiss(self) -> None:
        """Let the others go, as rank 0, and end the process group."""
        self._orders_out("")
        torch.distributed.destroy_process_group()

    def _storage(self, bench: Bench) -> Storage | None:
        """By which others reach what this rank has, where some of them are on other hosts."""
        is_one_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == self.ranks.size
        return None if is_one_host else bench.storage

    def _orders_out(self, text: str) -> None:
        if self.ranks.size > 1:
            self.ranks.told(text, group=self._orders)

    def _do(
        self,
        part: Part,
        bench: Bench,
        chooser: Chooser | None,
        told: Telling | None = None,
    ) -> tuple[TrainingReport, dict[str, torch.Tensor], Gathered | None]:
        """This rank's part. The weights, and the optimizer's state, come back on rank 0 alone."""
        assignment, start = part.assignment, bench.stages.reach(Path(part.start))
        device = torch.device(bench.device)
        self.is_broken = True
        strategy = make_strategy(part.options)
        removals = checkpoint.removals_in(start)
        model = _filled(strategy, start, bench, assignment, device, removals)
        tokenizer = AutoTokenizer.from_pretrained(start / "tokenizer")
        lesson = open_lesson(assignment.source, bench, _live(strategy, assignment, bench, device))
        masks = SpreadMasks(model, assignment.prune, chooser)
        earlier = saver = None
        if part.earlier:
            folder = bench.stages.reach(Path(part.earlier))
            earlier = Earlier(folder, part.step, part.progress, is_placed=True)
        if part.going:
            saver = bench.saver(Path(part.going))
        try:
            report, state_of_optimizer = _finetuned(
                model,
                assignment,
                bench,
                lesson,
                tokenizer,
                on_step=[masks.on_step],
                earlier=earlier,
                saver=saver,
                gathers=part.gathers,
                strategy=strategy,
                pieces=part.pieces,
                told=told,
            )
        except (Diverged, Preempted):
            self.is_broken = False
            raise
        finally:
            strategy.leave()
            shutil.rmtree(start, ignore_errors=True)  # on every host; all have read it
        weights = shards.gathered(model)
        peaks = torch.zeros(self.ranks.size)
        peaks[self.ranks.rank] = peak_mb(bench.device)
        self.peaks_mb = self.ranks.total(peaks).tolist()
        self.is_broken = False
        return report, weights, state_of_optimizer


def _filled(
    strategy: Strategy,
    folder: Path,
    bench: Bench,
    assignment: Assignment,
    device: torch.device,
    removals: Sequence[Mapping[str, Sequence[int]]] = (),
) -> PreTrainedModel:
    """A model that holds what is this rank's of the weights in `folder`."""
    trust = bench.recipe.model_options(assignment.model).trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    model = make_skeleton(bench.task.auto_class(), config, removals, trust_remote_code=trust)
    bench.set_attention(model)
    if assignment.numerics is not None:
        prepare(model, assignment.numerics, ignore=assignment.ignore)
    strategy.fill(model, folder / WEIGHTS, device)
    round_again(model, shards.is_sharded)
    return model.eval()


def _live(
    strategy: Strategy, assignment: Assignment, bench: Bench, device: torch.device
) -> PreTrainedModel | None:
    """The teacher, which answers while others train, held as the student is."""
    if not assignment.source.dense:
        return None
    plain = Assignment(model=assignment.model, finetune=assignment.finetune, seed=0)
    folder = bench.stages.reach(Path(assignment.source.dense))
    return strategy.answering(_filled(strategy, folder, bench, plain, device))


def _empty(model: PreTrainedModel) -> None:
    """Give the memory of all weights back; their values are in a file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
