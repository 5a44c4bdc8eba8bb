"""Jobs of Slurm on three hosts: the study is on all of them, and outlives the loss of any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Here
from hosts import REPOSITORY, Hosts
from slurm_cluster import Slurm, command, processes_of, start_node
from slurm_jobs import front, happened, left_by, log, runtime_s, submitted, write
from slurm_server import slurm_over_hosts  # noqa: F401
from waiting import until

from orchestrator.ledger import Event

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# Sooner than by itself, but not while all of Ray starts at once on cores that the hosts share.
NOTICES_LOSS = {
    "health_check_period_ms": "2000",
    "health_check_timeout_ms": "5000",
    "health_check_failure_threshold": "3",
    "gcs_rpc_server_reconnect_timeout_s": "20",
}
SAVE_STEPS = 40  # more than the baseline has
RESOURCES = {"cpus_per_trial": 1, "save_steps": SAVE_STEPS}


@pytest.fixture(autouse=True)
def settings(slimtune: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a job's environment: tasks of tests are found, and losses of hosts noticed soon."""
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{REPOSITORY / 'tests'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SEEN_ON", str(tmp_path / "seen"))
    for name, value in NOTICES_LOSS.items():
        monkeypatch.setenv(f"RAY_{name}", value)
    (tmp_path / "seen").mkdir()


def write_long(folder: Path, *, task: str, steps: int, count: int) -> Path:
    """A recipe of so many trials that take some seconds each."""
    rates = [rate * 1e-5 for rate in range(1, count + 1)]
    space = {"finetune": {"learning_rate": {"choice": rates}, "max_steps": steps}}
    return write(folder, "long", task=f"slow_task:{task}", space=space, resources=RESOURCES)


def in_mid_trial(recipe: Path, *, count: int = 1) -> bool:
    """Whether so many trials have come to a checkpoint and go on."""
    found = recipe.parent.glob("study/stages/.going-trained-*/step-*")
    return len({checkpoint.parent for checkpoint in found}) >= count


def leaves_nothing(number: str, hosts: Hosts) -> None:
    """On no host a process, a file, or shared memory."""
    until(lambda: not processes_of(number), what="the end of its processes", seconds=60)
    assert left_by(number) == []
    for host in hosts.numbers:
        assert hosts.run(host, ["ls", "-A", "/dev/shm", "/tmp/ray"]).stdout.split() == [
            "/dev/shm:",
            "/tmp/ray:",
        ]


def results(recipe: Path) -> dict[str, dict[str, Any]]:
    """What each trial came to; none was run to its end twice."""
    ended = happened(recipe, "finished")
    assert len({event.key for event in ended}) == len(ended)
    return {event.key: event.payload["result"] for event in ended}


def steps_gone_on_from(recipe: Path) -> list[int]:
    """Of trainings that were interrupted."""
    trained = [result["details"].get("training", {}) for result in results(recipe).values()]
    return [training["resumed_at"] for training in trained if training.get("resumed_at")]


def lost(recipe: Path) -> list[Event]:
    return happened(recipe, "lost")


def test_a_study_is_on_all_nodes_and_ends_with_its_status(
    slurm: Slurm, hosts: Hosts, slimtune: Here, tmp_path: Path
):
    recipe = write_long(tmp_path, task="Slow", steps=40, count=6)
    number = submitted(slimtune, recipe, "--nodes", 3)
    assert slurm.status(number) == 0, log(recipe)
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"host1", "host2", "host3"}
    assert front(recipe.parent / "study")["trials"]["completed"] == 7  # with the baseline
    leaves_nothing(number, hosts)


@pytest.mark.parametrize(
    ("status", "sentence"), [(1, "no trial keeps the limits"), (2, "there is no file")]
)
def test_a_study_without_front_or_of_bad_input_ends_so(
    slurm: Slurm, hosts: Hosts, slimtune: Here, tmp_path: Path, status: int, sentence: str
):
    limits = {"latency_ms": {"max": 1e-9}}
    recipe = write(tmp_path, "none", limits=limits, resources=RESOURCES)
    if status == 2:
        (recipe.parent / "data.csv").unlink()
    number = submitted(slimtune, recipe, "--nodes", 3)
    assert slurm.status(number) == status, log(recipe)
    assert sentence in log(recipe)
    leaves_nothing(number, hosts)


def test_at_its_time_limit_a_study_stops_in_mid_trial_and_goes_on_from_there(
    slurm: Slurm, hosts: Hosts, slimtune: Here, tmp_path: Path
):
    recipe = write_long(tmp_path, task="SlowAtFirst", steps=600, count=3)
    number = submitted(slimtune, recipe, "--nodes", 3, flags=("--time=60",))
    until(lambda: in_mid_trial(recipe), what="a checkpoint")
    slurm.limit(number, minutes=2 + runtime_s(slurm.job(number)) // 60)
    until(lambda: slurm.job(number)["Restarts"] == "1", what="its time limit")
    assert len(happened(recipe, "finished")) == 1  # the baseline
    slurm.limit(number, minutes=60)
    assert slurm.status(number) == 0, log(recipe)
    assert len(results(recipe)) == 4
    steps = steps_gone_on_from(recipe)
    assert steps and all(step % SAVE_STEPS == 0 for step in steps)
    leaves_nothing(number, hosts)


def test_a_study_goes_on_without_a_node_that_lost_power(
    slurm: Slurm, hosts: Hosts, slimtune: Here, tmp_path: Path
):
    recipe = write_long(tmp_path, task="Slow", steps=600, count=3)
    number = submitted(slimtune, recipe, "--nodes", 3)
    until(lambda: in_mid_trial(recipe, count=3), what="a checkpoint of each trial")
    hosts.power_off(3)
    try:
        until(lambda: lost(recipe), what="its loss to be noticed", seconds=90)
        assert slurm.status(number) == 0, log(recipe)
        assert slurm.job(number)["Restarts"] == "0"
        assert len(results(recipe)) == 4 and steps_gone_on_from(recipe)
    finally:
        back(slurm, hosts, 3)
    leaves_nothing(number, hosts)


def test_a_study_whose_own_host_lost_power_is_queued_again_and_goes_on(
    slurm: Slurm, hosts: Hosts, slimtune: Here, tmp_path: Path
):
    recipe = write_long(tmp_path, task="SlowAtFirst", steps=2000, count=3)
    number = submitted(slimtune, recipe, "--nodes", 3)
    # of that on host 1 too: other hosts may bring theirs to their ends without a driver
    until(lambda: in_mid_trial(recipe, count=3), what="a checkpoint of each trial")
    assert slurm.job(number)["BatchHost"] == "host1"
    hosts.power_off(1)
    try:
        until(lambda: slurm.job(number)["Restarts"] == "1", what="its node to be given up")
    finally:
        back(slurm, hosts, 1)
    assert slurm.status(number) == 0, log(recipe)
    assert len(results(recipe)) == 4 and steps_gone_on_from(recipe)
    leaves_nothing(number, hosts)


def test_a_study_that_is_queued_again_at_once_waits_until_its_driver_counts_as_dead(
    slurm: Slurm, hosts: Hosts, slimtune: Here, tmp_path: Path
):
    """Its processes are killed, and on the other host nobody sees that they are gone."""
    recipe = write_long(tmp_path, task="SlowAtFirst", steps=2000, count=1)
    number = submitted(slimtune, recipe, "--no-ray")
    until(lambda: in_mid_trial(recipe), what="a checkpoint")
    host = slurm.job(number)["BatchHost"]
    command("scontrol", "requeue", number)
    command("scontrol", "update", f"JobId={number}", f"ExcNodeList={host}")
    assert slurm.status(number) == 0, log(recipe)
    assert "waiting whether" in log(recipe) and f" on {host} (process " in log(recipe)
    assert len(results(recipe)) == 2 and steps_gone_on_from(recipe)
    leaves_nothing(number, hosts)


def test_a_cancelled_study_leaves_nothing_on_any_host(
    slurm: Slurm, hosts: Hosts, slimtune: Here, tmp_path: Path
):
    recipe = write_long(tmp_path, task="Slow", steps=600, count=3)
    number = submitted(slimtune, recipe, "--nodes", 3)
    until(lambda: in_mid_trial(recipe), what="a checkpoint")
    slurm.cancel(number)
    until(lambda: slurm.job(number)["JobState"] == "CANCELLED", what="its state")
    leaves_nothing(number, hosts)


def back(slurm: Slurm, hosts: Hosts, number: int) -> None:
    """A host has power again, and is a node."""
    hosts.power_on(number)
    start_node(hosts, number, slurm)
