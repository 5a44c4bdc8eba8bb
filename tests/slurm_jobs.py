"""Studies as jobs of Slurm: how tests submit them, and what they see of them."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import tiny_study
import yaml
from conftest import Here

from orchestrator.ledger import Event, Ledger
from orchestrator.manifest import ledger_key

FEW: dict[str, Any] = {
    "space": {"quantize": {"choice": ["none", "W8A8"]}, "finetune": {"max_steps": 2}},
    "references": {"dense_int8": False, "first_layers": [], "random_twin": False},
}


def write(folder: Path, name: str, *, task: str = "", **sections: Any) -> Path:
    """A recipe of a few trials in a folder of its own; `task` names another class for its task."""
    (folder / name).mkdir()
    allows = {"allow_code": True} if task else {}
    recipe = tiny_study.write_recipe(folder / name, **(FEW | allows | sections))
    if task:
        written = yaml.safe_load(recipe.read_text())
        written["task"]["name"] = task
        recipe.write_text(yaml.safe_dump(written))
    return recipe


def submitted(slimtune: Here, recipe: Path, *arguments: object, flags: tuple[str, ...] = ()) -> str:
    """The number of the job that runs a recipe; its log lies beside it."""
    flags = (*flags, f"--output={recipe.parent}/slurm-%a.txt")
    done = slimtune("slurm", recipe, *arguments, "--json", "--", *flags)
    assert done.status == 0, done.err
    return str(json.loads(done.out)["job_id"])


def log(recipe: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(recipe.parent.glob("slurm-*.txt")))


def front(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "front.json").read_text())


def happened(recipe: Path, kind: str, *, seed: str = "") -> list[Event]:
    """What the ledger of a recipe's study, or of the one with that seed, has of a kind."""
    study = recipe.parent / "study" / (f"seed-{seed}" if seed else "")
    if not (study / "manifest.json").exists():
        return []
    with closing(Ledger(study / "ledger", ledger_key(study))) as ledger:
        return [event for event in ledger.events() if event.kind == kind]


def runtime_s(job: dict[str, str]) -> int:
    hours, minutes, seconds = map(int, job["RunTime"].split(":"))
    return 3600 * hours + 60 * minutes + seconds


def left_by(number: str) -> list[Path]:
    """What a job left in the folder of temporary files."""
    return list(Path("/tmp").glob(f"slimtune-*-{number}"))
