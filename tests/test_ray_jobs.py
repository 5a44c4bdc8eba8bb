"""A study is submitted to a Ray cluster from a machine that is none of its nodes, and goes on later."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import yaml
from hosts import DASHBOARD_PORT, RAY_IS_PATIENT, REPOSITORY, Hosts, environment
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
ASKS, TOKEN = "asks for a token", "0123456789abcdef" * 4
ENDS_IN_PEACE = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}  # what is told to stop, on a busy machine too


@dataclass(frozen=True)
class Cluster:
    """A dashboard, and the settings of those who may talk to it."""

    hosts: Hosts
    settings: dict[str, str]

    @property
    def address(self) -> str:
        return f"http://{self.hosts.address(1)}:{DASHBOARD_PORT}"

    def slimtune(self, *arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
        """The command, on this machine, which is no node."""
        command = [REPOSITORY / "launch.sh", "--no-venv", *arguments, "--address", self.address]
        env = environment(PYTHON=sys.executable, **(self.settings | settings))
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=env, timeout=300
        )

    def state(self, job: str) -> str:
        return self.slimtune("job", "status", job).stdout.strip()


@pytest.fixture(scope="module", params=["open", ASKS])
def ray_cluster(
    request: pytest.FixtureRequest, hosts: Hosts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Three nodes. Nodes read the token from a file; who submits has it in the environment."""
    pytest.importorskip("aiohttp")
    node, user = {}, {}
    if request.param == ASKS:
        file = tmp_path_factory.mktemp("secret") / "token"
        file.write_text(TOKEN)
        node = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
        user = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    hosts.start_ray(dashboard=True, **RAY_IS_PATIENT, **ENDS_IN_PEACE, **node)
    yield Cluster(hosts, user)
    for number in hosts.numbers:
        hosts.power_off(number)
        hosts.power_on(number)


@cluster
@slow
def test_a_job_tells_how_it_goes_and_ends_as_the_study_does(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    recipe = tiny_study.write_recipe(tmp_path, references=ALONE)
    done = ray_cluster.slimtune("submit", recipe, "--send-data")
    assert done.returncode == OK, done.stdout + done.stderr
    assert "completed" in done.stdout and "hypervolume" in done.stdout
    front = json.loads((tmp_path / "study" / "front.json").read_text())
    assert front["points"]
    told = ray_cluster.slimtune("submit", recipe, "search.name=none-such")
    assert told.returncode == BAD_INPUT and "search.name" in told.stderr  # before it is sent
    lacking = ray_cluster.slimtune("submit", recipe, "--secret", "NO_SUCH_SECRET")
    assert lacking.returncode not in (OK, NO_FRONT)
    assert "NO_SUCH_SECRET: is not set on the cluster" in lacking.stdout


@cluster
@slow
@pytest.mark.parametrize("ray_cluster", [ASKS], indirect=True)
def test_a_job_that_was_stopped_goes_on_when_it_is_submitted_again(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    recipe = tiny_study.recipe(tmp_path, references=ALONE)
    recipe["space"]["finetune"] = {"learning_rate": {"choice": [1e-3, 2e-3, 3e-3]}, "max_steps": 60}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    job = ray_cluster.slimtune("submit", path, "--detach").stdout.strip()
    assert ray_cluster.state(job) in ("pending", "running")
    study = tmp_path / "study"
    until(lambda: study.exists() and study_status(study)["trials"]["completed"] >= 1)
    assert ray_cluster.slimtune("job", "stop", job).stdout == "stopping\n"
    until(lambda: ray_cluster.state(job) == "stopped")
    status = study_status(study)
    assert status["state"] == "interrupted" and status["driver"] is None  # it let go of its ledger
    assert ray_cluster.slimtune("job", "logs", job).returncode == INTERRUPTED
    done = ray_cluster.slimtune("submit", path)
    assert done.returncode == OK, done.stdout + done.stderr
    assert "by earlier runs" in done.stdout
    unknown = ray_cluster.slimtune("job", "status", "slimtune-none")
    assert unknown.returncode == BAD_INPUT and "knows no job" in unknown.stderr


@cluster
@slow
@pytest.mark.parametrize("ray_cluster", [ASKS], indirect=True)
def test_ray_s_own_command_runs_a_study_from_the_head(ray_cluster: Cluster, tmp_path: Path) -> None:
    recipe = tiny_study.write_recipe(tmp_path, references=ALONE)
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    submit += ["--address", ray_cluster.address, "--", "slimtune", "run", str(recipe)]
    done = ray_cluster.hosts.run(1, submit, limit_s=300, **ray_cluster.settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "study" / "front.json").read_text())["points"]


@cluster
@slow
@pytest.mark.parametrize("ray_cluster", [ASKS], indirect=True)
def test_who_has_no_token_is_told_what_is_lacking(ray_cluster: Cluster, tmp_path: Path) -> None:
    recipe = tiny_study.write_recipe(tmp_path)
    for settings in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "wrong" * 8}):
        told = ray_cluster.slimtune("submit", recipe, **settings)
        assert told.returncode == BAD_INPUT, told.stdout + told.stderr
        assert "it asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in told.stderr
        assert TOKEN not in told.stderr
