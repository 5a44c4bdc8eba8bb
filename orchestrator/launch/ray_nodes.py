"""Every node of a cluster asked what it is like, before anything is started on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from orchestrator.launch.ray_cluster import Node  # isort: skip (it sets what ray reads when it is imported)

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.doctor import Survey
from orchestrator.launch.ray_kinds import environment
from orchestrator.node_facts import Examiner
from orchestrator.scratch import remove

FIRST_S, ANSWER_S, LEAVES_S = 60.0, 15.0, 5.0
Json = dict[str, Any]


def survey(nodes: Sequence[Node], folder: str | None) -> Survey:
    """Ask each node, all of them at once, and then what it sees of the others."""
    names = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes}
    if len(set(names.values())) < len(names):  # several nodes of one host
        names = {key: f"{host} ({key[:6]})" for key, host in names.items()}
    there = {names[key]: _examiner(key) for key in names}
    driver = Examiner().facts(None, "driver")
    facts: dict[str, Json] = {}
    for name, answer in answers({n: e.facts.remote(folder, n) for n, e in there.items()}).items():
        facts[name] = answer | {"clock_off_s": answer.pop("off_s")}
    addresses = {names[node["NodeID"]]: node["NodeManagerAddress"] for node in nodes}
    places = {name: (addresses[name], each["port"]) for name, each in facts.items()}
    left = [name for name, each in facts.items() if not each["storage"]]  # marks
    asked = {
        name: there[name].sees.remote(
            folder, left, {n: place for n, place in places.items() if n != name}
        )
        for name in facts
    }
    sees = answers(asked)
    for examiner in there.values():
        ray.kill(examiner)
    return Survey(driver, facts, sees, tuple(sorted(there.keys() - facts.keys())))


def _examiner(node: str) -> Any:
    return (
        ray.remote(num_cpus=0, max_restarts=0)(Examiner)
        .options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env={"env_vars": environment(1)},
        )
        .remote()
    )


def answers(asked: dict[str, ray.ObjectRef]) -> dict[str, Json]:
    """Of those that answer in time; how far its clock was off as the answer came.

    The first answer may take `FIRST_S`, as on machines that have much to do all are slow to start
    a process; the others then have `ANSWER_S` more.
    """
    until, waiting = time.monotonic() + FIRST_S, {ref: name for name, ref in asked.items()}
    found: dict[str, Json] = {}
    while waiting and time.monotonic() < until:
        ready, _ = ray.wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
        for ref in ready:
            name = waiting.pop(ref)
            try:
                answer: Json = ray.get(ref)
            except ray.exceptions.RayError:
                continue
            off = answer["clock"] - time.time() if "clock" in answer else 0.0
            if not found:
                until = time.monotonic() + ANSWER_S
            found[name] = answer | {"off_s": off}
    return found


def remove_scratch(nodes: Sequence[Node], name: str) -> None:
    """Remove a study's own folder on each node, where nobody uses it any more."""
    asked = [
        ray.remote(num_cpus=0, max_retries=0)(remove)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(name, patience_s=LEAVES_S)
        for node in nodes
    ]
    ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S + LEAVES_S)
