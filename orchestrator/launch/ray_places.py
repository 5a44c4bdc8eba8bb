"""Where the workers of a gang are, and what each is told so that they find one another."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import orchestrator.launch.ray_cluster  # noqa: F401  isort: skip (it sets what ray reads when it is imported)

import psutil
import ray
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True)
class Place:
    """A worker's process: its node and address there, a port that was free, and its GPUs."""

    node: str
    ip: str
    port: int
    pid: int
    gpus: tuple[str, ...] = ()


def here() -> Place:
    """The place of the worker that asks."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    gpus = tuple(str(each) for each in ray.get_gpu_ids())
    node = ray.get_runtime_context().get_node_id()
    return Place(node, get_node_ip_address(), port, os.getpid(), gpus)


def rank_environment(rank: int, places: Sequence[Place]) -> dict[str, str]:
    """What torchrun would set. GPUs of one node are seen by all its ranks, so that these can share memory.

    Ranks meet over the network of Ray's own address, unless the node's environment names another.
    """
    own = places[rank]
    nodes = list(dict.fromkeys(place.node for place in places))
    beside = [number for number, place in enumerate(places) if place.node == own.node]
    found = {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(places)),
        "LOCAL_RANK": str(beside.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(beside)),
        "GROUP_RANK": str(nodes.index(own.node)),
        "MASTER_ADDR": places[0].ip,
        "MASTER_PORT": str(places[0].port),
    }
    if own.gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(g for n in beside for g in places[n].gpus)
    if interface := _interface(own.ip):
        sockets = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
        found |= {name: value for name, value in sockets.items() if name not in os.environ}
    return found


def _interface(ip: str) -> str | None:
    """The network interface that has the address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == ip for address in addresses):
            return str(name)
    return None


def end_process(place: Place) -> ray.ObjectRef:
    """Kill it from beside it, since it does not listen."""
    ended = ray.remote(num_cpus=0, max_retries=0)(_kill).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=False)
    )
    return ended.remote(place.pid)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
