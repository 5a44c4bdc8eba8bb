"""Ray as a study needs it: joined or started here, and what of it a gang takes."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Ray reads these when it is imported. It would send the working folder to all workers, and print
# on standard output what it thinks of workers that died, which the study is told as `Lost`.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
import ray

from orchestrator.launch import CutOff
from orchestrator.resources import GangOptions, Resources, num_cores
from orchestrator.trial import BadInput

Amounts = Mapping[str, float]
Node = Mapping[str, Any]  # an entry of `ray.nodes()`
LOCAL = "local"  # an address: none that the environment names
LOOK_S = 5.0  # a cluster may grow and shrink
JOIN_S = 10.0
CUT_OFF = (
    "The cluster has given up this machine, from which the study is driven. Once Ray runs here again,"
    " or from another machine of the cluster, the same command goes on."
)
NODE_ID = "ray.io/node-id"  # a label that Ray gives every node
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
OBJECT_STORE_BYTES = 100 * 2**20  # through which nothing but reports and measurements go


@dataclass(frozen=True)
class Shape:
    """What each worker of a gang takes: amounts by Ray's names, on a node with these labels."""

    amounts: Amounts
    labels: Mapping[str, str] = field(default_factory=dict)
    num_workers: int = 1

    @property
    def num_cpus(self) -> int:
        return int(self.amounts["CPU"])

    @property
    def num_gpus(self) -> int:
        return int(self.amounts.get("GPU", 0))

    @property
    def total(self) -> dict[str, float]:
        """What the whole gang takes."""
        return {name: much * self.num_workers for name, much in self.amounts.items()}

    def count_in(self, amounts: Amounts) -> int:
        """How many such gangs there are in `amounts`, wherever they lie."""
        return self.workers_in(amounts) // self.num_workers

    def workers_in(self, amounts: Amounts) -> int:
        return min(int(amounts.get(name, 0) // much) for name, much in self.amounts.items() if much)

    def __str__(self) -> str:
        each = said({**self.amounts, **self.labels})
        return each if self.num_workers == 1 else f"{self.num_workers} workers of {each}"


def said(amounts: Mapping[str, object]) -> str:
    """As `4 CPU, 1 GPU, zone=a`."""
    words = (f"{v}" if isinstance(v, str) else f"{v:g}" for v in amounts.values())
    return ", ".join(
        f"{name}={word}" if isinstance(amounts[name], str) else f"{word} {name}"
        for name, word in zip(amounts, words, strict=True)
    )


def gang_shape(
    resources: Resources,
    nodes: Sequence[Node],
    *,
    use_gpus: bool,
    options: GangOptions | None = None,
) -> Shape:
    """What a trial's gang takes, with the defaults that hang on the cluster.

    `options` are those of its model, where it has its own.
    """
    options = options or resources
    offers = [node["Resources"] for node in nodes]
    with_gpus = [offer for offer in offers if offer.get("GPU", 0)] if use_gpus else []
    gpus, cpus, workers = options.gpus_per_trial, options.cpus_per_trial, options.num_workers
    if gpus is None:
        gpus = workers if with_gpus else 0
    if cpus is None:
        shares = [gpus * offer.get("CPU", 0) // offer["GPU"] for offer in with_gpus]
        cpus = int(min(shares, default=workers))
    each = {"CPU": max(1, cpus // workers), "GPU": gpus / workers}
    each |= {name: much / workers for name, much in resources.custom.items()}
    return Shape({n: much for n, much in each.items() if much}, resources.labels, workers)


def capacity(shape: Shape, resources: Resources, nodes: Sequence[Node]) -> int:
    """How many gangs a study may have on a cluster as it is now."""
    return min(_caps(shape, resources, nodes).values())


def check_room(
    shape: Shape, resources: Resources, nodes: Sequence[Node], *, what: str = "resources"
) -> None:
    """Raises `BadInput`, with the section that is to blame, where no gang can ever be placed."""
    caps = _caps(shape, resources, nodes)
    if caps["the cluster"] == 0:
        raise BadInput([_unmet(shape, nodes, what)])
    if none := [name for name, cap in caps.items() if cap == 0]:
        raise BadInput([f"resources: a trial takes {shape}, more than {none[0]} allows."])


def _caps(shape: Shape, resources: Resources, nodes: Sequence[Node]) -> dict[str, int]:
    """How many gangs each bound allows, by its name."""
    offers = [node["Resources"] for node in nodes if has_labels(node, shape.labels)]
    workers = sum(shape.workers_in(offer) for offer in offers)
    caps = {
        "the cluster": workers // shape.num_workers,
        "resources.max_gangs": resources.max_gangs,
        "resources.max_cpus": _parts(resources.max_cpus, shape.total["CPU"]),
        "resources.max_gpus": _parts(resources.max_gpus, shape.total.get("GPU", 0)),
    }
    return {name: cap for name, cap in caps.items() if cap is not None}


def _parts(limit: int | None, each: float) -> int | None:
    return None if limit is None or not each else int(limit // each)


def left(used: Sequence[Shape], resources: Resources, nodes: Sequence[Node]) -> dict[str, float]:
    """What a study that has gangs of these shapes may still take, by name."""
    found: dict[str, float] = {}
    for node in nodes:
        for name, much in node["Resources"].items():
            found[name] = found.get(name, 0.0) + much
    for name, limit in (("CPU", resources.max_cpus), ("GPU", resources.max_gpus)):
        if limit is not None:
            found[name] = min(found.get(name, 0.0), limit)
    for shape in used:
        for name, much in shape.total.items():
            found[name] = found.get(name, 0.0) - much
    return found


def not_on_nodes(names: Iterable[str]) -> dict[str, str]:
    """A label selector for all other nodes."""
    return {NODE_ID: f"!in({','.join(sorted(names))})"}


def on_nodes(names: Sequence[str]) -> dict[str, str]:
    """A label selector for these nodes alone."""
    return {NODE_ID: f"in({','.join(names)})"}


def has_labels(node: Node, labels: Mapping[str, str]) -> bool:
    """Whether a node has the labels, as far as they are plain; the others Ray judges itself."""
    plain = {name: value for name, value in labels.items() if value[:1] != "!" and "(" not in value}
    return all(node["Labels"].get(name) == value for name, value in plain.items())


def _unmet(shape: Shape, nodes: Sequence[Node], what: str) -> str:
    names = [*shape.amounts, *shape.labels]
    offers = ({**node["Resources"], **node["Labels"]} for node in nodes)
    found = sorted({said({n: offer[n] for n in names if n in offer}) or "none" for offer in offers})
    return f"{what}: no node of the cluster has {shape}; its nodes have: {'; '.join(found)}."


class Cluster:
    """A connection to Ray. `is_own` says that it was started here and ends with it."""

    def __init__(self, address: str | None) -> None:
        self.is_own = False
        self._temporary: Path | None = None
        self._nodes: tuple[float, list[Node]] = (-LOOK_S, [])
        self._leaving: tuple[float, set[str]] = (-LOOK_S, set())
        self._connected_here = not ray.is_initialized()
        if self._connected_here:
            address = address or os.environ.get("RAY_ADDRESS")
            with _process_as_it_is():
                if address and address != LOCAL:
                    join(address)
                else:
                    self._start()
        self._own_node = ray.get_runtime_context().get_node_id()

    def nodes(self) -> list[Node]:
        """The nodes that live, as of a few seconds ago."""
        at, nodes = self._nodes
        if time.monotonic() - at > LOOK_S:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            self._nodes = (time.monotonic(), nodes)
        return nodes

    def leaving(self) -> set[str]:
        """The nodes that are about to be taken away, as of a few seconds ago.

        An operator, an autoscaler or a cloud gives such notice, as by `ray drain-node`. Raises
        `CutOff` where the driver's own is gone: whatever it starts then is never heard of.
        """
        at, nodes = self._leaving
        if time.monotonic() - at > LOOK_S:
            if all(node["NodeID"] != self._own_node for node in self.nodes()):
                raise CutOff(CUT_OFF)
            nodes = set(ray._private.state.state.get_draining_nodes())  # Ray Serve and Train ask so
            self._leaving = (time.monotonic(), nodes)
        return nodes

    def look_again(self) -> None:
        """What was seen of nodes a few seconds ago is out of date."""
        self._nodes, self._leaving = (-LOOK_S, []), (-LOOK_S, set())

    def available(self) -> dict[str, float]:
        """What is free now on all nodes together."""
        return dict(ray.available_resources())

    def leave(self) -> None:
        """Disconnect, and end what was started here."""
        if self._connected_here and ray.is_initialized():
            ray.shutdown(wait_for_processes=True)
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _start(self) -> None:
        """Ray on this machine, for this user alone.

        Unless told otherwise it wants a token by default. Ours is written nowhere: in the user's
        home it would change how every later cluster starts.
        """
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self.is_own = True
        self._temporary = session_folder(_short_folder())
        ray.init(
            address="local",
            num_cpus=num_cores(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(self._temporary),
            _system_config={
                "prestart_worker_first_driver": False,
                "process_group_cleanup_enabled": True,  # what a worker started dies with it
            },
            **QUIET,
        )


def join(address: str) -> None:
    """Connect to a Ray that runs. Raises `BadInput` where that fails."""
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdigit() and "://" not in address):
        raise BadInput([f"resources.address: needs host:port or auto, got `{address}`."])
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        if address != "auto":
            socket.create_connection((host, int(port)), JOIN_S).close()  # ray waits for minutes
        ray.init(address=address, **QUIET)
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise BadInput(
            [
                f"resources.address: cannot join Ray at {address}: {why}. Where it asks for a token, "
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH."
            ]
        ) from error


def _short_folder() -> Path:
    """Where sockets may lie, whose paths have at most 107 bytes."""
    folder = tempfile.gettempdir()
    return Path(folder if len(folder) <= 20 else "/tmp")


def session_folder(parent: Path) -> Path:
    """A new folder for Ray's logs and sockets. Those of drivers that were killed are removed."""
    for old in parent.glob("slimtune-ray-*"):
        with suppress(OSError), (old / "driver").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="slimtune-ray-", dir=parent))
    lock = os.open(folder / "new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)  # until this process ends
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "new").rename(folder / "driver")
    return folder


@contextmanager
def _process_as_it_is() -> Iterator[None]:
    """Keep the signal handlers and the process group, both of which `ray.init` replaces.

    In a group of its own the driver would not hear the terminal's Ctrl-C.
    """
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    group = os.getpgrp()
    try:
        yield
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
        if os.getpgrp() != group:
            os.setpgid(0, group)
