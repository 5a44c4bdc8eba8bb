"""What kind of machine each node of a cluster is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from orchestrator.launch.ray_cluster import Node  # isort: skip (it sets what ray reads when it is imported)

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.measure.fingerprint import fingerprint

ANSWER_S = 60.0
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


class Kinds:
    """The fingerprint of each node, asked once of a process there."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._asked: dict[str, ray.ObjectRef] = {}
        self._until = 0.0

    def of(self, nodes: Sequence[Node]) -> dict[str, str]:
        """By the node's id. One that does not answer in time is left out until it does."""
        names = {node["NodeID"] for node in nodes}
        for name in names - self._known.keys() - self._asked.keys():
            self._asked[name] = ask_node(name)
            self._until = time.monotonic() + ANSWER_S
        if self._asked:
            refs, patience = list(self._asked.values()), max(0.0, self._until - time.monotonic())
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=patience)
            for name in [name for name, ref in self._asked.items() if ref in ready]:
                with suppress(RayError):  # it is gone, else it is asked again
                    self._known[name] = ray.get(self._asked.pop(name))
        return {name: kind for name, kind in self._known.items() if name in names}


def ask_node(name: str) -> ray.ObjectRef:
    """The fingerprint of a node, when a process there has found it."""
    asked = ray.remote(num_cpus=0, max_retries=0)(fingerprint).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False),
        runtime_env={"env_vars": environment(1)},
    )
    return asked.remote()


def environment(num_threads: int) -> dict[str, str]:
    """What a worker's process needs before it imports anything."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads))
    if PACKAGE_PARENT.name in ("site-packages", "dist-packages"):
        return threads
    return threads | {"PYTHONPATH": f"{PACKAGE_PARENT}:${{PYTHONPATH}}"}
