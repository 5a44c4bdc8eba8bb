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

from orchestrator.measure.latency import decoder_round
from orchestrator.plugins import find
from orchestrator.runtimes import RUNTIMES, Session, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_REQUESTS = 3
TIME_LIMIT_S = 600


def peak_memory_mb(folder: Path, target: Target, *, length: int) -> float:
    """Peak resident memory in 10⁶ bytes of a whole serving process (device memory, for torch on a GPU).

    The process answers three requests at the target's batch: inputs of `length` tokens or, for
    decoders, a prompt and the tokens after it. It includes the interpreter and the runtime's own
    libraries, as a deployment would. Raises RuntimeError with the process's last words if it
    fails, and TimeoutExpired.
    """
    request = {"folder": str(folder), "target": target.model_dump(), "length": length}
    command = [sys.executable, "-m", "orchestrator.measure.memory"]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, timeout=TIME_LIMIT_S
    )
    if done.returncode:
        words = done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}"
        raise RuntimeError(f"measuring memory failed: {words}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_memory_mb"])


def reset_peak(device: str) -> None:
    """Start a new peak of this process (on a GPU: of its device memory), where the system can."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: str) -> float:
    """Peak memory since `reset_peak`, in 10⁶ bytes."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def example_inputs(
    description: dict[str, Any], *, batch: int, length: int
) -> dict[str, NDArray[np.int64]]:
    """Arrays [batch, length] for the inputs that artifact.json names; token 1 everywhere."""
    names = [entry["name"] for entry in description["inputs"]]
    values = {"input_ids": 1, "attention_mask": 1, "token_type_ids": 0, "decoder_input_ids": 1}
    return {
        name: np.full((batch, length), value, np.int64)
        for name, value in values.items()
        if name in names
    }


def _serve(request: dict[str, Any]) -> float:
    folder, target = Path(request["folder"]), Target(**request["target"])
    description = json.loads((folder / "artifact.json").read_text())
    session: Session = find(RUNTIMES, target.runtime, what="runtime").load(folder, target)
    prompt = np.ones((target.batch_size, target.prompt_tokens), np.int64)
    inputs = example_inputs(description, batch=target.batch_size, length=request["length"])
    for _ in range(NUM_REQUESTS):
        if description["kind"] == "decoder":
            decoder_round(session, prompt, target.new_tokens)
        else:
            session.run(inputs)
    return peak_mb(target.device if "torch" in sys.modules else "cpu")


if __name__ == "__main__":
    print(json.dumps({"peak_memory_mb": _serve(json.load(sys.stdin))}))
