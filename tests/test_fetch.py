"""What a recipe needs is fetched once, from a hub that is real but for its size; then nothing is asked."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_study
import tiny_tokenizers
import yaml
from conftest import Here
from hub_server import Repository, serve

REPOSITORY = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "orchestrator.cli"]
FEW: dict[str, Any] = {
    "space": {"quantize": "W8A8", "finetune": {"max_steps": 2}},
    "references": {"dense_int8": False, "first_layers": [], "random_twin": False},
}


def write_model(folder: Path) -> Path:
    tokenizer = tiny_tokenizers.wordpiece()
    model = tiny_models.make("bert", vocab_size=len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe whose model and data are on the hub, unless `sections` name others."""
    task = {"name": "text_classification", "data": "owner/reviews", "validation": "validation"}
    hub = {"model": {"id": "tiny", "name": "owner/tiny"}, "task": task}
    return tiny_study.write_recipe(folder, **(FEW | hub | sections))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model's folder, and one with the two splits of a data set."""
    folder = tmp_path_factory.mktemp("sources")
    data = folder / "reviews"
    data.mkdir()
    tiny_study.write_sentences(data / "train.csv", rows=160)
    tiny_study.write_sentences(data / "validation.csv", rows=60, seed=1)
    return {"model_tiny": write_model(folder / "tiny"), "dataset_reviews": data}


def slimtune(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, since the hub's client reads its settings when imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SLIMTUNE_"))}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=kept | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def without_network() -> list[str]:
    """How a command begins that has no network but itself."""
    alone = ["unshare", "--net", *(() if os.getuid() == 0 else ("--map-root-user",))]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("no network namespace can be made here")
    return alone


def fetched_items(told: dict[str, Any]) -> dict[str, str | None]:
    return {item["what"]: item["revision"] for item in told["items"]}


def commits(repositories: dict[str, Repository]) -> dict[str, str]:
    return {
        "model tiny": repositories["models/owner/tiny"].commit,
        "data": repositories["datasets/owner/reviews"].commit,
    }


@pytest.mark.cluster
@pytest.mark.slow
def test_what_was_fetched_runs_where_there_is_no_network(sources: dict[str, Path], tmp_path: Path):
    alone = without_network()
    recipe, place = write_recipe(tmp_path), tmp_path / "taken along"
    with serve(**sources) as (address, repositories):
        done = slimtune("fetch", recipe, "--to", place, "--json", HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr
        expected = commits(repositories)
    told = json.loads(done.stdout)
    assert fetched_items(told) == expected
    written = json.loads((place / "fetched.json").read_text())
    assert written == {key: value for key, value in told.items() if key != "file"}
    command = f"PATH={Path(sys.executable).parent}:$PATH; {told['command']}"
    command = command.replace(" slimtune run", f" {shlex.join(COMMAND)} run")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*alone, "bash", "-c", command], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    front = json.loads((tmp_path / "study" / "front.json").read_text())
    assert front["trials"]["completed"] and not front["trials"]["failed"]
    manifest = json.loads((tmp_path / "study" / "manifest.json").read_text())
    source = manifest["facts"]["models"]["tiny"]["source"]
    assert source == {"name": "owner/tiny", "revision": expected["model tiny"]}


@pytest.mark.slow
def test_a_folder_gets_a_copy_of_what_lies_here(sources: dict[str, Path], tmp_path: Path):
    task = {"name": "text_classification", "data": str(sources["dataset_reviews"] / "train.csv")}
    recipe = write_recipe(
        tmp_path,
        model=[{"id": "tiny", "name": str(sources["model_tiny"])}],
        task=task | {"validation": "validation.csv"},
    )
    uri = f"file://{tmp_path}/store"
    done = slimtune("fetch", recipe, "--to", uri, "--json", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (
        set(fetched_items(told)) == {"model tiny", "data"} and told["file"] == f"{uri}/fetched.json"
    )
    words = dict(word.split("=", 1) for word in shlex.split(told["command"]) if "=" in word)
    assert words["HF_HOME"] == "store/huggingface"  # where the store was copied to
    model, data = (tmp_path / words[key] for key in ("model.0.name", "task.data"))
    assert (model / "config.json").is_file()
    assert data.read_bytes() == (sources["dataset_reviews"] / "train.csv").read_bytes()
    assert (
        data.with_name("validation.csv").is_file()
        and (tmp_path / "store" / "fetched.json").is_file()
    )


def test_what_the_hub_does_not_have_is_told_together(tmp_path: Path):
    recipe = write_recipe(tmp_path, model={"id": "tiny", "name": "owner/other", "revision": "v2"})
    with serve() as (address, _):
        done = slimtune("fetch", recipe, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2
    problems = [line for line in done.stderr.splitlines() if line.startswith("✗")]
    assert [line.split(": the hub")[0] for line in problems] == ["✗ model.name", "✗ task.data"]


def test_a_recipe_of_this_machine_alone_needs_no_fetching(slimtune: Here, tmp_path: Path):
    written = tiny_study.recipe(tmp_path) | {"task": {"name": "causal_lm", "data": "python_stdlib"}}
    written["model"] = written["model"] | {"config": CAUSAL}
    written |= {"objectives": ["perplexity", "size_mb"], **FEW}
    written["task"] |= {"max_files": 4, "block_size": 16}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(written))
    done = slimtune("fetch", path, "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    assert told["items"] == [] and told["models"]["bert"]["config"] == CAUSAL


CAUSAL = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
