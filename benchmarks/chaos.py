"""A study on three hosts that are disturbed again and again, held against one that was left alone.

    python benchmarks/chaos.py [--minutes M] [--seed S] [--trials N] [--kinds "A;B"]
                               [--quick] [--json FILE]

Trials hold their worker for some seconds, train a tiny model and write real artifacts. Meanwhile
workers are killed and stopped, hosts lose power or are taken away on notice, links are cut, the
driver is killed, the head of the cluster goes down, and the study's disk freezes or fills up. What
an operator or a scheduler would do is done: power comes back, Ray is started again, and the same
command is given again, on any host. In the end the two ledgers are compared by compare_ledgers.py.

The head keeps its state in Redis on a machine of its own. Where it is lost without Redis, as is
said here, that state goes with it. Needs Linux and root (see hosts.py), and redis-server.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import yaml
from compare_ledgers import compare, finished
from hosts import OUTSIDE, REPOSITORY, Hosts, environment
from small_study import WORDS

from orchestrator.ledger import Event, Ledger
from orchestrator.manifest import ledger_key

Json = dict[str, Any]
HOLD_S, NUM_STEPS, SAVE_STEPS = 8.0, 16, 4  # of a trial's training
PAUSE_S = (8.0, 25.0)  # between the end of one disturbance and the next
AWAY_S = (3.0, 12.0)  # that power, a link or the disk is away
FULL_S = (15.0, 40.0)  # that the disk is full
LONG_S = 60.0  # that the disk is away now and then
NOTICE_S = 20  # before a host is taken away
PATIENCE_S = 30.0  # within which a loss is told of, if there was one
LIMIT_S = 300.0  # within which the study has to get on again
TAIL_S = 1200.0  # within which it ends, once nothing disturbs it any more
WHOLE_RUNS = 10  # that come to an end without all trials before that is believed
STARTS = 6  # of Ray on a host, before that is given up
REFUSED_IN_A_ROW = 5  # that the command is given before its message is believed
STORE_MB, REDIS_PORT = 600, 6390
WORKER, DRIVER, RAYLET = "ray::RayW[o]rker", "orchestrator[.]cli", "[r]aylet/raylet"
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
PYTHON_PATH = f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"
SETTINGS = {  # of workers, as of Ray
    "PYTHONPATH": PYTHON_PATH,
    "CHAOS_HOLD_S": str(HOLD_S),
    "RAY_worker_niceness": "0",  # else all else on the machine goes before them
    "RAY_health_check_period_ms": "1000",  # what is only slow, as on a busy machine, is not lost
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
GROUPS = """
import json, ray
from ray.util import placement_group_table
ray.init(log_to_driver=False)
states = [group["state"] for group in placement_group_table().values()]
print(json.dumps(sum(state != "REMOVED" for state in states)))
"""


class Study:
    """A recipe, its folder, and the driver that runs it on one host; started again where it ends early.

    `ended` says when each driver ended, and with which exit status. The next one is on any host by
    `rng`, where there is one: there it waits until the last is not heard of any more.
    """

    def __init__(
        self, home: Path, num_trials: int, hosts: Hosts, rng: random.Random | None
    ) -> None:
        self.hosts, self.home, self.num_trials, self.rng = hosts, home, num_trials, rng
        self.folder = home / "store" / "study"
        self.recipe = write_recipe(home, self.folder, num_trials, address=hosts.ray_address)
        self.log = home / "driver.log"
        self.num_started, self.place = 0, 1
        self.ended: list[tuple[float, int]] = []

    def keep_running(self) -> bool:
        """Start a driver unless one runs; False once the study has come to its end.

        It ends early, and says so, where the disk is full; and a trial that failed for that is
        tried again when the command is given again.
        """
        if len(self.ended) < self.num_started:
            return True
        if self.ended:
            num_whole = sum(status == 0 for _, status in self.ended)
            if self.ended[-1][1] == 0 and (self.is_complete() or num_whole > WHOLE_RUNS):
                return False
            if [s for _, s in self.ended[-REFUSED_IN_A_ROW:]] == [2] * REFUSED_IN_A_ROW:
                raise RuntimeError(self.log.read_text()[-2000:])
            if self.rng:
                self.place = self.rng.choice(list(self.hosts.numbers))
        self.num_started += 1
        command = [sys.executable, "-m", "orchestrator.cli", "run", str(self.recipe)]
        driver = self.hosts.start(self.place, command, log=self.log, PYTHONPATH=PYTHON_PATH)
        threading.Thread(target=self._watch, args=[driver], daemon=True).start()
        return True

    def _watch(self, driver: subprocess.Popen[bytes]) -> None:
        status = driver.wait()
        self.ended.append((time.time(), status))

    def is_complete(self) -> bool:
        """Whether every trial has completed."""
        results = dict(finished(self.folder))
        completed = [key for key, each in results.items() if each["status"] == "completed"]
        return len(completed) > self.num_trials  # and the baseline

    def events(self) -> list[Event]:
        if not (self.folder / "manifest.json").exists():
            return []
        with closing(Ledger(self.folder / "ledger", ledger_key(self.folder))) as ledger:
            return list(ledger.events())


def write_recipe(home: Path, folder: Path, num_trials: int, *, address: str | None) -> Path:
    rows = [
        f"{WORDS[i % 4]} {WORDS[4 + i % 6]} {WORDS[i * 7 % 10]},{'ab'[i % 2]}" for i in range(200)
    ]
    (home / "data.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    finetune = {"learning_rate": 1e-3, "max_steps": NUM_STEPS, "logging_steps": 1, "bf16": False}
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
        "resources": {"save_steps": SAVE_STEPS, **(ray if address else {"engine": "inline"})},
    }
    path = home / "chaos.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


# -- what happens --------------------------------------------------------------------------------


class Chaos:
    """Faults by name; each does its harm, waits, and repairs what an operator would."""

    def __init__(self, hosts: Hosts, study: Study, rng: random.Random) -> None:
        self.hosts, self.study, self.rng = hosts, study, rng
        self.others = [number for number in hosts.numbers if number != 1]  # without the head
        outside = hosts.address(OUTSIDE)
        self.redis = {
            "RAY_REDIS_ADDRESS": f"{outside}:{REDIS_PORT}",
            "RAY_external_storage_namespace": "chaos",
        }
        self.faults: dict[str, Callable[[], None]] = {
            "worker killed": lambda: self.signal_worker("KILL"),
            "worker hung": lambda: self.signal_worker("STOP"),
            "host off": self.host_off,
            "preemption": self.preemption,
            "link cut": self.link_cut,
            "driver killed": self.driver_killed,
            "head off": self.head_off,
            "head off, Redis": self.head_off_with_redis,
            "disk frozen": self.disk_frozen,
            "disk full": self.disk_full,
        }

    def start_ray(self) -> None:
        self.start_head()
        self.start(*self.others)

    def start_head(self) -> None:
        self.start(1, **self.redis)

    def start(self, *numbers: int, **settings: str) -> None:
        """Ray on these hosts; again where it does not come up.

        On a busy machine its raylet ends when its agent has not come up within 15 s.
        """
        for attempt in range(STARTS):
            try:
                self.hosts.start_ray(*numbers, **SETTINGS, **settings)
                return
            except (RuntimeError, subprocess.TimeoutExpired):
                if attempt == STARTS - 1:
                    raise
            for number in numbers:
                self.stop(number)

    def stop(self, number: int) -> None:
        self.hosts.run(number, [*RAY, "stop", "--force"])

    def signal_worker(self, signal: str) -> None:
        """One of a host that has any; every host has room for one gang."""
        for number in self.rng.sample(list(self.hosts.numbers), len(self.hosts.numbers)):
            found = self.hosts.run(number, ["pgrep", "-f", WORKER]).stdout.split()
            if found:
                self.hosts.run(number, ["kill", f"-{signal}", found[0]])
                return

    def host_off(self) -> None:
        number = self.rng.choice(self.others)
        self.hosts.power_off(number)
        self.wait()
        self.power_on(number)

    def preemption(self) -> None:
        """A host is taken away on notice, and another comes in its place."""
        number = self.rng.choice(self.others)
        self.hosts.give_notice(number, seconds=NOTICE_S)
        time.sleep(NOTICE_S)
        self.hosts.power_off(number)
        self.wait()
        self.power_on(number)

    def power_on(self, number: int) -> None:
        self.hosts.power_on(number)
        self.start(number)

    def link_cut(self) -> None:
        """Longer than Ray waits, mostly: the node is given up, and has to come again."""
        number = self.rng.choice(self.others)
        self.hosts.cut(number)
        self.wait()
        self.hosts.mend(number)
        time.sleep(8)  # what was given up meanwhile ends itself
        if self.hosts.run(number, ["pgrep", "-f", RAYLET]).returncode:
            self.start(number)

    def driver_killed(self) -> None:
        self.hosts.run(self.study.place, ["pkill", "-KILL", "-f", DRIVER])

    def head_off(self) -> None:
        """A cluster does not outlive a head that forgets it: Ray is started anew on all hosts."""
        self.hosts.power_off(1)
        self.wait()
        self.forget()
        self.hosts.power_on(1)
        self.start_head()
        for number in self.others:
            self.stop(number)
        self.start(*self.others)

    def forget(self) -> None:
        """All that Redis has."""
        with socket.create_connection((self.hosts.address(OUTSIDE), REDIS_PORT), 10) as redis:
            redis.sendall(b"FLUSHALL\r\n")
            assert redis.recv(64).startswith(b"+OK")

    def head_off_with_redis(self) -> None:
        """The other hosts wait for it."""
        self.hosts.power_off(1)
        self.wait()
        self.hosts.power_on(1)
        self.start_head()

    def disk_frozen(self) -> None:
        """Who writes to it hangs."""
        store = str(self.study.folder.parent)
        seconds = LONG_S if self.rng.random() < 0.4 else self.rng.uniform(*AWAY_S)
        subprocess.run(["fsfreeze", "--freeze", store], check=True)
        try:
            time.sleep(seconds)
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", store], check=True)

    def disk_full(self) -> None:
        store = self.study.folder.parent
        free = shutil.disk_usage(store).free
        subprocess.run(["fallocate", "-l", str(max(free - 4096, 4096)), str(store / "filler")])
        time.sleep(self.rng.uniform(*FULL_S))
        (store / "filler").unlink(missing_ok=True)

    def wait(self) -> None:
        time.sleep(self.rng.uniform(*AWAY_S))


def disturb(name: str, chaos: Chaos) -> Json:
    """One fault: when it was noticed, what it cost, and when all that it cost had been made again."""
    study, begun = chaos.study, time.time()
    num_ended = len(study.ended)
    chaos.faults[name]()
    repaired = time.time()
    goes_on = True
    aftermath = Aftermath(begun, repaired, study.events(), [])
    while goes_on and time.time() - repaired < LIMIT_S and not aftermath.is_over:
        time.sleep(0.5)
        goes_on = study.keep_running()
        aftermath = Aftermath(begun, repaired, study.events(), study.ended[num_ended:])
    return {"kind": name, **aftermath.told(), "went_on": aftermath.is_over or not goes_on}


class Aftermath:
    """What followed a fault that `begun` at a time, from a study's events and ends of its drivers."""

    def __init__(
        self,
        begun: float,
        repaired: float,
        events: list[Event],
        ended: list[tuple[float, int]],
    ) -> None:
        self.begun, self.repaired, self.ended = begun, repaired, ended
        found = [event for event in events if event.time > begun]
        self.lost = [event for event in found if event.kind == "lost"]
        self.left_behind = left_behind(events, begun)
        self.finished = {event.key: event.time for event in found if event.kind == "finished"}

    @property
    def is_hit(self) -> bool:
        """Whether it did any harm."""
        return bool(self.lost or self.left_behind or self.ended)

    @property
    def to_make_again(self) -> set[str]:
        trains = ("trial", "baseline")
        return {e.key for e in self.lost if e.payload["work"] in trains} | set(self.left_behind)

    @property
    def is_over(self) -> bool:
        """Whether all is made again, or nothing was lost for a while and the study gets on."""
        since = max([self.repaired, *(when for when, _ in self.ended)])
        gets_on = any(when > since for when in self.finished.values())
        all_made = self.to_make_again <= self.finished.keys()
        return all_made and gets_on and (self.is_hit or time.time() - self.begun > PATIENCE_S)

    def told(self) -> Json:
        noticed = [e.time for e in self.lost] + [when for when, _ in self.ended]
        again = self.to_make_again
        done = [when for key, when in self.finished.items() if key in again]
        if not again:  # the next trial that ended
            done = sorted(when for when in self.finished.values() if when > self.repaired)[:1]
        seconds = sum(e.payload["device_seconds"] for e in self.lost)
        seconds += sum(self.left_behind.values())
        return {
            "hit": self.is_hit,
            "repaired_s": round(self.repaired - self.begun, 1),
            "noticed_s": round(min(noticed) - self.begun, 1) if noticed else None,
            "works_lost": len(self.lost) + len(self.left_behind),
            "lost_device_seconds": round(seconds, 1),
            "recovered_s": round(max(done) - self.begun, 1) if done else None,
            "drivers_ended": [status for _, status in self.ended],
            "why": sorted({e.payload["message"][:90] for e in self.lost}),
        }


def left_behind(events: list[Event], begun: float) -> dict[str, float]:
    """Device-seconds by work of what a driver had begun that ended after `begun` without a word."""
    running: dict[str, Event] = {}
    found: dict[str, float] = {}
    for event in events:
        before = (
            running.pop(event.key, None) if event.kind in ("started", "lost", "finished") else None
        )
        if event.kind == "started":
            running[event.key] = event
            if before is not None and event.time > begun:
                found[event.key] = max(0.0, begun - before.time)
    return found


# -- the whole -----------------------------------------------------------------------------------


@contextmanager
def undisturbed(home: Path, num_trials: int) -> Iterator[Callable[[], Path]]:
    """The same trials one after another in one process meanwhile; call it for the study's folder."""
    home.mkdir()
    folder = home / "study"
    recipe = write_recipe(home, folder, num_trials, address=None)
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(recipe)]
    one_thread = environment(PYTHONPATH=PYTHON_PATH, OMP_NUM_THREADS="1")
    with (home / "driver.log").open("wb") as log:
        process = subprocess.Popen(["nice", *command], env=one_thread, stdout=log, stderr=log)

    def wait() -> Path:
        if process.wait():
            raise RuntimeError((home / "driver.log").read_text()[-2000:])
        return folder

    try:
        yield wait
    finally:
        process.kill()
        process.wait()


def run(
    home: Path,
    num_trials: int,
    *,
    minutes: float,
    seed: int,
    kinds: list[str] | None,
    is_quick: bool,
) -> Json:
    rng = random.Random(seed)
    count = 2 if is_quick else 3
    with mounted(home / "store"), Hosts(count) as hosts, redis(hosts, home):  # which see the mount
        moves = None if is_quick else random.Random(seed + 1000)
        study = Study(home, num_trials, hosts, moves)
        chaos, faults = Chaos(hosts, study, rng), []
        chaos.start_ray()
        study.keep_running()
        until_first_trial(study)
        end = time.time() + minutes * 60
        order = iter(kinds) if kinds else rounds(list(chaos.faults), rng)
        for name in order:
            if not study.keep_running() or time.time() > end:
                break
            faults.append(disturb(name, chaos))
            print(json.dumps(faults[-1]), flush=True)
            if not is_quick:
                time.sleep(rng.uniform(*PAUSE_S))
        disturbed_until = time.time()
        while study.keep_running() and time.time() - disturbed_until < TAIL_S:
            time.sleep(0.2)
        has_ended = not study.keep_running()
        leaks = left_running(hosts)
        kept = home / "kept"
        shutil.copytree(study.folder, kept)
    resumed = [result for _, result in finished(kept) if resumed_at(result)]
    return {
        "faults": faults,
        "ended": has_ended,
        "drivers": study.num_started,
        "exit_statuses": Counter(str(status) for _, status in study.ended),
        "went_on_from_checkpoint": len(resumed),
        "leaks": leaks,
        "ledger": str(kept / "ledger"),
    }


def rounds(kinds: list[str], rng: random.Random) -> Iterator[str]:
    """Every kind, in one order after another."""
    while True:
        yield from rng.sample(kinds, len(kinds))


def resumed_at(result: Json) -> int:
    """The step that a trial went on from."""
    return int((result["details"].get("training") or {}).get("resumed_at", 0))


def left_running(hosts: Hosts) -> int:
    """Placement groups that are not removed, workers and drivers that still run."""
    groups = hosts.run(1, [sys.executable, "-c", GROUPS], RAY_ADDRESS=hosts.ray_address)
    if groups.returncode:
        raise RuntimeError(groups.stderr[-2000:])
    left = int(groups.stdout)
    for number in hosts.numbers:
        for pattern in (WORKER, DRIVER):
            left += len(hosts.run(number, ["pgrep", "-f", pattern]).stdout.split())
    return left


def until_first_trial(study: Study) -> None:
    deadline = time.time() + LIMIT_S
    while not any(event.kind == "finished" for event in study.events()):
        if time.time() > deadline or not study.keep_running():
            raise RuntimeError(f"no trial ends: {study.log.read_text()[-2000:]}")
        time.sleep(0.5)


@contextmanager
def redis(hosts: Hosts, home: Path) -> Iterator[None]:
    """Where the head keeps what it knows: on the machine outside, which does not fail."""
    where = ["--bind", hosts.address(OUTSIDE), "--port", str(REDIS_PORT), "--protected-mode", "no"]
    command = ["setpriv", "--pdeathsig", "KILL", "redis-server", *where, "--save", ""]
    with (home / "redis.log").open("wb") as log:
        server = subprocess.Popen([*command, "--dir", str(home)], stdout=log, stderr=log)
    try:
        yield
    finally:
        server.kill()
        server.wait()


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
    parser.add_argument("--trials", type=int, help="default: two of three that hosts have time for")
    parser.add_argument(
        "--quick", action="store_true", help="two hosts, a worker and the driver killed"
    )
    parser.add_argument("--kinds", help="these faults alone, once each, with ; between")
    parser.add_argument("--json", type=Path, help="write every figure there")
    asked = parser.parse_args()
    kinds = asked.kinds.split(";") if asked.kinds else None
    if asked.quick:
        kinds = ["worker killed", "driver killed"]
        SETTINGS["CHAOS_HOLD_S"] = "1"
    num_trials = asked.trials or (6 if asked.quick else int(2 * asked.minutes * 60 / HOLD_S))
    home = Path(tempfile.mkdtemp(prefix="chaos-"))
    with undisturbed(home / "alone", num_trials) as alone:
        report = run(
            home,
            num_trials,
            minutes=asked.minutes,
            seed=asked.seed,
            kinds=kinds,
            is_quick=asked.quick,
        )
        report |= compare(home / "kept", alone())
    report["undisturbed_ledger"] = str(home / "alone" / "study" / "ledger")
    told = {name: value for name, value in report.items() if name != "faults"}
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
