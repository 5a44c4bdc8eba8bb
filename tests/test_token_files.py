"""Tokens are made once for all workers of a host, and come back as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_study

from orchestrator import token_files
from orchestrator.bench import Bench
from orchestrator.recipe import make_recipe
from orchestrator.tasks import Encoded

ROWS = [[3, 1, 4], [], [1, 5, 9, 2, 2**40]]


@pytest.mark.parametrize("labels", [None, np.array([0, 2, 1])])
def test_what_is_read_is_what_was_saved(tmp_path: Path, labels: np.ndarray | None) -> None:
    features = [
        {"input_ids": np.array(row, dtype=np.int64), "labels": np.array(row[1:], dtype=np.int64)}
        for row in ROWS
    ]
    saved = Encoded(ids=["a", "b", "c"], features=features, labels=labels, padding={"labels": -100})
    token_files.save(saved, tmp_path)
    found = token_files.load(tmp_path)
    assert list(found.ids) == ["a", "b", "c"] and dict(found.padding) == {"labels": -100}
    assert len(found) == 3 and len(found.features[1:]) == 2
    for row, expected in zip(found.features, features, strict=True):
        for name, values in expected.items():
            assert row[name].dtype == np.int64 and row[name].tolist() == values.tolist()
    assert found.features[-1]["input_ids"].tolist() == ROWS[-1]
    with pytest.raises(IndexError):
        found.features[3]
    if labels is None:
        assert found.labels is None
    else:
        assert found.labels.tolist() == labels.tolist()


def test_a_second_worker_does_not_tokenise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tiny_study.recipe(tmp_path))
    first = Bench(recipe, tmp_path / "study")
    train = first.encoded("train", first.base("bert").tokenizer)
    second = Bench(recipe, tmp_path / "study")
    second.base("bert")
    monkeypatch.setattr(type(recipe.task), "encode", lambda *_: pytest.fail("tokenised again"))
    again = second.encoded("train", second.base("bert").tokenizer)
    assert [row["input_ids"].tolist() for row in again.features] == [
        row["input_ids"].tolist() for row in train.features
    ]
    assert first.encoded("train", first.base("bert").tokenizer) is train
