"""A gang: workers on a placement group of their own, as the driver sees them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from orchestrator.launch.ray_cluster import Shape  # isort: skip (it sets what ray reads when it is imported)

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.launch.ray_kinds import environment
from orchestrator.launch.ray_places import Place, end_process
from orchestrator.launch.ray_worker import LOOK_S, REMOTE_WORKER
from orchestrator.trial import Reason, Work

END_S = 1.0  # to learn where a silent process is
GROWTH, GROWTH_MB = 1.5, 512.0  # a worker that has grown beyond both since it settled is replaced


class Gang:
    """Workers on a placement group of their own, kept from one work to the next.

    `work` is what it does now, `begun` whether a worker has said so, `memory_mb` the size of its
    first worker after each work; it `lacks_room` if there was none when it came. Workers behind
    the first follow it: `following` ends only where one fails. `beats` are their signs of life, and
    `alive_at` says when each rank gave the last. One that `leaves` was asked to end its work.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        name: str,
        worker: str,
        arguments: dict[str, Any],
        avoids: Mapping[str, str],
    ) -> None:
        self.shape = shape
        labels = {**avoids, **shape.labels}
        self.work: Work | None = None
        self.answer: ray.ObjectRef | None = None
        self.begun = self.lacks_room = self.leaves = False
        self.since = time.monotonic()  # of the work, else of idleness
        self.memory_mb: list[float] = []
        self.heard = 0
        self.place = placement_group(
            [dict(shape.amounts)] * shape.num_workers,
            name=name,
            bundle_label_selector=[labels] * shape.num_workers if labels else None,
        )
        self.placing: ray.ObjectRef | None = self.place.ready()
        self.actors = [self._actor(rank, worker, arguments) for rank in range(shape.num_workers)]
        self.places = [actor.place.remote() for actor in self.actors]
        self.following: list[ray.ObjectRef] = []
        if shape.num_workers > 1:
            for rank, actor in enumerate(self.actors):
                actor.join.remote(rank, *self.places)
            self.following = [actor.follow.remote() for actor in self.actors[1:]]
        self.news = self.ask("news", 0)
        self.beats = {self._beat(rank): rank for rank in range(1, shape.num_workers)}
        self.alive_at = [math.inf] * shape.num_workers  # until first heard of

    def _actor(self, rank: int, worker: str, arguments: dict[str, Any]) -> Any:
        shape = self.shape
        custom = {n: much for n, much in shape.amounts.items() if n not in ("CPU", "GPU")}
        options = REMOTE_WORKER.options(
            num_cpus=shape.num_cpus,
            num_gpus=shape.num_gpus,
            resources=custom,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.place, rank),
            runtime_env={"env_vars": environment(shape.num_cpus)},
        )
        return options.remote(worker, arguments)

    def _beat(self, rank: int) -> ray.ObjectRef:
        return self.actors[rank].news.options(concurrency_group="news").remote(0)

    def hear_beat(self, beat: ray.ObjectRef) -> None:
        """Raises `RayError` where the worker is gone."""
        rank = self.beats.pop(beat)
        ray.get(beat)
        self.alive_at[rank] = time.monotonic()
        self.beats[self._beat(rank)] = rank

    def silent(self, limit_s: float) -> list[int]:
        """Ranks that have been heard of, but owe an answer for so long.

        One that lies ready was given in time: nobody listens to an idle gang.
        """
        now = time.monotonic()
        owed = {0: self.news} | {rank: beat for beat, rank in self.beats.items()}
        late = [rank for rank, at in enumerate(self.alive_at) if now - at > limit_s]
        return [rank for rank in late if not ray.wait([owed[rank]], timeout=0)[0]]

    def ask(self, method: str, *arguments: Any) -> ray.ObjectRef:
        """Call a method of the first worker; it tells its news while it works."""
        group = {"news": "news", "grant": "orders"}.get(method, "work")
        call = getattr(self.actors[0], method).options(concurrency_group=group)
        return call.remote(*arguments)

    def start(self, work: Work) -> None:
        self.work, self.begun = work, False
        self.since = time.monotonic()
        self.answer = self.ask("do", work)

    def leave(self) -> None:
        """Ask for a checkpoint, and for the end of its work. Its first worker tells the others."""
        self.leaves = True
        self.actors[0].leave.options(concurrency_group="orders").remote()

    def finish(self) -> None:
        self.work = self.answer = None
        self.since = time.monotonic()

    @cached_property
    def nodes(self) -> list[str]:
        """The id of the node that each worker was placed on; asked once they are."""
        placed = placement_group_table(self.place)["bundles_to_node_id"]
        return [str(placed[rank]) for rank in range(self.shape.num_workers)]

    @property
    def known_nodes(self) -> Sequence[str]:
        """The same, as far as they were asked for."""
        return tuple(self.__dict__.get("nodes", ()))

    @property
    def only_node(self) -> str | None:
        """The node that it was placed on, None where that is not known, or there are several."""
        found = set(self.known_nodes)
        return found.pop() if len(found) == 1 else None

    @property
    def seconds(self) -> float:
        """Since its work was handed over; placing does not count."""
        return 0.0 if self.placing else time.monotonic() - self.since

    @property
    def has_grown(self) -> bool:
        settled = max(self.memory_mb[:2])
        return self.memory_mb[-1] > GROWTH * settled + GROWTH_MB

    def end(self) -> None:
        """Free all that it holds, whatever it does; its processes are killed."""
        for actor in self.actors:
            with suppress(RayError, ValueError):
                ray.kill(actor)
        with suppress(RayError, ValueError):
            remove_placement_group(self.place)

    def end_silent(self, ranks: Sequence[int]) -> None:
        """End processes that do not listen, such as stopped ones."""
        with suppress(RayError):
            placed: list[Place] = ray.get([self.places[rank] for rank in ranks], timeout=END_S)
            ray.wait([end_process(place) for place in placed], timeout=LOOK_S)


# -- why a worker is gone ---------------------------------------------------------------------------


def reason_of(error: RayError) -> Reason:
    """Whether a process is gone for want of memory, the host's or a device's."""
    is_full = isinstance(error, OutOfMemoryError) or "out of memory" in str(error)
    return Reason.OOM if is_full else Reason.ERROR


def never_started(error: RayError) -> bool:
    return isinstance(error, RayActorError) and error.actor_init_failed


def why_lost(error: RayError) -> str:
    """The sentence of Ray's message that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RayTaskError) or never_started(error):
        return f"its worker cannot work: {lines[-1]}"
    if isinstance(error, OutOfMemoryError):
        return f"its worker was ended: {lines[0]}"
    _, _, why = " ".join(lines).partition("Worker exit detail: ")
    return f"its worker died: {(why or lines[-1]).split('. ')[0]}"
