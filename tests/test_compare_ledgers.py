"""A comparison of two studies finds what is missing, counted twice, different or damaged."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from compare_ledgers import compare

from orchestrator.ledger import Ledger
from orchestrator.manifest import ledger_key
from orchestrator.trial import TrialConfig, TrialResult


def study(folder: Path, results: list[tuple[str, str, float]]) -> Path:
    """The folder of a study whose trials ended so: key, status and last loss."""
    folder.mkdir(parents=True)
    with closing(Ledger(folder / "ledger", ledger_key(folder))) as ledger:
        ledger.take()
        for key, status, loss in results:
            details = {"training": {"losses": [(1, loss)]}}
            config = TrialConfig(model="m")
            result = TrialResult(trial_id=key, config=config, status=status, details=details)
            attempt = 1 + sum(key == earlier for earlier, *_ in results) * ledger.attempts(key)
            ledger.append("finished", key, attempt=attempt, result=result.model_dump(mode="json"))
    return folder


def differences(tmp_path: Path, results: list[tuple[str, str, float]]) -> dict[str, int]:
    alone = study(tmp_path / "alone", [("a", "completed", 0.5), ("b", "completed", 0.25)])
    found = compare(study(tmp_path / "disturbed", results), alone)
    return {name: count for name, count in found.items() if count and name != "trials"}


def test_a_study_that_lost_trials_for_a_while_differs_in_nothing(tmp_path: Path) -> None:
    results = [("b", "failed", 9.0), ("a", "completed", 0.5), ("b", "completed", 0.25)]
    assert differences(tmp_path, results) == {}


def test_missing_trials_and_other_losses_are_counted(tmp_path: Path) -> None:
    results = [("a", "completed", 0.6), ("c", "completed", 1.0)]
    assert differences(tmp_path, results) == {"missing": 1, "unexpected": 1, "different": 1}


def test_a_trial_that_counts_twice_is_found(tmp_path: Path) -> None:
    results = [(key, "completed", loss) for key, loss in (("a", 0.5), ("b", 0.25), ("a", 0.5))]
    assert differences(tmp_path, results) == {"counted_twice": 1}


def test_an_artifact_that_was_changed_is_found(tmp_path: Path) -> None:
    artifact = tmp_path / "disturbed" / "trials" / "a" / "artifact"
    alone = study(tmp_path / "alone", [])
    disturbed = study(tmp_path / "disturbed", [])
    artifact.mkdir(parents=True)
    described = {"sha256": {"model.onnx": "0" * 64}}
    (artifact / "artifact.json").write_text(json.dumps(described))
    (artifact / "model.onnx").write_bytes(b"other")
    assert compare(disturbed, alone)["bad_hashes"] == 1
