"""A whole study small enough for a test: a BERT of a few thousand weights on sentences made here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

GOOD = ["lovely", "bright", "warm", "great", "fine", "superb"]
BAD = ["dull", "cold", "awful", "poor", "grim", "bad"]
REST = ["the", "a", "film", "story", "scene", "actor", "was", "is", "and", "very", "quite", "plot"]


def write_sentences(path: Path, *, rows: int, seed: int = 0) -> Path:
    """A CSV of `text,label` whose labels hang on a few words."""
    rng = random.Random(seed)
    lines = ["text,label"]
    for row in range(rows):
        words = rng.choices(GOOD if row % 2 else BAD, k=2) + rng.choices(REST, k=rng.randint(3, 9))
        rng.shuffle(words)
        lines.append(f"{' '.join(words)},{'positive' if row % 2 else 'negative'}")
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe of three trials whose data and study lie in `folder`; `sections` replace its own."""
    data = folder / "data.csv"
    if not data.exists():
        write_sentences(data, rows=240)
    return {
        "name": "tiny",
        "output_dir": str(folder / "study"),
        "model": {
            "id": "bert",
            "config": {
                "model_type": "bert",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 64,
                "max_position_embeddings": 40,
            },
            "tokenizer": {"train": "bpe", "vocab_size": 320},
        },
        "task": {"name": "text_classification", "data": str(data), "max_length": 32},
        "target": {"runtime": "onnxruntime", "threads": 1},
        "objectives": ["accuracy", "size_mb", "latency_ms"],
        "baseline": {"finetune": {"learning_rate": 2e-3, "max_steps": 30}},
        "space": {
            "prune": {"choice": ["none", {"method": "structured", "heads": 0.5, "neurons": 0.5}]},
            "quantize": {"choice": ["none", {"scheme": "W8A8", "qat": True}]},
            "finetune": {"learning_rate": 1e-3, "max_steps": 5},
            "forbid": [{"prune.method": "none", "quantize.scheme": "none"}],
        },
        "search": {"name": "grid"},
        "references": {"first_layers": [1]},
        "keep": "all",
        "resources": {"engine": "inline"},
        "measure": {"max_seconds": 0.3, "num_inputs": 4, "num_check_inputs": 16},
        **sections,
    }


def write_recipe(folder: Path, **sections: Any) -> Path:
    """The recipe as a file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, **sections), sort_keys=False))
    return path
