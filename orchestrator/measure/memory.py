"""Peak memory of serving, taken in a fresh process that loads the artifact and answers requests."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.runtimes import Session, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray


def peak_memory_mb(folder: Path, target: Target, *, length: int) -> float:
    """Peak resident memory in 10⁶ bytes (on a GPU: the device memory torch took) of a whole serving process.

    The process runs three requests of `length` tokens at the target's batch. It includes the
    interpreter and the runtime's own libraries, as a deployment would. Raises RuntimeError with
    the process's last words if it fails.
    """
    request = {"folder": str(folder), "target": target.model_dump(), "length": length}
    command = [sys.executable, "-m", "orchestrator.measure.memory"]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr.strip()[-500:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_memory_mb"])


def reset_peak(device: str) -> None:
    """Start a new peak of this process (on a GPU: of its device memory), where the system can."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: str) -> float:
    """Peak memory since `reset_peak`, in 10⁶ bytes."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def example_inputs(folder: Path, *, batch: int, length: int) -> dict[str, NDArray[np.int64]]:
    """Arrays [batch, length] for the inputs that artifact.json names; token 1 everywhere."""
    description = json.loads((folder / "artifact.json").read_text())
    names = [entry["name"] for entry in description["inputs"]]
    values = {"input_ids": 1, "attention_mask": 1, "token_type_ids": 0}
    return {
        name: np.full((batch, length), value, np.int64)
        for name, value in values.items()
        if name in names
    }


def _serve(request: dict[str, Any]) -> float:
    from orchestrator.runtimes import RUNTIMES

    folder, target = Path(request["folder"]), Target(**request["target"])
    session: Session = RUNTIMES[target.runtime].load(folder, target)
    inputs = example_inputs(folder, batch=target.batch_size, length=request["length"])
    for _ in range(3):
        session.run(inputs)
    return peak_mb(target.device if "torch" in sys.modules else "cpu")


if __name__ == "__main__":
    print(json.dumps({"peak_memory_mb": _serve(json.load(sys.stdin))}))
