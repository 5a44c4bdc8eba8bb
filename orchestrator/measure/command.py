"""A user's own script as an instrument: an artifact's folder goes in, metrics come out."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 3600


def run_command(command: str, folder: Path) -> dict[str, float]:
    """What `command FOLDER` prints: a JSON object of numbers by metric name.

    Raises RuntimeError, with the script's last words, when it fails or prints something else, and
    TimeoutExpired after an hour.
    """
    words = [*shlex.split(command), str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except OSError as error:
        raise RuntimeError(f"target.command cannot be started: {error}") from error
    if done.returncode:
        words = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"target.command ended with {done.returncode}: {words}")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = None
    if not (isinstance(found, dict) and all(map(_is_number, found.values()))):
        raise RuntimeError(
            "target.command has to print a JSON object of finite numbers, but printed "
            f"{done.stdout.strip()[:200]!r}"
        )
    return {name: float(value) for name, value in found.items()}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
