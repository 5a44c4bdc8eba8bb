"""The command: its verbs, exit statuses, and what happens when a study is begun a second time."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_study
from conftest import Here

from orchestrator.artifact import DamagedArtifact
from orchestrator.launch import Done, Event, Lost
from orchestrator.launch.inline import Inline
from orchestrator.recipe import Recipe, make_recipe
from orchestrator.study import Silent, Study
from orchestrator.trial import (
    Measurement,
    NoBaseline,
    Reason,
    TrialConfig,
    TrialResult,
    TrialStatus,
    Work,
)

REPOSITORY = Path(__file__).resolve().parent.parent
VERBS = (
    "plan",
    "run",
    "status",
    "front",
    "select",
    "export",
    "measure",
    "report",
    "fetch",
    "slurm",
)
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "datasets", "optuna", "jinja2")
ALONE: dict[str, Any] = {
    "references": {"dense_int8": False, "first_layers": [], "random_twin": False}
}
RATES = {"finetune": {"learning_rate": {"choice": [1e-4, 2e-4, 3e-4, 4e-4, 5e-4]}, "max_steps": 2}}


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}


def printed_json(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


# -- help ----------------------------------------------------------------------------------------


def test_help_lists_the_verbs_and_loads_nothing_heavy() -> None:
    code = (
        "import json, sys; sys.argv = ['slimtune', '--help']\n"
        "from orchestrator import cli\n"
        "try: cli.main()\n"
        "finally: print(json.dumps(sorted(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    text, modules = done.stdout.strip().rsplit("\n", 1)
    assert [verb for verb in VERBS if not re.search(rf"\b{verb}\b", text)] == []
    assert "Usage: slimtune" in text
    assert sorted(set(json.loads(modules)).intersection(HEAVY)) == []


def test_every_verb_prints_json_on_request(slimtune: Here) -> None:
    for verb in VERBS:
        assert "--json" in slimtune(verb, "--help").out, verb


# -- one study, looked at from all sides ---------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, and its finished study of two base models."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_study.recipe(folder)["model"]
    models = [model, {**model, "id": "smaller", "config": {**model["config"], "hidden_size": 16}}]
    space = {"prune": {"method": "structured", "heads": 0.5}, "finetune": {"max_steps": 2}}
    references = {"dense_int8": True, "first_layers": [], "random_twin": False}
    sections = {"model": models, "space": space, "references": references}
    tiny_study.write_recipe(folder, **sections, baseline={"finetune": {"max_steps": 4}})
    Study(
        make_recipe(tiny_study.recipe(folder, **sections, baseline={"finetune": {"max_steps": 4}}))
    ).run()
    return folder


@pytest.fixture
def front(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "study" / "front.json").read_text())
    return found


def test_every_base_model_has_a_baseline_of_its_own(folder: Path, front: dict[str, Any]) -> None:
    baselines = [p for p in front["references"] if p["role"] == "baseline"]
    assert {p["config"]["model"] for p in baselines} == {"bert", "smaller"}
    for point in baselines:
        home = folder / "study" / "baseline" / point["config"]["model"]
        assert json.loads((home / "measurement.json").read_text())["trial_id"] == point["trial_id"]
        assert point["artifact"] == f"baseline/{point['config']['model']}/artifact"
    sizes = {p["config"]["model"]: p["metrics"]["size_mb"] for p in baselines}
    assert sizes["smaller"] < sizes["bert"]
    trials = [trial for trial in front["all_trials"] if trial["role"] == "trial"]
    assert {trial["config"]["model"] for trial in trials} == {"bert", "smaller"}


def test_artifacts_of_every_base_model_are_exported_and_measured_again(
    folder: Path, front: dict[str, Any], tmp_path: Path, slimtune: Here
) -> None:
    for point in front["references"]:
        if point["role"] != "baseline":
            continue
        to, study = tmp_path / point["trial_id"], folder / "study"
        done = slimtune("export", point["trial_id"][:10], to, "--study", study, "--json")
        assert done.status == 0, done.err
        told = printed_json(done.out)
        assert told["trial_id"] == point["trial_id"]
        assert set(told["files"]) == {path.name for path in to.iterdir()} >= {"model.onnx"}
        done = slimtune("measure", to, "--study", study, "--json")
        assert done.status == 0, done.err
        assert printed_json(done.out)["metrics"]["accuracy"] == point["metrics"]["accuracy"]


def test_a_measurement_says_what_was_measured(folder: Path, slimtune: Here) -> None:
    done = slimtune("measure", folder / "study" / "baseline" / "smaller" / "artifact")
    assert done.status == 0, done.err
    assert "dense, 4 steps" in done.out and "accuracy" in done.out


def test_a_baseline_that_was_deleted_is_built_again_with_its_test_scores(
    folder: Path, front: dict[str, Any], tmp_path: Path, slimtune: Here
) -> None:
    study = tmp_path / "study"
    shutil.copytree(folder / "study", study)
    point = next(p for p in front["references"] if p["config"]["model"] == "smaller")
    shutil.rmtree(study / point["artifact"])
    done = slimtune("export", point["trial_id"], tmp_path / "copy", "--study", study)
    assert done.status == 0, done.err
    result = json.loads((study / point["artifact"]).parent.joinpath("measurement.json").read_text())
    assert result["test"]["metrics"] == point["test"]
    assert not list(study.glob(f"trials/{point['trial_id']}/artifact"))


def test_the_front_is_a_table_or_json(folder: Path, front: dict[str, Any], slimtune: Here) -> None:
    assert printed_json(slimtune("front", folder / "study", "--json").out) == front
    table = slimtune("front", folder / "study").out
    assert f"tiny: {len(front['points'])} on the front" in table
    assert front["points"][0]["trial_id"][:8] in table


def test_selected_points_are_those_of_the_front(
    folder: Path, front: dict[str, Any], slimtune: Here
) -> None:
    done = slimtune("select", folder / "study", "--knee", "--json")
    (point,) = printed_json(done.out)
    assert point in front["points"]
    most = f"size_mb={point['metrics']['size_mb']}"
    assert point in printed_json(slimtune("select", folder / "study", "--max", most, "--json").out)
    nothing = slimtune("select", folder / "study", "--max", "size_mb=0.000001")
    assert nothing.status == 1 and "No point of the front keeps these limits" in nothing.err


def test_a_report_is_written_anew(folder: Path, slimtune: Here) -> None:
    path = folder / "study" / "report.html"
    before = path.read_text()
    path.unlink()
    done = slimtune("report", folder / "study", "--json")
    assert printed_json(done.out) == {"report": str(path)}
    assert path.read_text() == before


def test_a_plan_knows_every_configuration_of_a_recipe_or_a_study(
    folder: Path, front: dict[str, Any], slimtune: Here
) -> None:
    plan = printed_json(slimtune("plan", folder / "tiny.yaml", "--json").out)
    planned = {row["trial_id"] for row in plan["configurations"]}
    assert planned == {trial["trial_id"] for trial in front["all_trials"]}
    assert all(row["size_mb"] > 0 and row["macs"] > 0 for row in plan["configurations"])
    assert printed_json(slimtune("plan", folder / "study", "--json").out) == plan
    table = slimtune("plan", folder / "study").out
    assert "6 of 6 configurations can work" in table and "smaller: heads 50%" in table


def test_a_plan_says_what_cannot_work_and_why(folder: Path, slimtune: Here) -> None:
    schemes = "space.quantize={choice: [none, {scheme: W4A16, group_size: 64}]}"
    plan = printed_json(slimtune("plan", folder / "study", schemes, "--json").out)
    reasons = [row["infeasible"] for row in plan["configurations"] if row["infeasible"]]
    assert len(reasons) == 2 and all("group size 64 does not divide" in why for why in reasons)
    assert plan["num_feasible"] == len(plan["configurations"]) - 2


def test_a_study_s_folder_is_a_recipe_to_go_on_with(
    folder: Path, tmp_path: Path, slimtune: Here
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(folder / "study", moved)
    done = slimtune("run", moved, "--json")
    assert done.status == 0, done.err
    again = printed_json(done.out)
    assert again["trials"]["reused"] == len(again["all_trials"]) == 6


def test_a_finished_study_says_so(folder: Path, slimtune: Here) -> None:
    done = slimtune("run", folder / "tiny.yaml")
    assert done.status == 0
    assert re.search(r"6 completed \(6 by earlier runs\) in \d s · hypervolume", done.out)
    assert done.err == ""


# -- what is not there ---------------------------------------------------------------------------

MISSING = {
    "front of nothing": (
        ["front", "{tmp}/none"],
        "none has no front.json; there is no such folder",
    ),
    "front of another folder": (["front", "{tmp}"], "has no front.json; finish its study first"),
    "front that is damaged": (["front", "{tmp}/damaged"], "front.json is damaged"),
    "select in nothing": (["select", "{tmp}/none"], "has no front.json"),
    "select by no number": (["select", "{study}", "--max", "size_mb=x"], "expected metric=number"),
    "select by no metric": (["select", "{study}", "--max", "sise_mb=1"], "sise_mb"),
    "export of no trial": (
        ["export", "zzzz", "{tmp}/to", "--study", "{study}"],
        "begins with zzzz",
    ),
    "export of many trials": (
        ["export", "", "{tmp}/to", "--study", "{study}"],
        "start of 6 trials",
    ),
    "export from no study": (["export", "a", "{tmp}/to", "--study", "{tmp}"], "holds no study"),
    "export without a study": (["export", "a", "{tmp}/to"], "runs/, which holds no study"),
    "export to what exists": (["export", "a", "{tmp}"], "exists already; name a new folder"),
    "export below a file": (
        ["export", "{trial}", "{study}/front.json/to", "--study", "{study}"],
        "front.json/to cannot be written",
    ),
    "measure nothing": (["measure", "{tmp}/none"], "is no artifact's folder"),
    "measure another folder": (["measure", "{tmp}"], "it has no artifact.json"),
    "measure in no study": (["measure", "{artifact}", "--study", "{tmp}"], "holds no study"),
    "report of nothing": (["report", "{tmp}/none"], "has no front.json"),
    "plan of nothing": (["plan", "{tmp}/none.yaml"], "none.yaml cannot be read"),
    "a verb that is none": (["prune"], "No such command 'prune'"),
    "run without a recipe": (["run"], "Missing argument 'recipe'"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_not_there_is_told_in_one_message(
    case: str,
    folder: Path,
    front: dict[str, Any],
    tmp_path: Path,
    slimtune: Here,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, words = MISSING[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "front.json").write_text("{")
    known = {
        "{tmp}": str(tmp_path),
        "{study}": str(folder / "study"),
        "{artifact}": str(folder / "study" / front["points"][0]["artifact"]),
        "{trial}": front["points"][0]["trial_id"],
    }
    for name, value in known.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    ended = slimtune(*arguments)
    assert ended.status == 2 and ended.out == "", ended
    assert len(ended.problems) == 1 and words in ended.problems[0], ended
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


# -- how a study ends, with a launcher that only pretends ----------------------------------------


class Pretend:
    """A launcher that trains nothing. `ends` says how trials end by their learning rate."""

    def __init__(
        self, facts: dict[str, Any], folder: Path, ends: dict[float, Any] | None = None
    ) -> None:
        self._facts, self.folder, self.ends = facts, folder, ends or {}
        self.ran: list[TrialConfig] = []
        self.damaged: set[str] = set()
        self.hear: Any = None
        self._work: Work | None = None

    def facts(self) -> dict[str, Any]:
        return self._facts

    def has(self, kind: str) -> bool:
        return True

    def free(self) -> int:
        return 0 if self._work else 1

    def start(self, work: Work) -> None:
        self._work = work

    def wait(self, timeout: float | None = None) -> list[Event]:
        work, self._work = self._work, None
        assert work is not None
        try:
            return [Done(work, getattr(self, work.kind)(work))]
        except DamagedArtifact as error:
            return [Lost(work, Reason.ERROR, str(error), again=False)]

    def baseline(self, work: Work) -> TrialResult:
        config = make_recipe(tiny_study.recipe(self.folder)).trial_config(model=work.model)
        self.ran.append(config)
        return self._completed(config, accuracy=0.9)

    def trial(self, work: Work) -> TrialResult:
        config = work.config
        assert config is not None
        self.ran.append(config)
        end = self.ends.get(config.finetune["learning_rate"])
        if isinstance(end, BaseException):
            raise end
        if end is None:
            return self._completed(config, accuracy=0.8 - config.finetune["learning_rate"])
        return TrialResult(
            trial_id=config.id, config=config, status=TrialStatus.FAILED, reason=end, message="why"
        )

    def _completed(self, config: TrialConfig, *, accuracy: float) -> TrialResult:
        size = 1.0 + accuracy  # better ones are larger: all are on the front
        metrics = {"accuracy": accuracy, "size_mb": size, "latency_ms": 1.0}
        return TrialResult(
            trial_id=config.id,
            config=config,
            status=TrialStatus.COMPLETED,
            measurement=Measurement(metrics=metrics),
            artifact="artifact",
        )

    def timings(self, work: Work) -> dict[str, Measurement]:
        return {key: Measurement(metrics={"latency_ms": 1.0}) for key in work.artifacts}

    def test(self, work: Work) -> tuple[Measurement, str]:
        assert work.config is not None
        if work.config.id in self.damaged:
            raise DamagedArtifact(f"{work.folder} is damaged: model.onnx has another SHA-256")
        return Measurement(metrics={"accuracy": 0.5}), "0" * 64

    def waiting(self) -> dict[str, str]:
        return {}

    def now(self) -> float:
        return 0.0

    def close(self) -> None:
        self._work = None


class Notes(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []
        self.reused = 0

    def note(self, text: str) -> None:
        self.told.append(text)

    def trial_reused(self, result: TrialResult) -> None:
        self.reused += 1


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a worker says of the tiny study."""
    folder = tmp_path_factory.mktemp("facts")
    return Inline(make_recipe(tiny_study.recipe(folder)), folder).facts()


def recipe(folder: Path, **sections: Any) -> Recipe:
    return make_recipe(tiny_study.recipe(folder, **{**ALONE, "space": RATES, **sections}))


def run(
    folder: Path, launcher: Pretend, watch: Silent | None = None, **sections: Any
) -> dict[str, Any]:
    return Study(recipe(folder, **sections), launcher=launcher, watch=watch).run()


def rates(front: dict[str, Any], status: str) -> list[float]:
    trials = [t for t in front["all_trials"] if t["role"] == "trial" and t["status"] == status]
    return [trial["config"]["finetune"]["learning_rate"] for trial in trials]


@pytest.mark.parametrize("reason", list(Reason))
def test_only_failures_that_may_pass_are_tried_again(
    reason: Reason, facts: dict[str, Any], tmp_path: Path
) -> None:
    first = run(tmp_path, Pretend(facts, tmp_path, {2e-4: reason}))
    assert rates(first, "failed") == [2e-4] and first["trials"]["completed"] == 5
    again = Pretend(facts, tmp_path)
    second = run(tmp_path, again)
    if reason in (Reason.OOM, Reason.TIMEOUT, Reason.ERROR):
        assert [config.finetune["learning_rate"] for config in again.ran] == [2e-4]
        assert rates(second, "failed") == []
    else:
        assert again.ran == [] and rates(second, "failed") == [2e-4]
        assert second["trials"]["reused"] == 6


def test_a_search_that_was_made_longer_goes_on(facts: dict[str, Any], tmp_path: Path) -> None:
    few = {"search": {"name": "random", "num_trials": 2}}
    first = run(tmp_path, Pretend(facts, tmp_path), **few)
    again, watch = Pretend(facts, tmp_path), Notes()
    more = {"search": {"name": "random", "num_trials": 4}}
    second = run(tmp_path, again, watch, **more)
    assert len(again.ran) == 2 and watch.reused == 3
    assert rates(second, "completed")[:2] == rates(first, "completed")
    assert len(rates(second, "completed")) == 4


def test_an_interrupted_study_goes_on_where_it_was(facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Pretend(facts, tmp_path, {3e-4: KeyboardInterrupt()}))
    assert not (tmp_path / "study" / "front.json").exists()
    again = Pretend(facts, tmp_path)
    front = run(tmp_path, again)
    assert [config.finetune["learning_rate"] for config in again.ran] == [3e-4, 4e-4, 5e-4]
    assert front["trials"]["completed"] == 6 and front["trials"]["reused"] == 3


def test_notes_on_the_data_are_told_when_a_study_starts_and_kept(
    facts: dict[str, Any], tmp_path: Path
) -> None:
    noted = facts | {"notes": ["3 rows of train are in validation or test too: dropped"]}
    watches = Notes(), Notes()
    for watch in watches:
        run(tmp_path, Pretend(noted, tmp_path), watch)
    assert watches[0].told == noted["notes"] and watches[1].told == []
    manifest = json.loads((tmp_path / "study" / "manifest.json").read_text())
    assert manifest["facts"]["notes"] == noted["notes"]


def test_leaks_are_noted(tmp_path: Path) -> None:
    data = tiny_study.write_sentences(tmp_path / "data.csv", rows=240)
    rows = data.read_text().splitlines()
    data.write_text("\n".join([*rows, *rows[1:]]) + "\n")
    (note, *_) = Inline(recipe(tmp_path), tmp_path / "study").facts()["notes"]
    assert re.fullmatch(r"\d+ rows of train are in validation or test too: dropped", note)


def test_a_damaged_artifact_fails_its_trial_and_no_other(
    facts: dict[str, Any], tmp_path: Path
) -> None:
    launcher = Pretend(facts, tmp_path)
    victim = next(iter(recipe(tmp_path).asked()))
    launcher.damaged = {victim.id}
    front = run(tmp_path, launcher)
    (failed,) = [trial for trial in front["all_trials"] if trial["status"] == "failed"]
    assert failed["trial_id"] == victim.id and "another SHA-256" in failed["message"]
    assert len(front["points"]) == 5 and all(point["test"] for point in front["points"])
    again = Pretend(facts, tmp_path)
    assert len(run(tmp_path, again)["points"]) == 6 and again.ran == [victim]


def test_a_damaged_baseline_ends_the_study_and_is_made_again(
    facts: dict[str, Any], tmp_path: Path
) -> None:
    launcher = Pretend(facts, tmp_path)
    launcher.damaged = {recipe(tmp_path).trial_config(model="bert").id}
    with pytest.raises(NoBaseline, match="is damaged.*the same command makes it again"):
        run(tmp_path, launcher)
    again = Pretend(facts, tmp_path)
    assert len(run(tmp_path, again)["points"]) == 6 and len(again.ran) == 1


@pytest.fixture
def pretend(
    facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pretend]:
    """The command's own launcher, replaced."""
    launcher = Pretend(facts, tmp_path)
    monkeypatch.setattr("orchestrator.study.make_launcher", lambda *_, **__: launcher)
    yield launcher


def test_a_failed_trial_ends_with_0_and_with_1_if_strict(
    pretend: Pretend, tmp_path: Path, slimtune: Here
) -> None:
    path = tiny_study.write_recipe(tmp_path, **ALONE, space=RATES)
    pretend.ends = {2e-4: Reason.ERROR, 3e-4: Reason.DIVERGED}
    done = slimtune("run", path)
    assert done.status == 0 and "4 completed, 2 failed in" in done.out
    assert "failed (error): why" in done.err and "failed (diverged): why" in done.err
    done = slimtune("run", path, "--strict")
    assert done.status == 1
    (problem,) = done.problems
    assert re.fullmatch(r"trial [0-9a-f]{16} failed: why", problem)
    pretend.ends = {}
    assert slimtune("run", path, "--strict").status == 0


def test_limits_that_every_trial_breaks_end_with_1(
    pretend: Pretend, tmp_path: Path, slimtune: Here
) -> None:
    path = tiny_study.write_recipe(
        tmp_path, **ALONE, space=RATES, limits={"accuracy": {"min": 0.99}}
    )
    done = slimtune("run", path)
    assert done.status == 1
    assert done.problems == ["no trial keeps the limits: 6 are over one."]


def test_a_dense_model_that_fails_ends_with_1_and_one_message(
    pretend: Pretend, tmp_path: Path, slimtune: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(tmp_path).trial_config(model="bert")
    ending = {"status": TrialStatus.FAILED, "reason": Reason.DIVERGED, "message": "loss is nan"}
    result = TrialResult(trial_id=config.id, config=config, **ending)
    monkeypatch.setattr(pretend, "baseline", lambda work: result)
    done = slimtune("run", tiny_study.write_recipe(tmp_path, **ALONE, space=RATES))
    assert done.status == 1
    assert done.problems == ["the dense baseline of bert failed: loss is nan"]


def test_numbers_that_json_does_not_have_are_null(
    pretend: Pretend, tmp_path: Path, slimtune: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    completed = pretend._completed

    def infinite(config: TrialConfig, *, accuracy: float) -> TrialResult:
        result = completed(config, accuracy=accuracy)
        assert result.measurement is not None
        metrics = {**result.measurement.metrics, "speedup": float("inf")}
        return result.model_copy(update={"measurement": Measurement(metrics=metrics)})

    monkeypatch.setattr(pretend, "_completed", infinite)
    done = slimtune("run", tiny_study.write_recipe(tmp_path, **ALONE, space=RATES), "--json")
    assert printed_json(done.out)["points"][0]["metrics"]["speedup"] is None


# -- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = tiny_study.write_recipe(tmp_path, **ALONE)
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(path)]
    log = tmp_path / "log"
    with log.open("w") as stream:
        running = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
    deadline = time.monotonic() + 240
    while "[2/" not in log.read_text():
        assert running.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to all that runs in it
    assert running.wait(timeout=60) == 130, log.read_text()
    told = log.read_text()
    assert told.endswith("Interrupted. The same command goes on from here.\n"), told
    assert "Traceback" not in told and "2 completed in" in told

    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    front = printed_json(done.stdout)
    assert front["trials"]["completed"] == 4 and front["trials"]["reused"] == 2
    assert "[1/" not in done.stderr and "[2/" in done.stderr


def test_a_full_disk_is_told_in_a_sentence(
    tmp_path: Path, slimtune: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, **_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("orchestrator.study.write_atomically", full)
    done = slimtune("run", tiny_study.write_recipe(tmp_path, **ALONE))
    assert done.status == 1
    assert [p for p in done.problems if "The disk is full" in p and "recipe.yaml" in p]


SLOW_TO_END = """
import time
from orchestrator import cli

def slow_to_end():
    try:
        print("works", flush=True)
        time.sleep(60)
    finally:
        print("ends", flush=True)
        time.sleep(60)

cli.app = lambda **_: slow_to_end()
cli.main()
"""


def test_a_second_ctrl_c_waits_for_nothing() -> None:
    running = subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_END],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert running.stdout is not None
    for told in ("works", "ends"):
        assert running.stdout.readline().strip() == told
        running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 130
    assert err.endswith("Ended at once. The same command goes on from here.\n")
    assert "Traceback" not in err
