"""The front is made of completed trials within limits, and knows which points noise cannot part."""

from __future__ import annotations

from pathlib import Path

from orchestrator import front as fronts
from orchestrator.front import Outcome
from orchestrator.pareto import Objective
from orchestrator.trial import Measurement, Reason, TrialConfig, TrialResult, TrialStatus

OBJECTIVES = (
    Objective(name="accuracy", direction="max"),
    Objective(name="size_mb", direction="min"),
)


def outcome(seed: int, accuracy: float, size: float, **update: object) -> Outcome:
    config = TrialConfig(model="m", seed=seed)
    measured = Measurement(metrics={"accuracy": accuracy, "size_mb": size})
    result = TrialResult(
        trial_id=config.id, config=config, status=TrialStatus.COMPLETED, measurement=measured
    )
    return Outcome(
        result.model_copy(update=update), Path("s") / config.id, role="trial", reused=False
    )


def test_outcomes_are_parted_into_front_dominated_and_over_limit() -> None:
    good, small = outcome(1, 0.9, 10), outcome(2, 0.8, 5)
    worse, over = outcome(3, 0.79, 6), outcome(4, 0.5, 1)
    failed = outcome(5, 0.99, 1, status=TrialStatus.FAILED, reason=Reason.OOM, measurement=None)
    limits = (Objective(name="accuracy", direction="max", min=0.6),)
    front, dominated, beyond = fronts.split_outcomes(
        [small, good, worse, over, failed], OBJECTIVES, limits
    )
    assert (front, dominated, beyond) == ([good, small], [worse], [over])


def test_hypervolume_is_in_units_of_the_dense_baseline() -> None:
    dense = {"accuracy": 0.9, "size_mb": 100.0}
    reference = {"accuracy": 0.5, "size_mb": 1.1}
    half = outcome(1, 0.9, 50)
    volume = fronts.hypervolume([half], dense, OBJECTIVES, reference)
    assert abs(volume - 0.5 * 0.6) < 1e-12


def test_counts_name_every_status_and_what_was_reused() -> None:
    failed = outcome(5, 0, 0, status=TrialStatus.FAILED, reason=Reason.ERROR)
    failed.reused = True
    counts = fronts.counts([outcome(1, 1, 1), failed])
    assert counts == {"completed": 1, "stopped": 0, "failed": 1, "skipped": 0, "reused": 1}


def test_points_that_noise_cannot_part_name_each_other() -> None:
    a, b, c = outcome(1, 0.9, 9), outcome(2, 0.89, 8), outcome(3, 0.5, 1)

    class Task:
        def paired_difference(self, mine: list[float], other: list[float]):
            gap = mine[0] - other[0]
            return gap, gap - 0.05, gap + 0.05

    records = {o.result.trial_id: [o.metrics["accuracy"]] for o in (a, b, c)}
    close = fronts.within_noise([a, b, c], Task(), records)  # type: ignore[arg-type]
    ids = [o.result.trial_id for o in (a, b, c)]
    assert close == {ids[0]: [ids[1]], ids[1]: [ids[0]], ids[2]: []}
