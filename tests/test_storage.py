"""What workers share at a URI is there whole or not at all, and a storage that is away is waited for."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_study
from servers import s3, s3_server  # noqa: F401

from orchestrator import scratch
from orchestrator.checkpoint import ABOUT, Saver
from orchestrator.manifest import ledger_key
from orchestrator.recipe import make_recipe
from orchestrator.stages import Stages, checkpoints, folder_sha256
from orchestrator.storage import Storage, StorageAway, open_uri
from orchestrator.study import Study
from orchestrator.trial import BadInput

Make = Callable[[str], Storage]


@pytest.fixture(params=["file", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Storages of one URI, each for a worker's folder of that name."""
    uri = {"file": f"file://{tmp_path}/shared/deep", "memory": f"memory://{tmp_path}"}
    here = f"{request.getfixturevalue('s3')}/study" if request.param == "s3" else uri[request.param]
    return lambda worker: Storage(here, tmp_path / worker)


def filled(folder: Path, text: str = "weights") -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model.txt").write_text(text)
    (folder / "tokenizer" / "vocabulary.txt").write_text("a b c")
    return folder


def test_what_one_worker_sends_another_fetches(storage: Make, tmp_path: Path):
    one, other = storage("one"), storage("other")
    sent = filled(tmp_path / "one" / "stages" / "trained-1")
    there = tmp_path / "other" / "stages" / "trained-1"
    assert not other.fetch(there) and other.below(there.parent) == []
    one.send(sent)
    assert other.below(there.parent) == [there]
    assert other.read(there, "model.txt") == b"weights"
    assert other.fetch(there) and folder_sha256(there) == folder_sha256(sent)
    assert [path.name for path in there.parent.iterdir()] == ["trained-1"]
    one.remove(sent)
    assert not other.fetch(there) and other.below(there.parent) == []


def test_checkpoints_are_seen_from_where_none_is_written(storage: Make, tmp_path: Path):
    stages = tmp_path / "one" / "stages"
    storage("one").send(filled(stages / "trained-1"))
    storage("one").send(filled(stages / ".going-trained-2" / "step-20"))
    there = tmp_path / "other" / "stages"
    assert checkpoints(there) == []
    assert checkpoints(there, storage("other")) == [".going-trained-2/step-20"]


def test_versions_of_a_folder_are_told_apart(storage: Make, tmp_path: Path):
    one, other = storage("one"), storage("other")
    sent, there = filled(tmp_path / "one" / "artifact"), tmp_path / "other" / "artifact"
    one.send(sent, version="first")
    (sent / "model.txt").write_text("more")
    one.send(sent, version="second")
    for version, text in (("second", "more"), ("first", "weights")):
        assert other.fetch(there, version=version)
        assert (there / "model.txt").read_text() == text
    assert not other.fetch(there) and not other.fetch(there, version="third")


def test_what_was_damaged_or_half_removed_counts_as_not_there(storage: Make, tmp_path: Path):
    one = storage("one")
    sent = filled(tmp_path / "one" / "stages" / "trained-1")
    one.send(sent)
    system, base = open_uri(one.uri)
    [model] = [path for path in system.find(base) if path.endswith("model.txt")]
    before = system.cat_file(model)
    system.pipe_file(model, b"else")
    there = tmp_path / "other" / "stages" / "trained-1"
    assert not storage("other").fetch(there) and not there.exists()
    system.pipe_file(model, before)
    assert storage("other").fetch(there)
    system.rm(model)
    assert not storage("third").fetch(tmp_path / "third" / "stages" / "trained-1")


def test_a_result_is_made_once_for_workers_that_share_no_folder(storage: Make, tmp_path: Path):
    made: list[str] = []

    def build(folder: Path) -> None:
        made.append(folder.name)
        filled(folder / "baseline")

    stages = {
        name: Stages(tmp_path / name / "stages", storage=storage(name)) for name in ("one", "other")
    }
    first = stages["one"].once("dense", {"seed": 0}, build, version=1)
    assert [*stages["other"].each("dense")] == [({"seed": 0}, 1)]
    told_of = tmp_path / "other" / "stages" / first.name / "baseline"
    assert (stages["other"].reach(told_of) / "model.txt").exists()
    again = stages["other"].once("dense", {"seed": 0}, build, version=1)
    assert len(made) == 1 and folder_sha256(first) == folder_sha256(again)


def test_a_training_is_gone_on_with_by_another_worker(storage: Make, tmp_path: Path):
    one = Saver(tmp_path / "one" / "stages" / ".going-x", 5, storage("one"))
    other = Saver(tmp_path / "other" / "stages" / ".going-x", 5, storage("other"))
    for step in (5, 10):
        folder = filled(one.folder / f"step-{step}")
        seal = f'{{"step": {step}, "progress": {{}}, "sha256": %s}}'
        hashes = str(folder_sha256(folder)).replace("'", '"')
        (folder / ABOUT).write_text(seal % hashes)
        storage("one").send(folder)
    last = other.last()
    assert last is not None and last.step == 10 and (last.folder / "model.txt").exists()
    other.forget()
    assert other.last() is None and one.storage and not one.storage.below(one.folder)


# -- a storage that is away, or cannot be used -------------------------------------------------------


def test_a_storage_that_comes_back_is_waited_for(s3: str, s3_server: Any, tmp_path: Path):  # noqa: F811
    storage = Storage(f"{s3}/study", tmp_path)
    sent = filled(tmp_path / "stages" / "trained-1")
    s3_server.stop()
    back = threading.Timer(3, s3_server.start)
    back.start()
    began = time.monotonic()
    try:
        storage.send(sent)
        assert time.monotonic() - began > 2.5
        assert storage.fetch(sent)
    finally:
        back.join()


def test_a_storage_that_stays_away_is_told(s3: str, s3_server: Any, tmp_path: Path):  # noqa: F811
    s3_server.stop()
    try:
        with pytest.raises(StorageAway, match=f"storage: {s3}/study cannot be used: Could not"):
            Storage(f"{s3}/study", tmp_path, patience_s=0.5).check()
    finally:
        s3_server.start()


def test_what_cannot_be_used_is_bad_input(s3: str, tmp_path: Path):  # noqa: F811
    refused = {
        "s3://no-such-bucket/study": "cannot be used: The specified bucket does not exist",
        "nope://x": "cannot be opened: Protocol not known",
        "file:///proc/study": "cannot be used: ",
    }
    for uri, why in refused.items():
        with pytest.raises(BadInput, match=why):
            Storage(uri, tmp_path, patience_s=0).check()
    with pytest.raises(BadInput, match="leave it out, and give credentials through the environ"):
        make_recipe(tiny_study.recipe(tmp_path, storage="s3://user:secret@host/bucket"))


# -- a worker's own folder ---------------------------------------------------------------------------


def test_the_folder_on_a_machine_stays_while_somebody_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = scratch.take("study")
    assert folder.is_dir() and folder == scratch.take("study")
    assert not scratch.remove("study") and folder.is_dir()
    for lock in scratch._held:  # as the kernel does for a process that ends
        os.close(lock)
    monkeypatch.setattr(scratch, "_held", [])
    assert scratch.remove("study") and not folder.exists() and scratch.remove("study")


# -- a study -----------------------------------------------------------------------------------------

FEW = {
    "space": {"quantize": {"choice": ["none", "W8A8"]}, "finetune": {"max_steps": 4}},
    "references": {"dense_int8": False, "first_layers": [], "random_twin": False},
    "keep": "front",
}


@pytest.mark.slow
def test_a_study_goes_on_elsewhere_from_its_storage_alone(s3: str, tmp_path: Path):  # noqa: F811
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    uri = f"{s3}/study"
    front = Study(make_recipe(tiny_study.recipe(tmp_path / "here", storage=uri, **FEW))).run()
    system, base = open_uri(uri)
    assert (
        system.cat_file(f"{base}/front.json") == (tmp_path / "here/study/front.json").read_bytes()
    )
    for point in (*front["points"], *front["references"]):
        assert system.exists(f"{base}/{point['artifact']}/model.onnx")
    second = make_recipe(
        tiny_study.recipe(tmp_path / "elsewhere", storage=uri, **FEW)
        | {"task": tiny_study.recipe(tmp_path / "here")["task"]}
    )
    again = Study(second).run()
    assert ledger_key(tmp_path / "elsewhere" / "study") == ledger_key(tmp_path / "here" / "study")
    ids = [{trial["trial_id"] for trial in each["all_trials"]} for each in (front, again)]
    assert ids[0] == ids[1]
    other = make_recipe(tiny_study.recipe(tmp_path / "here", storage=uri, seed=1, **FEW))
    with pytest.raises(BadInput, match=f"storage: {uri} holds a study with another `seed`"):
        Study(other.model_copy(update={"output_dir": str(tmp_path / "third")})).run()
