"""A graph for other sizes of the same layers is the one that an export would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tiny_models
import torch
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


def agree(one: ir.Model, other: ir.Model) -> None:
    """The same operators with the same attributes, and no shape that contradicts the other."""
    ports = [
        [(v.name, str(v.shape)) for v in (*m.graph.inputs, *m.graph.outputs)] for m in (one, other)
    ]
    assert ports[0] == ports[1]
    for node, twin in zip(one.graph, other.graph, strict=True):
        assert node.op_type == twin.op_type
        texts = [{k: str(a.value) for k, a in n.attributes.items()} for n in (node, twin)]
        assert texts[0] == texts[1]
        for value, same in zip(node.outputs, twin.outputs, strict=True):
            for axis, size in zip(value.shape or (), same.shape or (), strict=False):
                both_known = isinstance(axis, int) and isinstance(size, int)
                assert not both_known or axis == size, (node, value.shape, same.shape)
    assert len(one.graph) == len(other.graph)


@pytest.mark.parametrize("family", KINDS)
def test_a_template_in_other_sizes_is_what_the_exporter_makes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = KINDS[family]
    exported = onnx_export.templates(smaller(family), kind=kind, cache=tmp_path / "fresh")
    onnx_export.templates(tiny_models.make(family), kind=kind, cache=tmp_path / "shared")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("exported again"))
    resized = onnx_export.templates(smaller(family), kind=kind, cache=tmp_path / "shared")
    for file, model in exported.items():
        agree(resized[file], model)


def test_where_a_template_cannot_be_resized_there_is_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_export.templates(tiny_models.make("bert"), kind="encoder", cache=tmp_path)

    def wrong(model: ir.Model, weights: Any, ports: Any) -> None:
        resize(model, weights, ports)
        for node in model.graph:
            if node.op_type == "Attention":
                node.attributes["scale"] = ir.AttrFloat32("scale", 0.1)

    resize = onnx_export.resize
    monkeypatch.setattr(onnx_export, "resize", wrong)
    found = onnx_export.templates(smaller("bert"), kind="encoder", cache=tmp_path)
    scales = [
        n.attributes["scale"].value for n in found["model.onnx"].graph if "scale" in n.attributes
    ]
    assert scales and 0.1 not in scales
