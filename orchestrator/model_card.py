"""README.md of an artifact: what it is, from what, how good, and how to make it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.artifact import CARD
from orchestrator.trial import Measurement, TrialConfig

if TYPE_CHECKING:
    from orchestrator.bench import Bench

NUMBERS = "measurements.json"


def write_card(
    folder: Path,
    bench: Bench,
    config: TrialConfig,
    *,
    validation: Measurement | None = None,
    test: Measurement | None = None,
) -> None:
    """Write the card; numbers of a split that is not given now are taken from the last card."""
    numbers = _numbers(folder)
    for split, measurement in (("validation", validation), ("test", test)):
        if measurement is not None:
            numbers[split] = measurement.model_dump(mode="json")
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=1))
    text = _card(bench, config, numbers, loading=_loading(folder, bench.target.runtime))
    (folder / CARD).write_text(text, encoding="utf-8")


def _numbers(folder: Path) -> dict[str, dict[str, object]]:
    path = folder / NUMBERS
    return json.loads(path.read_text()) if path.exists() else {}


def _card(
    bench: Bench, config: TrialConfig, numbers: dict[str, dict[str, object]], *, loading: str
) -> str:
    options = bench.recipe.model_options(config.model)
    source = json.dumps(bench.base(config.model).source)
    rows = {split: len(data.ids) for split, data in bench.rows.items()}
    parts = [
        f"# {bench.recipe.name} · {config.id}",
        f"Served by **{bench.target.runtime}** on {bench.target.device}; `artifact.json` names inputs,"
        " outputs, target and the SHA-256 of every file.",
        "## Load it",
        loading,
        "## Base model",
        f"`{options.id}`: `{source}`. Licence: {_licence(options.name)}.",
        "## Data",
        f"Task `{bench.task.name}`, data `{bench.data_key}`, rows {rows}. Pruning, calibration and"
        " training read the training split alone; the front was chosen on validation; the test"
        " split was read once, at the end.",
        "## Configuration",
        "```json\n" + json.dumps(config.model_dump(mode="json"), indent=1) + "\n```",
    ]
    for split, measurement in numbers.items():
        parts += [f"## Measured ({split})", _table(measurement)]
    parts += [
        "## Build it again",
        f"```\nslimtune export {config.id} DIR --study {Path(bench.recipe.output_dir).as_posix()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _loading(folder: Path, runtime: str) -> str:
    """How to load the model with the runtime alone."""
    if (folder / "load.py").exists():
        return (
            "`config.json` cannot express what this model became, so `load.py` lies beside it (needs"
            ' torch, transformers and safetensors): `from load import load; model = load(".")`.'
        )
    known = {
        "onnxruntime": "`onnxruntime.InferenceSession(path)` for each `.onnx` file.",
        "torch": "A standard checkpoint: `from_pretrained` of the class that `config.json` names.",
    }
    return known.get(runtime, f"By the runtime `{runtime}`.")


def _table(measurement: dict[str, object]) -> str:
    found = Measurement.model_validate(measurement)
    lines = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for name, value in sorted(found.metrics.items()):
        interval = found.intervals.get(name)
        text = f"{interval[0]:.4g} … {interval[1]:.4g}" if interval else ""
        lines.append(f"| {name} | {value:.6g} | {text} |")
    notes = "".join(f"\n\n{note}" for note in found.notes)
    return "\n".join(lines) + f"\n\n{found.num_examples} examples.{notes}"


def _licence(name: str | None) -> str:
    """The `license:` line of the base model's own card, where the model is a folder that has one."""
    card = Path(name or "") / "README.md"
    if name and card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
            if line.startswith("license:"):
                return line.partition(":")[2].strip()
    return "see the base model" if name else "none needed, trained from scratch"
