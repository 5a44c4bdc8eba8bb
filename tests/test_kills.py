"""Whatever is killed, and whenever, the same command goes on and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_study
import yaml
from waiting import until

from orchestrator.ledger import Event, Ledger
from orchestrator.manifest import ledger_key
from orchestrator.trial import content_hash

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_KILLS = 5
SPACE = {
    "prune": {"choice": ["none", {"method": "structured", "heads": 0.5, "neurons": 0.5}]},
    "quantize": {"choice": ["none", {"scheme": "W8A8", "qat": True}]},
    "finetune": {"learning_rate": {"choice": [1e-3, 2e-3]}, "max_steps": 5},
}
ENGINES = {
    "inline": {"engine": "inline"},
    "ray": {
        "engine": "ray",
        "max_gangs": 2,
        "cpus_per_trial": 1,
        "max_attempts": NUM_KILLS + 1,  # they may all meet the same work
    },
}


def write(folder: Path, engine: str) -> Path:
    """The tiny study's recipe in a folder of its own."""
    folder.mkdir()
    return tiny_study.write_recipe(folder, space=SPACE, resources=ENGINES[engine])


def start(recipe: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "run", str(recipe)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(recipe.parent / "stderr.txt").open("ab"),
        start_new_session=True,
    )


def finish(recipe: Path) -> dict[str, Any]:
    """The study's front, once it has run undisturbed."""
    assert start(recipe).wait(timeout=400) == 0, (recipe.parent / "stderr.txt").read_text()
    return json.loads((recipe.parent / "study" / "front.json").read_text())


def events(recipe: Path) -> list[Event]:
    study = recipe.parent / "study"
    if not (study / "manifest.json").exists():
        return []
    with closing(Ledger(study / "ledger", ledger_key(study))) as ledger:
        return list(ledger.events())


def measurements(recipe: Path) -> dict[str, str]:
    """The hash of each finished trial's measurement; each may have finished once.

    Without the random twin: of what it is the twin hangs on latencies, which chance moves.
    """
    finished = [
        event
        for event in events(recipe)
        if event.kind == "finished" and event.payload["role"] != "random twin"
    ]
    assert set(Counter(event.key for event in finished).values()) <= {1}
    return {e.key: content_hash(e.payload["result"]["measurement"]) for e in finished}


def kill_driver(driver: subprocess.Popen[bytes]) -> None:
    """As the out-of-memory killer would: no process of the driver gets to say anything."""
    if driver.poll() is not None:
        return  # it has finished before
    family = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
    for process in reversed(family):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    driver.wait()


def kill_worker(driver: subprocess.Popen[bytes]) -> None:
    """One worker of a gang, if there is one by now."""
    workers = [p for p in psutil.Process(driver.pid).children(recursive=True) if is_worker(p)]
    if workers:
        os.kill(random.choice(workers).pid, signal.SIGKILL)


def is_worker(process: psutil.Process) -> bool:
    """Of a gang; false for one that is gone already."""
    with suppress(psutil.NoSuchProcess):  # a zombie is one too
        return "RayWorker" in "".join(process.cmdline())
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], float]:
    """What a whole run finishes, and how long it takes."""
    recipe = write(tmp_path_factory.mktemp("whole") / "study", "inline")
    began = time.monotonic()
    finish(recipe)
    return set(measurements(recipe)), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("ray", marks=pytest.mark.cluster), "inline"])
def test_a_driver_killed_at_any_moment(engine, undisturbed, tmp_path):
    trials, seconds = undisturbed
    recipe = write(tmp_path / "killed", engine)
    rng = random.Random(1)
    known: dict[str, str] = {}
    for _ in range(NUM_KILLS):
        driver = start(recipe)
        deadline = time.monotonic() + rng.uniform(0.2, 0.8) * seconds
        while time.monotonic() < deadline and driver.poll() is None:
            time.sleep(0.05)
        kill_driver(driver)
        found = measurements(recipe)
        assert known.items() <= found.items()
        known = found
    front = finish(recipe)
    final = measurements(recipe)
    assert set(final) == trials and known.items() <= final.items()
    assert front["trials"]["failed"] == 0


@pytest.mark.slow
@pytest.mark.cluster
def test_a_worker_killed_at_any_moment(undisturbed, tmp_path):
    trials, seconds = undisturbed
    recipe = write(tmp_path / "killed", "ray")
    rng = random.Random(2)
    driver = start(recipe)
    for _ in range(NUM_KILLS):
        time.sleep(rng.uniform(0.05, 0.25) * seconds)
        if driver.poll() is None:
            kill_worker(driver)
    assert driver.wait(timeout=400) == 0, (recipe.parent / "stderr.txt").read_text()
    lost = [event for event in events(recipe) if event.kind == "lost"]
    assert set(measurements(recipe)) == trials
    assert all(event.payload["reason"] == "error" for event in lost)
    front = json.loads((recipe.parent / "study" / "front.json").read_text())
    assert front["trials"]["failed"] == 0


def mixed(folder: Path) -> Path:
    """A study of two models: one trains in one process, the other on two that share it out."""
    folder.mkdir()
    written = tiny_study.recipe(folder)
    small = written["model"] | {"id": "small"}
    large = small | {"id": "large", "config": small["config"] | {"num_hidden_layers": 3}}
    written |= {
        "model": [small, large],
        "space": {
            "quantize": {"choice": ["none", {"scheme": "W8A8", "qat": True}]},
            "prune": {"choice": ["none", {"method": "magnitude", "sparsity": 0.5}]},
            "finetune": {"learning_rate": 1e-3, "max_steps": 5},
            "forbid": [{"prune.method": "none", "quantize.scheme": "none"}],
        },
        "references": {"dense_int8": False, "first_layers": [], "random_twin": False},
        "resources": {
            "cpus_per_trial": 1,
            "per_model": {"large": {"workers_per_trial": 2, "strategy": "fsdp2"}},
            "max_attempts": 2 * NUM_KILLS,
            "silence_s": 10,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(written))
    return path


def training_losses(recipe: Path) -> dict[str, list[list[float]]]:
    finished = [event for event in events(recipe) if event.kind == "finished"]
    results = {event.key: event.payload["result"]["details"] for event in finished}
    return {
        key: found["training"]["losses"] for key, found in results.items() if "training" in found
    }


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.distributed
def test_gangs_of_one_and_of_two_survive_kills_and_hangs(tmp_path):
    whole = mixed(tmp_path / "whole")
    began = time.monotonic()
    finish(whole)
    seconds = time.monotonic() - began
    recipe = mixed(tmp_path / "killed")
    rng = random.Random(3)
    driver = start(recipe)
    seen: set[int] = set()
    hit = 0
    for number in range(NUM_KILLS + 1):
        time.sleep(rng.uniform(0.05, 0.2) * seconds)
        if driver.poll() is not None:
            break
        family = psutil.Process(driver.pid).children(recursive=True)
        seen |= {process.pid for process in family}
        workers = [process for process in family if is_worker(process)]
        if workers:
            sent = signal.SIGSTOP if number == 2 else signal.SIGKILL
            os.kill(rng.choice(workers).pid, sent)
            hit += 1
    assert hit > 1
    time.sleep(0.1 * seconds)
    kill_driver(driver)
    known = measurements(recipe)
    front = finish(recipe)
    assert front["trials"]["failed"] == 0
    final = measurements(recipe)
    assert set(final) == set(measurements(whole)) and known.items() <= final.items()
    expected, found = training_losses(whole), training_losses(recipe)
    assert {key: found[key] for key in expected} == expected
    deadline = time.monotonic() + 30
    while left := [pid for pid in seen if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.slow
def test_a_front_half_written_is_written_again(tmp_path):
    recipe = write(tmp_path / "torn", "inline")
    written = yaml.safe_load(recipe.read_text())
    written["space"] = {"quantize": "W8A8", "finetune": {"max_steps": 2}}
    written["references"] = {"dense_int8": False, "first_layers": [], "random_twin": False}
    recipe.write_text(yaml.safe_dump(written))
    whole = finish(recipe)
    study = recipe.parent / "study"
    (study / "front.json").write_text((study / "front.json").read_text()[:100])
    again = finish(recipe)
    assert [p["metrics"] for p in again["points"]] == [p["metrics"] for p in whole["points"]]


@pytest.mark.slow
def test_a_training_that_a_killed_driver_has_begun_goes_on_from_its_checkpoint(tmp_path):
    (tmp_path / "long").mkdir()
    space = {
        "prune": "none",
        "quantize": "W8A8",
        "finetune": {"max_steps": 400, "logging_steps": 10},
    }
    recipe = tiny_study.write_recipe(
        tmp_path / "long",
        space=space,
        resources={"engine": "inline", "save_steps": 20},
        references={"dense_int8": False, "first_layers": [], "random_twin": False},
    )
    driver = start(recipe)
    kept = "study/stages/.going-trained-*/step-*"
    until(lambda: list(recipe.parent.glob(kept)), what="a checkpoint")
    kill_driver(driver)
    finish(recipe)
    [training] = [
        event.payload["result"]["details"]["training"]
        for event in events(recipe)
        if event.kind == "finished" and event.payload["role"] == "trial"
    ]
    assert training["resumed_at"] >= 20
    assert not list(recipe.parent.glob("study/stages/.going-*"))
