"""Fine-tuning: one Accelerate loop through which masks, fake-quant and a teacher live.

Whoever changes the model while it trains does so in an `on_step` callback; the loop knows of none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from orchestrator.batches import dealt_out, micro_batches, num_calls, splits_batches
from orchestrator.compiled import compiled
from orchestrator.distill import Distillation, HiddenDistance
from orchestrator.predict import row_lengths, to_device
from orchestrator.problems import nearest
from orchestrator.progress import LossCurve, OnLog, Pace
from orchestrator.ranks import Ranks
from orchestrator.recompute import recomputed
from orchestrator.strategies import SINGLE, Plan, Strategy
from orchestrator.tasks.augmentation import Augmentation
from orchestrator.trial import BadInput, Frozen, Preempted

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from orchestrator.checkpoint import Earlier, Saver
    from orchestrator.distill import Teacher
    from orchestrator.predict import Batch
    from orchestrator.tasks import Encoded, Task

OnStep = Callable[[int, int], None]


class FinetuneOptions(Frozen):
    """A recipe's finetune section, in the names of transformers' `TrainingArguments`.

    `max_steps` overrides the epochs; 0 trains nothing. `bf16: auto` is on where the hardware has
    it. `augmentation` adds rows that the teacher answers; an epoch goes over those too.
    `group_by_length` puts rows of similar length into a batch. `freeze` lists parts of
    parameters' names that stay as they are. `dropout` replaces the model's own.
    `gradient_checkpointing` keeps less for the backward pass, and computes the rest again.
    `torch_compile` compiles the layers; the first steps take long.
    """

    learning_rate: float = Field(5e-5, ge=0)
    num_train_epochs: float = Field(1.0, ge=0)
    max_steps: int | None = Field(None, ge=0)
    per_device_train_batch_size: int = Field(32, gt=0)
    gradient_accumulation_steps: int = Field(1, gt=0)
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    bf16: bool | Literal["auto"] = "auto"
    group_by_length: bool = True
    distillation: Distillation | None = None
    augmentation: Augmentation | None = None
    freeze: tuple[str, ...] = ()
    dropout: float | None = Field(None, ge=0, lt=1)
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    logging_steps: int = Field(10, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.augmentation is not None and self.distillation is None:
            raise ValueError("`augmentation` makes rows for a teacher: set `distillation` too")
        return self


class TrainingReport(Frozen):
    """How training went. `losses` are (step, mean loss since the one before).

    `step_seconds` is the median of all steps but the first, which warms up; `position_seconds` the
    same for each position of a batch. Positions are `tokens` and padding. Of the `steps`, an
    earlier training took `steps_before`; seconds, tokens and losses are those of the others. An
    interrupted training went on from step `resumed_at`.
    """

    steps: int
    steps_before: int = 0
    resumed_at: int = 0
    epochs: float
    losses: tuple[tuple[int, float], ...]
    seconds: float
    step_seconds: float
    position_seconds: float
    tokens: int
    positions: int
    peak_learning_rate: float


def finetune(
    model: PreTrainedModel,
    task: Task,
    encoded: Encoded,
    options: FinetuneOptions,
    *,
    seed: int,
    device: str | torch.device,
    on_step: Sequence[OnStep] = (),
    teacher: Teacher | None = None,
    hidden: HiddenDistance | None = None,
    on_log: OnLog | None = None,
    max_steps: int | None = None,
    earlier: Earlier | None = None,
    saver: Saver | None = None,
    on_end: Callable[[nn.Module, torch.optim.Optimizer], None] | None = None,
    strategy: Strategy = SINGLE,
    pieces: int = 1,
) -> TrainingReport:
    """Train `model` in place and leave it in evaluation mode.

    `on_step(step, num_steps)` is called with the number of steps taken, mostly 0, before the
    first optimizer step and with k after the k-th; `on_log(step, num_steps, loss)` every
    `logging_steps`. `max_steps` goes before the options' own. Steps go on from where `earlier`
    stands, as if they had been taken here, and `saver` writes them down; on its notice a training
    of one rank ends after a step, one of several after a logged one. `on_end` gets model and
    optimizer after the last. On a CPU the same seed gives the same weights. All ranks of a process
    group call this with the same arguments and the part of the model that `strategy` lets them
    hold; a step is over the same rows however many they are, and in however many `pieces` each
    takes its rows. Raises `Diverged` and `Preempted`.
    """
    import torch
    from accelerate.utils import set_seed

    distillation = options.distillation
    assert (teacher is None) == (distillation is None), "distillation needs a teacher"
    assert (hidden is None) == (distillation is None or distillation.hidden == 0)
    device = torch.device(device)
    lengths = row_lengths(encoded)
    batches_an_epoch = math.ceil(len(lengths) / options.per_device_train_batch_size)
    accumulation = options.gradient_accumulation_steps
    num_steps = steps_of(options, len(lengths), max_steps)
    begin = earlier.step if earlier else 0
    ranks = Ranks.here()
    calls = num_calls(accumulation, ranks, pieces)
    curve = LossCurve(
        begin,
        num_steps,
        options.logging_steps,
        on_log,
        check_each=device.type == "cpu",
        ranks=ranks,
    )
    plan = Plan(
        device,
        bf16=uses_bf16(options, device),
        num_calls=calls,
        batch_size=options.per_device_train_batch_size,
        max_grad_norm=options.max_grad_norm,
    )

    if earlier:
        earlier.place(model)
    strategy.place(model, device)
    model.train()
    for callback in on_step:
        callback(begin, num_steps)
    with as_it_trains(model, options, hidden, ranks):
        wrapped = strategy.wrap(model, make_optimizer(model, options), plan)
        accelerator, trained, optimizer = wrapped.accelerator, wrapped.model, wrapped.optimizer
        set_seed(seed + ranks.rank)  # each rank drops out other units
        precision = torch.autocast(device.type, torch.bfloat16, enabled=plan.bf16)
        teacher = teacher and precision(teacher)  # as precise as the student
        batches = micro_batches(
            task,
            encoded,
            lengths,
            batch_size=options.per_device_train_batch_size,
            by_length=options.group_by_length,
            seed=seed,
            begin=begin * accumulation,
        )
        if earlier:
            earlier.restore(model, optimizer)
        progress = earlier and earlier.progress
        if progress:
            curve.restore(progress["curve"])
        pace = Pace(ranks, progress and progress["pace"])
        for step in range(begin + 1, num_steps + 1):
            set_learning_rate(optimizer, options, step, num_steps)
            step_loss = torch.zeros((), device=device)
            for micro in dealt_out(itertools.islice(batches, accumulation), ranks, pieces):
                batch = to_device(micro.arrays, device)
                with accelerator.accumulate(trained):
                    if hidden:
                        hidden.listen()
                    target = teacher(micro.indices, batch) if teacher else None
                    loss = micro.share * objective(trained, task, batch, target, distillation)
                    if hidden and distillation:
                        distance = hidden(micro.indices, batch, is_spare=not micro.share)
                        loss = loss + micro.batch_share * distillation.hidden * distance
                    accelerator.backward(loss * (calls * ranks.size))  # which take the mean
                    if accelerator.sync_gradients:
                        norm = wrapped.clip()
                    optimizer.step()
                    optimizer.zero_grad()
                step_loss += loss.detach()
                pace.add_batch(
                    tokens=int(lengths[micro.indices].sum()) if micro.share else 0,
                    positions=micro.arrays["input_ids"].size if micro.share else 0,
                )
            curve.add(step, step_loss, norm)
            for callback in on_step:
                callback(step, num_steps)
            pace.end_step()
            if saver and step < num_steps:
                looks = ranks.size == 1 or step % options.logging_steps == 0
                leaves = looks and saver.notice.is_given(ranks)
                if saver.is_due(step, leaves=leaves):
                    said = {"curve": curve.state(), "pace": pace.summary()}
                    saver.save(step, model, optimizer, said)
                if leaves:
                    raise Preempted(f"it stands at step {step} of {num_steps}")
        if on_end is not None:
            on_end(model, optimizer)
        wrapped.close()
    model.eval()
    return TrainingReport(
        steps=num_steps,
        steps_before=0 if progress else begin,
        resumed_at=begin if progress else 0,
        epochs=num_steps * accumulation / batches_an_epoch,
        losses=tuple(curve.points),
        **pace.summary(),
        peak_learning_rate=options.learning_rate if num_steps else 0.0,
    )


def objective(
    model: nn.Module,
    task: Task,
    batch: Batch,
    target: torch.Tensor | None,
    distillation: Distillation | None,
) -> torch.Tensor:
    """The task's loss, mixed with how far the logits are from the teacher's (`target`)."""
    logits = task.logits(model, batch)
    loss = task.loss(logits, batch)
    if target is None or distillation is None:
        return loss
    distance = task.distillation_loss(logits, target, batch, temperature=distillation.temperature)
    return distillation.alpha * distance + (1 - distillation.alpha) * loss


# -- what a step is ------------------------------------------------------------------------------


def steps_of(options: FinetuneOptions, num_rows: int, max_steps: int | None = None) -> int:
    """Optimizer steps in all, over so many rows; `max_steps` goes before the options' own."""
    if max_steps is None:
        max_steps = options.max_steps
    if max_steps is not None:
        return max_steps
    batches = math.ceil(num_rows / options.per_device_train_batch_size)
    return math.ceil(options.num_train_epochs * batches / options.gradient_accumulation_steps)


def learning_rate(options: FinetuneOptions, step: int, num_steps: int) -> float:
    """At step 1..num_steps: warm-up to the peak, then decay. No step is wasted on a rate of 0."""
    warmup = math.ceil(options.warmup_ratio * num_steps)
    if step <= warmup:
        return options.learning_rate * step / warmup
    done = (step - 1 - warmup) / (num_steps - warmup)  # of the decay, in [0, 1)
    factors = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "constant": 1.0,
    }
    return options.learning_rate * factors[options.lr_scheduler_type]


def set_learning_rate(
    optimizer: torch.optim.Optimizer, options: FinetuneOptions, step: int, num_steps: int
) -> None:
    rate = learning_rate(options, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate


# -- setting up ----------------------------------------------------------------------------------


def uses_bf16(options: FinetuneOptions, device: torch.device) -> bool:
    """What `bf16` comes to on this device: auto is on where matrix products in it are native."""
    import torch

    if options.bf16 != "auto":
        return options.bf16
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def make_optimizer(model: nn.Module, options: FinetuneOptions) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) whose weight decay leaves norms and biases alone."""
    import torch

    from orchestrator.shards import full_shape

    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(full_shape(p)) >= 2]
    others = [p for p in trained if len(full_shape(p)) < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        fused=True,
    )


@contextmanager
def as_it_trains(
    model: nn.Module, options: FinetuneOptions, hidden: HiddenDistance | None, ranks: Ranks
) -> Iterator[None]:
    """All that the options change of a model for as long as it trains, undone at the end."""
    from orchestrator.prune.tree import layers_of

    shares = splits_batches(options.gradient_accumulation_steps, ranks)
    with (
        frozen(model, options.freeze),
        dropout_at(options.dropout, model),
        unwrapped(model),
        recomputed(model, options.gradient_checkpointing),
        compiled(layers_of(model) if options.torch_compile else []),
        hidden or nullcontext(),
        counted_together(model, hidden, ranks if shares else Ranks()),
    ):
        yield


@contextmanager
def frozen(model: nn.Module, patterns: Sequence[str]) -> Iterator[None]:
    """No gradients inside for parameters whose name contains a pattern. Raises `BadInput`."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parts = {part for name in names for part in name.split(".") if not part.isdecimal()}
    problems = [
        f"finetune.freeze: no parameter's name contains `{pattern}`{nearest(pattern, parts)}"
        for pattern in patterns
        if not any(pattern in name for name in names)
    ]
    chosen = [name for name in names if any(pattern in name for pattern in patterns)]
    if len(chosen) == len(names):
        problems.append(f"finetune.freeze: {list(patterns)} leaves no parameter to train.")
    if problems:
        raise BadInput(problems)
    try:
        for name in chosen:
            model.get_parameter(name).requires_grad_(False)
        yield
    finally:
        for name in chosen:
            model.get_parameter(name).requires_grad_(True)


@contextmanager
def dropout_at(rate: float | None, model: nn.Module) -> Iterator[None]:
    """Another dropout rate inside; None leaves the model's own."""
    from torch import nn

    places = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is float
        and ("dropout" in name or (name == "p" and isinstance(module, nn.Dropout)))
    ]
    try:
        if rate is not None:
            for module, name, _ in places:
                setattr(module, name, rate)
        yield
    finally:
        for module, name, value in places:
            setattr(module, name, value)


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Take off, at the end, what Accelerate puts on the module object itself (its `forward`)."""
    before = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - before:
            delattr(model, name)


@contextmanager
def counted_together(
    model: nn.Module, hidden: HiddenDistance | None, ranks: Ranks
) -> Iterator[None]:
    """Inside, what hangs on a batch as a whole is found over the rows of all `ranks`.

    That is the scale of activations which are rounded with one a call, and the spread of hidden
    states.
    """
    owners = {m.inputs for m in model.modules() if getattr(m, "inputs", None) is not None}
    owners |= {hidden} if hidden else set()
    try:
        for owner in owners:
            owner.ranks = ranks
        yield
    finally:
        for owner in owners:
            owner.ranks = Ranks()
