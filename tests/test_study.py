"""From a recipe to a front of artifacts: what a user may rely on, on a study run for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_study

STRANGER = """
import json, sys, io
import numpy as np, onnxruntime, tokenizers, zstandard
folder, data, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
about = json.load(open(folder + "/artifact.json"))
tokenizer = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_truncation(about["max_length"])
session = onnxruntime.InferenceSession(folder + "/model.onnx")
names = {entry["name"] for entry in about["inputs"]}
right = 0
for text, label in rows:
    found = tokenizer.encode(text)
    inputs = {"input_ids": found.ids, "attention_mask": found.attention_mask, "token_type_ids": found.type_ids}
    feed = {name: np.array([value], np.int64) for name, value in inputs.items() if name in names}
    logits = session.run(["logits"], feed)[0]
    right += about["labels"][int(logits.argmax())] == label
assert "torch" not in sys.modules and "orchestrator" not in sys.modules
print(right / len(rows))
"""


def slimtune(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its finished study."""
    folder = tmp_path_factory.mktemp("study")
    done = slimtune("run", tiny_study.write_recipe(folder))
    assert done.returncode == 0, done.stderr
    return folder


def trials_of(front: dict[str, Any]) -> list[dict[str, Any]]:
    """The searched points, on the front or not."""
    return [p for p in front["points"] + front["dominated"] if p["role"] == "trial"]


@pytest.fixture
def front(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "study" / "front.json").read_text())


def test_the_study_lies_on_disk_as_documented(folder: Path, front: dict[str, Any]) -> None:
    study = folder / "study"
    for name in ("recipe.yaml", "manifest.json", "ledger", "stages", "report.html"):
        assert (study / name).exists(), name
    trial = study / "trials" / trials_of(front)[0]["trial_id"]
    assert {p.name for p in trial.iterdir()} == {
        "config.json",
        "measurement.json",
        "log.txt",
        "artifact",
    }
    artifact = {p.name for p in (trial / "artifact").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "artifact.json"} <= artifact
    assert {"README.md", "predictions.jsonl.zst"} <= artifact


def test_every_trial_is_accounted_for(front: dict[str, Any]) -> None:
    roles = [trial["role"] for trial in front["all_trials"]]
    assert roles.count("trial") == 3
    assert {"baseline", "dense int8", "first 1 layer"} <= set(roles)
    assert front["trials"]["failed"] == 0, [t["message"] for t in front["all_trials"]]
    assert front["trials"]["completed"] == len(front["all_trials"])


def test_front_points_are_measured_on_both_splits_with_intervals(front: dict[str, Any]) -> None:
    for point in front["points"]:
        low, high = point["intervals"]["accuracy"]
        assert low <= point["metrics"]["accuracy"] <= high
        assert 0 <= point["test"]["accuracy"] <= 1
        assert point["metrics"]["latency_ms"] > 0 and point["metrics"]["peak_memory_mb"] > 10


def test_pruned_and_rounded_artifacts_are_smaller(front: dict[str, Any]) -> None:
    both = [p for p in trials_of(front) if p["config"]["prune"] and p["config"]["quantize"]["qat"]]
    small = both[0]
    assert small["metrics"]["size_mb"] < 0.7 * front["baseline"]["metrics"]["size_mb"]
    assert small["metrics"]["macs"] < 0.7 * front["baseline"]["metrics"]["macs"]


def test_what_is_served_is_what_was_trained(front: dict[str, Any]) -> None:
    for point in [front["baseline"], *front["points"]]:
        if point["role"] in ("trial", "baseline"):
            difference = point["details"]["served_difference"]
            assert difference["median_difference"] < 1e-3 * max(1.0, difference["logits_std"])


def test_a_stranger_with_the_runtime_alone_finds_the_test_score(
    folder: Path, front: dict[str, Any]
) -> None:
    from orchestrator.manifest import read_manifest
    from orchestrator.recipe import Recipe

    manifest = read_manifest(folder / "study")
    assert manifest is not None
    test = Recipe.from_resolved(manifest["recipe"]).task.load()["test"]
    names = test.label_names
    rows = [[text[0], names[label]] for text, label in zip(test.texts, test.labels, strict=True)]
    for point in front["points"][:3]:
        artifact = folder / "study" / point["artifact"]
        command = [sys.executable, "-c", STRANGER, str(artifact), "", json.dumps(rows)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=artifact)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(point["test"]["accuracy"], abs=1e-12)


def test_the_shapes_in_the_graph_are_the_smaller_ones(folder: Path, front: dict[str, Any]) -> None:
    import onnx

    point = next(p for p in trials_of(front) if p["config"]["prune"])
    graph = onnx.load(folder / "study" / point["artifact"] / "model.onnx").graph
    shapes = {tuple(sorted(tensor.dims)) for tensor in graph.initializer if len(tensor.dims) == 2}
    assert (16, 32) in shapes and (32, 64) not in shapes


def test_the_same_command_again_runs_nothing_and_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; sys.argv = ['slimtune', 'run', sys.argv[1], '--json']\n"
        "from orchestrator.cli import app\n"
        "try: app(standalone_mode=False)\n"
        "except BaseException as error: assert getattr(error, 'exit_code', 1) == 0, error\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    before = (folder / "study" / "front.json").read_text()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, str(folder / "tiny.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert again["trials"]["reused"] == len(again["all_trials"])
    assert again["points"] == json.loads(before)["points"]


def test_another_study_in_the_same_folder_is_refused(folder: Path) -> None:
    done = slimtune("run", folder / "tiny.yaml", "seed=7")
    assert done.returncode == 2
    assert "another `seed`" in done.stderr and "Traceback" not in done.stderr


def test_select_filters_and_says_when_nothing_fits(folder: Path, front: dict[str, Any]) -> None:
    study = folder / "study"
    sizes = sorted(p["metrics"]["size_mb"] for p in front["points"])
    done = slimtune("select", study, "--max", f"size_mb={sizes[0]}", "--json")
    assert [p["metrics"]["size_mb"] for p in json.loads(done.stdout)] == [sizes[0]]
    assert slimtune("select", study, "--max", "size_mb=0.0001").returncode == 1
    assert slimtune("select", study, "--max", "sise_mb=1").returncode == 2
    assert len(json.loads(slimtune("select", study, "--knee", "--json").stdout)) == 1


def test_export_copies_an_intact_artifact_and_refuses_a_flipped_byte(
    folder: Path, front: dict[str, Any], tmp_path: Path
) -> None:
    study = tmp_path / "study"
    shutil.copytree(folder / "study", study)
    point = front["points"][0]
    good = slimtune("export", point["trial_id"], tmp_path / "good", "--study", study)
    assert good.returncode == 0, good.stderr
    path = study / point["artifact"] / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    bad = slimtune("export", point["trial_id"], tmp_path / "bad", "--study", study)
    assert bad.returncode == 1 and "model.onnx has SHA-256" in bad.stderr
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_a_dropped_artifact_is_built_again_with_the_same_bytes(
    folder: Path, front: dict[str, Any], tmp_path: Path
) -> None:
    study = tmp_path / "study"
    shutil.copytree(folder / "study", study)
    point = trials_of(front)[0]
    before = json.loads((study / point["artifact"] / "artifact.json").read_text())["sha256"]
    shutil.rmtree(study / point["artifact"])
    result = study / "trials" / point["trial_id"] / "measurement.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"artifact": None}))
    done = slimtune("export", point["trial_id"], tmp_path / "again", "--study", study)
    assert done.returncode == 0, done.stderr
    after = json.loads((tmp_path / "again" / "artifact.json").read_text())["sha256"]
    assert after["model.onnx"] == before["model.onnx"]


@pytest.mark.slow
def test_measure_takes_the_numbers_again(folder: Path, front: dict[str, Any]) -> None:
    point = front["points"][0]
    done = slimtune("measure", folder / "study" / point["artifact"], "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)["metrics"]
    assert again["accuracy"] == point["metrics"]["accuracy"]
    assert again["size_mb"] == point["metrics"]["size_mb"]


@pytest.mark.slow
def test_a_trial_that_fails_has_its_reason_and_disturbs_nobody(tmp_path: Path) -> None:
    space = {
        "prune": "none",
        "quantize": "none",
        "finetune": {"learning_rate": {"choice": [1e-3, 1e30]}, "max_steps": 5},
    }
    path = tiny_study.write_recipe(
        tmp_path, space=space, references={"dense_int8": False, "first_layers": []}
    )
    done = slimtune("run", path, "--json")
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)["all_trials"]
    assert [t["reason"] for t in trials if t["status"] == "failed"] == ["diverged"]
    assert any(t["role"] == "trial" and t["status"] == "completed" for t in trials)


@pytest.mark.slow
def test_a_dry_run_tries_every_path_and_writes_no_study(folder: Path, tmp_path: Path) -> None:
    path = tiny_study.write_recipe(tmp_path)
    done = slimtune("run", path, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    tried = json.loads(done.stdout)
    assert all(row["works"] for row in tried["paths"]), tried
    assert tried["estimated_hours"] > 0
    assert {row["path"] for row in tried["paths"]} >= {
        "bert: dense",
        "bert: structured × W8A8 QAT",
        "bert: structured × none",
    }
    assert not (tmp_path / "study").exists()
