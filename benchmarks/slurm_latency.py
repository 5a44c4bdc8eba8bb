"""What a job of Slurm adds to a study: from sbatch to its first trial, and from its last to its end.

    python benchmarks/slurm_latency.py [--quick] [--json FILE] [--jobs 5]

Jobs of three nodes, one after another, on a Slurm of one's own over three hosts (see hosts.py and
slurm_cluster.py; needs Linux, root and Slurm). Each runs a study of small trials: its Ray is
started on all nodes, the dense model trained, trials run, the front timed and scored, and all of
it ended. Every figure is in seconds by one clock, and the median of the jobs; when a job started
is told by Slurm, in whole seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from hosts import REPOSITORY, Hosts
from slurm_cluster import Slurm, slurm_over
from small_study import SMALL, WORDS

from orchestrator.launch.slurm import Job, batch_script, submit
from orchestrator.ledger import Event, Ledger
from orchestrator.manifest import ledger_key

Json = dict[str, Any]
NUM_NODES, NUM_TRIALS = 3, 6


def write_recipe(folder: Path) -> Path:
    """Of trials that differ in their seed alone."""
    folder.mkdir()
    rows = (f"{WORDS[i % 4]} {WORDS[4 + i % 6]} {WORDS[i % 10]},{'ab'[i % 2]}" for i in range(200))
    (folder / "data.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    finetune = {"learning_rate": 1e-3, "max_steps": 20, "bf16": False}
    recipe = {
        "name": "latency",
        "output_dir": str(folder / "study"),
        "model": SMALL,
        "task": {"name": "text_classification", "data": str(folder / "data.csv"), "max_length": 16},
        "target": {"threads": 1},
        "objectives": ["accuracy", "size_mb"],
        "baseline": {"finetune": finetune},
        "space": {"finetune": finetune, "seed": {"choice": list(range(NUM_TRIALS))}},
        "search": {"name": "grid"},
        "references": {"dense_int8": False, "first_layers": [], "random_twin": False},
        "measure": {"max_seconds": 0.2, "num_inputs": 4, "num_check_inputs": 8},
        "resources": {"cpus_per_trial": 1},
    }
    path = folder / "latency.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run_job(slurm: Slurm, folder: Path) -> Json:
    """One job, from its submission to when Slurm calls it completed."""
    recipe = write_recipe(folder)
    flags = (f"--output={folder}/job.txt",)
    script = batch_script(recipe, [], Job(num_nodes=NUM_NODES, flags=flags))
    submitted = time.time()
    number = submit(script)
    if slurm.status(number):
        raise RuntimeError((folder / "job.txt").read_text()[-2000:])
    ended = time.time()
    begun = datetime.fromisoformat(slurm.job(number)["StartTime"]).timestamp()
    study = folder / "study"
    with closing(Ledger(study / "ledger", ledger_key(study))) as ledger:
        events = list(ledger.events())
    started = times(events, "started")
    last = times(events, "finished")[-1]
    return {
        "sbatch_to_job_start_s": begun - submitted,
        "sbatch_to_baseline_s": started[0] - submitted,
        "sbatch_to_first_trial_s": times(events, "started", trials=True)[0] - submitted,
        "last_trial_to_front_s": (study / "front.json").stat().st_mtime - last,
        "last_trial_to_job_end_s": ended - last,
        "sbatch_to_job_end_s": ended - submitted,
    }


def times(events: list[Event], kind: str, *, trials: bool = False) -> list[float]:
    """When works of any kind, or trials alone, came to this."""
    return [
        event.time
        for event in events
        if event.kind == kind and not (trials and event.key.startswith("baseline:"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one job")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--jobs", type=int, default=5)
    asked = parser.parse_args()
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # of jobs
    with tempfile.TemporaryDirectory() as name, Hosts(NUM_NODES) as hosts, slurm_over(hosts) as own:
        jobs = []
        for number in range(1 if asked.quick else asked.jobs):
            jobs.append(run_job(own, Path(name) / str(number)))
            print(json.dumps(jobs[-1]), file=sys.stderr, flush=True)
    report = {name: round(statistics.median(job[name] for job in jobs), 1) for name in jobs[0]}
    for name, value in report.items():
        print(f"{name:26} {value}")
    if asked.json:
        asked.json.write_text(json.dumps(report | {"jobs": jobs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
