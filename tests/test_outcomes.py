"""The front so far is that of all outcomes as they are now, whichever of them have changed since."""

from __future__ import annotations

import random
from pathlib import Path

import tiny_study

from orchestrator.front import Outcome
from orchestrator.outcomes import Outcomes
from orchestrator.recipe import make_recipe
from orchestrator.trial import Measurement, TrialConfig, TrialResult, TrialStatus


def outcome(seed: int, numbers: tuple[float, float, float], *, role: str = "trial") -> Outcome:
    config = TrialConfig(model="bert", seed=seed)
    metrics = dict(zip(("accuracy", "size_mb", "latency_ms"), numbers, strict=True))
    result = TrialResult(
        trial_id=config.id,
        config=config,
        status=TrialStatus.COMPLETED,
        measurement=Measurement(metrics=metrics),
    )
    return Outcome(result, Path(config.id), role=role, reused=False)


def test_the_hypervolume_follows_points_that_come_and_points_that_change(tmp_path: Path):
    recipe = make_recipe(tiny_study.recipe(tmp_path))
    draw, outcomes, changes = random.Random(0), Outcomes(recipe), 0
    for number in range(200):
        seed = 0 if number in (0, 120) else draw.randrange(60)
        numbers = (draw.uniform(0.3, 1), draw.uniform(0.2, 2), draw.uniform(0.2, 2))
        role = "trial" if seed else "baseline"
        changes += outcomes.get(TrialConfig(model="bert", seed=seed).id) is not None
        outcomes.add(outcome(seed, numbers, role=role))
        if draw.random() < 0.5:
            continue  # several may change before anybody asks
        anew = Outcomes(recipe)
        for each in outcomes:
            anew.add(each)
        assert outcomes.hypervolume == anew.hypervolume > 0
    assert changes > 100
