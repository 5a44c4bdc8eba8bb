"""Trials in parallel on Ray: warm gangs of workers, on placement groups that the driver owns.

A gang is started when there is work for it and room on the cluster. It is kept from one work to
the next, and replaced when it fails, grows or has done its share.
"""

from __future__ import annotations

import atexit
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.launch.ray_cluster import (  # isort: skip (it sets what ray reads when it is imported)
    Cluster,
    Node,
    Shape,
    capacity,
    check_room,
    gang_shape,
    has_labels,
    left,
    not_on_nodes,
    on_nodes,
    said,
)

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from orchestrator import scratch
from orchestrator.doctor import marks_in, raise_if_hopeless
from orchestrator.launch import Done, Event, Lost, Told
from orchestrator.launch.claims import Claims
from orchestrator.launch.ray_gang import Gang, never_started, reason_of, why_lost
from orchestrator.launch.ray_kinds import Kinds
from orchestrator.launch.ray_nodes import LEAVES_S, remove_scratch, survey
from orchestrator.launch.ray_suspects import IN_A_ROW, Suspects
from orchestrator.launch.ray_worker import Answer, News
from orchestrator.measure.fingerprint import fingerprint
from orchestrator.trial import TIMED, BadInput, Reason, Work, model_of

if TYPE_CHECKING:
    from orchestrator.recipe import Recipe

POLL_S = 1.0  # between looks at deadlines; news come at once
PLACING_S = 2.0  # a gang that takes longer to be placed waits for room
ON_NOTICE = "its machine was about to be taken away"
PAUSE_S = 2e-5  # for each answer that gangs owe: what comes meanwhile is heard at one look


Hear = Callable[[Gang, "ray.ObjectRef"], list[Event]]


class RayGangs:
    """A launcher of warm gangs. Joins Ray, or starts it here, when it is first asked for room.

    `worker` names the class whose `facts`, `do`, `leave`, `reset` and `rss_mb` a worker's process
    calls. It `examines` the nodes of a cluster that it joins before anything is started there.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        device: str | None = None,
        worker: str = "orchestrator.gang:Worker",
        examines: bool = True,
        **limits: int,
    ) -> None:
        self.hear: Callable[[Told], None] = lambda told: None
        self.name, self.resources, self.target = recipe.name, recipe.resources, recipe.target
        self.folder, self.storage = folder.resolve(), recipe.storage
        self.models = [options.id for options in recipe.models]
        self.gangs: list[Gang] = []
        self._worker, self._examines = worker, examines
        self._use_gpus = device != "cpu"
        self._kinds, self._suspects = Kinds(), Suspects()
        self._claims: Claims[Gang] = Claims()
        self._said: deque[tuple[Gang, ray.ObjectRef]] = deque()  # and not heard yet
        self._looked_at = -math.inf  # for what is overdue
        self._arguments = {
            "recipe": recipe.resolved(),
            "folder": str(self.folder),
            "device": "cuda:0" if device and device.startswith("cuda") else device,
            **limits,
        }
        atexit.register(self.close)

    @cached_property
    def cluster(self) -> Cluster:
        """Raises `BadInput` where nodes of a cluster that is joined cannot work."""
        cluster = Cluster(self.resources.address)
        if self._examines and not cluster.is_own:
            nodes = [node for node in cluster.nodes() if has_labels(node, self.resources.labels)]
            with marks_in(self.folder, self.storage) as folder:
                raise_if_hopeless(survey(nodes, folder))
        return cluster

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """What each model's gangs take. Raises `BadInput` where the cluster has no such room."""
        nodes = self._nodes()
        found = {}
        for model in self.models:
            shape = gang_shape(
                self.resources,
                nodes,
                use_gpus=self._use_gpus,
                options=self.resources.of(model),
            )
            named = f"resources.per_model.{model}" if model in self.resources.per_model else ""
            check_room(shape, self.resources, nodes, what=named or "resources")
            found[model] = shape
        return found

    @property
    def shape(self) -> Shape:
        """The least that a trial takes."""
        return min(self.shapes.values(), key=lambda s: (s.total.get("GPU", 0), s.total["CPU"]))

    @cached_property
    def speed_shape(self) -> Shape:
        """What a gang takes that only measures. Raises `BadInput` where no node has the labels."""
        amounts = dict(self.shape.amounts)
        amounts["CPU"] = max(amounts["CPU"], self.target.threads)
        if self.target.device == "cpu":
            amounts.pop("GPU", None)
        shape = Shape(amounts, self.target.host or self.shape.labels)
        check_room(shape, self.resources, self._nodes(), what="target.host")
        return shape

    # -- what the study asks ---------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        for attempt in count(1):
            gang = self._new_gang(self.speed_shape if self.target.host else self.shape)
            try:
                answer: Answer = ray.get(gang.ask("facts"))
            except RayActorError as error:
                self._end(gang)
                if never_started(error) or attempt == self.resources.max_attempts:
                    why = f"data and models could not be read: {why_lost(error)}."
                    raise BadInput([why]) from error
            else:
                break
        gang.finish()
        if answer.problems:
            raise BadInput(list(answer.problems))
        return dict(answer.value)

    def free(self) -> int:
        """At least one when nothing runs: then a work may wait for its gang."""
        if "cluster" not in self.__dict__:
            return 1  # nothing is joined or started before there is a work
        self._leave_nodes()
        self._hand_back()
        if any(self._waits_for_room(gang) for gang in self._working()):
            return 0  # what comes later, and takes less, does not go before it
        idle = sum(self._trains(gang) for gang in self._idle())
        most = self._room(self.shape) + len(self._idle()) - idle
        if most > 0 and not self.cluster.is_own:  # others take of it too
            most = min(most, self.shape.count_in(self.cluster.available()))
        return max(idle + max(0, most), 0 if self._working() else 1)

    def has(self, kind: str) -> bool:
        return bool(self._nodes_of(kind))

    def start(self, work: Work) -> None:
        """On the gang that worked last, so that others can be handed back, or on a new one."""
        fit = [gang for gang in self._idle() if self._fits(gang, work)]
        gang = max(fit, key=lambda gang: gang.since, default=None)
        (gang or self._new_gang(self._shape_for(work), work.key)).start(work)

    def wait(self, timeout: float | None = None) -> list[Event]:
        until = math.inf if timeout is None else time.monotonic() + timeout
        while self._working():
            self._leave_nodes()
            self._hand_back()
            events = self._overdue() or self._hear(min(POLL_S, until - time.monotonic()))
            if events or time.monotonic() >= until:
                return events
        return []

    def waiting(self) -> dict[str, str]:
        late = [gang for gang in self._working() if not gang.begun]
        return {gang.work.key: self._reason(gang) for gang in late if gang.work}

    def now(self) -> float:
        return time.time()

    def close(self) -> None:
        atexit.unregister(self.close)
        for gang in list(self.gangs):
            self._end(gang)
        if self.storage and "cluster" in self.__dict__:
            name = scratch.scratch_name(self.storage, str(self.folder))
            if self.cluster.is_own:
                scratch.remove(name, patience_s=LEAVES_S)
            else:
                remove_scratch(self.cluster.nodes(), name)
        if cluster := self.__dict__.pop("cluster", None):
            cluster.leave()

    # -- gangs -----------------------------------------------------------------------------------

    def _working(self) -> list[Gang]:
        return [gang for gang in self.gangs if gang.work]

    def _idle(self) -> list[Gang]:
        return [gang for gang in self.gangs if not gang.work]

    def _trains(self, gang: Gang, model: str = "") -> bool:
        """Whether trials may run on it; one that was made to measure may lack a GPU, or labels."""
        shapes = [self.shapes[model]] if model in self.shapes else self.shapes.values()
        return any(
            (gang.shape.amounts, gang.shape.num_workers) == (shape.amounts, shape.num_workers)
            and shape.labels in ({}, gang.shape.labels)
            for shape in shapes
        )

    def _fits(self, gang: Gang, work: Work) -> bool:
        if work.kind in TIMED and work.timed_on:
            return gang.nodes[0] in self._nodes_of(work.timed_on)
        is_avoided = gang.only_node in self._suspects.avoided(work.key)
        return not is_avoided and self._trains(gang, model_of(work))

    def _shape_for(self, work: Work) -> Shape:
        model = model_of(work)
        if work.kind not in TIMED or not work.timed_on:
            return self.shapes.get(model, self.shape)
        nodes = self._nodes_of(work.timed_on)
        if len(nodes) in (0, len(self._nodes())):  # trials may run on it as well
            return self.shape
        return Shape(self.speed_shape.amounts, on_nodes(nodes))

    def _nodes_of(self, kind: str) -> list[str]:
        """The nodes whose fingerprint is `kind`."""
        if self.cluster.is_own:
            kinds = {node["NodeID"]: fingerprint() for node in self._nodes()}
        else:
            kinds = self._kinds.of(self._nodes())
        return sorted(name for name, found in kinds.items() if found == kind)

    def _room(self, shape: Shape) -> int:
        """How many gangs of a shape may come to those that are there."""
        nodes = self._nodes()
        alike = sum(gang.shape == shape for gang in self.gangs)
        most = capacity(shape, self.resources, nodes) - alike
        if self.resources.max_gangs is not None:
            most = min(most, self.resources.max_gangs - len(self.gangs))
        used = [gang.shape for gang in self.gangs]
        return min(most, shape.count_in(left(used, self.resources, nodes)))

    def _waits_for_room(self, gang: Gang) -> bool:
        late = time.monotonic() - gang.since > PLACING_S
        return bool(gang.placing) and (gang.lacks_room or late)

    def _nodes(self) -> list[Node]:
        """The nodes that works may go to."""
        others = self._suspects.set_aside | self.cluster.leaving()
        return [node for node in self.cluster.nodes() if node["NodeID"] not in others]

    def _avoids(self, shape: Shape, work: str) -> dict[str, str]:
        """A label selector against nodes on which a work was lost, where others have room for it."""
        avoided = self._suspects.avoided(work)
        if self._are_full(self._others(avoided), shape):
            avoided = self._suspects.avoided(work, others_are_full=True)
        if not avoided or capacity(shape, self.resources, self._others(avoided)) == 0:
            return {}
        return not_on_nodes(avoided)

    def _others(self, avoided: set[str]) -> list[Node]:
        return [node for node in self._nodes() if node["NodeID"] not in avoided]

    def _are_full(self, nodes: Sequence[Node], shape: Shape) -> bool:
        """Whether this study's gangs leave no place on them for one more; one yet to be placed may be there."""
        names = {node["NodeID"] for node in nodes}
        there = [g for g in self.gangs if not g.known_nodes or not names.isdisjoint(g.known_nodes)]
        return len(there) >= capacity(shape, self.resources, nodes)

    def _new_gang(self, shape: Shape, work: str = "") -> Gang:
        """In the place of idle ones where the study may have no more."""
        while self._room(shape) <= 0 and (idle := self._idle()):
            self._end(min(idle, key=lambda gang: gang.since))
        lacks_room = self._room(shape) <= 0
        gang = Gang(
            shape,
            name=f"{self.name}-{secrets.token_hex(4)}",
            worker=self._worker,
            arguments={**self._arguments, "threads": shape.num_cpus},
            avoids=self._avoids(shape, work),
        )
        gang.lacks_room = lacks_room
        self.gangs.append(gang)
        return gang

    def _end(self, gang: Gang) -> None:
        self.gangs.remove(gang)
        gang.end()
        self._grant(self._claims.forget(gang))

    def _grant(self, claims: list[tuple[str, Gang]]) -> None:
        for name, gang in claims:
            gang.ask("grant", name)

    def _hand_back(self) -> None:
        """What nothing is done with: to a gang that waits for room, else to the cluster that lent it."""
        wanted = any(self._waits_for_room(gang) for gang in self._working())
        for gang in self._idle():
            unused = time.monotonic() - gang.since > self.resources.idle_s
            if wanted or (unused and not self.cluster.is_own):
                self._end(gang)

    def _leave_nodes(self) -> None:
        """End what is idle on nodes that are about to be taken away, and have the others checkpoint."""
        leaving = self.cluster.leaving()
        for gang in [gang for gang in self.gangs if not leaving.isdisjoint(gang.known_nodes)]:
            if not gang.work:
                self._end(gang)
            elif not gang.leaves:
                gang.leave()

    def _relieve(self, idle: Gang) -> None:
        """Let a gang measure, now that it is idle, what waits for a place on nodes like its own."""
        for gang in self._working():
            work = gang.work
            if gang.placing and work and work.kind in TIMED and self._fits(idle, work):
                self._end(gang)
                idle.start(work)
                return

    def _reason(self, gang: Gang) -> str:
        if not gang.placing:
            return "its worker to start"
        available = self.cluster.available()
        free = {name: available.get(name, 0.0) for name in gang.shape.amounts}
        return f"a place with {gang.shape}; the whole cluster has free: {said(free)}"

    # -- what they say ---------------------------------------------------------------------------

    def _overdue(self) -> list[Event]:
        """Works that have taken too long, as of the last second."""
        if time.monotonic() - self._looked_at < POLL_S:
            return []
        self._looked_at = time.monotonic()
        limit = self.resources.time_limit_s or math.inf
        message = f"it was ended after {limit:g} s, see resources.time_limit_s"
        lost: list[Event] = []
        for gang in [gang for gang in self._working() if gang.seconds > limit]:
            assert gang.work
            self._end(gang)
            message += self._blame(gang)
            lost.append(Lost(gang.work, Reason.TIMEOUT, message, again=False))
        for gang in self._working():
            if ranks := gang.silent(self.resources.silence_s):
                assert gang.work
                who = ", ".join(f"rank {rank}" for rank in ranks)
                why = f"{who} of {gang.shape.num_workers} gave no sign of life for "
                self._end(gang)
                gang.end_silent(ranks)
                self.cluster.look_again()
                message = f"{why}{self.resources.silence_s:g} s, see resources.silence_s"
                message += self._blame(gang)
                lost.append(Lost(gang.work, Reason.ERROR, message))
        return lost

    def _hear(self, timeout: float) -> list[Event]:
        """The next end of a work that any gang has to tell, if there is one in time."""
        if not self._said:
            self._listen(timeout)
        while self._said:
            gang, ref = self._said.popleft()
            if gang not in self.gangs:
                continue
            hear = self._owed(gang).get(ref)
            if hear and (events := hear(gang, ref)):
                return events
        return []

    def _listen(self, timeout: float) -> None:
        """Wait until any gang has something to say, and take in what all of them have."""
        owed = {ref: gang for gang in self._working() for ref in self._owed(gang)}
        time.sleep(min(PAUSE_S * len(owed), max(0.0, timeout)))
        ready, _ = ray.wait(list(owed), num_returns=len(owed), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(owed), timeout=max(0.0, timeout))
        self._said.extend((owed[ref], ref) for ref in ready)

    def _owed(self, gang: Gang) -> dict[ray.ObjectRef, Hear]:
        """What a gang that works has yet to answer, and who hears it."""
        if gang.answer is None:
            return {}
        owed: dict[ray.ObjectRef, Hear] = {}
        if gang.placing:
            owed[gang.placing] = self._hear_placed
        owed |= {gang.news: self._hear_news, gang.answer: self._hear_answer}
        return owed | dict.fromkeys((*gang.following, *gang.beats), self._hear_follower)

    def _hear_follower(self, gang: Gang, ref: ray.ObjectRef) -> list[Event]:
        """A worker behind the first lives, or has failed."""
        try:
            if ref in gang.beats:
                gang.hear_beat(ref)
                return []
            ray.get(ref)
        except RayTaskError as error:
            return self._lose(gang, error, again=True)  # as above
        except RayError as error:
            return self._lose(gang, error)
        return self._lose(gang, RayError("a worker left its gang"))

    def _hear_placed(self, gang: Gang, ref: ray.ObjectRef) -> list[Event]:
        gang.placing = None
        gang.since = time.monotonic()
        _ = gang.nodes  # while they can be asked for
        return []

    def _hear_news(self, gang: Gang, ref: ray.ObjectRef) -> list[Event]:
        try:
            news: list[News] = ray.get(gang.news)
        except RayError as error:
            return self._lose(gang, error)
        gang.heard = news[-1].number if news else gang.heard
        gang.news = gang.ask("news", gang.heard)
        gang.alive_at[0] = time.monotonic()
        for each in news:
            if each.wants:
                self._grant(self._claims.want(each.wants, gang))
            if each.lets_go:
                self._grant(self._claims.let_go(each.lets_go, gang))
            if gang.work and gang.work == each.work:
                gang.begun = True
                if each.stage:
                    self.hear(Told(gang.work, each.stage))
        return []

    def _hear_answer(self, gang: Gang, ref: ray.ObjectRef) -> list[Event]:
        work = gang.work
        assert work and gang.answer
        try:
            answer: Answer = ray.get(gang.answer)
        except RayError as error:
            return self._lose(gang, error)
        if answer.has_no_disk:
            message = answer.problems[0] + self._blame(gang)
            self._end(gang)
            return [Lost(work, Reason.ERROR, message)]
        gang.finish()
        self._grant(self._claims.forget(gang))  # whose last news nobody listens to
        if answer.leaves:
            self._end(gang)
            return [Lost(work, Reason.ERROR, f"{ON_NOTICE}: {answer.value}", counts=False)]
        if gang.only_node and not answer.is_broken:
            self._suspects.done(gang.only_node, work.key)
        gang.memory_mb.append(answer.rss_mb)
        if (
            answer.is_broken
            or gang.has_grown
            or len(gang.memory_mb) >= self.resources.recycle_after
        ):
            self._end(gang)
        else:
            self._relieve(gang)
        if answer.problems:
            return [Lost(work, Reason.ERROR, answer.problems[0], again=False)]
        if answer.is_broken and getattr(answer.value, "reason", None) is Reason.ERROR:
            # Mostly another rank has died, and this one has heard of it before Ray did.
            return [Lost(work, Reason.ERROR, f"its gang broke up: {answer.value.message}")]
        return [Done(work, answer.value)]

    def _lose(self, gang: Gang, error: RayError, *, again: bool = False) -> list[Event]:
        """What became of a gang whose process is gone.

        Where that is because the driver's own node was given up, the next look at nodes says so:
        Ray would keep for ever what was placed for such a driver.
        """
        assert gang.work
        self._end(gang)
        self.cluster.look_again()
        reason = reason_of(error)
        again |= not isinstance(error, RayTaskError) and not never_started(error)
        again |= reason is Reason.OOM and gang.work.pieces == 1
        if gang.leaves and again:
            return [Lost(gang.work, reason, f"{ON_NOTICE}: {why_lost(error)}", counts=False)]
        blame = self._blame(gang) if reason is Reason.ERROR and again else ""
        return [Lost(gang.work, reason, why_lost(error) + blame, again=again)]

    def _blame(self, gang: Gang) -> str:
        """What follows for the node that a work was lost on, as the end of a sentence."""
        assert gang.work
        node = gang.only_node
        if node is None or not self._suspects.lost(node, gang.work.key):
            return ""
        names = {each["NodeID"]: each["NodeManagerHostname"] for each in self.cluster.nodes()}
        for idle in [each for each in self._idle() if each.only_node == node]:
            self._end(idle)
        what = f"{IN_A_ROW} works in a row were lost there, and none elsewhere"
        return f"; {names.get(node, node)} is set aside: {what}"
