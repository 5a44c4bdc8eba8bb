"""A host on which work after work is lost, and none elsewhere, is set aside; the study comes to its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_study
from host_trials import events, run_command
from hosts import REPOSITORY, Hosts

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
PYTHONPATH = f"{REPOSITORY}:{REPOSITORY / 'tests'}"


def test_a_bad_host_is_set_aside_and_told(hosts: Hosts, tmp_path: Path):
    pytest.importorskip("ray")
    hosts.start_ray(1, 2, PYTHONPATH=PYTHONPATH)
    hosts.start_ray(3, PYTHONPATH=PYTHONPATH, HOST_IS_BAD="1")
    rates = [rate * 1e-4 for rate in range(1, 25)]
    recipe = tiny_study.write_recipe(
        tmp_path,
        allow_code=True,
        objectives=["accuracy", "size_mb"],
        space={
            "prune": "dying_host:DiesThere",
            "finetune": {"learning_rate": {"choice": rates}, "max_steps": 2},
        },
        references={"dense_int8": False, "first_layers": [], "random_twin": False},
        resources={"address": hosts.ray_address, "cpus_per_trial": 1},
    )
    done = hosts.run(1, run_command(recipe), limit_s=500, PYTHONPATH=PYTHONPATH)
    assert done.returncode == 0, done.stderr
    lost, finished = (events(tmp_path / "study", kind) for kind in ("lost", "finished"))
    assert "host3 is set aside: 3 works in a row were lost there" in lost[-1].payload["message"]
    assert len({event.key for event in lost}) == 3  # and after that no more
    assert "host3 is set aside" in done.stderr
    results = [event.payload["result"] for event in finished]
    assert len(results) == 1 + len(rates)
    assert {result["status"] for result in results} == {"completed"}
