"""Tasks that take their time and, where SEEN_ON names a folder, say there on which hosts they run."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import torch

from orchestrator.tasks.text_classification import TextClassification

STEP_S = 0.05


class Slow(TextClassification):
    """As the other in all it computes."""

    def loss(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if "SEEN_ON" in os.environ:
            (Path(os.environ["SEEN_ON"]) / socket.gethostname()).touch()
        if self.takes_its_time():
            time.sleep(STEP_S)
        return super().loss(logits, batch)

    def takes_its_time(self) -> bool:
        return True


class SlowAtFirst(Slow):
    """Until its job is queued again, so that no machine is done before that."""

    def takes_its_time(self) -> bool:
        return "SLURM_RESTART_COUNT" not in os.environ
