"""What is wrong with a cluster is told before a study starts, each with the one thing to do."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import yaml
from rich.console import Console

from orchestrator.cli import BAD_INPUT, OK
from orchestrator.doctor import Survey, examine, judge, marks_in, raise_if_hopeless
from orchestrator.node_facts import MARKS, Examiner
from orchestrator.recipe import make_recipe
from orchestrator.report.doctor_table import doctor_table
from orchestrator.trial import BadInput

WELL: dict[str, Any] = {
    "python": "3.12.4",
    "packages": {"slimtune": "0.4", "torch": "2.13.0+cpu", "transformers": "5.20", "ray": "2.60"},
    "disk_free_gb": 100.0,
    "shm_free_gb": 8.0,
    "storage": "",
    "has_uri": False,
}


def survey(*, sees: Any = None, silent: tuple[str, ...] = (), **changes: Any) -> Survey:
    """Two nodes, of which `b` differs from the driver by the changes."""
    return Survey(WELL, {"a": WELL, "b": WELL | changes}, {"b": sees or {}}, silent)


def packages(**changes: str | None) -> dict[str, Any]:
    changed = WELL["packages"] | changes
    return {"packages": {name: value for name, value in changed.items() if value}}


@pytest.mark.parametrize(
    ("found", "what", "remedy", "is_fatal"),
    [
        (survey(python="3.11.2"), "has Python 3.11.2, the driver 3.12.4", "same Python", True),
        (
            survey(**packages(torch="2.11.0+cu128")),
            "has torch 2.11.0+cu128, the driver 2.13.0+cpu",
            "pip install torch==2.13.0 there",
            True,
        ),
        (survey(**packages(ray=None)), "lacks ray, the driver 2.60", "ray==2.60", True),
        (survey(disk_free_gb=0.3), "has 0.3 GB free for temporary files", "TMPDIR", True),
        (survey(shm_free_gb=0.06), "has 0.06 GB of shared memory free", "--shm-size", True),
        (survey(storage="is not there"), "the study's folder is not there", "output_dir", True),
        (
            survey(has_uri=True, storage="cannot be written: Access Denied"),
            "the study's storage cannot be written: Access Denied",
            "credentials",
            True,
        ),
        (survey(sees={"missing": ["a"]}), "does not see what a wrote", "output_dir", True),
        (survey(sees={"unreachable": ["a"]}), "cannot connect to a", "open the ports", True),
        (survey(clock_off_s=-9.0), "its clock is 9 s behind", "chrony", False),
        (survey(silent=("c",)), "does not answer", "ray status", True),
    ],
)
def test_each_problem_is_told_with_what_to_do(
    found: Survey, what: str, remedy: str, is_fatal: bool
) -> None:
    (finding,) = judge(found)
    assert finding.where in "bc" and what in finding.what and remedy in finding.remedy
    assert finding.is_fatal == is_fatal


def test_another_patch_of_python_or_build_of_torch_is_no_problem() -> None:
    alike = packages(torch="2.13.0+cu128") | {"python": "3.12.9"}
    assert judge(survey(**alike, clock_off_s=2.0, gpus=["NVIDIA H100, 570.1"])) == []


def test_other_versions_of_what_does_not_change_a_result_do_not_forbid_a_study() -> None:
    driver = WELL | {"packages": WELL["packages"] | {"tokenizers": "0.22"}}
    node = WELL | {"packages": driver["packages"] | {"tokenizers": "0.21"}}
    found = Survey(driver, {"a": node}, {})
    assert [finding.is_fatal for finding in judge(found)] == [False]
    raise_if_hopeless(found)


def test_a_study_hears_of_all_problems_at_once_but_not_of_nodes_that_left() -> None:
    with pytest.raises(BadInput) as caught:
        raise_if_hopeless(survey(python="3.11.2", disk_free_gb=0.1))
    assert len(caught.value.problems) == 2
    assert "b has Python 3.11.2, the driver 3.12.4; run both" in caught.value.problems[0]
    raise_if_hopeless(survey(silent=("c",)))


def test_machines_see_each_others_marks_and_listeners(tmp_path: Path) -> None:
    one, other = Examiner(), Examiner()
    with marks_in(tmp_path / "new" / "study") as folder:
        said = {name: each.facts(folder, name) for name, each in (("a", one), ("b", other))}
        assert {each["storage"] for each in said.values()} == {""}
        place = ("127.0.0.1", said["b"]["port"])
        assert one.sees(folder, ["a", "b"], {"b": place}) == {"missing": [], "unreachable": []}
        (Path(folder) / MARKS / "b").unlink()
        other._listener.close()
        found = one.sees(folder, ["a", "b"], {"b": place})
        assert found == {"missing": ["b"], "unreachable": ["b"]}
    assert list(tmp_path.iterdir()) == []  # nothing stays behind
    assert one.facts(str(tmp_path / "gone"), "a")["storage"] == "is not there"


def test_this_machine_can_run_the_tiny_study_and_says_what_speaks_against_another(
    tmp_path: Path,
) -> None:
    recipe = tiny_study.recipe(tmp_path, resources={"engine": "inline"})
    found = examine(make_recipe(recipe))
    assert found["can_run"], found["findings"]
    assert not (tmp_path / "study").exists()
    recipe["task"]["data"] = str(tmp_path / "gone.csv")
    found = examine(make_recipe(recipe))
    assert not found["can_run"] and "gone.csv" in found["findings"][0]["what"]
    console = Console(width=80, file=io.StringIO())
    console.print(doctor_table(found))
    told = console.file.getvalue().replace("\n", "")
    assert "✗" in told and "gone.csv" in told


@pytest.mark.cluster
@pytest.mark.slow
def test_a_recipe_that_asks_for_more_than_there_is_is_told_so(tmp_path: Path) -> None:
    recipe = tiny_study.recipe(tmp_path, resources={"engine": "ray", "gpus_per_trial": 4})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    for arguments, status in (([], BAD_INPUT), (["resources.gpus_per_trial=0"], OK)):
        command = [sys.executable, "-m", "orchestrator.cli", "doctor", str(path), *arguments]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        found = json.loads(done.stdout)
        assert len(found["nodes"]) == 1 and found["can_run"] == (status == OK)
    assert not (tmp_path / "study").exists()
