"""Trials of a finished study: found by id, built again where dropped, measured again here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.artifact import verify
from orchestrator.launch.inline import Inline
from orchestrator.recipe import Recipe
from orchestrator.stages import write_atomically
from orchestrator.study import RESULT, read_result
from orchestrator.trial import BadInput, Measurement, TrialStatus


def recipe_of(study: Path) -> Recipe:
    """The resolved recipe of a study's manifest."""
    manifest = json.loads((study / "manifest.json").read_text(encoding="utf-8"))
    return Recipe.from_resolved(manifest["recipe"], output_dir=study)


def find_trial(trial: str, study: Path | None) -> tuple[Path, Path]:
    """The study and the folder of the trial whose id begins with `trial`. Raises `BadInput`."""
    studies = (
        [study] if study else sorted(path.parent for path in Path("runs").glob("*/manifest.json"))
    )
    found = []
    for home in studies:
        folders = [*home.glob("trials/*/"), *home.glob("baseline"), *home.glob("baseline/*/")]
        for folder in folders:
            result = read_result(folder)
            if result is not None and result.trial_id.startswith(trial):
                found.append((home, folder))
    if len(found) == 1:
        return found[0]
    where = ", ".join(str(home) for home in studies) or "runs/"
    if not found:
        raise BadInput([f"no trial begins with {trial} in {where}; `slimtune front` lists them."])
    raise BadInput(
        [f"{trial} is the start of {len(found)} trials; give more of the id, or --study."]
    )


def artifact_of(study: Path, folder: Path, *, note: Callable[[str], None]) -> Path:
    """The artifact of a finished trial; a dropped one is built again by running the trial."""
    result = read_result(folder)
    assert result is not None
    if result.artifact is not None:
        return folder / result.artifact
    again = Inline(recipe_of(study), study).trial(result.config, note)
    if again.status is not TrialStatus.COMPLETED:
        raise BadInput([f"{result.trial_id} could not be built again: {again.message}"])
    write_atomically(folder / RESULT, again.model_dump_json(indent=1))
    return folder / "artifact"


def measure_again(artifact: Path, study: Path | None) -> dict[str, Any]:
    """Measure an artifact on this machine, its hashes checked first.

    With its study at hand, quality on validation and speed-up over the dense baseline come too.
    """
    description = verify(artifact)
    home = study or next(
        (p for p in artifact.resolve().parents if (p / "manifest.json").exists()), None
    )
    recipe = recipe_of(home) if home else None
    from orchestrator.quiet import quiet

    quiet()
    from orchestrator.measure.again import measure_alone, measure_in_study

    measured: Measurement
    if home is not None and recipe is not None:
        measured = measure_in_study(artifact, recipe, home)
    else:
        measured = measure_alone(artifact, description)
    return {"artifact": str(artifact), "trial_id": description["trial_id"], **measured.model_dump()}
