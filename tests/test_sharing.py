"""A study beside others on a cluster: it keeps to its share, and hands back what it does not use."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import chaos
import pytest
from hosts import DASHBOARD_PORT, Hosts
from waiting import until

from orchestrator.status import study_status

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

STARTS_S = 30
HOLD_S = 20  # a trial, its gang

# Three workers of one CPU each, all at once; it says when they work, and ends.
OTHER = """
import sys, time
from pathlib import Path

import ray


@ray.remote(num_cpus=1)
class Worker:
    def work(self):
        return time.time()


ray.init(log_to_driver=False)
workers = [Worker.remote() for _ in range(3)]
ray.get([worker.work.remote() for worker in workers])
Path(sys.argv[1]).touch()
"""


@pytest.fixture(scope="module")
def cluster(hosts: Hosts) -> Hosts:
    """Two CPUs on each of three hosts."""
    pytest.importorskip("aiohttp")
    hosts.start_ray(num_cpus=2, dashboard=True, **(chaos.SETTINGS | {"CHAOS_HOLD_S": str(HOLD_S)}))
    return hosts


@contextmanager
def running(cluster: Hosts, folder: Path, *overrides: str, trials: int) -> Iterator[Path]:
    """A study of trials that hold their gang for some seconds."""
    study = folder / "study"
    recipe = chaos.write_recipe(folder, study, trials, address=cluster.ray_address)
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(recipe), *overrides]
    log = folder / "driver.log"
    driver = cluster.start(1, command, log=log, PYTHONPATH=chaos.PYTHON_PATH)
    try:
        yield study
        assert driver.poll() is None, log.read_text()[-2000:]
    finally:
        cluster.run(1, ["pkill", "-INT", "-f", "orchestrator[.]cli"])
        driver.wait(timeout=60)


def num_begun(study: Path) -> int:
    """Trials that train, and do not wait for a place."""
    if not study.exists():
        return 0
    now = study_status(study)["running"]
    return sum(bool(each["stage"]) and "waits" not in each["stage"] for each in now)


def submit_other(cluster: Hosts, folder: Path) -> Callable[[], bool]:
    """A plain job of Ray from somebody else; whether its workers work."""
    code, mark = folder / "other.py", folder / "they work"
    code.write_text(OTHER)
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait"]
    submit += ["--address", f"http://{cluster.address(1)}:{DASHBOARD_PORT}"]
    done = cluster.run(1, [*submit, "--", sys.executable, code, mark])
    assert done.returncode == 0, done.stdout + done.stderr
    return mark.exists


def test_another_user_s_job_of_half_the_cluster_starts_at_once_beside_a_study_of_the_other_half(
    cluster: Hosts, tmp_path: Path
):
    with running(cluster, tmp_path, "resources.max_cpus=3", trials=200) as study:
        until(lambda: num_begun(study) == 3)
        begun = time.monotonic()
        works = submit_other(cluster, tmp_path)
        until(works, what="the other job", seconds=STARTS_S - (time.monotonic() - begun))
        print(f"\nthe other job works after {time.monotonic() - begun:.1f} s")
        until(lambda: num_begun(study) == 3)  # which has lost nothing by it
        assert study_status(study)["trials"]["failed"] == 0


def test_gangs_that_have_no_more_work_are_handed_to_others_while_the_study_goes_on(
    cluster: Hosts, tmp_path: Path
):
    with running(cluster, tmp_path, "resources.idle_s=1", trials=7) as study:
        until(lambda: num_begun(study) == 6)
        works = submit_other(cluster, tmp_path)
        assert not works()  # the study has the whole cluster
        until(works, what="the other job", seconds=120)
        assert num_begun(study) == 1
