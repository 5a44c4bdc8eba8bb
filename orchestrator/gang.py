"""The worker's side of a gang: what it is asked to do, and how it is left clean for the next work."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed

from orchestrator import scratch
from orchestrator.alone import this_host
from orchestrator.artifact import DamagedArtifact, sealed_as
from orchestrator.bench import Bench
from orchestrator.measure.again import speeds, time_together
from orchestrator.notice import Notice
from orchestrator.quiet import quiet
from orchestrator.recipe import Recipe
from orchestrator.run_trial import DISK_IS_FULL, measure_test, run_baseline, run_trial
from orchestrator.stages import Claim, unclaimed
from orchestrator.training import Crew, join_ranks
from orchestrator.trial import Result, TrialResult, Work

Note = Callable[[str], None]
LIBRARIES = ("torch.nn", "torch.optim", "transformers", "accelerate")  # may be patched by a plug-in
SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (os.getcwd, os.chdir),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
)


def perform(work: Work, bench: Bench, note: Note) -> Result:
    """Do one work on this worker. Raises `DamagedArtifact` where an artifact is not what it was.

    It steps aside when somebody on this host measures.
    """
    with this_host().working():
        for folder, sha256 in work.sealed.items():
            _bring(bench.folder / folder, sha256, bench)
        result = _perform(work, bench, note)
        _hand_in(work, result, bench)
        return result


def _bring(artifact: Path, sha256: str, bench: Bench) -> None:
    """Have an artifact here that was maybe made elsewhere."""
    if bench.storage is None or sealed_as(artifact) == sha256:
        return
    with bench.stages.holding_here(f"artifact-{sha256}"):
        if sealed_as(artifact) == sha256 or bench.storage.fetch(artifact, version=sha256):
            return
    raise DamagedArtifact(f"{bench.storage.uri} lacks the artifact {sha256[:12]}… of {artifact}")


def _hand_in(work: Work, result: Result, bench: Bench) -> None:
    """Let others have the artifact that was made or completed, and the log."""
    if bench.storage is None or isinstance(result, dict):
        return
    if isinstance(result, tuple):
        bench.storage.send(bench.folder / work.folder, version=result[1])
        return
    home = bench.folder / "trials" / result.trial_id
    if work.kind == "baseline":
        home = bench.recipe.baseline_folder(bench.folder, work.model)
    bench.storage.publish([home / "log.txt"])
    if result.artifact and result.sha256:
        artifact = home / result.artifact
        bench.storage.send(artifact, version=result.sha256)
        if work.kind == "trial" and bench.has_own_folder:  # few are asked for again
            shutil.rmtree(artifact)


def _perform(work: Work, bench: Bench, note: Note) -> Result:
    bench.timed_on, bench.pieces = work.timed_on, work.pieces
    if work.kind == "baseline":
        return run_baseline(work.model, bench, note)
    artifacts = {key: bench.folder / folder for key, folder in work.artifacts.items()}
    if work.kind == "speed":
        return speeds(artifacts, bench, note)
    if work.kind == "timings":
        return time_together(artifacts, bench)
    assert work.config is not None
    if work.kind == "trial":
        return run_trial(work.config, bench, note)
    return measure_test(bench.folder / work.folder, work.config, bench)


class Worker:
    """A process that does works of one study, one after another, on data and models that it keeps.

    `recipe` is resolved; `folder` is the study's, on a file system that all workers share unless the
    recipe has a storage; `limits` are those of its bench. A `claim` is held on what others may want
    to make, too.
    """

    claim: Claim = staticmethod(unclaimed)

    def __init__(
        self,
        *,
        recipe: dict[str, Any],
        folder: str,
        device: str | None,
        threads: int,
        **limits: int,
    ) -> None:
        quiet()
        torch.set_num_threads(threads)
        self._size = int(os.environ.get("WORLD_SIZE", "1"))
        if device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self._recipe, self._study, self._device = recipe, Path(folder), device
        self._folder = self._study
        if recipe.get("storage"):
            self._folder = scratch.take(scratch.scratch_name(recipe["storage"], folder))
        self._limits, self._notice = limits, Notice()
        self._clean = Clean()

    @cached_property
    def bench(self) -> Bench:
        recipe = Recipe.from_resolved(self._recipe, output_dir=self._study)
        bench = Bench(recipe, self._folder, device=self._device, claim=self.claim, **self._limits)
        bench.notice = self._notice
        options = [recipe.resources.of(model.id) for model in recipe.models]
        if self._size > 1 or any(each.strategy_name != "single" for each in options):
            waits = recipe.resources.collective_timeout_s
            join_ranks(bench.device, self._folder, timeout_s=waits)
            bench.crew = Crew(recipe.resources.of)
            self._clean.keep_group()
        return bench

    @property
    def is_broken(self) -> bool:
        """Whether other ranks wait for something that will not come."""
        bench = self.__dict__.get("bench")
        return bench is not None and bench.crew is not None and bench.crew.is_broken

    def follow(self) -> None:
        """Train what rank 0 leads, until it lets go."""
        assert self.bench.crew is not None
        self.bench.crew.follow(self.bench, after_each=self.reset)

    def facts(self) -> dict[str, Any]:
        """Raises `BadInput`."""
        return self.bench.facts()

    def do(self, work: Work, note: Note) -> Result:
        """Raises `DamagedArtifact`, `Preempted`, FileNotFoundError where the study's folder is not
        seen, and OSError (ENOSPC) where this machine's own disk is full."""
        self.check_folder()
        result = perform(work, self.bench, note)
        is_full = isinstance(result, TrialResult) and result.message.startswith(DISK_IS_FULL)
        if is_full and self.bench.has_own_folder:
            raise OSError(errno.ENOSPC, DISK_IS_FULL)
        return result

    def check_folder(self) -> None:
        """Raises FileNotFoundError where the study's folder is not seen."""
        if not self._folder.is_dir():
            raise FileNotFoundError(
                f"{os.uname().nodename} does not see the study's folder {self._folder}: output_dir"
                " has to be on a file system that all nodes share, or storage a URI that all reach"
            )

    def leave(self) -> None:
        """Its machine is about to be taken away: what it trains writes a checkpoint and ends."""
        self._notice.give()

    def reset(self) -> None:
        """Leave nothing of a work behind but what all works share."""
        self._clean.restore()
        give_memory_back()

    def rss_mb(self) -> float:
        return rss_mb()


class Clean:
    """What a process is like before any work: environment, settings and libraries.

    A gang of several keeps its process group.
    """

    def __init__(self) -> None:
        self.keeps_group = False
        self.environment = dict(os.environ)
        self.settings = [(read(), write) for read, write in SETTINGS]
        self.bindings = dict(_bindings())

    def keep_group(self) -> None:
        """The process group there is, and what it was told through the environment, stay."""
        self.keeps_group = True
        self.environment = dict(os.environ)

    def restore(self) -> None:
        """End process groups, and set everything back; random numbers start anew from one seed."""
        has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
        if has_group and not self.keeps_group:
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self._restore_environment()
        for value, write in self.settings:
            write(value)
        self._restore_bindings()
        set_seed(0)

    def _restore_environment(self) -> None:
        for name in os.environ.keys() - self.environment.keys():
            del os.environ[name]
        for name, value in self.environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value

    def _restore_bindings(self) -> None:
        """Undo patches. What was imported since is taken as it is."""
        for (owner, name), value in _bindings():
            if self.bindings.setdefault((owner, name), value) is not value:
                setattr(owner, name, self.bindings[owner, name])


def _bindings() -> Iterator[tuple[tuple[Any, str], Any]]:
    """What can be called in the libraries: (module or class, name) and what that is."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith(LIBRARIES)}
    for module_name, module in modules.items():
        for name, value in list(vars(module).items()):
            if not callable(value):
                continue
            yield (module, name), value
            if isinstance(value, type) and value.__module__ == module_name:
                methods = list(vars(value).items())
                yield from (((value, n), method) for n, method in methods if callable(method))


def give_memory_back() -> None:
    """To the device and to the system, as far as nothing refers to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def rss_mb() -> float:
    """Resident memory of this process in 10⁶ bytes; its peak where the system tells no more."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
