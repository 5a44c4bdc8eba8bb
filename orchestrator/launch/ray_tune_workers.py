"""The processes that do the work of a trial which Ray Tune drives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.launch.ray_kinds import environment
from orchestrator.launch.ray_worker import LOOK_S, RayWorker
from orchestrator.quiet import quiet
from orchestrator.rungs import Rungs, Standing
from orchestrator.trial import Stopped, TrialConfig, TrialResult

Json = dict[str, Any]
STOP_S = 60.0  # a trial that is told to stop has so long to come to its next logged loss or stage
POLL_S = 0.05


class TrialWorker(RayWorker):
    """One process of a trial. The first runs it, the others follow."""

    def __init__(self, worker: str, arguments: Json) -> None:
        super().__init__(worker, arguments)
        self._number = self._stopped = 0  # of the trial that runs, and of one that shall not
        self._standings: list[Standing] = []
        self._is_over = False

    def run(self, number: int, config: TrialConfig, num_rungs: int, pieces: int) -> TrialResult:
        """The `number`-th trial of this process."""
        with self._changed:
            self._number, self._standings, self._is_over = number, [], False
        try:
            return self._run(config, num_rungs, pieces)
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _run(self, config: TrialConfig, num_rungs: int, pieces: int) -> TrialResult:
        quiet()
        from orchestrator.alone import this_host
        from orchestrator.one_trial import run_with_baseline

        self.worker.check_folder()
        bench = self.worker.bench
        bench.pieces, bench.rungs = pieces, Rungs(num_rungs, self._stand, self._check)
        with this_host().working():
            result = run_with_baseline(config, bench, lambda stage: self._check())
        if not self.worker.is_broken:
            self.worker.reset()
        return result

    def _check(self) -> None:
        if self._stopped == self._number:
            raise Stopped("Tune has stopped it")

    def _stand(self, standing: Standing) -> None:
        if standing.quality is None or math.isfinite(standing.quality):
            with self._changed:
                self._standings.append(standing)
                self._changed.notify_all()

    def hear(self, number: int, heard: int) -> Standing | None:
        """What the `number`-th trial says after `heard` standings; waits a while for it."""

        def is_news() -> bool:
            return self._number == number and (self._is_over or len(self._standings) > heard)

        with self._changed:
            self._changed.wait_for(is_news, timeout=LOOK_S)
            here = self._number == number
            return self._standings[heard] if here and len(self._standings) > heard else None

    def stop(self, number: int) -> None:
        """The `number`-th trial is to end at its next rung or stage."""
        self._stopped = number

    def is_broken(self) -> bool:
        return bool(self.worker.is_broken)


REMOTE_WORKER = ray.remote(
    max_restarts=0,
    max_task_retries=0,
    concurrency_groups={"work": 1, "news": 1, "orders": 1},
)(TrialWorker)


class Workers:
    """The processes of a trial, one a bundle of the placement group that Tune has made for it.

    They are broken where one has died, or one waits for another that does not come.
    """

    def __init__(
        self, bundles: Sequence[Mapping[str, float]], arguments: Json, *, num_rungs: int
    ) -> None:
        self._num_rungs, self._number, self._heard = num_rungs, 0, 0
        self._answer: ray.ObjectRef | None = None
        self.are_broken = False
        self._actors = [_actor(rank, bundle, arguments) for rank, bundle in enumerate(bundles)]
        self._following: list[ray.ObjectRef] = []
        if len(bundles) > 1:
            places = [actor.place.remote() for actor in self._actors]
            for rank, actor in enumerate(self._actors):
                actor.join.remote(rank, *places)
            self._following = [actor.follow.remote() for actor in self._actors[1:]]

    def begin(self, config: TrialConfig, pieces: int) -> None:
        self._number, self._heard = self._number + 1, 0
        run = self._actors[0].run.options(concurrency_group="work")
        self._answer = run.remote(self._number, config, self._num_rungs, pieces)

    def hear(self) -> Standing | TrialResult:
        """The next that the trial says. Raises `RayError` where a process is gone."""
        assert self._answer is not None
        try:
            while True:
                news = self._actors[0].hear.options(concurrency_group="news")
                standing: Standing | None = ray.get(news.remote(self._number, self._heard))
                if standing is not None:
                    self._heard += 1
                    return standing
                if ray.wait([self._answer], timeout=POLL_S)[0]:
                    result: TrialResult = ray.get(self._answer)
                    self.are_broken = len(self._actors) > 1 and self._is_broken()
                    return result
                for ended in ray.wait(self._following, timeout=0)[0] if self._following else []:
                    ray.get(ended)
                    raise RayError("a worker left its gang")
        except RayError:
            self.are_broken = True
            raise

    def _is_broken(self) -> bool:
        asked = self._actors[0].is_broken.options(concurrency_group="orders")
        return bool(ray.get(asked.remote()))

    def stop(self) -> None:
        """Wait for the trial to end at its next rung or stage. Others that train with it are lost."""
        order = self._actors[0].stop.options(concurrency_group="orders")
        order.remote(self._number)
        ended, _ = ray.wait([self._answer], timeout=STOP_S)
        self.are_broken = not ended or len(self._actors) > 1

    def end(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


def _actor(rank: int, bundle: Mapping[str, float], arguments: Json) -> Any:
    num_cpus = int(bundle["CPU"])
    options = REMOTE_WORKER.options(
        num_cpus=num_cpus,
        num_gpus=int(bundle.get("GPU", 0)),
        resources={n: much for n, much in bundle.items() if n not in ("CPU", "GPU")},
        scheduling_strategy=PlacementGroupSchedulingStrategy(get_current_placement_group(), rank),
        runtime_env={"env_vars": environment(num_cpus)},
    )
    return options.remote("orchestrator.gang:Worker", {**arguments, "threads": num_cpus})
