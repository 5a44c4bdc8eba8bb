"""What an event costs in a ledger: milliseconds until it is on the disk, and bytes a trial.

    python benchmarks/ledger_events.py [--quick] [--json FILE] [--trials 1000]
                                       [--url postgresql://…] [--folder FOLDER]

Trials of twelve events, as large as those of a real one, go into SQLite in a folder, and with
`--url` into PostgreSQL, under a study's name of its own; a bare fsync in the folder is beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.ledger import Kind, Ledger

Json = dict[str, Any]
SIZES: tuple[tuple[Kind, int], ...] = (  # of payloads, in bytes
    ("asked", 750),
    ("started", 14),
    *[("stage", 20)] * 7,
    ("finished", 2900),
    *[("measured", 420)] * 2,
)


def fill(where: Path | str, num_trials: int) -> Json:
    """Append the events of that many trials."""
    seconds = []
    with closing(Ledger(where, f"benchmark-{secrets.token_hex(4)}")) as ledger:
        ledger.take()
        cpu = time.process_time()
        for trial in range(num_trials):
            for kind, size in SIZES:
                began = time.perf_counter()
                ledger.append(kind, f"{trial:016x}", text="x" * size)
                seconds.append(time.perf_counter() - began)
        cpu = time.process_time() - cpu
    return milliseconds(seconds) | {"cpu_ms": 1e3 * cpu / len(seconds)}


def bare_fsync(folder: Path, count: int) -> Json:
    seconds = []
    with (folder / "file").open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(b"x" * 1000)
            began = time.perf_counter()
            os.fsync(file)
            seconds.append(time.perf_counter() - began)
    return milliseconds(seconds)


def milliseconds(seconds: Sequence[float]) -> Json:
    median, high = 1e3 * np.quantile(seconds, [0.5, 0.95])
    return {"median_ms": float(median), "p95_ms": float(high), "mean_ms": 1e3 * np.mean(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fifty trials")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--url", help="of a PostgreSQL that may be written to")
    parser.add_argument(
        "--folder", type=Path, help="on the disk in question; default a temporary one"
    )
    asked = parser.parse_args()
    num_trials = 50 if asked.quick else asked.trials
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        found = {"SQLite": fill(folder, num_trials), "bare fsync": bare_fsync(folder, num_trials)}
        size = sum(path.stat().st_size for path in folder.glob("ledger*"))
        found["SQLite"]["bytes_a_trial"] = size / num_trials
    if asked.url:
        found["PostgreSQL"] = fill(asked.url, num_trials)
    for what, figures in found.items():
        print(what, " ".join(f"{name}={value:.3g}" for name, value in figures.items()))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
