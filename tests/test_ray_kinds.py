"""On a cluster of two kinds of machines speed is taken on the kind that serves, wherever trials train."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_study

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402
from ray.util import placement_group_table  # noqa: E402

from orchestrator.launch.ray_gangs import RayGangs  # noqa: E402
from orchestrator.ledger import Ledger  # noqa: E402
from orchestrator.manifest import ledger_key  # noqa: E402
from orchestrator.recipe import make_recipe  # noqa: E402
from orchestrator.study import Study  # noqa: E402
from orchestrator.trial import BadInput  # noqa: E402

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(len(CORES) < 2, reason="one core: all nodes here are of one kind"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Two nodes of one CPU each; processes of the one that serves may use a single core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster()
        cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=10**8)
        os.sched_setaffinity(0, CORES[:1])
        try:
            cluster.add_node(num_cpus=1, labels={"role": "serves"}, object_store_memory=10**8)
        finally:
            os.sched_setaffinity(0, CORES)
        yield cluster.address
        cluster.shutdown()


def recipe_of(folder: Path, address: str, **target: Any) -> Any:
    sections = {
        "target": {"runtime": "onnxruntime", "threads": 1, **target},
        "resources": {"engine": "ray", "address": address, "cpus_per_trial": 1},
        "references": {"dense_int8": True, "first_layers": [1], "random_twin": False},
    }
    return make_recipe(tiny_study.recipe(folder, **sections))


def serving_kind() -> str:
    """The fingerprint of a process on a single core, as a fresh one finds it."""
    code = "from orchestrator.measure.fingerprint import fingerprint; print(fingerprint())"
    command = ["taskset", "-c", str(CORES[0]), sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_speed_counts_on_the_kind_of_machine_that_serves_alone(address: str, tmp_path: Path):
    recipe = recipe_of(tmp_path, address, host={"role": "serves"})
    folder = Path(recipe.output_dir)
    front = Study(recipe).run()
    kind = serving_kind()
    assert front["fingerprint"] == kind
    assert front["trials"]["completed"] == 6 and front["trials"]["failed"] == 0
    ledger = Ledger(folder / "ledger", ledger_key(folder))
    events = list(ledger.events())
    ledger.close()
    results = {e.key: e.payload["result"] for e in events if e.kind == "finished"}
    elsewhere = {r["trial_id"] for r in results.values() if not r["measurement"]["is_timed"]}
    assert elsewhere  # the other node trained some
    later = {e.key for e in events if e.kind == "measured" and e.payload["kind"] == "speed"}
    assert later == elsewhere
    for event in events:
        if event.kind == "measured" and event.payload["kind"] != "test":
            assert event.payload["measurement"]["fingerprint"] == kind
    assert all("latency_ms" in row["metrics"] for row in front["all_trials"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(address=address, log_to_driver=False)
        assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}
        ray.shutdown()


def test_a_host_that_no_node_has_is_bad_input(address: str, tmp_path: Path):
    launcher = RayGangs(recipe_of(tmp_path, address, host={"role": "absent"}), tmp_path)
    try:
        with pytest.raises(
            BadInput, match=r"target.host: no node of the cluster has .*role=absent"
        ):
            launcher.facts()
    finally:
        launcher.close()
