"""What a study may take of the machines it runs on, and how a trial's workers share its training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from orchestrator.trial import Frozen

StrategyName = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
OWNED = ("optimizer", "scheduler", "bf16", "fp16")  # sections of a DeepSpeed file


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class GangOptions(Frozen):
    """What one trial takes, and how its workers share the training; None is the default.

    A gang takes `gpus_per_trial` (1 where the cluster has GPUs, else 0) and `cpus_per_trial` (its
    share of the cluster's CPUs by its GPUs, else 1 a worker). It has `workers_per_trial` processes
    (1 a GPU, or 1), which train by `strategy` (`ddp`, or `single` where there is one). `offload`
    keeps `optimizer` state or `parameters` in the host's memory. `deepspeed` is a DeepSpeed
    configuration, or its file, whose batch sizes are those of the recipe or `auto`.
    """

    gpus_per_trial: int | None = Field(None, ge=0)
    cpus_per_trial: int | None = Field(None, ge=1)
    workers_per_trial: int | None = Field(None, ge=1)
    strategy: StrategyName | None = None
    offload: tuple[Literal["optimizer", "parameters"], ...] = ()
    deepspeed: dict[str, Any] | None = None

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """A file is read at once: workers may run where it is not."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(Path(value).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read {value}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{value} is not JSON: {error}") from error

    @property
    def num_workers(self) -> int:
        return self.workers_per_trial or self.gpus_per_trial or 1

    @property
    def strategy_name(self) -> StrategyName:
        return self.strategy or ("single" if self.num_workers == 1 else "ddp")

    @model_validator(mode="after")
    def _check_strategy(self) -> Self:
        name = self.strategy_name
        if name == "single" and self.num_workers > 1:
            raise ValueError(f"`strategy: single` is for one worker, not for {self.num_workers}")
        if self.workers_per_trial and self.gpus_per_trial not in (None, 0, self.workers_per_trial):
            raise ValueError(
                "a worker has one GPU: leave `workers_per_trial` or `gpus_per_trial` out"
            )
        allowed = {"zero1": 1, "zero2": 1, "zero3": 2, "fsdp2": 2}.get(name, 0)
        if len(self.offload) > allowed:
            raise ValueError(f"`strategy: {name}` cannot offload {' and '.join(self.offload)}")
        if self.offload == ("parameters",):
            raise ValueError("parameters are offloaded with the optimizer's state, not without")
        if name == "fsdp2" and len(self.offload) == 1:
            raise ValueError(
                "`strategy: fsdp2` offloads both the optimizer and parameters, or none"
            )
        if self.deepspeed is not None:
            _check_deepspeed(self.deepspeed, name)
        return self


def _check_deepspeed(config: dict[str, Any], strategy: str) -> None:
    if not strategy.startswith("zero"):
        raise ValueError(f"`deepspeed` is for zero1, zero2 and zero3, not for {strategy}")
    stage = config.get("zero_optimization", {}).get("stage", int(strategy[-1]))
    if stage != int(strategy[-1]):
        raise ValueError(
            f"`deepspeed` has zero_optimization.stage {stage}, but strategy is {strategy}"
        )
    if owned := [name for name in OWNED if name in config]:
        raise ValueError(f"`deepspeed` may not have {', '.join(owned)}: the recipe's finetune has")


class Resources(GangOptions):
    """A recipe's resources section.

    `engine: inline` runs trials one after another in the driver's own process. `address` is that
    of a Ray cluster, `auto` for the one of this host, or `local` to start one even where the
    environment names another. `per_model` holds
    other options for the trials of a base model, by its id. `max_*` caps what all gangs together
    take. `labels` and `custom` go to Ray: node labels that a gang's node must have, and custom
    resources of each gang. A work that runs longer than `time_limit_s` is ended, as is one with a
    worker that gives no sign of life for `silence_s`, or that waits for those it trains with for
    `collective_timeout_s`; one whose worker died or fell silent is tried `max_attempts` times in
    all. A worker is replaced after `recycle_after` works and handed back to the cluster when idle
    for `idle_s`. Training writes a checkpoint every `save_steps` optimizer steps, from which an
    interrupted trial goes on; 0 writes none.
    """

    engine: Literal["ray", "inline"] = "ray"
    address: str | None = None
    per_model: dict[str, GangOptions] = {}
    max_gangs: int | None = Field(None, ge=1)
    max_gpus: int | None = Field(None, ge=1)
    max_cpus: int | None = Field(None, ge=1)
    labels: dict[str, str] = {}
    custom: dict[str, float] = {}
    silence_s: float = Field(60.0, ge=10)
    collective_timeout_s: float = Field(1800.0, ge=10)
    time_limit_s: float | None = Field(None, gt=0)
    max_attempts: int = Field(3, ge=1)
    recycle_after: int = Field(50, ge=1)
    idle_s: float = Field(60.0, gt=0)
    save_steps: int = Field(500, ge=0)

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine == "inline" and any(each.num_workers > 1 for each in self._all()):
            raise ValueError(
                "`engine: inline` trains in one process: several workers need `engine: ray`"
            )
        return self

    def of(self, model: str) -> GangOptions:
        """What the trials of a base model take."""
        if model in self.per_model:
            return self.per_model[model]
        return GangOptions(**{name: getattr(self, name) for name in GangOptions.model_fields})

    def _all(self) -> list[GangOptions]:
        return [self, *self.per_model.values()]
