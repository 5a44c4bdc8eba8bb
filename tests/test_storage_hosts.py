"""A study over hosts that share no file system: what they have in common lies in a storage, here S3."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import yaml
from host_trials import (
    SAVE_STEPS,
    across,
    assert_same,
    ended,
    run_alone,
    run_command,
    write_recipe,
)
from hosts import Hosts, NoHosts
from servers import postgresql, postgresql_server, s3_environment, s3_server  # noqa: F401
from waiting import until

from orchestrator.artifact import verify
from orchestrator.ledger import Event, Ledger
from orchestrator.storage import open_uri

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def apart() -> Iterator[Path]:
    """A folder that each host has for itself: the study's is in it, and temporary files.

    Its path is short, since Ray's sockets lie below it and the path of one has at most 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="apart-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def hosts(apart: Path) -> Iterator[Hosts]:
    try:
        with Hosts(3, apart=apart) as made:
            for number in made.numbers:
                (made.own(number) / "tmp").mkdir()
            yield made
    except NoHosts as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def settings(hosts: Hosts, apart: Path, s3_server: Any) -> dict[str, str]:  # noqa: F811
    """What Ray and its drivers are started with; a node of Ray runs on each host."""
    pytest.importorskip("ray")
    _, port = s3_server.get_host_and_port()
    there = s3_environment(hosts.outside, port)
    settings = {**there, "TMPDIR": str(apart / "tmp")}
    hosts.start_ray(**settings)
    return settings


@pytest.fixture
def uri(s3_server: Any, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:  # noqa: F811
    for name, value in settings.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    bucket = f"s3://bucket-{time.monotonic_ns()}"
    open_uri(bucket)[0].mkdir(bucket)
    return f"{bucket}/study"


def changed(recipe: Path, **sections: Any) -> Path:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | sections))
    return recipe


def test_doctor_asks_for_a_storage_and_is_content_with_one(
    hosts: Hosts, settings: dict[str, str], uri: str, apart: Path, tmp_path: Path
):
    resources = {"address": hosts.ray_address}
    folder = str(apart / "asked")
    recipe = tiny_study.write_recipe(tmp_path, output_dir=folder, resources=resources)
    command = [*run_command(recipe)[:-2], "doctor", str(recipe), "--json"]
    lacking = hosts.run(1, command, **settings)
    findings = json.loads(lacking.stdout)["findings"]
    assert {each["where"] for each in findings} == {"host2", "host3"}, findings
    assert all(each["what"] == "the study's folder is not there" for each in findings)
    assert all("or storage to a URI that all reach" in each["remedy"] for each in findings)
    assert lacking.returncode == 2
    changed(recipe, storage=uri)
    content = hosts.run(1, command, **settings)
    assert json.loads(content.stdout)["findings"] == [] and content.returncode == 0
    assert open_uri(uri)[0].find(uri) == []


def test_trials_on_hosts_that_share_no_folder_make_each_result_once(
    hosts: Hosts, settings: dict[str, str], uri: str, apart: Path, tmp_path: Path
):
    resources = {"address": hosts.ray_address, "cpus_per_trial": 1}
    recipe = tiny_study.write_recipe(
        tmp_path,
        output_dir=str(apart / "study"),
        storage=uri,
        keep="front",
        resources=resources,
    )
    done = hosts.run(1, run_command(recipe), limit_s=500, **settings)
    assert done.returncode == 0, done.stderr
    front = json.loads((hosts.own(1) / "study" / "front.json").read_text())
    assert front["trials"]["failed"] == 0 and len(front["all_trials"]) == 7
    for point in (*front["points"], *front["references"]):
        verify(hosts.own(1) / "study" / point["artifact"])
    system, base = open_uri(uri)
    sent = [path.removeprefix(f"{base}/files/").split("/") for path in system.find(f"{base}/files")]
    copies = {(parts[1], parts[2]) for parts in sent if parts[0] == "stages"}
    assert len(copies) == len({name for name, _ in copies}) > 0  # none was made by two
    for number in (2, 3):
        assert not (hosts.own(number) / "study").exists()
    for number in hosts.numbers:
        left = (hosts.own(number) / "tmp").glob("slimtune-*.scratch/*")
        assert list(left) == [], f"host{number}"


@pytest.mark.distributed
def test_a_gang_goes_on_from_a_checkpoint_that_only_the_storage_has(
    hosts: Hosts, settings: dict[str, str], uri: str, apart: Path, tmp_path: Path
):
    data = tiny_study.write_sentences(tmp_path / "data.csv", rows=240)
    for name in ("alone", "gang"):
        (tmp_path / name).mkdir()
    expected = run_alone(tmp_path / "alone", data, steps=120, qat=False)
    resources = across(hosts.ray_address, "ddp")
    recipe = write_recipe(tmp_path / "gang", data, steps=120, qat=False, **resources)
    changed(recipe, output_dir=str(apart / "gang"), storage=uri)
    log = tmp_path / "driver.log"
    driver = hosts.start(1, run_command(recipe), log=log, **settings)
    system, base = open_uri(uri)
    going = f"{base}/index/stages/.going-trained-*/step-*"
    until(lambda: ended(driver, log) or system.glob(going), what="a checkpoint")
    hosts.power_off(3)
    time.sleep(5)
    for path in (hosts.own(3) / "tmp").glob("slimtune-*"):
        path.rename(tmp_path / path.name)  # a machine with another disk
    hosts.power_on(3)
    hosts.start_ray(3, **settings)
    assert driver.wait(timeout=300) == 0, log.read_text()
    found = results_in(hosts.own(1) / "gang")
    [result] = found.values()
    assert result["details"]["training"]["resumed_at"] % SAVE_STEPS == 0
    assert result["details"]["training"]["resumed_at"] > 0
    assert_same(found, expected)


def test_a_study_whose_machine_is_gone_goes_on_from_another(
    hosts: Hosts,
    settings: dict[str, str],
    uri: str,
    apart: Path,
    tmp_path: Path,
    postgresql: str,  # noqa: F811
):
    rates = [rate * 1e-4 for rate in range(1, 9)]
    recipe = tiny_study.write_recipe(
        tmp_path,
        output_dir=str(apart / "moved"),
        storage=uri,
        ledger=postgresql.replace("127.0.0.1", hosts.outside),
        space={"finetune": {"learning_rate": {"choice": rates}, "max_steps": 40}},
        references={"dense_int8": False, "first_layers": [], "random_twin": False},
        resources={"address": hosts.ray_address, "cpus_per_trial": 1},
    )
    log = tmp_path / "driver.log"
    driver = hosts.start(2, run_command(recipe), log=log, **settings)
    manifest = hosts.own(2) / "moved" / "manifest.json"
    until(lambda: ended(driver, log) or manifest.exists(), what="a manifest")
    study = json.loads(manifest.read_text())["ledger_key"]
    until(lambda: ended(driver, log) or len(finished(postgresql, study)) > 3, what="some trials")
    hosts.power_off(2)
    before = finished(postgresql, study)
    done = hosts.run(3, run_command(recipe), limit_s=500, **settings)
    hosts.power_on(2)
    hosts.start_ray(2, **settings)
    assert done.returncode == 0, done.stderr
    assert "waiting whether" in done.stderr  # it is not seen from there that the driver is gone
    after = finished(postgresql, study)
    assert after[: len(before)] == before and len({event.lease for event in after}) == 2
    assert len(after) == len({event.key for event in after}) == 1 + len(rates)
    front = json.loads((hosts.own(3) / "moved" / "front.json").read_text())
    assert front["trials"]["failed"] == 0
    for point in (*front["points"], *front["references"]):
        verify(hosts.own(3) / "moved" / point["artifact"])


def finished(ledger: str, study: str) -> list[Event]:
    with closing(Ledger(ledger, study)) as opened:
        return [event for event in opened.events() if event.kind == "finished"]


def results_in(study: Path) -> dict[str, Any]:
    files = study.glob("trials/*/measurement.json")
    return {path.parent.name: json.loads(path.read_text()) for path in files}
