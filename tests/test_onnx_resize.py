"""A graph for other sizes of the same layers is the one that an export would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tiny_models
import torch
from params import slow_but
from transformers import PreTrainedModel

from orchestrator.prune.tree import read_signature, shrink
from orchestrator.runtimes import onnx_export

KINDS = {
    "bert": "encoder",
    "roberta": "encoder",
    "distilbert": "encoder",
    "llama_untied": "encoder",
    "gpt2": "decoder",
    "llama": "decoder",
}


def smaller(family: str) -> PreTrainedModel:
    """Each layer with heads and neurons of its own number, at least two, and fewer tokens."""
    model = tiny_models.make(family)
    counts = read_signature(model).counts
    keep = {}
    for number, (group, count) in enumerate(counts.items()):
        if group.endswith("heads"):
            keep[group] = range(2 + number % (count - 1))
        elif group.endswith("neurons"):
            keep[group] = range(count - 3 - number)
        elif group == "vocabulary":
            keep[group] = range(count - 7)
    shrink(model, keep)
    return model


@pytest.mark.parametrize("family", slow_but(KINDS, "bert", "gpt2"))
def test_a_template_in_other_sizes_is_what_the_exporter_makes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = KINDS[family]
    onnx_export.templates(smaller(family), kind=kind, cache=tmp_path / "fresh")
    onnx_export.templates(tiny_models.make(family), kind=kind, cache=tmp_path / "shared")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("exported again"))
    onnx_export.templates(smaller(family), kind=kind, cache=tmp_path / "shared")
    (exported,) = (tmp_path / "fresh").glob("onnx-*/*.onnx")
    resized = tmp_path / "shared" / exported.relative_to(tmp_path / "fresh")
    assert resized.read_bytes() == exported.read_bytes()


def test_where_a_resized_template_computes_something_else_there_is_an_export(
    tmp_path: Path,
) -> None:
    onnx_export.templates(tiny_models.make("bert"), kind="encoder", cache=tmp_path)
    (file,) = tmp_path.glob("onnx-*/model.onnx")
    model = ir.load(file)
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 0.1)
    ir.save(model, file)
    found = onnx_export.templates(smaller("bert"), kind="encoder", cache=tmp_path)["model.onnx"]
    scales = [node.attributes.get_float("scale", 0) for node in found.graph]
    assert any(scales) and 0.1 not in [round(scale, 3) for scale in scales]
