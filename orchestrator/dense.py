"""The dense baseline of a study: the best of its own small grid, as well trained as any trial may be."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from orchestrator.base_model import Base, tokenizer_key
from orchestrator.finetune import FinetuneOptions
from orchestrator.predict import predict
from orchestrator.space import trains
from orchestrator.training import Assignment, train
from orchestrator.trial import Diverged, TrialConfig

if TYPE_CHECKING:
    from orchestrator.bench import Bench
    from orchestrator.tasks import Record

VERSION = 4
Note = Callable[[str], None]


@dataclass(frozen=True)
class Dense:
    """The trained dense model: where its checkpoints lie, and how it came to be.

    `config` is the trial configuration that describes it, `candidates` what it is the best of.
    """

    folder: Path
    config: TrialConfig
    candidates: list[dict[str, Any]]


def make_dense(model: str, bench: Bench, note: Note) -> Dense:
    """The dense baseline, trained at most once a study. Raises `Diverged` if all of its grid did."""
    base, grid = bench.base(model), bench.recipe.baseline_grid(model)
    inputs = {
        "base": base.source,
        "tokenizer": tokenizer_key(base.tokenizer),
        "data": bench.data_key,
        "budgets": bench.recipe.baseline_budgets(model),
        "seed": bench.recipe.seed,
        "limits": [bench.rows_limit, bench.steps_limit],
    }

    def build(folder: Path) -> None:
        whole = bench.base(model, with_weights=True)
        going = bench.stages.beside("dense", inputs, version=VERSION)
        made = _Grid(model, whole, bench, note, going=going).train(grid)
        made.start.save_pretrained(folder / "start")
        made.baseline.save_pretrained(folder / "baseline")
        base.tokenizer.save_pretrained(folder / "baseline")
        config = bench.dense_config(model, made.options)
        text = {"config": config.model_dump(mode="json"), "candidates": made.candidates}
        (folder / "dense.json").write_text(json.dumps(text, indent=1))
        shutil.rmtree(going, ignore_errors=True)

    folder = bench.stages.once("dense", inputs, build, version=VERSION)
    found = json.loads((folder / "dense.json").read_text())
    return Dense(folder, TrialConfig(**found["config"]), found["candidates"])


@dataclass(frozen=True)
class _Trained:
    """Where trials start, the baseline, the winner's options, and how all candidates did."""

    start: PreTrainedModel
    baseline: PreTrainedModel
    options: FinetuneOptions
    candidates: list[dict[str, Any]]


@dataclass(frozen=True)
class _Candidate:
    """A dense model that was trained, with its answers on validation."""

    model: PreTrainedModel
    options: FinetuneOptions
    records: list[Record]


class _Grid:
    """Trains dense models from one base and scores them on validation."""

    def __init__(self, name: str, base: Base, bench: Bench, note: Note, *, going: Path) -> None:
        self.name, self.base, self.bench, self.note = name, base, bench, note
        self.going = going
        self.candidates: list[dict[str, Any]] = []

    def train(self, grid: list[FinetuneOptions]) -> _Trained:
        """The best of the grid is where trials start.

        It is then trained on for the largest budget that any trial gets; that becomes the baseline
        where validation can tell that it is better, and not by chance.
        """
        best: _Candidate | None = None
        for number, options in enumerate(grid, 1):
            self.note(f"dense {number}/{len(grid)}")
            model = copy.deepcopy(self.base.model)
            self.bench.set_attention(model)
            found = self._train_and_score(model, options)
            if found is not None and (best is None or self._gain(found, best)[0] > 0):
                best = found
        if best is None:
            raise Diverged(f"the dense model diverged with each of {len(grid)} baseline.finetune")
        return _Trained(best.model, self._continued(best), best.options, self.candidates)

    def _continued(self, start: _Candidate) -> PreTrainedModel:
        """`start` after more training, if there is any and it surely did good."""
        longer = self.bench.recipe.continued_baseline(start.options)
        if longer is None:
            return start.model
        self.note("dense, continued")
        model = copy.deepcopy(start.model)
        continued = self._train_and_score(model, longer, continued=True)
        if continued is None or self._gain(continued, start)[1] <= 0:
            return start.model
        return continued.model

    def _gain(self, one: _Candidate, other: _Candidate) -> tuple[float, float]:
        """How much better `one` is on validation, and at the least: the end of the paired interval."""
        task = self.bench.task
        value, *ends = task.paired_difference(one.records, other.records)
        sign = self.bench.recipe.sign(task.quality)
        return sign * value, min(sign * end for end in ends)

    def _train_and_score(
        self, model: PreTrainedModel, options: FinetuneOptions, *, continued: bool = False
    ) -> _Candidate | None:
        """Train in place, on to the CPU, and answer validation; None if it diverged."""
        bench, task = self.bench, self.bench.task
        line: dict[str, Any] = {
            "finetune": options.model_dump(mode="json"),
            "continued": continued,
        }
        self.candidates.append(line)
        assignment = Assignment(
            model=self.name,
            finetune=options,
            seed=bench.recipe.seed,
            max_steps=bench.steps_limit if trains(options) else 0,
        )
        try:
            number = len(self.candidates)
            tokenizer, going = self.base.tokenizer, self.going / str(number)
            report, _ = train(model, assignment, bench, tokenizer=tokenizer, going=going)
        except Diverged as reason:
            line["diverged"] = str(reason)
            return None
        validation = bench.encoded("validation", self.base.tokenizer)
        rows = options.per_device_train_batch_size  # training had memory for so many
        records = predict(model, task, validation, batch_size=rows, device=bench.device)
        value = task.metrics(records)[task.quality][0]
        model.cpu()
        line |= {task.quality: value, **report.model_dump(mode="json")}
        return _Candidate(model, options, records)
