"""Trials on gangs across hosts, and what they come to in a single process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
from hosts import environment

from orchestrator.ledger import Event, Ledger
from orchestrator.manifest import ledger_key

UNITS = {"method": "structured", "heads": 0.5, "neurons": 0.5}
ROUNDED = {"scheme": "W8A8", "qat": True}
SAVE_STEPS = 40  # more than the baseline has steps


def write_recipe(folder: Path, data: Path, *, steps: int, qat: bool, **resources: Any) -> Path:
    """Of a trial without half its units and, where there is to be QAT, one that is rounded."""
    shutil.copy(data, folder)
    plain = {"dropout": 0.0, "bf16": False}
    both = {"prune": {"choice": [UNITS, "none"]}, "quantize": {"choice": ["none", ROUNDED]}}
    forbid = [
        {"prune.method": "none", "quantize.scheme": "none"},
        {"prune.method": "structured", "quantize.scheme": "W8A8"},
    ]
    space = {**both, "forbid": forbid} if qat else {"prune": UNITS}
    finetune = {"learning_rate": 1e-3, "max_steps": steps, "logging_steps": 1, **plain}
    return tiny_study.write_recipe(
        folder,
        baseline={"finetune": {"learning_rate": 2e-3, "max_steps": 30, **plain}},
        space={**space, "finetune": finetune},
        references={"dense_int8": False, "first_layers": [], "random_twin": False},
        resources=resources,
    )


def across(address: str, strategy: str) -> dict[str, Any]:
    """Resources of a trial that has a worker on each host."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    workers = {"workers_per_trial": 3, "cpus_per_trial": 3, "strategy": strategy}
    return {"address": address, "save_steps": SAVE_STEPS, **workers}


def run_command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "orchestrator.cli", "run", str(recipe)]


def run_alone(folder: Path, data: Path, *, steps: int, qat: bool) -> dict[str, Any]:
    """The same trials in a single process, without hosts."""
    recipe = write_recipe(folder, data, steps=steps, qat=qat, engine="inline")
    one_thread = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(run_command(recipe), capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    return results(folder)


def results(folder: Path) -> dict[str, Any]:
    """What each trial of a study came to, by its id."""
    files = folder.glob("study/trials/*/measurement.json")
    return {path.parent.name: json.loads(path.read_text()) for path in files}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys() and found
    for key, one in expected.items():
        other = found[key]
        is_rounded = one["config"]["quantize"]["scheme"] != "none"
        np.testing.assert_allclose(
            losses(other), losses(one), rtol=5e-3 if is_rounded else 1e-5, err_msg=key
        )
        accuracies = [each["measurement"]["metrics"]["accuracy"] for each in (other, one)]
        assert accuracies[0] == pytest.approx(accuracies[1])
        assert len(other["details"]["peak_memory_mb_by_rank"]) == 3


def losses(result: dict[str, Any]) -> list[float]:
    return [loss for _, loss in result["details"]["training"]["losses"]]


def ended(driver: subprocess.Popen[bytes], log: Path) -> None:
    """Fail at once where a driver has ended before its time."""
    assert driver.poll() is None, log.read_text()


def events(study: Path, kind: str) -> list[Event]:
    with closing(Ledger(study / "ledger", ledger_key(study))) as ledger:
        return [event for event in ledger.events() if event.kind == kind]
