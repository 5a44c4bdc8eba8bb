"""The dense baseline, what its trials start from and learn from, and what is worked on only once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_study
import torch

from orchestrator import training
from orchestrator.bench import MAX_ENCODED, Bench
from orchestrator.finetune import FinetuneOptions
from orchestrator.predict import predict
from orchestrator.prune import importance
from orchestrator.prune.tokens import rebuild_tokenizer
from orchestrator.recipe import make_recipe
from orchestrator.run_trial import _prune, run_baseline
from orchestrator.training import Assignment, train
from orchestrator.trial import BadInput, Diverged, Reason, TrialStatus

GOOD_RATE, STUCK_RATE, WILD_RATE = 2e-3, 0.0, 1e30
STUDENT = FinetuneOptions(max_steps=2, distillation={})
AUGMENTED = FinetuneOptions(max_steps=2, distillation={}, augmentation={"copies": 2})


def make_bench(folder: Path, *, limits: dict[str, int] | None = None, **sections: Any) -> Bench:
    recipe = make_recipe(tiny_study.recipe(folder, **sections))
    return Bench(recipe, folder / "study", device="cpu", **(limits or {}))


def trained(rates: list[float], *, then: float = STUCK_RATE) -> dict[str, Any]:
    """Sections of a study whose dense model is the best of `rates`, and is trained on at another."""
    return {
        "baseline": {"finetune": {"learning_rate": {"choice": rates}, "max_steps": 25}},
        "space": {"finetune": {"learning_rate": then, "max_steps": 5}},
    }


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench whose dense model was trained on to something else than trials start from."""
    folder = tmp_path_factory.mktemp("bench")
    return make_bench(folder, **trained([GOOD_RATE], then=GOOD_RATE))


def weights(bench: Bench, *, trained_on: bool = False) -> torch.Tensor:
    model = bench.dense_model("bert", trained_on=trained_on)
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def accuracy(bench: Bench, *, trained_on: bool) -> float:
    """Of a checkpoint, on validation."""
    model = bench.dense_model("bert", trained_on=trained_on)
    rows = bench.encoded("validation", bench.base("bert").tokenizer)
    records = predict(model, bench.task, rows, batch_size=8, device="cpu")
    return bench.task.metrics(records)["accuracy"][0]


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this was trained already")

    monkeypatch.setattr(training, "finetune", refuse)


# -- the dense baseline --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_baseline_is_the_best_of_its_grid_on_validation(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, **trained([STUCK_RATE, GOOD_RATE]))
    dense = bench.dense("bert")
    scores = [line["accuracy"] for line in dense.candidates if not line["continued"]]
    assert scores[1] > scores[0] and dense.config.finetune["learning_rate"] == GOOD_RATE
    assert accuracy(bench, trained_on=True) == scores[1]


def test_the_winner_is_trained_on_and_the_better_of_the_two_is_the_baseline(bench: Bench) -> None:
    last = bench.dense("bert").candidates[-1]
    assert last["continued"] and last["steps"] == 5
    scores = [accuracy(bench, trained_on=trained_on) for trained_on in (True, False)]
    assert scores[1] == max(scores[0], last["accuracy"])


@pytest.mark.slow
def test_further_training_that_does_no_good_is_not_taken(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, **trained([GOOD_RATE], then=WILD_RATE))
    assert "diverged" in bench.dense("bert").candidates[-1]
    assert torch.equal(weights(bench), weights(bench, trained_on=True))


def test_a_candidate_that_diverges_costs_nobody_the_study(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, **trained([WILD_RATE, GOOD_RATE]))
    assert bench.dense("bert").config.finetune["learning_rate"] == GOOD_RATE


def test_a_baseline_that_cannot_be_trained_is_a_result_with_its_reason(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, **trained([WILD_RATE]))
    result = run_baseline("bert", bench, lambda stage: None)
    assert (result.status, result.reason) == (TrialStatus.FAILED, Reason.DIVERGED)
    with pytest.raises(Diverged):
        bench.dense("bert")


def test_trials_that_train_start_where_the_baseline_stood_before_its_last_steps(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bench.dense("bert").folder
    for trained_on, name in ((True, "start"), (False, "baseline")):
        model = bench.task.auto_class().from_pretrained(folder / name)
        expected = torch.cat([parameter.flatten() for parameter in model.parameters()])
        assert torch.equal(weights(bench, trained_on=trained_on), expected)


def test_a_model_that_is_finetuned_is_evaluated_and_not_trained(
    bench: Bench, tmp_path: Path
) -> None:
    model = {"id": "bert", "name": str(bench.dense("bert").folder / "baseline"), "finetuned": True}
    data = bench.recipe.task.data
    for limits in ({}, {"rows_limit": 32, "steps_limit": 2}):  # in a dry run neither
        other = make_bench(
            tmp_path,
            limits=limits,
            model=model,
            task=tiny_study.recipe(tmp_path)["task"] | {"data": data},
        )
        (line,) = other.dense("bert").candidates
        assert line["steps"] == 0 and not line["continued"]
        assert torch.equal(weights(other), weights(bench))
        assert torch.equal(weights(other, trained_on=True), weights(bench))
    assert line["accuracy"] <= 1


# -- nothing twice -------------------------------------------------------------------------------


def test_the_dense_model_is_trained_once_a_study_whatever_was_done_in_between(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bench.dense("bert").folder
    tokenizer = bench.base("bert").tokenizer
    tokenizer("the film", truncation=True, max_length=4, padding="max_length")
    lesson = bench.lesson(bench.source("bert", AUGMENTED))
    no_training(monkeypatch)
    again = Bench(bench.recipe, bench.folder, device="cpu")
    again.base("bert").tokenizer("the film", padding=True)
    assert again.dense("bert").folder == folder
    assert again.lesson(again.source("bert", AUGMENTED)).key == lesson.key


def test_other_data_are_another_dense_model(bench: Bench, tmp_path: Path) -> None:
    tiny_study.write_sentences(tmp_path / "data.csv", rows=200, seed=1)
    assert make_bench(tmp_path).data_key != bench.data_key


def test_a_split_is_encoded_once_and_few_encodings_are_kept(bench: Bench) -> None:
    tokenizer = bench.base("bert").tokenizer
    first = bench.encoded("train", tokenizer)
    assert bench.encoded("train", tokenizer) is first
    for size in range(300, 300 + MAX_ENCODED):
        bench.encoded("train", rebuild_tokenizer(tokenizer, range(size)))
    assert len(bench._encoded) == MAX_ENCODED
    assert bench.encoded("train", tokenizer) is not first


# -- lessons -------------------------------------------------------------------------------------


def test_without_a_teacher_the_training_split_is_the_lesson(bench: Bench) -> None:
    lesson = bench.lesson(bench.source("bert", FinetuneOptions()))
    tokenizer = bench.base("bert").tokenizer
    assert lesson.teacher is None
    assert bench.encoded_lesson(lesson, tokenizer) is bench.encoded("train", tokenizer)


@pytest.mark.parametrize("limits", [None, {"rows_limit": 32, "steps_limit": 2}])
@pytest.mark.parametrize("options", [STUDENT, AUGMENTED])
def test_the_teacher_answers_the_very_rows_that_are_trained_on(
    bench: Bench, options: FinetuneOptions, limits: dict[str, int] | None
) -> None:
    if limits:
        bench = Bench(bench.recipe, bench.folder, device="cpu", **limits)
    lesson = bench.lesson(bench.source("bert", options))
    rows = bench.encoded_lesson(lesson, bench.base("bert").tokenizer)
    dense = bench.dense_model("bert")
    expected = [r["logits"] for r in predict(dense, bench.task, rows, batch_size=16, device="cpu")]
    assert lesson.teacher is not None
    indices = np.random.default_rng(0).permutation(len(rows))
    answers = lesson.teacher(indices, {"input_ids": torch.zeros(1)})
    np.testing.assert_allclose(answers, np.array(expected)[indices], atol=1e-5)
    assert len(rows) <= 32 if limits else len(rows) >= len(bench.rows["train"].ids)


def test_made_up_rows_follow_the_real_ones_and_have_the_teachers_labels(bench: Bench) -> None:
    train, lesson = bench.rows["train"], bench.lesson(bench.source("bert", AUGMENTED))
    rows, count = lesson.rows, len(bench.rows["train"].ids)
    assert rows is not None and lesson.teacher is not None
    assert len(rows.ids) == len(set(rows.ids)) == len(rows.labels) == 3 * count
    assert [tuple(text) for text in rows.texts[:count]] == list(train.texts)
    assert rows.labels[:count] == list(train.labels)
    answers = lesson.teacher(np.arange(3 * count), {"input_ids": torch.zeros(1)})
    assert rows.labels[count:] == answers.argmax(-1).tolist()[count:]
    assert set(rows.texts[count:]) - set(train.texts)


# -- pruning -------------------------------------------------------------------------------------


def test_calibration_reads_the_training_split_in_an_order_of_the_seed(bench: Bench) -> None:
    tokenizer = bench.base("bert").tokenizer
    first, again, other = (
        [batch["input_ids"] for batch in bench.prune_context(tokenizer, seed=s).batches(3)]
        for s in (0, 0, 1)
    )
    assert [len(batch) for batch in first] == [bench.recipe.calibration_batch_size] * 3
    assert all(map(torch.equal, first, again))
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True)
    )
    train = bench.encoded("train", tokenizer).features
    known = {tuple(row["input_ids"].tolist()) for row in train}
    assert {tuple(i for i in row.tolist() if i) for row in first[0]} <= {
        tuple(i for i in row if i) for row in known
    }


def test_a_method_that_acts_while_training_sees_the_smaller_vocabulary(bench: Bench) -> None:
    gradual = {"method": "structured", "heads": 0.5, "schedule": "gradual", "num_batches": 1}
    config = bench.recipe.trial_config(
        model="bert",
        prune=[gradual, {"method": "vocabulary", "vocab_size": 300}],
        finetune={"max_steps": 2},
    )
    model = bench.dense_model("bert", trained_on=True)
    before = bench.encoded("train", bench.base("bert").tokenizer)
    assert max(int(row["input_ids"].max()) for row in before.features) >= 300
    pruned = _prune(model, config, bench)
    rows = bench.encoded("train", pruned.tokenizer)
    options = FinetuneOptions(**config.finetune)
    assignment = Assignment(model="bert", finetune=options, seed=0)
    train(model, assignment, bench, tokenizer=pruned.tokenizer, prunings=pruned.prunings)
    largest = max(int(row["input_ids"].max()) for row in rows.features)
    assert largest < 300 == len(pruned.tokenizer)
    for method in pruned.prunings:
        method.finish()
    assert model.config.vocab_size == 300


# -- facts ---------------------------------------------------------------------------------------


def test_facts_are_json_and_count_the_rows(bench: Bench) -> None:
    facts = bench.facts()
    assert json.loads(json.dumps(facts)) == facts
    model = facts["models"]["bert"]
    assert model["num_train"] == facts["num_rows"]["train"] > model["num_validation"] > 0
    lengths = [
        len(row["input_ids"])
        for row in bench.encoded("train", bench.base("bert").tokenizer).features
    ]
    assert model["mean_length"] == pytest.approx(np.mean(lengths))


def test_a_family_that_nobody_described_is_bad_input(tmp_path: Path) -> None:
    config = tiny_study.recipe(tmp_path)["model"]["config"] | {"model_type": "electra"}
    model = tiny_study.recipe(tmp_path)["model"] | {"config": config}
    with pytest.raises(BadInput, match="electra.*known: .*bert"):
        make_bench(tmp_path, model=model).facts()


def test_texts_longer_than_the_learned_positions_are_cut(tmp_path: Path) -> None:
    task = tiny_study.recipe(tmp_path)["task"] | {"max_length": 128}
    bench = make_bench(tmp_path, task=task)
    assert bench.max_length("bert") == 40  # the model's positions


def test_a_decoder_is_not_asked_beyond_its_positions(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the film was fine and the plot was not\n" * 200)
    config = {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 48}
    sections = tiny_study.recipe(tmp_path) | {
        "model": {"id": "gpt2", "config": config, "tokenizer": {"train": "bpe", "vocab_size": 300}},
        "task": {
            "name": "causal_lm",
            "data": str(tmp_path / "text.txt"),
            "block_size": 64,
        },
        "target": {"prompt_tokens": 32, "new_tokens": 32},
        "objectives": ["perplexity", "size_mb"],
    }
    with pytest.raises(BadInput) as caught:
        Bench(make_recipe(sections), tmp_path / "study", device="cpu").facts()
    assert len(caught.value.problems) == 2 and "48 positions" in caught.value.problems[0]


# -- importance ----------------------------------------------------------------------------------


@pytest.fixture
def taylor_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each pass over training batches judged."""
    passes: list[int] = []
    found = importance._taylor

    def counted(model: Any, names: Any, **options: Any) -> Any:
        passes.append(len(names))
        return found(model, names, **options)

    monkeypatch.setattr(importance, "_taylor", counted)
    return passes


def prune_with(bench: Bench, seed: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    method = {"method": "structured", "num_batches": 2, **options}
    model = bench.dense_model("bert", trained_on=True)
    _prune(model, bench.recipe.trial_config(model="bert", prune=[method], seed=seed), bench)
    return dict(model.state_dict())


def test_trials_that_judge_the_same_weights_share_what_was_found(
    tmp_path: Path, taylor_passes: list[int]
) -> None:
    benches_of_two_workers = [make_bench(tmp_path, **trained([GOOD_RATE])) for _ in range(2)]
    first, second = benches_of_two_workers
    alone = prune_with(first, heads=0.5)
    assert len(taylor_passes) == 1
    again = prune_with(second, heads=0.5)
    prune_with(second, heads=0.25)
    assert len(taylor_passes) == 1
    assert all(torch.equal(alone[name], again[name]) for name in alone)
    prune_with(second, heads=0.5, seed=1)
    prune_with(second, heads=0.5, num_batches=1)
    prune_with(second, heads=0.5, neurons=0.5)
    assert len(taylor_passes) == 4


def test_what_is_found_of_weights_that_a_trial_has_trained_is_not_kept(
    bench: Bench, taylor_passes: list[int]
) -> None:
    gradual = {"method": "structured", "heads": 0.5, "schedule": "gradual", "num_batches": 1}
    config = bench.recipe.trial_config(model="bert", prune=[gradual], finetune={"max_steps": 2})
    for num_passes in (1, 2):
        pruned = _prune(bench.dense_model("bert", trained_on=True), config, bench)
        pruned.prunings[0].on_step(2, 2)
        assert len(taylor_passes) == num_passes
    assert not list(bench.stages.folder.glob("importance-*"))


def test_a_compiler_is_asked_for_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "absent-compiler")
    choice = {"finetune": {"max_steps": 1, "torch_compile": {"choice": [False, True]}}}
    for sections in ({"space": choice}, {"baseline": {"finetune": {"torch_compile": True}}}):
        recipe = make_recipe(tiny_study.recipe(tmp_path, **sections))
        with pytest.raises(BadInput, match=r"torch_compile: needs a C\+\+ compiler: there is no"):
            Bench(recipe, tmp_path / "study", device="cpu").facts()
    plain = make_recipe(tiny_study.recipe(tmp_path))
    assert Bench(plain, tmp_path / "study", device="cpu").facts()["models"]
