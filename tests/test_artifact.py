"""An artifact proves that it is what was measured, and keeps its answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import artifact


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "tokenizer.json").write_text("{}")
    artifact.seal(tmp_path, {"trial_id": "abc"})
    return tmp_path


def test_an_intact_artifact_describes_itself(folder: Path) -> None:
    description = artifact.verify(folder)
    assert description["trial_id"] == "abc"
    assert set(description["sha256"]) == {"model.onnx", "tokenizer.json"}


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_one_flipped_byte_is_refused_by_name(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[0] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(artifact.DamagedArtifact, match=name):
        artifact.verify(folder)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(artifact.DamagedArtifact, match=r"tokenizer\.json is missing"):
        artifact.verify(folder)


def test_predictions_come_back_by_split_and_are_replaced_not_added(folder: Path) -> None:
    artifact.write_predictions(folder, "validation", [{"id": "1", "logits": [0.25, -1.5]}])
    artifact.write_predictions(folder, "test", [{"id": "7", "logits": [1.0, 2.0]}])
    artifact.write_predictions(folder, "validation", [{"id": "2", "logits": [3.0, 4.0]}])
    assert artifact.read_predictions(folder, "validation") == [{"id": "2", "logits": [3.0, 4.0]}]
    assert artifact.read_predictions(folder, "test") == [{"id": "7", "logits": [1.0, 2.0]}]


def test_resealing_takes_completed_files_in_and_keeps_the_description(folder: Path) -> None:
    before = artifact.file_sha256(folder / "artifact.json")
    artifact.write_predictions(folder, "test", [{"id": "7"}])
    after = artifact.reseal(folder)
    assert after != before
    assert artifact.verify(folder)["trial_id"] == "abc"
