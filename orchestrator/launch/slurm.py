"""A study as a job of Slurm: its batch script, and handing that over."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.manifest import ledger_key, read_manifest
from orchestrator.problems import raise_if
from orchestrator.recipe import Recipe, load_recipe
from orchestrator.stages import checkpoints
from orchestrator.storage import Storage
from orchestrator.trial import BadInput

TEMPLATE = Path(__file__).with_name("slurm.sh")  # a link to cluster/slurm/study.sh in a clone
MARKS = ("# @sbatch", "# @study")
WARNING_S = 120  # seconds before its time limit in which a study ends cleanly
STORAGE_S = 30.0  # of them, for a storage that does not answer


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of Slurm; `flags` are further ones of sbatch. Raises `BadInput`."""

    num_nodes: int = 1
    gpus_per_node: int = 0
    use_ray: bool = True
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.num_nodes < 1:
            problems.append(f"--nodes has to be at least 1, got {self.num_nodes}.")
        if self.gpus_per_node < 0:
            problems.append(f"--gpus-per-node has to be at least 0, got {self.gpus_per_node}.")
        if self.num_nodes > 1 and not self.use_ray:
            problems.append(f"--no-ray is for one node: {self.num_nodes} of them need Ray.")
        problems += [f"sbatch: {flag!r} has a line break." for flag in self.flags if "\n" in flag]
        raise_if(problems)


def parted(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """What a recipe is given on the command line, and flags of sbatch, which begin with a dash."""
    flags = list(dropwhile(lambda text: not text.startswith("-"), arguments))
    return list(arguments[: len(arguments) - len(flags)]), tuple(flags)


def batch_script(
    recipe: Path, overrides: Sequence[str], job: Job, *, template: Path = TEMPLATE
) -> str:
    """The batch script that runs a recipe. Raises `BadInput`, also for what the recipe does not allow."""
    overrides = [*overrides, f"resources.engine={'ray' if job.use_ray else 'inline'}"]
    loaded = load_recipe(recipe, overrides)
    filled = {
        "# @sbatch": [f"#SBATCH {shlex.join(flags)}" for flags in _flags(loaded, job)],
        "# @study": _settings(loaded, recipe, overrides, use_ray=job.use_ray),
    }
    lines = [line for text in _read(template) for line in filled.get(text.strip(), [text])]
    return "\n".join([*lines, ""])


def _flags(recipe: Recipe, job: Job) -> list[list[str]]:
    """Options of sbatch, a line each; the last of two counts."""
    gpus = [f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []
    flags = [
        [f"--job-name={recipe.name}"],
        [f"--nodes={job.num_nodes}", "--ntasks-per-node=1", *gpus],
        [f"--signal=B:USR1@{WARNING_S}", "--requeue", "--no-kill", "--open-mode=append"],
        list(job.flags),
    ]
    return [line for line in flags if line]


def _settings(recipe: Recipe, path: Path, overrides: Sequence[str], *, use_ray: bool) -> list[str]:
    """The study as variables of the shell."""
    return [
        f"python={shlex.quote(sys.executable)}",
        f"recipe={shlex.quote(str(path.resolve()))}",
        f"overrides=({shlex.join(overrides)})",
        f"output_dir={shlex.quote(recipe.output_dir)}",
        f"use_ray={'true' if use_ray else 'false'}",
    ]


def _read(template: Path) -> list[str]:
    try:
        lines = template.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise BadInput([f"--template: {template} cannot be read: {why}."]) from error
    counts = {mark: sum(line.strip() == mark for line in lines) for mark in MARKS}
    raise_if(
        [
            f"--template: {template} needs one line `{mark}`, which the study fills in; it has {count}."
            for mark, count in counts.items()
            if count != 1
        ]
    )
    return lines


def submit(script: str) -> str:
    """Hand a batch script to Slurm; the job's id. Raises `BadInput` with Slurm's reason."""
    if shutil.which("sbatch") is None:
        raise BadInput(
            [
                "sbatch is not on PATH: run this where Slurm's jobs are submitted, or look at the"
                " script with --print."
            ]
        )
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise BadInput([f"sbatch: {line.removeprefix('sbatch: error: ')}" for line in said])
    return done.stdout.strip().partition(";")[0]


def achieved(folder: Path) -> tuple[int, list[str]]:
    """What the study in a folder has come to: how many results, and the checkpoints beyond them.

    As long as it stays the same, the study gets nowhere.
    """
    manifest = read_manifest(folder)
    recipe = manifest["recipe"] if manifest else {}
    with closing(Ledger(recipe.get("ledger") or folder / "ledger", ledger_key(folder))) as ledger:
        num_results = sum(event.kind in ("finished", "measured") for event in ledger.events())
    uri = recipe.get("storage")
    storage = Storage(uri, folder, patience_s=STORAGE_S) if uri else None
    return num_results, checkpoints(folder / "stages", storage)
