"""A study on three hosts that are disturbed again and again, held against one that was left alone.

    python benchmarks/chaos.py [--minutes M] [--seed S] [--quick] [--json FILE]

Trials hold their worker for some seconds, train a tiny model and write real artifacts. Meanwhile
workers are killed and stopped, hosts lose power, links are cut, the driver is killed, the head of
the cluster goes down, and the study's disk freezes or fills up; what an operator or a scheduler would do is
done: power comes back, Ray is started again, and the same command is given again. In the end the
two ledgers are compared by compare_ledgers.py. Needs Linux and root (see hosts.py).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import yaml
from compare_ledgers import compare
from hosts import REPOSITORY, Hosts, environment
from small_study import WORDS

from orchestrator.ledger import Event, Ledger
from orchestrator.manifest import ledger_key

Json = dict[str, Any]
HOLD_S = 4.0  # that a trial keeps its worker beside its training
PAUSE_S = (8.0, 25.0)  # between the end of one disturbance and the next
AWAY_S = (3.0, 12.0)  # that power, a link or the disk is away
PATIENCE_S = 25.0  # within which a loss is told of, if there was one
LIMIT_S = 240.0  # within which the study has to get on again
STORE_MB = 600
WORKER = "ray::Ray[W]orker"  # a pattern that the command which looks for it does not match
PYTHON_PATH = f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"
SETTINGS = {"PYTHONPATH": PYTHON_PATH, "CHAOS_HOLD_S": str(HOLD_S)}  # of workers, as of Ray
GROUPS = """
import json, ray
from ray.util import placement_group_table
ray.init(log_to_driver=False)
states = [group["state"] for group in placement_group_table().values()]
print(json.dumps(sum(state != "REMOVED" for state in states)))
"""


class Study:
    """A recipe, its folder, and the driver that runs it on host 1; started again where it ends early."""

    def __init__(self, home: Path, num_trials: int, hosts: Hosts) -> None:
        self.hosts, self.home = hosts, home
        self.folder = home / "store" / "study"
        self.recipe = write_recipe(home, self.folder, num_trials, address=hosts.ray_address)
        self.log = home / "driver.log"
        self.num_started = 0
        self.driver: subprocess.Popen[bytes] | None = None

    def keep_running(self) -> bool:
        """Start a driver unless one runs; False once the study has come to its end."""
        if self.driver is not None and self.driver.poll() is None:
            return True
        if self.driver is not None and self.driver.returncode == 0:
            return False
        if self.driver is not None and self.driver.returncode == 2:
            raise RuntimeError(self.log.read_text()[-2000:])
        self.num_started += 1
        command = [sys.executable, "-m", "orchestrator.cli", "run", str(self.recipe)]
        self.driver = self.hosts.start(1, command, log=self.log, PYTHONPATH=PYTHON_PATH)
        return True

    def events(self) -> list[Event]:
        if not (self.folder / "ledger").exists():
            return []
        with closing(Ledger(self.folder / "ledger", ledger_key(self.folder))) as ledger:
            return list(ledger.events())


def write_recipe(home: Path, folder: Path, num_trials: int, *, address: str | None) -> Path:
    rows = [
        f"{WORDS[i % 4]} {WORDS[4 + i % 6]} {WORDS[i * 7 % 10]},{'ab'[i % 2]}" for i in range(200)
    ]
    (home / "data.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    finetune = {"learning_rate": 1e-3, "max_steps": 8, "logging_steps": 1, "bf16": False}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ray = {"address": address, "cpus_per_trial": 1, "silence_s": 15, "max_attempts": 20}
    recipe = {
        "name": "chaos",
        "output_dir": str(folder),
        "allow_code": True,
        "model": {
            "id": "bert",
            "config": {"model_type": "bert", "intermediate_size": 64, **shape},
            "tokenizer": {"train": "bpe", "vocab_size": 300},
        },
        "task": {"name": "text_classification", "data": str(home / "data.csv"), "max_length": 16},
        "objectives": ["accuracy", "size_mb"],
        "baseline": {"finetune": finetune | {"max_steps": 20}},
        "measure": {"max_seconds": 0.2, "num_inputs": 4, "num_check_inputs": 8},
        "references": {"dense_int8": False, "first_layers": [], "random_twin": False},
        "space": {
            "prune": "chaos_parts:Slow",
            "finetune": finetune,
            "seed": {"choice": list(range(num_trials))},
        },
        "search": {"name": "grid"},
        "keep": "all",
        "resources": ray if address else {"engine": "inline"},
    }
    path = home / "chaos.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


# -- what happens --------------------------------------------------------------------------------


class Chaos:
    """Faults by name; each does its harm, waits, and repairs what an operator would."""

    def __init__(self, hosts: Hosts, study: Study, rng: random.Random) -> None:
        self.hosts, self.study, self.rng = hosts, study, rng
        self.faults: dict[str, Callable[[], None]] = {
            "worker killed": lambda: self.signal_worker("-KILL"),
            "worker hung": lambda: self.signal_worker("-STOP"),
            "host off": self.host_off,
            "link cut": self.link_cut,
            "driver killed": self.driver_killed,
            "head off": self.head_off,
            "disk frozen": self.disk_frozen,
            "disk full": self.disk_full,
        }

    def signal_worker(self, signal: str) -> None:
        """The newest worker of a host that has one."""
        for number in self.rng.sample(list(self.hosts.numbers), 3):
            if (
                self.hosts.run(number, ["pkill", signal, "-n", "-f", "ray::RayWorker"]).returncode
                == 0
            ):
                return

    def host_off(self) -> None:
        number = self.rng.choice([2, 3])
        self.hosts.power_off(number)
        self.wait()
        self.hosts.power_on(number)
        self.hosts.start_ray(number, **SETTINGS)

    def link_cut(self) -> None:
        """Longer than Ray waits: the node is given up, and has to come again."""
        number = self.rng.choice([2, 3])
        self.hosts.cut(number)
        self.wait()
        self.hosts.mend(number)
        time.sleep(8)  # what was given up meanwhile ends itself
        if self.hosts.run(number, ["pgrep", "-f", "[r]aylet/raylet"]).returncode:
            self.hosts.start_ray(number, **SETTINGS)

    def driver_killed(self) -> None:
        self.hosts.run(1, ["pkill", "-KILL", "-f", "orchestrator[.]cli"])

    def head_off(self) -> None:
        """Without Redis a cluster does not outlive its head: all of it is started anew."""
        for number in self.hosts.numbers:
            self.hosts.power_off(number)
        self.wait()
        for number in self.hosts.numbers:
            self.hosts.power_on(number)
        self.hosts.start_ray(**SETTINGS)

    def disk_frozen(self) -> None:
        """Who writes to it hangs."""
        store = str(self.study.folder.parent)
        subprocess.run(["fsfreeze", "--freeze", store], check=True)
        try:
            self.wait()
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", store], check=True)

    def disk_full(self) -> None:
        store = self.study.folder.parent
        free = shutil.disk_usage(store).free
        subprocess.run(["fallocate", "-l", str(max(free - 4096, 4096)), str(store / "filler")])
        self.wait()
        (store / "filler").unlink(missing_ok=True)

    def wait(self) -> None:
        time.sleep(self.rng.uniform(*AWAY_S))


def disturb(name: str, chaos: Chaos) -> Json:
    """One fault: when the study told of it, what it cost, and when the next trial had ended."""
    study, begun = chaos.study, time.time()
    chaos.faults[name]()
    found: list[Event] = []
    goes_on = True
    while goes_on and time.time() - begun < LIMIT_S and not is_over(found, begun):
        time.sleep(0.5)
        goes_on = study.keep_running()
        found = [event for event in study.events() if event.time > begun]
    lost = [event for event in found if event.kind == "lost"]
    since = lost[-1].time if lost else begun
    ended = [e for e in found if e.kind == "finished" and e.time > since]
    return {
        "kind": name,
        "noticed_s": round(lost[0].time - begun, 1) if lost else None,
        "lost_device_seconds": round(sum(e.payload["device_seconds"] for e in lost), 1),
        "recovered_s": round(ended[0].time - begun, 1) if ended else None,
        "went_on": bool(ended) or not goes_on,
    }


def is_over(events: list[Event], begun: float) -> bool:
    """Whether a trial has ended after the last loss, or nothing was lost for a while."""
    kinds = [event.kind for event in events if event.kind in ("lost", "finished")]
    return kinds[-1:] == ["finished"] and ("lost" in kinds or time.time() - begun > PATIENCE_S)


# -- the whole -----------------------------------------------------------------------------------


def undisturbed(home: Path, num_trials: int) -> Path:
    """The same trials one after another in one process."""
    home.mkdir()
    folder = home / "study"
    recipe = write_recipe(home, folder, num_trials, address=None)
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(recipe)]
    one_thread = environment(PYTHONPATH=PYTHON_PATH, OMP_NUM_THREADS="1")
    subprocess.run(command, check=True, env=one_thread, capture_output=True)
    return folder


def run(home: Path, *, minutes: float, seed: int, kinds: list[str] | None) -> Json:
    rng = random.Random(seed)
    num_trials = max(6, int(minutes * 60 / HOLD_S))
    with mounted(home / "store"), Hosts(3) as hosts:  # which see what was mounted before them
        study = Study(home, num_trials, hosts)
        hosts.start_ray(**SETTINGS)
        chaos, faults = Chaos(hosts, study, rng), []
        order = kinds or list(chaos.faults)
        study.keep_running()
        until_first_trial(study)
        end = time.time() + minutes * 60
        while study.keep_running() and time.time() < end:
            name = order[len(faults) % len(order)] if kinds else rng.choice(order)
            faults.append(disturb(name, chaos))
            print(json.dumps(faults[-1]), flush=True)
            time.sleep(rng.uniform(*PAUSE_S))
        while study.keep_running():
            time.sleep(1)
        groups = hosts.run(1, [sys.executable, "-c", GROUPS], RAY_ADDRESS=hosts.ray_address)
        leaks = int(groups.stdout or -1)
        leaks += hosts.run(1, ["pgrep", "-f", WORKER]).returncode == 0
        kept = home / "kept"
        shutil.copytree(study.folder, kept)
    return {
        "faults": faults,
        "drivers": study.num_started,
        "leaks": leaks,
        "ledger": str(kept / "ledger"),
        "trials_asked": num_trials,
    }


def until_first_trial(study: Study) -> None:
    deadline = time.time() + LIMIT_S
    while not any(event.kind == "finished" for event in study.events()):
        if time.time() > deadline or not study.keep_running():
            raise RuntimeError(f"no trial ends: {study.log.read_text()[-2000:]}")
        time.sleep(0.5)


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A disk of its own in `folder`, which can freeze and fill up."""
    image = folder.with_suffix(".img")
    folder.mkdir()
    subprocess.run(["fallocate", "-l", f"{STORE_MB}M", str(image)], check=True)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a worker and the driver killed once")
    parser.add_argument("--json", type=Path, help="write every figure there")
    asked = parser.parse_args()
    kinds = ["worker killed", "driver killed"] if asked.quick else None
    minutes = 0.4 if asked.quick else asked.minutes
    home = Path(tempfile.mkdtemp(prefix="chaos-"))
    report = run(home, minutes=minutes, seed=asked.seed, kinds=kinds)
    alone = undisturbed(home / "alone", report.pop("trials_asked"))
    report |= compare(home / "kept", alone) | {"undisturbed_ledger": str(alone / "ledger")}
    told = {name: value for name, value in report.items() if name != "faults"}
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
