"""Who has a training loop of their own gets the steps of a trial by five calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from torch.nn.functional import cross_entropy

from orchestrator.artifact import DamagedArtifact, verify
from orchestrator.own_loop import convert, export, measure, prepare, prune
from orchestrator.runtimes import RUNTIMES, Target
from orchestrator.trial import BadInput, Infeasible


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMTUNE_CACHE", str(tmp_path / "cache"))


def train(model: torch.nn.Module, pruned: object, num_steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(num_steps):
        batch = tiny_models.inputs(model, rows=4)
        cross_entropy(model(**batch).logits, torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruned.step()


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_was_trained_is_what_is_served(runtime: str, tmp_path: Path) -> None:
    target = Target(runtime=runtime)
    model = tiny_models.make("bert", intermediate_size=64)
    options = {"method": "magnitude", "sparsity": 0.5, "schedule": "gradual"}
    neurons = {"method": "structured", "neurons": 0.5, "importance": "magnitude"}
    pruned = prune(model, [options, neurons], num_steps=6)
    prepare(model, "W8A8", target=target)
    train(model, pruned, 6)
    reached, _ = pruned.finish()
    assert reached["sparsity"] > 0.45
    folder = export(convert(model, "W8A8", target=target), tmp_path / "made", target=target)
    assert verify(folder)["target"]["runtime"] == runtime
    given = tiny_models.inputs(model)
    trained = model.eval()(**given).logits.detach()

    def evaluate(answer: object) -> dict[str, float]:
        return {"difference": float((answer(given) - trained).abs().max() / trained.abs().max())}

    found = measure(folder, evaluate)
    assert found["difference"] < 0.05
    assert found["size_mb"] > 0 and found["latency_ms"] > 0 and found["peak_memory_mb"] > 0


def test_importance_that_looks_at_batches_needs_some() -> None:
    with pytest.raises(BadInput, match="give `batches`"):
        prune(tiny_models.make("bert"), {"method": "structured", "heads": 0.5})


def test_importance_by_the_model_s_own_loss() -> None:
    model = tiny_models.make("bert")
    batch = tiny_models.inputs(model) | {"labels": torch.tensor([0, 1])}
    pruned = prune(model, {"method": "structured", "heads": 0.5}, batches=[batch])
    assert pruned.finish()[0]["kept"]["encoder.2.heads"] == 2


def test_none_changes_nothing() -> None:
    model = tiny_models.make("gpt2")
    before = tiny_models.logits(model)
    assert prune(model, "none").finish() == []
    prepare(model, "none")
    prepare(model, {"scheme": "W8A8", "qat": False})
    assert torch.equal(tiny_models.logits(model), before)
    assert torch.equal(tiny_models.logits(convert(model, "none")), before)


def test_a_scheme_that_the_runtime_does_not_serve_is_infeasible() -> None:
    with pytest.raises(Infeasible):
        convert(tiny_models.make("bert"), "W2A8")


def test_a_changed_artifact_is_not_measured(tmp_path: Path) -> None:
    folder = export(tiny_models.make("bert"), tmp_path / "made", target=Target(runtime="torch"))
    (folder / "config.json").write_text("{}")
    with pytest.raises(DamagedArtifact):
        measure(folder)
