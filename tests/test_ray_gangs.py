"""Works run on warm gangs in parallel; whatever dies is told, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny_study
from waiting import until

ray = pytest.importorskip("ray")

from ray.util import placement_group_table  # noqa: E402

from orchestrator.launch import (  # noqa: E402
    Done,
    Event,
    Lost,
    Told,
    ray_cluster,
    ray_gangs,
    ray_nodes,
)
from orchestrator.launch.ray_places import Place, rank_environment  # noqa: E402
from orchestrator.recipe import make_recipe  # noqa: E402
from orchestrator.resources import Resources  # noqa: E402
from orchestrator.runtimes import Target  # noqa: E402
from orchestrator.trial import BadInput, Reason, TrialConfig, TrialStatus, Work  # noqa: E402

pytestmark = pytest.mark.cluster
TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[ray_cluster.Cluster]:
    """Ray with four CPUs, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_cluster, "num_cores", lambda: 4)
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = ray_cluster.Cluster(None)
        yield cluster
        cluster.leave()


@pytest.fixture
def gangs(cluster: ray_cluster.Cluster, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes launchers of toy workers, and closes them."""
    made = []

    def make(problems: list[str] | None = None, **resources: Any) -> ray_gangs.RayGangs:
        recipe = SimpleNamespace(
            name="toy",
            models=[
                SimpleNamespace(id=model) for model in ("toy", *resources.get("per_model", {}))
            ],
            resources=Resources(**resources),
            storage=None,
            target=Target(),
            resolved=lambda: {"problems": problems},
        )
        made.append(
            ray_gangs.RayGangs(
                recipe,  # type: ignore[arg-type]
                tmp_path,
                worker="toy_worker:ToyWorker",
            )
        )
        assert made[-1].cluster  # joined at once, and not when there is a work
        return made[-1]

    yield make
    for launcher in made:
        launcher.close()


def do(words: str, key: str = "w") -> Work:
    return Work("baseline", key, model=words)


def ended(launcher: ray_gangs.RayGangs, count: int = 1) -> list[Event]:
    events: list[Event] = []
    deadline = time.monotonic() + 120
    while len(events) < count:
        assert time.monotonic() < deadline, launcher.waiting()
        events += launcher.wait(1.0)
    return events


def run(launcher: ray_gangs.RayGangs, words: str) -> Any:
    return result(launcher, do(words))


def result(launcher: ray_gangs.RayGangs, work: Work) -> Any:
    launcher.start(work)
    [event] = ended(launcher)
    assert isinstance(event, Done), event
    return event.result


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_two_works_run_at_the_same_time(gangs):
    launcher = gangs(cpus_per_trial=2)
    for key in ("a", "b"):
        assert launcher.free() > 0
        launcher.start(do("meet 2", key))
    assert launcher.free() == 0
    events = ended(launcher, 2)
    assert {event.work.key for event in events} == {"a", "b"}
    assert len({event.result["pid"] for event in events}) == 2


def test_of_gangs_that_want_the_same_result_one_makes_it_at_a_time(gangs, tmp_path):
    launcher = gangs(cpus_per_trial=1)
    for key in ("a", "b", "c"):
        launcher.start(do("make it", key))
    assert all(isinstance(event, Done) for event in ended(launcher, 3))
    assert (tmp_path / "it").read_text() == "begins\nends\n" * 3


def test_what_a_worker_that_dies_was_making_the_next_one_makes(gangs, tmp_path):
    launcher = gangs(cpus_per_trial=1)
    launcher.start(do("make it and die", "dies"))
    events: list[Event] = []
    until(lambda: events.extend(launcher.wait(0.1)) or (tmp_path / "it").exists())
    launcher.start(do("make it", "lives"))
    events += ended(launcher, 2 - len(events))
    assert {event.work.key: type(event) for event in events} == {"dies": Lost, "lives": Done}
    assert (tmp_path / "it").read_text() == "begins\nbegins\nends\n"


def test_a_gang_is_kept_and_left_clean_after_each_work(gangs):
    launcher = gangs()
    first, second = run(launcher, "answer"), run(launcher, "answer")
    assert first["pid"] == second["pid"]
    assert (first["num_resets"], second["num_resets"]) == (0, 1)


def test_a_worker_has_as_many_threads_as_its_gang_has_cpus(gangs):
    facts = gangs(cpus_per_trial=3).facts()
    assert (facts["threads"], facts["omp"]) == (3, "3")


def test_problems_of_the_input_come_back_as_they_are(gangs):
    problems = ["model a: it is missing.", "task.data: no such file."]
    with pytest.raises(BadInput) as caught:
        gangs(problems=problems).facts()
    assert caught.value.problems == problems


@pytest.mark.slow
def test_a_worker_that_dies_reading_the_input_is_replaced(gangs, tmp_path):
    (tmp_path / "deadly 1").touch()
    assert gangs(max_attempts=2).facts()["threads"] == 1
    for number in (1, 2):
        (tmp_path / f"deadly {number}").touch()
    with pytest.raises(BadInput, match="could not be read: its worker died"):
        gangs(max_attempts=2).facts()


def test_stages_are_told_with_their_work(gangs):
    launcher, told = gangs(), []
    launcher.hear = told.append
    launcher.start(do("meet 2", "a"))
    until(lambda: bool(launcher.wait(0.05) or told))
    assert told == [Told(do("meet 2", "a"), "meet")]
    launcher.start(do("meet 2", "b"))
    ended(launcher, 2)


def test_a_killed_worker_loses_its_work_alone_and_the_next_one_is_fresh(gangs, tmp_path):
    launcher = gangs()
    launcher.start(do("hang", "a"))
    until((tmp_path / "hangs").exists)
    launcher.start(do("meet 2", "b"))
    pid, child = (int((tmp_path / name).read_text()) for name in ("pid", "child"))
    os.kill(pid, signal.SIGKILL)
    [lost] = ended(launcher)
    assert isinstance(lost, Lost)
    assert (lost.work.key, lost.reason, lost.again) == ("a", Reason.ERROR, True)
    until(lambda: not alive(child))
    launcher.start(do("meet 2", "a"))
    done = ended(launcher, 2)
    assert all(isinstance(event, Done) for event in done)
    assert pid not in {event.result["pid"] for event in done}


def test_a_work_beyond_its_time_limit_is_ended_with_all_it_started(gangs, tmp_path):
    launcher = gangs(time_limit_s=0.5)
    launcher.start(do("hang"))
    [lost] = ended(launcher)
    assert (lost.reason, lost.again) == (Reason.TIMEOUT, False)
    assert "0.5 s" in lost.message
    if (tmp_path / "hangs").exists():
        pids = [int((tmp_path / name).read_text()) for name in ("pid", "child")]
        until(lambda: not any(map(alive, pids)))


def test_what_a_work_cannot_do_is_told_and_its_gang_stays(gangs):
    launcher = gangs()
    pid = run(launcher, "answer")["pid"]
    launcher.start(do("damaged model.onnx is not the one that was measured"))
    [lost] = ended(launcher)
    assert (lost.reason, lost.again) == (Reason.ERROR, False)
    assert lost.message == "model.onnx is not the one that was measured"
    assert run(launcher, "answer")["pid"] == pid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resources", "works"),
    [({"recycle_after": 2}, ["answer"] * 2), ({}, ["answer", "answer", "grow 700"])],
)
def test_a_gang_is_replaced_after_its_share_of_works_or_when_it_has_grown(gangs, resources, works):
    launcher = gangs(**resources)
    before = {run(launcher, words)["pid"] for words in works}
    assert len(before) == 1
    assert run(launcher, "answer")["pid"] not in before


def test_a_study_takes_no_more_than_its_resources_say(gangs):
    until(lambda: gangs(max_gangs=3).free() == 3)
    until(lambda: gangs(cpus_per_trial=2).free() == 2)
    assert gangs(max_cpus=3, cpus_per_trial=2).free() == 1


def test_a_trial_that_no_node_has_room_for_is_bad_input(gangs):
    with pytest.raises(BadInput, match=r"no node of the cluster has 64 CPU.*nodes have: 4 CPU"):
        gangs(cpus_per_trial=64).free()
    with pytest.raises(BadInput, match=r"has 1 CPU, zone=a; its nodes have: 4 CPU"):
        gangs(labels={"zone": "a"}).free()
    with pytest.raises(BadInput, match="more than resources.max_cpus allows"):
        gangs(cpus_per_trial=2, max_cpus=1).free()


def node(*, labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    return {"Resources": resources, "Labels": labels or {}}


def test_a_trial_takes_a_gpu_and_its_share_of_cpus_where_there_are_gpus():
    nodes = [node(CPU=64, GPU=8), node(CPU=24, GPU=4), node(CPU=16)]
    default = ray_cluster.gang_shape(Resources(), nodes, use_gpus=True)
    assert (default.num_cpus, default.num_gpus) == (6, 1)
    assert ray_cluster.capacity(default, Resources(), nodes) == 8 + 4
    two = ray_cluster.gang_shape(Resources(gpus_per_trial=2), nodes, use_gpus=True)
    assert (two.num_workers, two.total) == (2, {"CPU": 12, "GPU": 2})
    assert ray_cluster.capacity(two, Resources(), nodes) == 4 + 2
    on_cpus = ray_cluster.gang_shape(Resources(), nodes, use_gpus=False)
    assert (on_cpus.num_cpus, on_cpus.num_gpus) == (1, 0)
    assert ray_cluster.capacity(default, Resources(max_gpus=3), nodes) == 3


def test_only_nodes_with_the_labels_and_custom_resources_count():
    resources = Resources(cpus_per_trial=2, labels={"zone": "a"}, custom={"scratch": 1})
    zone = {"zone": "a"}
    nodes = [node(CPU=8, scratch=3, labels=zone), node(CPU=8, labels=zone), node(CPU=8, scratch=9)]
    shape = ray_cluster.gang_shape(resources, nodes, use_gpus=True)
    assert ray_cluster.capacity(shape, resources, nodes) == 3


def test_a_work_without_room_says_what_it_waits_for_and_runs_when_there_is(gangs):
    first, second = gangs(cpus_per_trial=3), gangs(cpus_per_trial=2)
    first.facts()
    assert second.free() == 1  # nothing of it runs, so one may wait
    second.start(do("answer"))
    assert second.wait(0.5) == []
    assert second.waiting() == {"w": "a place with 2 CPU; the whole cluster has free: 1 CPU"}
    first.close()
    [event] = ended(second)
    assert isinstance(event, Done) and second.waiting() == {}


def test_an_idle_gang_is_handed_back_to_a_cluster_that_was_joined(gangs):
    launcher = gangs(idle_s=0.1)
    pid = run(launcher, "answer")["pid"]
    time.sleep(0.2)
    launcher.free()
    until(lambda: not alive(pid))
    until(lambda: ray.available_resources().get("CPU") == 4)


def test_closing_leaves_no_process_and_no_placement_group(gangs, tmp_path):
    launcher = gangs()
    idle = run(launcher, "answer")["pid"]
    for key in ("a", "b"):
        launcher.start(do("hang", key))
    until((tmp_path / "hangs").exists)
    pids = [idle, *(int((tmp_path / name).read_text()) for name in ("pid", "child"))]
    launcher.close()
    until(lambda: not any(map(alive, pids)))
    until(lambda: ray.available_resources().get("CPU") == 4)
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}


@pytest.mark.slow
def test_a_study_s_own_works_run_on_a_gang(cluster, tmp_path):
    recipe = make_recipe(tiny_study.recipe(tmp_path, search={"name": "grid"}))
    folder = Path(recipe.output_dir)
    folder.mkdir()
    launcher, stages = ray_gangs.RayGangs(recipe, folder), []
    launcher.hear = lambda told: stages.append(told.stage)
    facts = launcher.facts()
    assert list(facts["models"]) == ["bert"]
    config = next(recipe.asked())
    baseline = result(launcher, Work("baseline", "baseline:bert", model="bert"))
    trial = result(launcher, Work("trial", config.id, config=config))
    assert (baseline.status, trial.status) == (TrialStatus.COMPLETED,) * 2
    assert "finetune" in stages and "latency" in stages
    artifacts = {"dense": "baseline/artifact", config.id: f"trials/{config.id}/artifact"}
    timings = result(launcher, Work("timings", "front", artifacts=artifacts))
    assert {"latency_ms", "speedup"} <= timings[config.id].metrics.keys()
    assert timings["dense"].fingerprint == baseline.measurement.fingerprint
    launcher.close()


# -- gangs of several workers --------------------------------------------------------------------


def followers(folder: Path, count: int) -> list[dict[str, Any]]:
    """What the workers behind the first were told, once they all follow."""
    until(lambda: len(list(folder.glob("rank *.json"))) == count)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank *.json"))]


def test_each_worker_of_a_gang_is_told_what_torchrun_would_say(gangs, tmp_path):
    launcher = gangs(workers_per_trial=3)
    run(launcher, "answer")
    told = followers(tmp_path, 2)
    assert [each["RANK"] for each in told] == [each["LOCAL_RANK"] for each in told] == ["1", "2"]
    assert {each["WORLD_SIZE"] for each in told} == {"3"}
    assert len({each["MASTER_PORT"] for each in told}) == 1
    assert launcher.free() == 1  # the gang itself; another of three would not fit beside it
    launcher.close()
    until(lambda: not any(alive(each["pid"]) for each in told))
    until(lambda: ray.available_resources().get("CPU") == 4)


def test_workers_meet_over_the_network_of_ray_unless_their_node_names_another(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    places = [Place("a", "10.0.0.1", 1234, 1), Place("b", "127.0.0.1", 1235, 1)]
    told = rank_environment(1, places)
    assert (told["MASTER_ADDR"], told["LOCAL_RANK"], told["GROUP_RANK"]) == ("10.0.0.1", "0", "1")
    interface = told["GLOO_SOCKET_IFNAME"]
    assert "127.0.0.1" in [each.address for each in psutil.net_if_addrs()[interface]]
    assert told["NCCL_SOCKET_IFNAME"] == f"={interface}"  # which is eth1 and not eth10 too
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert "NCCL_SOCKET_IFNAME" not in rank_environment(1, places)


@pytest.mark.slow
def test_all_workers_die_with_one_and_the_work_may_be_tried_again(gangs, tmp_path):
    launcher = gangs(workers_per_trial=3)
    launcher.start(do("hang"))
    victim, other = followers(tmp_path, 2)
    until((tmp_path / "hangs").exists)
    os.kill(victim["pid"], signal.SIGKILL)
    [event] = ended(launcher)
    assert isinstance(event, Lost) and event.again and event.reason is Reason.ERROR
    pids = [other["pid"], *(int((tmp_path / name).read_text()) for name in ("pid", "child"))]
    until(lambda: not any(map(alive, pids)))
    until(lambda: ray.available_resources().get("CPU") == 4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_gives_no_sign_of_life_is_ended_with_its_gang(gangs, tmp_path, rank):
    launcher = gangs(workers_per_trial=2, silence_s=10)
    launcher.start(do("hang"))
    [follower] = followers(tmp_path, 1)
    until((tmp_path / "hangs").exists)
    leader = int((tmp_path / "pid").read_text())
    launcher.wait(6.0)  # each is heard of once
    os.kill((leader, follower["pid"])[rank], signal.SIGSTOP)
    [event] = ended(launcher)
    assert isinstance(event, Lost) and event.again
    assert f"rank {rank} of 2 gave no sign of life for 10 s" in event.message
    until(lambda: not alive(leader) and not alive(follower["pid"]))
    until(lambda: ray.available_resources().get("CPU") == 4)


@pytest.mark.slow
def test_a_gang_that_was_idle_for_long_is_not_taken_for_silent(gangs, tmp_path):
    launcher = gangs(workers_per_trial=2, silence_s=10)
    launcher.start(do("wait go"))
    launcher.wait(8.0)  # each is heard of once
    (tmp_path / "go").touch()
    [first] = ended(launcher)
    time.sleep(12)  # nobody listens to it meanwhile
    assert run(launcher, "answer")["pid"] == first.result["pid"]


@pytest.mark.slow
def test_a_large_gang_gets_its_turn_among_small_ones(gangs, tmp_path):
    launcher = gangs(per_model={"large": {"workers_per_trial": 4}})
    small, large = TrialConfig(model="toy"), TrialConfig(model="large")
    for key in ("a", "b"):
        launcher.start(Work("trial", key, model=f"wait {key}", config=small))
        until((tmp_path / f"{key} is waited for").exists)
    launcher.start(Work("trial", "large", model="answer", config=large))
    until(lambda: launcher.free() == 0)
    assert "4 workers of 1 CPU" in launcher.waiting()["large"]
    (tmp_path / "a").touch()
    [first] = ended(launcher)
    assert first.work.key == "a" and launcher.free() == 0  # its gang is not for the next small one
    (tmp_path / "b").touch()
    events = ended(launcher, 2)
    assert [event.work.key for event in events] == ["b", "large"]
    assert run(launcher, "answer")  # and the large one makes room again


DRIVER = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
group, handlers = os.getpgrp(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
from orchestrator.launch.ray_gangs import RayGangs
from orchestrator.resources import Resources
from orchestrator.trial import Work
from orchestrator.runtimes import Target
recipe = SimpleNamespace(name="toy", models=[SimpleNamespace(id="toy")], storage=None, resources=Resources(), target=Target(), resolved=dict)
launcher = RayGangs(recipe, Path(sys.argv[1]), worker="toy_worker:ToyWorker")
launcher.start(Work("baseline", "w", model=sys.argv[2]))
assert os.getpgrp() == group
assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
lost = launcher.wait()
launcher.close()
print([(event.reason.value, event.again) for event in lost])
"""


@pytest.fixture
def driver(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a driver of its own, with a Ray of its own, that gives a toy worker one work."""
    started = []

    def start(words: str, **settings: str) -> subprocess.Popen[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | settings
        env |= {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "HOME": str(tmp_path)}
        command = [sys.executable, "-c", DRIVER, str(tmp_path), words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=env, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_driver_that_ends_takes_the_ray_it_started_along(driver, tmp_path, sent):
    process = driver("hang")
    until(lambda: (tmp_path / "hangs").exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    pids = [process.pid, *below(process.pid)]
    assert int((tmp_path / "child").read_text()) in pids
    process.send_signal(sent)
    process.wait(60)
    until(lambda: not any(map(alive, pids)))
    assert not (tmp_path / ".ray").exists()  # a token there would change later clusters


@pytest.mark.slow
def test_a_driver_joins_the_ray_at_ray_address_and_leaves_it_running(cluster, driver):
    settings = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    address = ray.get_runtime_context().gcs_address
    out, err = driver("die", RAY_ADDRESS=address, **settings).communicate(timeout=120)
    assert (out, err) == ("[('error', True)]\n", "")
    until(lambda: ray.available_resources().get("CPU") == 4)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://here:10001", "here"])
def test_an_address_without_a_ray_is_bad_input(address):
    with pytest.raises(BadInput, match=f"resources.address: .*{address}"):
        ray_cluster.join(address)


def test_folders_of_killed_drivers_are_removed_and_those_of_others_are_kept(tmp_path):
    mine = ray_cluster.session_folder(tmp_path)
    (tmp_path / "slimtune-ray-dead").mkdir()
    (tmp_path / "slimtune-ray-dead" / "driver").touch()
    (tmp_path / "slimtune-ray-new").mkdir()  # of a driver that has not got as far as to lock it
    other = ray_cluster.session_folder(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, other, tmp_path / "slimtune-ray-new"}


@pytest.mark.slow
def test_ray_says_nothing_itself_of_a_worker_that_died(driver):
    out, err = driver("die").communicate(timeout=120)
    assert (out, err) == ("[('error', True)]\n", "")


@pytest.mark.slow
def test_a_worker_that_ray_ends_for_want_of_memory_is_out_of_memory(driver):
    limit = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    out, _ = driver("hang", **limit).communicate(timeout=120)
    assert out == "[('oom', True)]\n"


def test_nodes_that_are_all_slow_to_answer_are_waited_for_and_one_of_many_is_not(
    cluster, monkeypatch
):
    @ray.remote(num_cpus=0)
    def answer(seconds: float) -> dict[str, float]:
        time.sleep(seconds)
        return {"seconds": seconds}

    ray.get([answer.remote(1.0), answer.remote(1.0)])  # two processes, which take no time to start
    monkeypatch.setattr(ray_nodes, "ANSWER_S", 2.0)
    slow = {"a": answer.remote(3.0), "b": answer.remote(3.5)}
    assert ray_nodes.answers(slow).keys() == {"a", "b"}
    begun = time.monotonic()
    silent = answer.remote(60.0)
    assert ray_nodes.answers({"a": answer.remote(0.0), "b": silent}).keys() == {"a"}
    assert time.monotonic() - begun < 15.0
    ray.cancel(silent, force=True)


def below(pid: int) -> list[int]:
    """All that a process has started, and what that has; but Ray's agents, who take a minute."""
    found = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    children = [child for child in map(int, found.split()) if b"Agent" not in cmdline(child)]
    return [one for child in children for one in (child, *below(child))]


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
