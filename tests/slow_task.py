"""A task that takes its time until its job is queued again, so that no machine is done before that."""

from __future__ import annotations

import os
import time

import torch

from orchestrator.tasks.text_classification import TextClassification

STEP_S = 0.05


class SlowAtFirst(TextClassification):
    """As the other in all it computes."""

    def loss(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(STEP_S)
        return super().loss(logits, batch)
