"""A study beside others on a cluster: it keeps to its share, and hands back what it does not use."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chaos
import pytest
from hosts import DASHBOARD_PORT, RAY_IS_PATIENT, Hosts
from waiting import until

from orchestrator.status import study_status

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

STARTS_S = 30
HOLD_S, LONG_S = 20, 120  # a trial, its gang

# Three workers of one CPU each, all at once; it says when it has their places and when they work.
OTHER = """
import sys
from pathlib import Path

import ray
from ray.util import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(num_cpus=1)
def work():
    pass


ray.init(log_to_driver=False)
places = placement_group([{"CPU": 1}] * 3)
ray.get(places.ready())
Path(sys.argv[1], "has places").touch()
each = [PlacementGroupSchedulingStrategy(places, number) for number in range(3)]
ray.get([work.options(scheduling_strategy=one).remote() for one in each])
Path(sys.argv[1], "works").touch()
"""


@pytest.fixture(scope="module")
def cluster(hosts: Hosts) -> Hosts:
    """Two CPUs on each of three hosts."""
    pytest.importorskip("aiohttp")
    settings = chaos.SETTINGS | RAY_IS_PATIENT | {"CHAOS_HOLD_S": str(HOLD_S)}
    hosts.start_ray(num_cpus=2, dashboard=True, **settings)
    return hosts


@contextmanager
def running(cluster: Hosts, folder: Path, *overrides: str, trials: int) -> Iterator[Path]:
    """A study of trials that hold their gang for some seconds."""
    study = folder / "study"
    recipe = chaos.write_recipe(folder, study, trials, address=cluster.ray_address)
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(recipe), *overrides]
    driver = cluster.start(1, command, PYTHONPATH=chaos.PYTHON_PATH)
    try:
        yield study
    finally:
        cluster.run(1, ["pkill", "-INT", "-f", "orchestrator[.]cli"])
        driver.wait(timeout=60)


def num_running(study: Path, *, trains: bool = False) -> int:
    """Trials under way; those that train do not wait for a worker any more."""
    began = (study / "manifest.json").exists()
    now = study_status(study)["running"] if began else []
    return sum(not trains or "waits" not in (each["stage"] or "waits") for each in now)


def submit_other(cluster: Hosts, folder: Path) -> Path:
    """A plain job of Ray from somebody else; where it says how far it is."""
    other = folder / "other"
    other.mkdir()
    (other / "job.py").write_text(OTHER)
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait"]
    submit += ["--address", f"http://{cluster.address(1)}:{DASHBOARD_PORT}"]
    done = cluster.run(1, [*submit, "--", sys.executable, other / "job.py", other])
    assert done.returncode == 0, done.stdout + done.stderr
    return other


def test_another_user_s_job_of_half_the_cluster_starts_at_once_beside_a_study_of_the_other_half(
    cluster: Hosts, tmp_path: Path
):
    with running(cluster, tmp_path, "resources.max_cpus=3", trials=200) as study:
        until(lambda: num_running(study, trains=True) == 3)
        begun = time.monotonic()
        other = submit_other(cluster, tmp_path)
        left = STARTS_S - (time.monotonic() - begun)
        until((other / "works").exists, what="the other job", seconds=left)
        print(f"\nthe other job works after {time.monotonic() - begun:.1f} s")
        until(lambda: num_running(study, trains=True) == 3)  # which has lost nothing by it
        assert study_status(study)["trials"]["failed"] == 0


def test_gangs_that_have_no_more_work_are_handed_to_others_while_the_study_goes_on(
    cluster: Hosts, tmp_path: Path
):
    holds = [*range(HOLD_S, HOLD_S + 6), LONG_S]  # seconds; the last one is still there at the end
    method = f"space.prune={{method: chaos_parts:Slow, hold_s: {{choice: {holds}}}}}"
    with running(cluster, tmp_path, "resources.idle_s=1", method, trials=1) as study:
        until(lambda: num_running(study) == 6)  # so all places are taken
        other = submit_other(cluster, tmp_path)
        assert not (other / "has places").exists()
        until((other / "has places").exists, what="places for the other job")
        assert num_running(study) >= 1
        until((other / "works").exists, what="the other job")
