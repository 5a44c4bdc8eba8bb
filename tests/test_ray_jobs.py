"""A study is submitted to a Ray cluster from a machine that is none of its nodes, and goes on later."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import yaml
from hosts import DASHBOARD_PORT, Hosts, environment
from waiting import until

from orchestrator.cli import BAD_INPUT, INTERRUPTED, NO_FRONT, OK
from orchestrator.status import study_status
from orchestrator.trial import BadInput

ray_jobs = pytest.importorskip("orchestrator.launch.ray_jobs")


ALONE = {"dense_int8": False, "first_layers": [], "random_twin": False}


def request(folder: Path, *overrides: str, **options: Any) -> Any:
    recipe = tiny_study.write_recipe(folder)
    return ray_jobs.Request(recipe, overrides, **options)


# -- what is sent --------------------------------------------------------------------------------


def test_code_and_recipe_are_sent_and_paths_are_those_of_the_cluster(tmp_path: Path) -> None:
    wanted = request(tmp_path, "seed=3", needs=("HF_TOKEN",))
    with ray_jobs.packed(wanted) as (folder, entrypoint):
        assert {path.name for path in folder.iterdir()} == {"orchestrator", "recipe.yaml"}
        assert list((folder / "orchestrator" / "report").glob("*.html"))
        assert not list(folder.rglob("__pycache__"))
        sent = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert sent < 5e6
        assert (folder / "recipe.yaml").read_text() == wanted.recipe.read_text()
    check, _, run = entrypoint.partition(" && exec ")
    assert check == ': "${HF_TOKEN:?is not set on the cluster}"'
    assert shlex.split(run)[:5] == ["python", "-m", "orchestrator.cli", "run", "recipe.yaml"]
    assert "seed=3" in run and f"task.data={tmp_path / 'data.csv'}" in shlex.split(run)
    assert not folder.exists()


def test_data_may_be_sent_along_and_its_size_is_looked_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = request(tmp_path, sends_data=True)
    with ray_jobs.packed(wanted) as (folder, entrypoint):
        [given] = [each for each in shlex.split(entrypoint) if each.startswith("task.data=")]
        sent = folder / given.partition("=")[2]
        assert sent.read_bytes() == (tmp_path / "data.csv").read_bytes()
    monkeypatch.setattr(ray_jobs, "MOST_MB", 0.001)
    too_much = pytest.raises(BadInput, match=r"task.data take 0 MB, a job 0; put them where")
    with too_much, ray_jobs.packed(wanted):
        pass


def test_what_is_wrong_with_a_request_is_told_at_once(tmp_path: Path) -> None:
    wanted = request(
        tmp_path,
        "output_dir=runs/here",
        needs=("HF_TOKEN=hf_123",),
        pip=tmp_path / "gone.txt",
        uv=tmp_path / "data.csv",
    )
    with pytest.raises(BadInput) as caught, ray_jobs.packed(wanted):
        pass
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for part in ("`runs/here` is relative", "never a value", "give one of them", "gone.txt is no"):
        assert part in told


# -- a cluster of three hosts --------------------------------------------------------------------

cluster = pytest.mark.cluster
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def address(hosts: Hosts) -> Iterator[str]:
    """Of the dashboard; two nodes are enough."""
    pytest.importorskip("aiohttp")
    hosts.start_ray(1, 2, dashboard=True)
    yield f"http://{hosts.address(1)}:{DASHBOARD_PORT}"


def slimtune(*arguments: object, address: str) -> subprocess.CompletedProcess[str]:
    """The command, on this machine, which is no node."""
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, arguments), "--address", address]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)


@cluster
@slow
def test_a_job_tells_how_it_goes_and_ends_as_the_study_does(address: str, tmp_path: Path) -> None:
    recipe = tiny_study.write_recipe(tmp_path, references=ALONE)
    done = slimtune("submit", recipe, "--send-data", address=address)
    assert done.returncode == OK, done.stdout + done.stderr
    assert "completed" in done.stdout and "hypervolume" in done.stdout
    front = json.loads((tmp_path / "study" / "front.json").read_text())
    assert front["points"]
    told = slimtune("submit", recipe, "search.name=none-such", address=address)
    assert told.returncode == BAD_INPUT and "search.name" in told.stderr  # before it is sent
    lacking = slimtune("submit", recipe, "--secret", "NO_SUCH_SECRET", address=address)
    assert lacking.returncode not in (OK, NO_FRONT)
    assert "NO_SUCH_SECRET: is not set on the cluster" in lacking.stdout


@cluster
@slow
def test_a_job_that_was_stopped_goes_on_when_it_is_submitted_again(
    address: str, tmp_path: Path
) -> None:
    recipe = tiny_study.recipe(tmp_path, references=ALONE)
    recipe["space"]["finetune"] = {"learning_rate": {"choice": [1e-3, 2e-3, 3e-3]}, "max_steps": 60}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    job = slimtune("submit", path, "--detach", address=address).stdout.strip()
    assert slimtune("job", "status", job, address=address).stdout.strip() in ("pending", "running")
    study = tmp_path / "study"
    until(lambda: study.exists() and study_status(study)["trials"]["completed"] >= 1)
    assert slimtune("job", "stop", job, address=address).stdout == "stopping\n"
    until(lambda: slimtune("job", "status", job, address=address).stdout.strip() == "stopped")
    status = study_status(study)
    assert status["state"] == "interrupted" and status["driver"] is None  # it let go of its ledger
    assert slimtune("job", "logs", job, address=address).returncode == INTERRUPTED
    done = slimtune("submit", path, address=address)
    assert done.returncode == OK, done.stdout + done.stderr
    assert "by earlier runs" in done.stdout
    unknown = slimtune("job", "status", "slimtune-none", address=address)
    assert unknown.returncode == BAD_INPUT and "knows no job" in unknown.stderr
