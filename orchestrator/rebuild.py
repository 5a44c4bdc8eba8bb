"""Trials of a finished study: found by id, built again where dropped, measured again here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.artifact import DESCRIPTION, sealed_as, verify
from orchestrator.manifest import NAME as MANIFEST
from orchestrator.manifest import read_manifest
from orchestrator.recipe import Recipe
from orchestrator.stages import write_atomically
from orchestrator.storage import Storage
from orchestrator.study import RESULT, read_result
from orchestrator.trial import BadInput, Measurement, TrialResult, TrialStatus


def recipe_of(study: Path) -> Recipe:
    """The resolved recipe of a study's manifest. Raises `BadInput` where there is none."""
    manifest = read_manifest(study) if (study / MANIFEST).is_file() else None
    if manifest is None:
        raise BadInput([f"{study} holds no study."])
    return Recipe.from_resolved(manifest["recipe"], output_dir=study)


def study_above(path: Path) -> Path | None:
    """The folder of the study that a file or folder lies in."""
    return next((p for p in path.resolve().parents if (p / MANIFEST).is_file()), None)


def find_trial(trial: str, study: Path | None) -> tuple[Path, Path]:
    """The study and the folder of the trial whose id begins with `trial`. Raises `BadInput`."""
    if study is not None and not (study / MANIFEST).is_file():
        raise BadInput([f"{study} holds no study."])
    studies = [study] if study else sorted(p.parent for p in Path("runs").glob(f"*/{MANIFEST}"))
    found = [
        (home, folder)
        for home in studies
        for folder in (*home.glob("trials/*/"), *home.glob("baseline"), *home.glob("baseline/*/"))
        if (result := read_result(folder)) is not None and result.trial_id.startswith(trial)
    ]
    if len(found) == 1:
        return found[0]
    where = ", ".join(str(home) for home in studies) or "runs/, which holds no study"
    if not found:
        raise BadInput([f"no trial begins with {trial} in {where}; --study names another study."])
    raise BadInput(
        [
            f"{trial} is the start of {len(found)} trials in {where}; give more of the id, or --study."
        ]
    )


def artifact_of(study: Path, folder: Path, *, note: Callable[[str], None]) -> Path:
    """The artifact of a finished trial; a dropped one is built again by running the trial."""
    result = read_result(folder)
    assert result is not None
    if result.status is not TrialStatus.COMPLETED:
        reason = f"{result.status.value}: {result.message}"
        raise BadInput([f"{result.trial_id} has no artifact, it {reason}."])
    artifact = folder / "artifact"
    recipe = recipe_of(study)
    if recipe.storage and result.artifact and sealed_as(artifact) != result.sha256:
        Storage(recipe.storage, study).fetch(artifact, version=str(result.sha256))
    if result.artifact is None or not (artifact / DESCRIPTION).exists():
        again = _run_again(study, folder, result, note)
        if again.status is not TrialStatus.COMPLETED:
            raise BadInput([f"{result.trial_id} could not be built again: {again.message}."])
        write_atomically(folder / RESULT, again.model_dump_json(indent=1))
    return artifact


def _run_again(
    study: Path, folder: Path, result: TrialResult, note: Callable[[str], None]
) -> TrialResult:
    """The trial, or the dense baseline, once more, with its test scores if it had any."""
    from orchestrator.quiet import quiet

    quiet()
    from orchestrator.bench import Bench
    from orchestrator.run_trial import measure_test, run_baseline, run_trial

    bench = Bench(recipe_of(study), study)
    if folder.relative_to(study).parts[0] == "baseline":
        again = run_baseline(result.config.model, bench, note)
    else:
        again = run_trial(result.config, bench, note)
    if again.artifact is not None and result.test is not None:
        test, sha256 = measure_test(folder / again.artifact, result.config, bench)
        again = again.model_copy(update={"test": test, "sha256": sha256})
    return again


def copy_artifact(artifact: Path, folder: Path) -> list[str]:
    """A copy that appears whole or not at all; the names of its files. Raises `BadInput`."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        shutil.copytree(artifact, part)
        part.rename(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise BadInput([f"{folder} cannot be written: {error.strerror}."]) from error
    return sorted(path.name for path in folder.iterdir())


def measure_again(artifact: Path, study: Path | None) -> dict[str, Any]:
    """Measure an artifact on this machine, its hashes checked first.

    With its study at hand, quality on validation and speed-up over the dense baseline come too.
    Raises `BadInput` where there is no artifact, or no study in the folder that is named.
    """
    if not (artifact / DESCRIPTION).is_file():
        raise BadInput([f"{artifact} is no artifact's folder: it has no {DESCRIPTION}."])
    description = verify(artifact)
    home = study or study_above(artifact)
    recipe = recipe_of(home) if home else None
    from orchestrator.quiet import quiet

    quiet()
    from orchestrator.measure.again import measure_alone, measure_in_study

    measured: Measurement
    if home is not None and recipe is not None:
        measured = measure_in_study(artifact, recipe, home)
    else:
        measured = measure_alone(artifact, description)
    about = {key: description[key] for key in ("trial_id", "config")}
    return {"artifact": str(artifact), **about, **measured.model_dump()}
