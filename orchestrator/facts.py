"""What planning must know of data and models: asked of a worker process once, then cached.

The driver never loads a tensor library; a signature is small JSON that outlives the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.measure.fingerprint import fingerprint
from orchestrator.recipe import Recipe
from orchestrator.stages import write_atomically
from orchestrator.trial import BadInput, content_hash

Json = dict[str, Any]


def facts_of(recipe: Recipe) -> Json:
    """Signatures, labels and row counts, from the cache or a worker process. Raises `BadInput`."""
    cached = cache_folder() / "facts" / f"{_key(recipe)}.json"
    if cached.exists():
        found: Json = json.loads(cached.read_text(encoding="utf-8"))
        return found
    facts = ask_worker(recipe)
    write_atomically(cached, json.dumps(facts))
    return facts


def ask_worker(recipe: Recipe, environment: Mapping[str, str] | None = None) -> Json:
    """Load data and base models in a process of their own and describe them."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.bench"],
        input=json.dumps(recipe.resolved()),
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        raise RuntimeError(f"reading data and models failed:\n{done.stderr.strip()[-2000:]}")
    answer: Json = json.loads(done.stdout.splitlines()[-1])
    if "problems" in answer:
        raise BadInput(answer["problems"])
    return answer


def cache_folder() -> Path:
    """Where this user's caches lie: `$SLIMTUNE_CACHE`, else the platform's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SLIMTUNE_CACHE") or Path(base) / "slimtune")


def _key(recipe: Recipe) -> str:
    """The hash of what the facts depend on: sections, the files they name, versions, hardware."""
    resolved = recipe.resolved()
    sections = {name: resolved[name] for name in ("model", "task", "seed")}
    paths = [Path(text) for text in _texts(sections) if text and Path(text).exists()]
    stats = [_stat(file) for path in paths for file in _files(path)]
    return content_hash([sections, stats, fingerprint()])


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in _texts(item)]


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _stat(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns
