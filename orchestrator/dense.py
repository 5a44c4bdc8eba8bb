"""The dense baseline of a study: the best of its own small grid, as well trained as any trial may be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from orchestrator.base_model import Base, tokenizer_key
from orchestrator.finetune import FinetuneOptions
from orchestrator.predict import predict
from orchestrator.trial import Diverged, TrialConfig

if TYPE_CHECKING:
    from orchestrator.bench import Bench

VERSION = 3
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
        made = _Grid(base, bench, note).train(grid)
        made.start.save_pretrained(folder / "start")
        made.baseline.save_pretrained(folder / "baseline")
        base.tokenizer.save_pretrained(folder / "baseline")
        config = bench.dense_config(model, made.options)
        text = {"config": config.model_dump(mode="json"), "candidates": made.candidates}
        (folder / "dense.json").write_text(json.dumps(text, indent=1))

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


class _Grid:
    """Trains dense models from one base and scores them on validation."""

    def __init__(self, base: Base, bench: Bench, note: Note) -> None:
        self.base, self.bench, self.note = base, bench, note
        self.candidates: list[dict[str, Any]] = []

    def train(self, grid: list[FinetuneOptions]) -> _Trained:
        """The best of the grid is where trials start.

        It is then trained on for the largest budget that any trial gets, and the better of the
        two is the baseline.
        """
        best: tuple[float, PreTrainedModel, FinetuneOptions] | None = None
        for number, options in enumerate(grid, 1):
            self.note(f"dense {number}/{len(grid)}")
            model = copy.deepcopy(self.base.model)
            self.bench.set_attention(model)
            score = self._train_and_score(model, options)
            if score is not None and (best is None or score > best[0]):
                best = (score, model, options)
        if best is None:
            raise Diverged(f"the dense model diverged with each of {len(grid)} baseline.finetune")
        score, start, options = best
        return _Trained(start, self._continued(start, score, options), options, self.candidates)

    def _continued(
        self, start: PreTrainedModel, score: float, options: FinetuneOptions
    ) -> PreTrainedModel:
        """`start` after more training, if there is any and it did good."""
        longer = self.bench.recipe.continued_baseline(options)
        if longer is None:
            return start
        self.note("dense, continued")
        continued = copy.deepcopy(start)
        later = self._train_and_score(continued, longer, continued=True)
        return continued if later is not None and later > score else start

    def _train_and_score(
        self, model: PreTrainedModel, options: FinetuneOptions, *, continued: bool = False
    ) -> float | None:
        """Train in place, on to the CPU; quality on validation, larger is better, None if it diverged."""
        bench, task = self.bench, self.bench.task
        line: dict[str, Any] = {
            "finetune": options.model_dump(mode="json"),
            "continued": continued,
        }
        self.candidates.append(line)
        try:
            report = bench.train(model, bench.encoded("train", self.base.tokenizer), options)
        except Diverged as reason:
            line["diverged"] = str(reason)
            return None
        validation = bench.encoded("validation", self.base.tokenizer)
        rows = options.per_device_train_batch_size  # training had memory for so many
        records = predict(model, task, validation, batch_size=rows, device=bench.device)
        value = task.metrics(records)[task.quality][0]
        model.cpu()
        line |= {task.quality: value, **report.model_dump(mode="json")}
        return value * bench.recipe.sign(task.quality)
