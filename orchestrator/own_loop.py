"""The steps of a trial for who has a training loop of their own: five calls around it.

`prune` and `prepare` change a model before its optimizer is made, `convert` makes of the trained
one what is served, `export` writes that down, and `measure` takes every number from there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from orchestrator import artifact as artifacts
from orchestrator.facts import cache_folder
from orchestrator.measure.again import measure_alone
from orchestrator.plugins import find
from orchestrator.prune import PruneContext, Pruning, load_methods
from orchestrator.quantize import Numerics, QuantizeOptions
from orchestrator.quantize import convert as converting
from orchestrator.quantize.fake import set_enabled
from orchestrator.runtimes import RUNTIMES, Target
from orchestrator.space import method_sections, spell_out
from orchestrator.tasks import Kind
from orchestrator.trial import BadInput

Batch = Mapping[str, torch.Tensor]
Answer = Callable[[Batch], torch.Tensor]
Section = str | Mapping[str, Any]
HERE = Target()  # onnxruntime, one thread


class Pruned:
    """Methods at work on a model; `step` after each optimizer step, `finish` after the last."""

    def __init__(self, prunings: Sequence[Pruning], num_steps: int) -> None:
        self.prunings, self._num_steps, self._taken = prunings, num_steps, 0
        self._tell()

    def step(self) -> None:
        self._taken += 1
        self._tell()

    def _tell(self) -> None:
        for pruning in self.prunings:
            pruning.on_step(self._taken, self._num_steps)

    def finish(self) -> list[dict[str, Any]]:
        """Make it final; what each method reached."""
        for pruning in self.prunings:
            pruning.finish()
        return [pruning.report() for pruning in self.prunings]


def prune(
    model: PreTrainedModel,
    methods: Section | Sequence[Section],
    *,
    num_steps: int = 1,
    batches: Iterable[Batch] = (),
    loss: Callable[[PreTrainedModel, Batch], torch.Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Iterable[str] = (),
    seed: int = 0,
) -> Pruned:
    """Begin to prune `model` in place, as a recipe's `prune` says, over so many optimizer steps.

    Importance by `taylor` looks at `batches` of the training split, by the model's own loss where
    none is given; `vocabulary` at `tokenizer` and `texts`, and its new tokenizer is in `prunings`.
    """

    def first(count: int) -> Iterator[dict[str, torch.Tensor]]:
        found = [dict(batch) for batch in islice(batches, count)]
        if not found:
            raise BadInput(
                ["prune: importance `taylor` looks at training batches; give `batches`."]
            )
        yield from found

    context = PruneContext(
        tokenizer=tokenizer,
        texts=lambda: iter(texts),
        batches=first,
        loss=loss or (lambda model, batch: model(**batch).loss),
        seed=seed,
    )
    return Pruned(
        [m.start(model, context) for m in load_methods(method_sections(methods))], num_steps
    )


def prepare(model: PreTrainedModel, quantize: Section, *, target: Target = HERE) -> None:
    """Let `model` train through the rounding of the runtime that will serve it, in place.

    Nothing changes under a scheme that rounds no weights, and with `qat: false`. Raises
    `Infeasible`.
    """
    options = QuantizeOptions(**{"qat": True, **spell_out(quantize, "scheme")})
    if options.qat:
        converting.prepare(model, _numerics(options, target), ignore=options.ignore)


def convert(model: PreTrainedModel, quantize: Section, *, target: Target = HERE) -> PreTrainedModel:
    """A copy with real codes, on the CPU; it is what `export` takes. Raises `Infeasible`."""
    options = QuantizeOptions(**spell_out(quantize, "scheme"))
    copied = copy.deepcopy(model).cpu().eval()
    set_enabled(copied, True)
    return converting.convert(
        copied, _numerics(options, target), ignore=options.ignore, clip_search=True
    )


def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    target: Target = HERE,
    max_length: int = 128,
) -> Path:
    """Write a converted model as `target` serves it; the folder, sealed by its hashes.

    `max_length` is the longest input that it will be asked, in tokens.
    """
    folder = Path(folder).resolve()
    about = {"max_length": max_length, "target": target.model_dump(mode="json")}
    artifacts.write(
        folder,
        model,
        tokenizer,
        find(RUNTIMES, target.runtime, what="runtime"),
        kind=_kind(model),
        cache=cache_folder() / "graphs",
        about=about,
    )
    return folder


def measure(
    folder: str | Path, evaluate: Callable[[Answer], Mapping[str, float]] | None = None
) -> dict[str, float]:
    """Size, latency and memory of an exported model, and what `evaluate` says of its answers.

    `evaluate` is given what maps a batch of tensors to the logits that the runtime answers. Latency
    is on made-up tokens of half the maximal length. Raises `DamagedArtifact`.
    """
    folder = Path(folder)
    description = artifacts.verify(folder)
    found = dict(measure_alone(folder, description).metrics)
    if evaluate is not None:
        target = Target(**description["target"])
        session = find(RUNTIMES, target.runtime, what="runtime").load(folder, target)

        def answer(batch: Batch) -> torch.Tensor:
            arrays = {name: value.numpy(force=True) for name, value in batch.items()}
            return torch.from_numpy(session.run(arrays))

        found |= evaluate(answer)
    return found


def _numerics(options: QuantizeOptions, target: Target) -> Numerics:
    return find(RUNTIMES, target.runtime, what="runtime").numerics(options, target)


def _kind(model: PreTrainedModel) -> Kind:
    if model.config.is_encoder_decoder:
        return "encoder_decoder"
    is_decoder = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return "decoder" if is_decoder else "encoder"
