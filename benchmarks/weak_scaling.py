"""Weak scaling: as many trials a gang on more and more gangs and hosts, beside the ideal.

    python benchmarks/weak_scaling.py [--quick] [--json FILE] [--trial-s 30] [--trials-a-gang 4]
                                      [--layouts 1x1 1x8 1x64 2x8 3x8] [--gangs-a-process 1]

A layout is hosts × gangs on each. Driver, ledger, Ray and gangs are real; a trial holds its gang
for `--trial-s` seconds and makes its outcome up. The driver runs on host 1. Gangs start one after
another as the cores allow, so each begins with a trial that ends once all of them are there, and
all at the same moment: that is `start_s`, from the driver's first line on. What is counted comes
then: `efficiency` is the ideal time of the trials, `--trials-a-gang` × `--trial-s`, over the time
from that moment to the end of the last one. The driver's CPU share is that of one core: while it is
counted, and while all gangs work and none ends (`waiting`). Goal: an efficiency of 0.97 at trials of
30 seconds. Needs Linux and root (see hosts.py).

With `--gangs-a-process N` so many gangs share a process, by which a small machine holds hundreds
of them; to the driver each is a gang as any other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from control_plane import recipe_for, surrogate
from hosts import RAY_IS_PATIENT, REPOSITORY, Hosts
from rich.console import Console
from rich.table import Table

from orchestrator.facts import facts_of
from orchestrator.recipe import Recipe
from orchestrator.study import Silent, Study
from orchestrator.trial import Result, TrialResult, Work

Json = dict[str, Any]
LAYOUTS = ("1x1", "1x8", "1x64", "2x8", "3x8")
QUICK = ("1x2", "2x1")
TOGETHER_S = 2.0  # between the moment when the last gang is there and the one when all begin
LOOK_S = 0.2
PYTHON_PATH = f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"
SETTINGS = {
    "PYTHONPATH": PYTHON_PATH,
    "RAY_prestart_worker_first_driver": "0",  # none that no gang uses
    "RAY_worker_niceness": "0",
    **RAY_IS_PATIENT,
}
STAGES = (
    "load",
    "prune",
    "finetune",
    "convert",
    "export",
    "check",
    "quality",
)  # as trials tell them


# -- a gang's side -------------------------------------------------------------------------------


class Holding:
    """A worker whose trials keep its place and compute nothing; the first waits for all gangs."""

    def __init__(self, *, recipe: Json, folder: str, **others: Any) -> None:
        self.recipe, self.meeting = recipe, Path(folder).parent / "meeting"
        self.plan = json.loads((self.meeting / "plan").read_text())
        self.is_broken = self.has_met = False

    def facts(self) -> Json:
        return facts_of(Recipe.from_resolved(self.recipe))

    def do(self, work: Work, note: Callable[[str], None]) -> Result:
        _, result = surrogate(work)
        if work.kind != "trial":
            return result
        assert isinstance(result, TrialResult)
        is_first, begun = not self.has_met, time.time()
        self.meet() if is_first else self.hold(begun, note)
        details = {"is_first": is_first, "ended": time.time()}
        return result.model_copy(update={"details": details})

    def hold(self, begun: float, note: Callable[[str], None]) -> None:
        for number, stage in enumerate(STAGES, 1):
            note(stage)
            until = begun + self.plan["trial_s"] * number / len(STAGES)
            time.sleep(max(0.0, until - time.time()))

    def meet(self) -> None:
        """Until all gangs are there, and then to the same moment in all of them."""
        (self.meeting / f"gang-{socket.gethostname()}-{os.getpid()}-{id(self)}").touch()
        begin = self.meeting / "begin"
        if len(list(self.meeting.glob("gang-*"))) == self.plan["num_gangs"]:
            begin.touch()
        while not begin.exists():
            time.sleep(LOOK_S)
        time.sleep(max(0.0, begin.stat().st_mtime + TOGETHER_S - time.time()))
        self.has_met = True

    def reset(self) -> None: ...

    def rss_mb(self) -> float:
        return 0.0


# -- the driver's side ---------------------------------------------------------------------------


class Clock(Silent):
    """What each trial said of itself, and the time and CPU seconds of this process when it was heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[Json, float, float]] = []
        self.num_files = 0  # open ones, connections among them

    def trial_finished(self, key: str, result: TrialResult) -> None:
        if "is_first" in result.details:
            self.heard.append((result.details, time.time(), time.process_time()))
            self.num_files = max(self.num_files, psutil.Process().num_fds())


def drive(resolved: Json, gangs_a_process: int) -> Json:
    """One study in this process, and what its clock says."""
    began = time.time()
    from orchestrator.launch.ray_gangs import RayGangs

    recipe, clock = Recipe.from_resolved(resolved), Clock()
    folder = Path(recipe.output_dir)
    if gangs_a_process > 1:
        import crowd

        crowd.share_processes(gangs_a_process)
    launcher = RayGangs(recipe, folder, worker="weak_scaling:Holding")
    Study(recipe, launcher=launcher, watch=clock).run()
    return figures(clock, began) | {"whole_s": time.time() - began}


def figures(clock: Clock, began: float) -> Json:
    first = [heard for heard in clock.heard if heard[0]["is_first"]]
    counted = [heard for heard in clock.heard if not heard[0]["is_first"]]
    together = max(details["ended"] for details, _, _ in first)
    seconds = max(details["ended"] for details, _, _ in counted) - together
    (_, since, cpu_then), (_, until, cpu_now) = first[0], counted[-1]
    pairs = zip(clock.heard[len(first) - 1 :], clock.heard[len(first) :], strict=False)
    quiet = max(pairs, key=lambda pair: pair[1][1] - pair[0][1])  # the longest time without an end
    return {
        "trials": len(counted),
        "seconds": seconds,
        "start_s": together - began,
        "driver_cpu_share": (cpu_now - cpu_then) / (until - since),
        "driver_cpu_share_waiting": (quiet[1][2] - quiet[0][2]) / (quiet[1][1] - quiet[0][1]),
        "driver_ms_a_trial": 1e3 * (cpu_now - cpu_then) / len(counted),
        "driver_open_files": clock.num_files,
        "driver_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


# -- the whole -----------------------------------------------------------------------------------


def measure(folder: Path, num_hosts: int, gangs_a_host: int, asked: argparse.Namespace) -> Json:
    """One study on a cluster of its own."""
    num_gangs = num_hosts * gangs_a_host
    with Hosts(num_hosts) as hosts:
        hosts.start_ray(num_cpus=gangs_a_host, **SETTINGS)
        recipe = recipe_for(
            folder,
            "random",
            num_gangs * (1 + asked.trials_a_gang),
            address=hosts.ray_address,
            max_gangs=num_gangs,
            cpus_per_trial=1,
            recycle_after=1000,
        )
        facts_of(recipe)  # so that no worker has to load torch for it
        (folder / "meeting").mkdir()
        plan = {"num_gangs": num_gangs, "trial_s": asked.trial_s}
        (folder / "meeting" / "plan").write_text(json.dumps(plan))
        given = folder / "driver.json"
        given.write_text(json.dumps([recipe.resolved(), asked.gangs_a_process]))
        done = hosts.run(
            1,
            [sys.executable, __file__, "--drive", given],
            limit_s=3600,
            PYTHONPATH=PYTHON_PATH,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: Json = json.loads(done.stdout.splitlines()[-1])
    ideal_s = asked.trials_a_gang * asked.trial_s
    return {
        "hosts": num_hosts,
        "gangs": num_gangs,
        "trial_s": asked.trial_s,
        "trials_per_hour": 3600 * found["trials"] / found["seconds"],
        "ideal_per_hour": 3600 * num_gangs / asked.trial_s,
        "efficiency": ideal_s / found["seconds"],
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two gangs, trials of a second")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--trial-s", type=float, help="seconds that a trial takes; default 30")
    parser.add_argument("--trials-a-gang", type=int, help="default 4")
    parser.add_argument("--layouts", nargs="+", help="hosts × gangs on each; default: as above")
    parser.add_argument("--gangs-a-process", type=int, default=1)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.drive:
        print(json.dumps(drive(*json.loads(asked.drive.read_text()))))
        return
    asked.trial_s = asked.trial_s or (1.0 if asked.quick else 30.0)
    asked.trials_a_gang = asked.trials_a_gang or (3 if asked.quick else 4)
    rows = []
    for layout in asked.layouts or (QUICK if asked.quick else LAYOUTS):
        num_hosts, gangs_a_host = map(int, layout.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(Path(folder) / "run", num_hosts, gangs_a_host, asked))
        print(json.dumps(rows[-1]), flush=True)
    show(rows)
    if asked.json:
        asked.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def show(rows: Sequence[Json]) -> None:
    names = ("hosts", "gangs", "trials", "trials an hour", "ideal", "efficiency", "driver's CPU")
    table = Table(*names, "waiting", "ms a trial", "start", "driver MB")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("hosts", "gangs", "trials")),
            *(f"{row[name]:.0f}" for name in ("trials_per_hour", "ideal_per_hour")),
            f"{row['efficiency']:.4f}",
            *(f"{row[name]:.1%}" for name in ("driver_cpu_share", "driver_cpu_share_waiting")),
            f"{row['driver_ms_a_trial']:.1f}",
            f"{row['start_s']:.1f} s",
            f"{row['driver_rss_mb']:.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
