"""A gang may spread over hosts, and outlives the loss of one; hosts are namespaces of this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny_study
from host_trials import (
    SAVE_STEPS,
    across,
    assert_same,
    ended,
    events,
    losses,
    results,
    run_alone,
    run_command,
    write_recipe,
)
from hosts import REPOSITORY, Hosts, environment
from waiting import until

from orchestrator.status import study_status

pytestmark = [pytest.mark.cluster, pytest.mark.distributed, pytest.mark.slow]

NOTICED_S = 10
STEPS = 1000  # of a training that is still on its way when notice is given
PROBE = "import socket, sys; socket.create_connection((sys.argv[1], 22), 2)"


# -- hosts themselves ----------------------------------------------------------------------------


def hears(hosts: Hosts, number: int, *, of: int) -> str:
    """What a host is told when it asks another for a port where nobody listens."""
    return hosts.run(number, [sys.executable, "-c", PROBE, hosts.address(of)]).stderr


def test_hosts_have_names_and_processes_of_their_own_and_links_that_can_be_cut(hosts: Hosts):
    assert hosts.run(2, ["hostname"]).stdout == "host2\n"
    assert hosts.run(1, ["getent", "hosts", "host3"]).stdout.split()[0] == hosts.address(3)
    assert len(hosts.run(1, ["ps", "--no-headers", "-e"]).stdout.splitlines()) < 5
    assert "refused" in hears(hosts, 1, of=2)  # so it is there
    hosts.cut(2)
    assert "refused" not in hears(hosts, 1, of=2) and "refused" in hears(hosts, 1, of=3)
    hosts.mend(2)
    assert "refused" in hears(hosts, 1, of=2)


def test_a_host_without_power_runs_nothing_and_tells_nobody(hosts: Hosts):
    serve = "import socket, time; held = socket.create_server(('', 80)).accept(); time.sleep(600)"
    served = hosts.start(3, [sys.executable, "-c", serve])
    [inside] = until(psutil.Process(served.pid).children)
    connected = until(lambda: connection(hosts.address(3)))
    hosts.power_off(3)
    served.wait(timeout=30)  # it waits for the process inside
    assert not inside.is_running()
    connected.settimeout(0.5)
    with closing(connected), pytest.raises(TimeoutError):  # neither closed nor reset
        connected.recv(1)
    hosts.power_on(3)
    assert "refused" in hears(hosts, 1, of=3)


def connection(address: str) -> socket.socket | None:
    try:
        return socket.create_connection((address, 80))
    except OSError:
        return None


def test_nothing_runs_any_more_of_hosts_whose_maker_was_killed(hosts: Hosts, tmp_path: Path):
    code = """
from hosts import Hosts
with Hosts(2) as hosts:
    hosts.start(1, ["sleep", "600"])
    print(hosts.address(1), flush=True)
    input()
"""
    maker = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(PYTHONPATH=str(REPOSITORY / "benchmarks"), TMPDIR=str(tmp_path)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert maker.stdout
    network = maker.stdout.readline().strip().rpartition(".")[0]
    assert network in addresses()
    family = until(lambda: whole_family(maker.pid))
    maker.kill()
    maker.communicate()
    until(lambda: not any(map(psutil.Process.is_running, family)) and network not in addresses())


def whole_family(pid: int) -> list[psutil.Process] | None:
    """A switch, two hosts with a first process each, and what runs on one."""
    found = psutil.Process(pid).children(recursive=True)
    return found if len(found) == 7 else None


def addresses() -> str:
    return subprocess.run(["ip", "address"], capture_output=True, text=True, check=True).stdout


# -- a gang across them --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(hosts: Hosts) -> str:
    """Of Ray with one CPU on each host."""
    pytest.importorskip("ray")
    hosts.start_ray()
    return hosts.ray_address


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_study.write_sentences(tmp_path_factory.mktemp("data") / "data.csv", rows=240)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_alone(tmp_path_factory.mktemp("alone"), data, steps=20, qat=True)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_gang_across_three_hosts_comes_to_what_a_single_process_does(
    hosts: Hosts,
    address: str,
    data: Path,
    alone: dict[str, Any],
    tmp_path: Path,
    strategy: str,
):
    recipe = write_recipe(tmp_path, data, steps=20, qat=True, **across(address, strategy))
    done = hosts.run(1, run_command(recipe), limit_s=400)
    assert done.returncode == 0, done.stderr
    assert_same(results(tmp_path), alone)


def test_a_trial_goes_on_from_its_checkpoint_when_a_host_that_lost_power_is_back(
    hosts: Hosts, address: str, data: Path, tmp_path: Path
):
    (tmp_path / "alone").mkdir()
    expected = run_alone(tmp_path / "alone", data, steps=120, qat=False)
    recipe = write_recipe(tmp_path, data, steps=120, qat=False, **across(address, "ddp"))
    log, study = tmp_path / "driver.log", tmp_path / "study"
    driver = hosts.start(1, run_command(recipe), log=log)
    until(lambda: ended(driver, log) or list(study.glob("stages/.going-*/step-*")))
    hosts.power_off(3)
    off_at = time.time()
    [lost] = until(lambda: ended(driver, log) or events(study, "lost"))
    assert lost.time - off_at < NOTICED_S
    waits = "waits for a place with 3 workers of 1 CPU; the whole cluster has free:"
    until(lambda: f"{waits} 2 CPU" in [each["stage"] for each in study_status(study)["running"]])
    hosts.power_on(3)
    hosts.start_ray(3)
    assert driver.wait(timeout=300) == 0, log.read_text()
    [result] = results(tmp_path).values()
    training = result["details"]["training"]
    assert training["resumed_at"] > 0 and training["resumed_at"] % SAVE_STEPS == 0
    assert_same(results(tmp_path), expected)
    assert waits in log.read_text()


def test_on_notice_a_trial_writes_a_checkpoint_and_goes_on_elsewhere(
    hosts: Hosts, address: str, data: Path, tmp_path: Path
):
    workers = 2  # so that one is not on the driver's own host
    (tmp_path / "alone").mkdir()
    expected = run_alone(tmp_path / "alone", data, steps=STEPS, qat=False)
    takes = {"workers_per_trial": workers, "cpus_per_trial": workers}
    once = {"save_steps": 10 * STEPS, "max_attempts": 1}  # but for the notice nothing would be kept
    recipe = write_recipe(tmp_path, data, steps=STEPS, qat=False, address=address, **takes, **once)
    log, study = tmp_path / "driver.log", tmp_path / "study"
    driver = hosts.start(1, run_command(recipe), log=log)
    until(lambda: ended(driver, log) or begun(study, "finetune"))
    last = [number for number in hosts.numbers if works(hosts, number)][-1]
    hosts.give_notice(last, seconds=30)
    [lost] = until(lambda: ended(driver, log) or events(study, "lost"))
    assert "its machine was about to be taken away: it stands at step" in lost.payload["message"]
    assert driver.wait(timeout=300) == 0, log.read_text()
    until(lambda: hosts.run(last, ["pgrep", "-f", "[r]aylet/raylet"]).returncode)
    hosts.start_ray(last)
    [result] = results(tmp_path).values()
    assert 0 < result["details"]["training"]["resumed_at"] < STEPS
    [alone] = expected.values()
    np.testing.assert_allclose(losses(result), losses(alone), rtol=1e-5)


def test_a_driver_whose_host_was_given_up_ends_and_the_next_one_goes_on(
    hosts: Hosts, address: str, data: Path, tmp_path: Path
):
    recipe = write_recipe(tmp_path, data, steps=STEPS, qat=False, address=address, save_steps=50)
    log, study = tmp_path / "driver.log", tmp_path / "study"
    driver = hosts.start(3, run_command(recipe), log=log)
    until(lambda: ended(driver, log) or list(study.glob("stages/.going-trained-*/step-*")))
    hosts.cut(3)
    until(lambda: "host3" not in living(hosts))
    hosts.mend(3)
    until(lambda: hosts.run(3, ["pgrep", "-f", "[r]aylet/raylet"]).returncode)
    hosts.start_ray(3)
    assert driver.wait(timeout=120) == 1
    assert "The cluster has given up this machine" in " ".join(log.read_text().split())
    done = hosts.run(3, run_command(recipe), limit_s=400)
    assert done.returncode == 0, done.stderr
    [result] = results(tmp_path).values()  # whose training may have come to its end meanwhile
    assert result["status"] == "completed"
    assert len(events(study, "finished")) == 2  # with the baseline


def living(hosts: Hosts) -> str:
    """The names of the nodes that Ray takes to be alive."""
    ask = "import ray; ray.init(); print([n['NodeManagerHostname'] for n in ray.nodes() if n['Alive']])"
    asked = hosts.run(1, [sys.executable, "-c", ask], RAY_ADDRESS=hosts.ray_address)
    assert asked.returncode == 0, asked.stderr
    return asked.stdout


def begun(study: Path, stage: str) -> bool:
    """Whether a trial has come to that stage."""
    return any(
        event.payload["stage"] == stage and not event.key.startswith("baseline")
        for event in (events(study, "stage") if (study / "manifest.json").exists() else [])
    )


def works(hosts: Hosts, number: int) -> bool:
    """Whether a gang has a worker on that host."""
    return hosts.run(number, ["pgrep", "-f", "ray::RayW[o]rker"]).returncode == 0
