"""Whether a study that was disturbed came to what an undisturbed one did.

    python benchmarks/compare_ledgers.py DISTURBED UNDISTURBED

Reads both studies' folders and prints, as JSON, how many trials are missing, were counted twice,
came to another result, or have an artifact that is not what its hashes say.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from orchestrator.artifact import DamagedArtifact, verify
from orchestrator.ledger import Ledger
from orchestrator.manifest import ledger_key

TOLERANCE = 1e-6  # of losses


def finished(study: Path) -> list[tuple[str, dict[str, Any]]]:
    """Results by trial as they were written down, repeated ones too."""
    with closing(Ledger(study / "ledger", ledger_key(study))) as ledger:
        events = [event for event in ledger.events() if event.kind == "finished"]
    return [(event.key, event.payload["result"]) for event in events]


def compare(disturbed: Path, undisturbed: Path) -> dict[str, int]:
    """Counts of what differs; all of them are 0 where nothing does."""
    found, expected = finished(disturbed), dict(finished(undisturbed))
    completed = Counter(key for key, result in found if result["status"] == "completed")
    results = {key: result for key, result in found if result["status"] == "completed"}
    wanted = {key for key, result in expected.items() if result["status"] == "completed"}
    return {
        "trials": len(wanted),
        "missing": len(wanted - results.keys()),
        "counted_twice": sum(count > 1 for count in completed.values()),
        "unexpected": len(results.keys() - wanted),
        "different": sum(
            not _alike(results[key], expected[key]) for key in results.keys() & wanted
        ),
        "bad_hashes": sum(map(_is_damaged, disturbed.glob("trials/*/artifact"))),
    }


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = zip(_losses(one), _losses(other), strict=True)
    return all(abs(a - b) <= TOLERANCE * abs(b) for a, b in pairs)


def _losses(result: dict[str, Any]) -> list[float]:
    return [loss for _, loss in (result["details"].get("training") or {}).get("losses", ())]


def _is_damaged(artifact: Path) -> bool:
    try:
        verify(artifact)
    except DamagedArtifact:
        return True
    return False


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]))))
