"""The study's loop on a virtual clock: many gangs, lost workers, killed drivers, wider spaces."""

from __future__ import annotations

import copy
import hashlib
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_study

from orchestrator.facts import ask_worker
from orchestrator.launch import Event, Lost
from orchestrator.launch.virtual import Virtual
from orchestrator.ledger import Held, Ledger
from orchestrator.manifest import ledger_key
from orchestrator.recipe import make_recipe
from orchestrator.search import SEARCHERS
from orchestrator.study import Silent, Study
from orchestrator.trial import (
    BadInput,
    Measurement,
    Reason,
    Result,
    TrialConfig,
    TrialResult,
    TrialStatus,
    Work,
)

RATES = {"choice": [1e-4, 2e-4, 3e-4, 4e-4]}
SPACE: dict[str, Any] = {
    "prune": {"choice": ["none", {"method": "structured", "neurons": {"choice": [0.25, 0.5]}}]},
    "quantize": {"choice": ["none", "W8A8"]},
    "finetune": {"learning_rate": RATES, "max_steps": 5},
}
NUM_CONFIGS = 24
ALONE = {"dense_int8": False, "first_layers": [], "random_twin": False}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a worker says of the tiny study."""
    return ask_worker(recipe_of(tmp_path_factory.mktemp("facts")))


def recipe_of(folder: Path, **sections: Any) -> Any:
    own = {"references": ALONE, "space": SPACE, "keep": "all"}
    return make_recipe(tiny_study.recipe(folder, **own | sections))


def drawn(key: str, what: str) -> float:
    """A number in [0, 1) that hangs on a configuration alone."""
    return int(hashlib.sha256(f"{key}{what}".encode()).hexdigest()[:12], 16) / 16**12


def surrogate(work: Work) -> tuple[float, Result | Reason]:
    """Made-up outcomes of every kind; how long a work takes hangs on its configuration."""
    if work.kind in ("test", "timings"):
        return 1.0, ((Measurement(metrics={}), "") if work.kind == "test" else {})
    config = work.config or TrialConfig(model=work.model)
    seconds = 10 + 90 * drawn(config.id, "seconds")
    if work.kind == "trial" and drawn(config.id, "fails") < 0.15:
        return seconds, ended(config, seconds, TrialStatus.FAILED)
    return seconds, ended(config, seconds)


def ended(
    config: TrialConfig, seconds: float, status: TrialStatus = TrialStatus.COMPLETED
) -> TrialResult:
    size = 1 + drawn(config.id, "size")
    metrics = {
        "accuracy": 0.5 + 0.4 * drawn(config.id, "accuracy"),
        "size_mb": size,
        "latency_ms": size * drawn(config.id, "latency"),
    }
    completed = status is TrialStatus.COMPLETED
    return TrialResult(
        trial_id=config.id,
        config=config,
        status=status,
        reason=None if completed else Reason.DIVERGED,
        measurement=Measurement(metrics=metrics) if completed else None,
        device_seconds=seconds,
    )


def run(
    folder: Path, facts: Any, *, surrogate: Any = surrogate, num_gangs: int = 3, **sections: Any
) -> dict[str, Any]:
    launcher = Virtual(surrogate, facts=facts, num_gangs=num_gangs)
    return Study(recipe_of(folder, **sections), launcher=launcher).run()


def events(folder: Path) -> list[Any]:
    ledger = Ledger(folder / "study" / "ledger", ledger_key(folder / "study"))
    found = list(ledger.events())
    ledger.close()
    return found


def finished(folder: Path) -> list[str]:
    return [event.key for event in events(folder) if event.kind == "finished"]


def asked(folder: Path) -> list[str]:
    return [event.key for event in events(folder) if event.kind == "asked"]


# -- many gangs ----------------------------------------------------------------------------------


class Crowded(Virtual):
    """Nothing begins for a while."""

    def wait(self, timeout: float | None = None) -> list[Any]:
        if self._clock < 20:
            self._clock += timeout or 5
            return []
        return super().wait(timeout)

    def waiting(self) -> dict[str, str]:
        return {work.key: "a GPU" for *_, work, _ in self._running if self._clock < 20}


def test_what_a_work_waits_for_is_told_once(tmp_path, facts):
    Study(recipe_of(tmp_path), launcher=Crowded(surrogate, facts=facts, num_gangs=2)).run()
    told = [event.payload["stage"] for event in events(tmp_path) if event.kind == "stage"]
    assert told == ["waits for a GPU"]


def test_every_configuration_runs_once_whatever_the_number_of_gangs(tmp_path, facts):
    ids = set()
    for num_gangs in (1, 7):
        folder = tmp_path / str(num_gangs)
        folder.mkdir()
        front = run(folder, facts, num_gangs=num_gangs)
        counts = Counter(finished(folder))
        assert set(counts.values()) == {1} and len(counts) == NUM_CONFIGS + 1
        assert sum(front["trials"][name] for name in ("completed", "failed")) == NUM_CONFIGS + 1
        ids.add(frozenset(counts))
    assert len(ids) == 1


def test_gangs_work_at_the_same_time(tmp_path, facts):
    clocks = []
    for num_gangs in (1, 6):
        folder = tmp_path / str(num_gangs)
        folder.mkdir()
        launcher = Virtual(surrogate, facts=facts, num_gangs=num_gangs)
        Study(recipe_of(folder), launcher=launcher).run()
        clocks.append(launcher.now())
    assert clocks[1] < clocks[0] / 3


# -- killed drivers ------------------------------------------------------------------------------


class Killed(BaseException):
    """The driver's process is gone."""


def run_until_killed(folder: Path, facts: Any, *, after: int, **sections: Any) -> None:
    """A driver that dies after `after` events, before it knows that the last one was written."""
    launcher = Virtual(surrogate, facts=facts, num_gangs=3)
    study = Study(recipe_of(folder, **sections), launcher=launcher)
    written = 0
    append = Ledger.append

    def dying(self: Ledger, *arguments: Any, **payload: Any) -> Any:
        nonlocal written
        if written == after:
            raise Killed
        written += 1
        return append(self, *arguments, **payload)

    Ledger.append = dying  # type: ignore[method-assign]
    try:
        with pytest.raises(Killed):
            study.run()
    finally:
        Ledger.append = append  # type: ignore[method-assign]


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_study_whose_driver_is_killed_again_and_again_ends_as_if_it_was_not(
    name, tmp_path, facts
):
    search = {"search": {"name": name} if name == "grid" else {"name": name, "num_trials": 12}}
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    run(tmp_path / "whole", facts, **search)
    rng = random.Random(0)
    for _ in range(6):
        run_until_killed(tmp_path / "killed", facts, after=rng.randint(1, 9), **search)
    before = {
        e.key: e.payload["result"] for e in events(tmp_path / "killed") if e.kind == "finished"
    }
    front = run(tmp_path / "killed", facts, **search)
    after = Counter(finished(tmp_path / "killed"))
    assert set(after.values()) == {1}
    assert (
        before.items()
        <= {
            e.key: e.payload["result"] for e in events(tmp_path / "killed") if e.kind == "finished"
        }.items()
    )
    assert front["trials"]["reused"] >= len(before)
    assert len(asked(tmp_path / "killed")) == len(asked(tmp_path / "whole"))
    if name in ("grid", "random"):
        assert set(after) == set(finished(tmp_path / "whole"))


@pytest.mark.parametrize("name", SEARCHERS)
def test_with_the_same_order_of_arrival_a_killed_study_asks_the_same(name, tmp_path, facts):
    search = {"search": {"name": name} if name == "grid" else {"name": name, "num_trials": 12}}
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    run(tmp_path / "whole", facts, num_gangs=1, **search)
    for after in (4, 3, 2):
        launcher = Virtual(surrogate, facts=facts, num_gangs=1)
        study = Study(recipe_of(tmp_path / "killed", **search), launcher=launcher)
        stop_after(study, after)
    run(tmp_path / "killed", facts, num_gangs=1, **search)
    assert asked(tmp_path / "killed") == asked(tmp_path / "whole")
    assert finished(tmp_path / "killed") == finished(tmp_path / "whole")


def stop_after(study: Study, num_works: int) -> None:
    """End a driver between two works."""
    left = num_works
    start = study.launcher.start

    def counting(work: Work) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        start(work)

    study.launcher.start = counting  # type: ignore[method-assign]
    with pytest.raises(Killed):
        study.run()


# -- lost workers --------------------------------------------------------------------------------


def test_a_lost_work_is_tried_again_and_given_up_after_three_attempts(tmp_path, facts):
    attempts: Counter[str] = Counter()

    def deadly(work: Work) -> tuple[float, Result | Reason]:
        attempts[work.key] += work.kind == "trial"
        victim = work.config is not None and work.kind == "trial"
        if victim and drawn(work.key, "dies") < 0.2:
            return 1.0, Reason.ERROR
        if victim and drawn(work.key, "dies") < 0.4 and work.attempt == 1:
            return 1.0, Reason.OOM
        return surrogate(work)

    front = run(tmp_path, facts, surrogate=deadly)
    doomed = {key for key in attempts if drawn(key, "dies") < 0.2 and attempts[key]}
    unlucky = {key for key in attempts if 0.2 <= drawn(key, "dies") < 0.4 and attempts[key]}
    assert doomed and unlucky
    assert {attempts[key] for key in doomed} == {3} and {attempts[key] for key in unlucky} == {2}
    messages = {t["trial_id"]: t["message"] for t in front["all_trials"]}
    assert all("worker died" in messages[key] and "attempt 3" in messages[key] for key in doomed)
    assert set(finished(tmp_path)) - {"baseline:bert"} == set(asked(tmp_path))


class Lent(Virtual):
    """Machines that are taken away on notice, the first four times that a work is there."""

    def wait(self, timeout: float | None = None) -> list[Event]:
        [event] = super().wait(timeout)
        if event.work.kind == "trial" and event.work.attempt <= 4:
            return [Lost(event.work, Reason.ERROR, "taken away", counts=False)]
        return [event]


def test_a_work_whose_machine_was_taken_away_on_notice_has_no_attempt_less(tmp_path, facts):
    Study(recipe_of(tmp_path), launcher=Lent(surrogate, facts=facts)).run()
    lost = Counter(event.key for event in events(tmp_path) if event.kind == "lost")
    assert set(lost) == set(asked(tmp_path)) and set(lost.values()) == {4}
    assert not [event for event in events(tmp_path) if event.kind == "given_up"]


def test_a_trial_short_of_memory_is_tried_once_more_in_parts(tmp_path, facts):
    seen: dict[str, list[int]] = {}

    def greedy(work: Work) -> tuple[float, Result | Reason]:
        seconds, result = surrogate(work)
        large = work.kind == "trial" and drawn(work.key, "size") < 0.5
        if large:
            seen.setdefault(work.key, []).append(work.pieces)
            if work.pieces == 1 or drawn(work.key, "size") < 0.25:
                failed = {
                    "status": TrialStatus.FAILED,
                    "reason": Reason.OOM,
                    "message": "none left",
                }
                assert isinstance(result, TrialResult)
                result = result.model_copy(update={**failed, "measurement": None})
        return seconds, result

    front = run(tmp_path, facts, surrogate=greedy)
    assert seen and {tuple(pieces) for pieces in seen.values()} == {(1, 2)}
    status = {trial["trial_id"]: trial for trial in front["all_trials"]}
    hopeless = {key for key in seen if drawn(key, "size") < 0.25}
    assert hopeless and hopeless < set(seen)
    assert {key for key in seen if status[key]["reason"] == "oom"} == hopeless
    assert {status[key]["reason"] for key in set(seen) - hopeless} <= {None, "diverged"}


# -- budgets -------------------------------------------------------------------------------------


def test_a_budget_of_trials_is_kept_and_may_be_raised(tmp_path, facts):
    run(tmp_path, facts, budget={"num_trials": 5})
    first = asked(tmp_path)
    assert len(first) == 5
    run(tmp_path, facts, budget={"num_trials": 9})
    assert len(asked(tmp_path)) == 9 and asked(tmp_path)[:5] == first
    assert set(Counter(finished(tmp_path)).values()) == {1}


def test_device_hours_count_all_work_and_are_overrun_by_one_trial_a_gang_at_most(tmp_path, facts):
    def costly(work: Work) -> tuple[float, Result | Reason]:
        if work.kind == "trial" and drawn(work.key, "dies") < 0.3:
            return 30.0, Reason.ERROR
        return surrogate(work)

    hours = 500 / 3600
    front = run(tmp_path, facts, surrogate=costly, budget={"device_hours": hours}, num_gangs=3)
    lost = [e.payload["device_seconds"] for e in events(tmp_path) if e.kind == "lost"]
    assert lost and len(asked(tmp_path)) < NUM_CONFIGS
    assert 500 <= front["device_seconds"] <= 500 + 3 * 100


def test_a_trial_counts_as_many_devices_as_its_model_takes_lost_and_killed_ones_too(
    tmp_path, facts
):
    def costly(work: Work) -> tuple[float, Result | Reason]:
        if work.kind == "trial" and work.attempt == 1 and drawn(work.key, "dies") < 0.3:
            return 30.0, Reason.ERROR
        return surrogate(work)

    spent = []
    for folder, resources in (
        ("one", {}),
        ("four", {"per_model": {"bert": {"gpus_per_trial": 4}}}),
    ):
        (tmp_path / folder).mkdir()
        resources = {"engine": "ray"} | resources
        run_until_killed(tmp_path / folder, facts, after=20, resources=resources)
        front = run(tmp_path / folder, facts, surrogate=costly, resources=resources)
        assert "lost" in {event.kind for event in events(tmp_path / folder)}
        spent.append(front["device_seconds"])
    assert spent[1] == pytest.approx(4 * spent[0], rel=0.01)


def test_money_is_hours_by_their_price(tmp_path, facts):
    run(tmp_path, facts, budget={"money": 1.0, "price_per_device_hour": 3600 / 300})
    assert 2 < len(asked(tmp_path)) < NUM_CONFIGS


# -- another recipe in the same folder -----------------------------------------------------------


def wider(**changes: Any) -> dict[str, Any]:
    return {"space": copy.deepcopy(SPACE) | changes}


def test_a_wider_space_goes_on_from_what_is_there(tmp_path, facts):
    run(tmp_path, facts)
    first = finished(tmp_path)
    rates = {"learning_rate": {"choice": [*RATES["choice"], 5e-4]}, "max_steps": 5}
    front = run(tmp_path, facts, **wider(finetune=rates))
    assert finished(tmp_path)[: len(first)] == first
    assert len(asked(tmp_path)) == NUM_CONFIGS * 5 // 4
    assert front["trials"]["reused"] == len(first)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (wider(quantize="W8A8"), "another `space.quantize`"),
        (wider(quantize={"choice": ["W8A8", "none"]}), "another `space.quantize`"),
        (wider(forbid=[{"quantize.scheme": "none"}]), "another `space.forbid`"),
        ({"seed": 5}, "another `seed`"),
        ({"objectives": ["accuracy", "size_mb"]}, "another `objectives`"),
        (
            wider(finetune={"learning_rate": RATES, "max_steps": {"choice": [5, 9]}}),
            "space.finetune",
        ),
    ],
)
def test_a_recipe_that_contradicts_the_study_is_refused_with_what_differs(
    sections, words, tmp_path, facts
):
    run(tmp_path, facts, budget={"num_trials": 1})
    before = events(tmp_path)
    with pytest.raises(BadInput) as refused:
        run(tmp_path, facts, **sections)
    assert words in str(refused.value) and "choose another output_dir" in str(refused.value)
    assert [e for e in events(tmp_path) if e.kind != "lease"] == before


# -- two drivers ---------------------------------------------------------------------------------


def test_a_second_driver_is_refused_and_told_who_holds_the_study(tmp_path, facts):
    refused: list[str] = []

    class Nosy(Silent):
        def trial_started(self, key: str, number: int, total: int | None, text: str) -> None:
            if not refused:
                with pytest.raises(Held) as held:
                    run(tmp_path, facts)
                refused.append(str(held.value))

    launcher = Virtual(surrogate, facts=facts, num_gangs=2)
    front = Study(recipe_of(tmp_path), launcher=launcher, watch=Nosy()).run()
    assert f"process {os.getpid()}" in refused[0]
    assert front["trials"]["completed"] > 0
    assert set(Counter(finished(tmp_path)).values()) == {1}


def test_the_manifest_names_no_password(tmp_path):
    with pytest.raises(BadInput, match="password"):
        recipe_of(tmp_path, ledger="postgresql://me:secret@host/db")


def test_what_a_killed_driver_had_begun_counts_as_spent(tmp_path, facts):
    run_until_killed(tmp_path, facts, after=12)
    front = run(tmp_path, facts)
    results = [e.payload["result"] for e in events(tmp_path) if e.kind == "finished"]
    done = sum(result["device_seconds"] for result in results)
    assert front["device_seconds"] > done


def test_who_looks_on_is_told_of_the_baseline_before_what_is_compared_with_it(tmp_path, facts):
    run(tmp_path, facts, budget={"num_trials": 3})
    told: list[str] = []

    class Listener(Silent):
        def trial_reused(self, result: TrialResult) -> None:
            told.append(result.trial_id)

    study = Study(recipe_of(tmp_path), launcher=Virtual(surrogate, facts=facts), watch=Listener())
    front = study.run()
    assert told[0] == front["baseline"]["trial_id"] and len(told) == 4


def test_trials_of_machines_of_different_kinds_compare_once_timed_in_one_pass(tmp_path, facts):
    passes, notes = [], []

    def on_two_kinds(work: Work) -> tuple[float, Result | Reason]:
        if work.kind == "timings":
            passes.append(sorted(work.artifacts))
            return 1.0, {key: Measurement(metrics={}, fingerprint="one") for key in work.artifacts}
        seconds, result = surrogate(work)
        if isinstance(result, TrialResult) and result.measurement is not None:
            kind = "other" if drawn(result.trial_id, "kind") < 0.5 else facts["fingerprint"]
            measured = result.measurement.model_copy(update={"fingerprint": kind})
            result = result.model_copy(update={"measurement": measured, "artifact": "artifact"})
        return seconds, result

    class Noted(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    launcher = Virtual(on_two_kinds, facts=facts, num_gangs=3)
    front = Study(recipe_of(tmp_path), launcher=launcher, watch=Noted()).run()
    completed = [trial for trial in front["all_trials"] if trial["status"] == "completed"]
    assert [len(keys) for keys in passes] == [len(completed)]
    assert len([note for note in notes if "different kinds" in note]) == 1


# -- trials that are timed elsewhere -------------------------------------------------------------


class Elsewhere:
    """A surrogate whose trials, those of `share`, are trained on machines of another kind."""

    def __init__(self, *, share: float = 0.5, lost: str = "") -> None:
        self.share, self.lost = share, lost
        self.timed: list[list[str]] = []
        self.machines: set[tuple[str, str]] = set()

    def __call__(self, work: Work) -> tuple[float, Result | Reason]:
        self.machines.add((work.kind, work.timed_on))
        if work.kind == "speed":
            self.timed.append(list(work.artifacts))
            if self.lost in work.artifacts:
                return 5.0, Reason.ERROR
            return 25.0, {key: self.speed(key, work.timed_on) for key in work.artifacts}
        if work.kind == "timings":
            return 1.0, {
                key: Measurement(metrics={}, fingerprint=work.timed_on) for key in work.artifacts
            }
        seconds, result = surrogate(work)
        if isinstance(result, TrialResult) and result.measurement is not None:
            whole, here = result.measurement, drawn(result.trial_id, "kind") >= self.share
            costs = {n: v for n, v in whole.metrics.items() if here or n != "latency_ms"}
            kind = work.timed_on if here else ""
            update = {"metrics": costs, "is_timed": here, "fingerprint": kind}
            update = {"measurement": whole.model_copy(update=update), "artifact": "artifact"}
            result = result.model_copy(update=update)
        return seconds, result

    def speed(self, key: str, kind: str) -> Measurement:
        return Measurement(metrics={"latency_ms": 1 + drawn(key, "speed")}, fingerprint=kind)


def test_trials_of_other_machines_are_timed_on_the_target_s_and_then_told(tmp_path, facts):
    elsewhere = Elsewhere(share=0.8)
    front = run(tmp_path, facts, surrogate=elsewhere, num_gangs=6)
    rows = [row for row in front["all_trials"] if row["status"] == "completed"]
    assert len(rows) > 10 and all("latency_ms" in row["metrics"] for row in rows)
    timed = [key for keys in elsewhere.timed for key in keys]
    assert len(timed) == len(set(timed)) > 5
    assert max(map(len, elsewhere.timed)) > 1  # those that come meanwhile are taken together
    assert {kind for _, kind in elsewhere.machines} == {facts["fingerprint"]}
    trained = {key for key in timed if drawn(key, "kind") < elsewhere.share}
    assert trained == set(timed)


@pytest.mark.parametrize("name", ["grid", "tpe"])
def test_a_killed_study_times_what_was_left_and_nothing_twice(name, tmp_path, facts):
    search = {"search": {"name": name} if name == "grid" else {"name": name, "num_trials": 12}}
    whole, killed = Elsewhere(), Elsewhere()
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    run(tmp_path / "whole", facts, surrogate=whole, num_gangs=1, **search)
    for after in (2, 3, 4, 2):
        launcher = Virtual(killed, facts=facts, num_gangs=1)
        stop_after(Study(recipe_of(tmp_path / "killed", **search), launcher=launcher), after)
    run(tmp_path / "killed", facts, surrogate=killed, num_gangs=1, **search)
    for what in (asked, finished):
        assert what(tmp_path / "killed") == what(tmp_path / "whole")
    measured = Counter(
        event.key
        for event in events(tmp_path / "killed")
        if event.kind == "measured" and event.payload["kind"] == "speed"
    )
    assert set(measured) == {key for keys in whole.timed for key in keys}
    assert set(measured.values()) == {1}


def test_an_artifact_that_cannot_be_timed_fails_its_own_trial_alone(tmp_path, facts):
    config = next(c for c in recipe_of(tmp_path).asked() if drawn(c.id, "fails") >= 0.15)
    elsewhere = Elsewhere(share=1.0, lost=config.id)
    front = run(tmp_path, facts, surrogate=elsewhere, num_gangs=4)
    ended = {row["trial_id"]: row for row in front["all_trials"]}
    failed = ended.pop(config.id)
    assert failed["status"] == "failed" and "speed could not be taken" in failed["message"]
    assert all("latency_ms" in r["metrics"] for r in ended.values() if r["status"] == "completed")


def test_where_no_machine_of_the_target_s_kind_is_left_trials_are_timed_where_they_run(
    tmp_path, facts
):
    class Gone(Virtual):
        def has(self, kind: str) -> bool:
            return False

    elsewhere, notes = Elsewhere(share=0.0), []

    class Noted(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    launcher = Gone(elsewhere, facts=facts, num_gangs=3)
    Study(recipe_of(tmp_path), launcher=launcher, watch=Noted()).run()
    assert {kind for _, kind in elsewhere.machines} == {""}
    assert len([note for note in notes if "no machine is here of the kind" in note]) == 1
