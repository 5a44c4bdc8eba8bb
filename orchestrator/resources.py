"""What a study may take of the machines it runs on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.trial import Frozen


class Resources(Frozen):
    """A recipe's resources section.

    `engine: inline` runs trials one after another in the driver's own process. A trial's gang takes
    `gpus_per_trial` (default 1 where the cluster has GPUs, else 0) and `cpus_per_trial` (default
    its share of the cluster's CPUs by its GPUs, else 1); `max_*` caps what all gangs together
    take. `labels` and `custom` go to Ray: node labels that a gang's node must have, and custom
    resources of each gang. A work that runs longer than `time_limit_s` is ended; one whose
    worker died is tried `max_attempts` times in all. A worker is replaced after `recycle_after`
    works and handed back to the cluster when idle for `idle_s`.
    """

    engine: Literal["ray", "inline"] = "ray"
    address: str | None = None
    gpus_per_trial: int | None = Field(None, ge=0)
    cpus_per_trial: int | None = Field(None, ge=1)
    max_gangs: int | None = Field(None, ge=1)
    max_gpus: int | None = Field(None, ge=1)
    max_cpus: int | None = Field(None, ge=1)
    labels: dict[str, str] = {}
    custom: dict[str, float] = {}
    time_limit_s: float | None = Field(None, gt=0)
    max_attempts: int = Field(3, ge=1)
    recycle_after: int = Field(50, ge=1)
    idle_s: float = Field(60.0, gt=0)
