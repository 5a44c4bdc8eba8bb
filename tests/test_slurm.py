"""A study as a job of Slurm: its exit status, its time limit, and what is left when it is gone."""

from __future__ import annotations

import json
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
import tiny_study
from conftest import Ended, Here
from slurm_cluster import Slurm, processes_of
from slurm_jobs import front, happened, left_by, log, runtime_s, submitted, write
from slurm_server import slurm_on_this_machine  # noqa: F401
from waiting import until

from orchestrator.launch.slurm import achieved
from orchestrator.ledger import Ledger
from orchestrator.manifest import ledger_key

REPOSITORY = Path(__file__).resolve().parent.parent
TEMPLATE = REPOSITORY / "cluster" / "slurm" / "study.sh"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny_study.write_recipe(tmp_path)


# -- the command -----------------------------------------------------------------------------------


def test_the_printed_script_is_the_template_with_the_study_in_it(slimtune: Here, recipe: Path):
    done = slimtune(
        "slurm", recipe, "seed=3", "--nodes", 4, "--gpus-per-node", 8, "--print",
        "--", "-p", "big one", "--time=1:00:00",
    )  # fmt: skip
    assert done.status == 0
    subprocess.run(["bash", "-n"], input=done.out, text=True, check=True)
    lines = done.out.splitlines()
    told = [line for line in lines if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8" in told
    assert told[-1] == "#SBATCH -p 'big one' --time=1:00:00"
    assert f"recipe={recipe}" in lines and "use_ray=true" in lines
    assert "overrides=(seed=3 resources.engine=ray)" in lines
    marks = ("# @sbatch", "# @study")
    assert [line for line in TEMPLATE.read_text().splitlines() if line not in marks] == [
        line for line in lines if line not in told and not line.startswith(SETTINGS)
    ]


SETTINGS = ("python=", "recipe=", "overrides=(", "output_dir=", "use_ray=")


def test_a_site_has_its_own_template(slimtune: Here, recipe: Path, tmp_path: Path):
    own = tmp_path / "own.sh"
    own.write_text("#!/bin/sh\n# @sbatch\n#SBATCH --account=us\n# @study\nrun it\n")
    script = slimtune("slurm", recipe, "--template", own, "--print").out
    assert script.splitlines()[-1] == "run it" and "#SBATCH --account=us" in script
    own.write_text("#!/bin/sh\n# @sbatch\nrun it\n")
    done = slimtune("slurm", recipe, "--template", own, "--print")
    assert done.status == 2
    assert done.problems == [
        f"--template: {own} needs one line `# @study`, which the study fills in; it has 0."
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--nodes", "0"], "--nodes has to be at least 1, got 0."),
        (["--gpus-per-node", "-1"], "--gpus-per-node has to be at least 0, got -1."),
        (["--nodes", "2", "--no-ray"], "--no-ray is for one node: 2 of them need Ray."),
        (["--template", "nowhere.sh"], "--template: nowhere.sh cannot be read"),
        (["search.name=nope"], "search.name"),
        ([], "sbatch is not on PATH"),
    ],
)
def test_bad_input_is_told_before_anything_is_submitted(
    arguments: list[str],
    sentence: str,
    slimtune: Here,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("PATH", "/nowhere")
    done = slimtune("slurm", recipe, *arguments)
    assert done.status == 2 and len(done.problems) == 1
    assert sentence in done.problems[0]


def test_a_recipe_that_is_not_there_is_bad_input(slimtune: Here, tmp_path: Path):
    done: Ended = slimtune("slurm", tmp_path / "none.yaml", "--nodes", 2)
    assert done.status == 2
    assert done.problems == [f"{tmp_path}/none.yaml cannot be read: No such file or directory."]


def test_a_study_gets_somewhere_with_results_and_with_checkpoints(tmp_path: Path):
    folder = tmp_path / "study"
    assert achieved(folder) == (0, [])
    with closing(Ledger(folder / "ledger", ledger_key(folder))) as ledger:
        ledger.take()
        for kind in ("asked", "started", "stage", "lost", "started"):
            ledger.append(kind, "a")
        assert achieved(folder) == (0, [])
        ledger.append("measured", "a")
    (folder / "stages" / ".going-trained-1" / "step-20").mkdir(parents=True)
    assert achieved(folder) == (1, [".going-trained-1/step-20"])


# -- on a cluster ----------------------------------------------------------------------------------


@pytest.mark.cluster
def test_what_slurm_refuses_is_bad_input(slurm: Slurm, slimtune: Here, recipe: Path):
    done = slimtune("slurm", recipe, "--", "--partition=nowhere")
    assert done.status == 2 and "invalid partition specified: nowhere" in done.err


@pytest.mark.cluster
@pytest.mark.slow
def test_a_job_ends_as_its_study_does(slurm: Slurm, slimtune: Here, tmp_path: Path):
    seeds = write(tmp_path, "seeds")
    none = write(tmp_path, "none", limits={"latency_ms": {"max": 1e-9}})
    bad = write(tmp_path, "bad")
    (bad.parent / "data.csv").unlink()
    array = submitted(slimtune, seeds, "--no-ray", flags=("--array=3-4",))
    others = [submitted(slimtune, path, "--no-ray") for path in (none, bad)]
    assert [slurm.status(f"{array}_{seed}") for seed in (3, 4)] == [0, 0], log(seeds)
    assert [slurm.status(number) for number in others] == [1, 2]
    assert "no trial keeps the limits" in log(none) and "there is no file" in log(bad)
    for seed in (3, 4):
        folder = seeds.parent / "study" / f"seed-{seed}"
        assert json.loads((folder / "manifest.json").read_text())["seed"] == seed
        assert front(folder)["trials"]["failed"] == 0
    assert [path for number in (array, *others) for path in left_by(number)] == []


@pytest.mark.cluster
@pytest.mark.slow
def test_a_cancelled_job_leaves_nothing_and_its_neighbour_alone(
    slurm: Slurm, slimtune: Here, tmp_path: Path
):
    """Both run Ray on the same two machines, one of them for longer than anybody waits."""
    whole = write(tmp_path, "whole", resources={"cpus_per_trial": 1})
    endless = write(tmp_path, "endless", space={"finetune": {"max_steps": 10**6}})
    cancelled = submitted(slimtune, endless, "--nodes", 2)
    neighbour = submitted(slimtune, whole, "--nodes", 2)
    until(lambda: happened(endless, "started"), what="its first training")
    assert processes_of(cancelled)
    slurm.cancel(cancelled)
    until(lambda: not processes_of(cancelled), what="the end of its processes")
    until(lambda: slurm.job(cancelled)["JobState"] == "CANCELLED", what="its state")
    assert slurm.status(neighbour) == 0, log(whole)
    assert front(whole.parent / "study")["trials"]["failed"] == 0
    until(lambda: not processes_of(neighbour), what="the end of its processes")
    assert [path for number in (cancelled, neighbour) for path in left_by(number)] == []


@pytest.mark.cluster
@pytest.mark.slow
def test_at_its_time_limit_a_study_is_interrupted_and_goes_on_later(
    slurm: Slurm, slimtune: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is the last of an array, whose number is that of the array too."""
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{REPOSITORY / 'tests'}")
    rates = [rate * 1e-5 for rate in range(1, 10)]
    space = {"finetune": {"learning_rate": {"choice": rates}, "max_steps": 100}}
    recipe = write(tmp_path, "long", task="slow_task:SlowAtFirst", space=space)
    array = submitted(slimtune, recipe, "--no-ray", flags=("--time=60", "--array=3-4"))
    number = f"{array}_4"
    until(lambda: len(happened(recipe, "finished", seed="4")) > 1, what="the first trial")
    slurm.limit(number, minutes=2 + runtime_s(slurm.job(number)) // 60)  # not a minute ahead of it
    until(lambda: slurm.job(number)["Restarts"] == "1", what="its time limit")
    before = happened(recipe, "finished", seed="4")
    slurm.limit(number, minutes=60)
    assert [slurm.status(f"{array}_{seed}") for seed in (3, 4)] == [0, 0], log(recipe)
    assert slurm.job(f"{array}_3")["Restarts"] == "0"
    after = happened(recipe, "finished", seed="4")
    assert len(before) < len(after) and after[: len(before)] == before
    assert len({event.key for event in after}) == len(after)  # none was run twice
    assert len({event.lease for event in after}) == 2
    assert "Interrupted. The same command goes on from here." in log(recipe)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_study_that_gets_nowhere_within_its_time_limit_is_not_queued_again(
    slurm: Slurm, slimtune: Here, tmp_path: Path
):
    endless = {"finetune": {"max_steps": 10**6}}
    recipe = write(tmp_path, "endless", baseline=endless, resources={"save_steps": 0})
    number = submitted(slimtune, recipe, "--no-ray", flags=("--time=60",))
    until(lambda: happened(recipe, "started"), what="its first training")
    slurm.limit(number, minutes=2 + runtime_s(slurm.job(number)) // 60)
    assert slurm.status(number) == 1, log(recipe)
    assert slurm.job(number)["Restarts"] == "0"
    assert "no trial was finished and no training saved within the time limit" in log(recipe)
    assert left_by(number) == []
