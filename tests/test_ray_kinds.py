"""On a cluster of two kinds of machines speed is taken on the kind that serves, wherever trials train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_study

from orchestrator.cli import BAD_INPUT
from orchestrator.ledger import Ledger
from orchestrator.manifest import ledger_key

pytest.importorskip("ray")

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(len(CORES) < 2, reason="one core: all nodes here are of one kind"),
]

# Two nodes of one CPU each; processes of the one that serves may use a single core.
CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster

cores = os.sched_getaffinity(0)
cluster = Cluster()
cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=10**8)
os.sched_setaffinity(0, [min(cores)])
cluster.add_node(num_cpus=1, labels={"role": "serves"}, object_store_memory=10**8)
os.sched_setaffinity(0, cores)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""

PLACEMENT_GROUPS = """
import ray
from ray.util import placement_group_table

ray.init(log_to_driver=False)
print({group["state"] for group in placement_group_table().values()} - {"REMOVED"})
"""


def environment(**settings: str) -> dict[str, str]:
    """Of processes of their own: how Ray proves who it is cannot change within one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return (
        kept
        | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parents[1])}
        | settings
    )


def python(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**settings))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-c", CLUSTER]
    process = subprocess.Popen(command, text=True, env=environment(), **pipes)
    assert process.stdout
    yield process.stdout.readline().strip()
    process.communicate(timeout=60)


def write_recipe(folder: Path, address: str, **target: Any) -> Path:
    return tiny_study.write_recipe(
        folder,
        target={"runtime": "onnxruntime", "threads": 1, **target},
        resources={"engine": "ray", "address": address, "cpus_per_trial": 1},
        references={"dense_int8": True, "first_layers": [1], "random_twin": False},
    )


def serving_kind() -> str:
    """The fingerprint of a process on a single core, as a fresh one finds it."""
    code = "from orchestrator.measure.fingerprint import fingerprint; print(fingerprint())"
    command = ["taskset", "-c", str(CORES[0]), sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_speed_counts_on_the_kind_of_machine_that_serves_alone(address: str, tmp_path: Path):
    path = write_recipe(tmp_path, address, host={"role": "serves"})
    done = python("-m", "orchestrator.cli", "run", str(path))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "study"
    front = json.loads((folder / "front.json").read_text())
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
    assert python("-c", PLACEMENT_GROUPS, RAY_ADDRESS=address).stdout == "set()\n"


def test_a_host_that_no_node_has_is_bad_input(address: str, tmp_path: Path):
    path = write_recipe(tmp_path, address, host={"role": "absent"})
    done = python("-m", "orchestrator.cli", "run", str(path))
    assert done.returncode == BAD_INPUT
    assert "target.host: no node of the cluster has" in done.stderr
    assert "role=absent" in done.stderr and "Traceback" not in done.stderr
