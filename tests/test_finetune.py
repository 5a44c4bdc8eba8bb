"""What a user may rely on while a model trains: the same seed, the same weights; no step without use."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tiny_seq2seq import Reversal
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from orchestrator.batches import epoch_batches
from orchestrator.distill import CachedTeacher, HiddenDistance, LiveTeacher, cached_teacher
from orchestrator.finetune import (
    FinetuneOptions,
    finetune,
    learning_rate,
    uses_bf16,
)
from orchestrator.predict import predict, to_device
from orchestrator.prune.tree import layers_of
from orchestrator.tasks import Encoded
from orchestrator.tasks.causal_lm import CausalLm
from orchestrator.tasks.text_classification import TextClassification
from orchestrator.trial import BadInput, Diverged

TASK = TextClassification(data="unread")
PLAIN = FinetuneOptions(bf16=False, learning_rate=1e-3, per_device_train_batch_size=8)


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_bert(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, **changes,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def reviews() -> Encoded:
    """Rows of 3 to 12 tokens; the class is whether token 5 is among them."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(6, 32, size=rng.integers(3, 13)) for _ in range(64)]
    labels = np.arange(64) % 2
    for row, label in zip(rows, labels, strict=True):
        row[0] = 5 if label else 4
    return Encoded(
        ids=[f"row-{number}" for number in range(64)],
        features=[{"input_ids": row, "attention_mask": np.ones_like(row)} for row in rows],
        labels=labels,
    )


@pytest.fixture(scope="module")
def text() -> Encoded:
    """Blocks of 12 tokens of which 0 to 8 are not asked."""
    rng = np.random.default_rng(0)
    blocks = [rng.integers(1, 32, size=13) for _ in range(16)]
    features = []
    for number, block in enumerate(blocks):
        labels = block[1:].copy()
        labels[: number % 9] = -100
        features.append(
            {"input_ids": block[:-1], "attention_mask": np.ones(12, int), "labels": labels}
        )
    return Encoded(ids=[str(number) for number in range(16)], features=features)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(model: Any, encoded: Encoded, task: Any = TASK, **changes: Any) -> torch.Tensor:
    arguments = {
        name: changes.pop(name)
        for name in ("on_step", "teacher", "hidden", "seed", "pieces")
        if name in changes
    }
    options = FinetuneOptions(**PLAIN.model_dump(exclude_unset=True) | changes)
    finetune(model, task, encoded, options, device="cpu", **{"seed": 0, **arguments})
    return weights(model)


# -- training ------------------------------------------------------------------------------------


def test_a_model_learns_what_can_be_learnt(reviews):
    model = tiny_bert()
    options = PLAIN.model_copy(update={"num_train_epochs": 15.0, "learning_rate": 5e-3})
    report = finetune(model, TASK, reviews, options, seed=0, device="cpu")
    records = predict(model, TASK, reviews, batch_size=16, device="cpu")
    assert TASK.metrics(records)["accuracy"][0] == 1.0
    assert report.losses[-1][1] < 0.5 * report.losses[0][1]
    assert report.steps == 120 and report.losses[-1][0] == 120
    assert report.epochs == 15.0
    assert report.tokens == 15 * sum(len(row["input_ids"]) for row in reviews.features)
    assert report.peak_learning_rate == 5e-3


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("pieces", [2, 3])
def test_a_batch_in_pieces_trains_as_the_whole_does(reviews, text, pieces, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "dropout": 0.0}
    whole = train(tiny_bert(), reviews, **options)
    assert torch.allclose(train(tiny_bert(), reviews, pieces=pieces, **options), whole, atol=1e-5)
    task = CausalLm(data="unread", block_size=12)
    whole = train(tiny_llama(), text, task, **options)
    parts = train(tiny_llama(), text, task, pieces=pieces, **options)
    assert torch.allclose(parts, whole, atol=1e-5)


def test_same_seed_gives_the_same_weights_and_another_seed_others(reviews):
    first, again, other = (train(tiny_bert(), reviews, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_learning_rate_zero_changes_nothing(reviews):
    before = weights(tiny_bert())
    assert torch.equal(train(tiny_bert(), reviews, learning_rate=0.0, weight_decay=0.5), before)


def test_no_steps_leave_the_model_as_it_is(reviews):
    calls: list[tuple[int, int]] = []
    model = tiny_bert()
    after = train(model, reviews, max_steps=0, on_step=[lambda *call: calls.append(call)])
    assert torch.equal(after, weights(tiny_bert()))
    assert calls == [(0, 0)] and not model.training


@pytest.mark.parametrize("case", ["classes", "tokens"])
def test_accumulated_batches_are_one_large_batch(case, reviews, text):
    """Also where micro-batches hold different numbers of labels."""
    model, task, encoded = {
        "classes": (tiny_bert(), TASK, reviews),
        "tokens": (tiny_llama(), CausalLm(data="unread"), text),
    }[case]
    shared = {"group_by_length": False, "dropout": 0.0, "max_steps": 4, "weight_decay": 0.0}
    twin = copy.deepcopy(model)
    large = train(model, encoded, task, per_device_train_batch_size=8, **shared)
    small = train(
        twin, encoded, task, per_device_train_batch_size=2, gradient_accumulation_steps=4, **shared
    )
    assert (large - small).abs().max() < 2e-5
    assert (large - weights(tiny_bert() if case == "classes" else tiny_llama())).abs().max() > 1e-3


def test_callbacks_see_every_step_and_what_they_zero_stays_zero(reviews):
    model, calls = tiny_bert(), []
    mask = torch.rand(32, 16, generator=torch.Generator().manual_seed(0)) < 0.5

    def hold(step: int, num_steps: int) -> None:
        calls.append((step, num_steps))
        model.bert.encoder.layer[0].intermediate.dense.weight.data.mul_(mask)

    train(model, reviews, on_step=[hold])
    assert calls == [(step, 8) for step in range(9)]
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert torch.equal(weight != 0, mask)


@pytest.mark.parametrize("bf16", [False, True])
def test_losses_that_are_not_finite_end_training(reviews, bf16):
    model = tiny_bert()

    def spoil(step: int, num_steps: int) -> None:
        if step == 2:
            model.classifier.bias.data[0] = float("nan")

    with pytest.raises(Diverged, match="step 3 of 8"):
        train(model, reviews, on_step=[spoil], bf16=bf16)
    assert "forward" not in vars(model)


def test_frozen_parts_stay_and_can_be_trained_again_later(reviews):
    model = tiny_bert()
    before = copy.deepcopy(model)
    train(model, reviews, freeze=("embeddings",))
    assert torch.equal(weights(model.bert.embeddings), weights(before.bert.embeddings))
    assert not torch.equal(weights(model.bert.encoder), weights(before.bert.encoder))
    assert all(p.requires_grad for p in model.parameters())


def test_freezing_what_is_not_there_names_what_is(reviews):
    with pytest.raises(BadInput, match="did you mean `embeddings`"):
        train(tiny_bert(), reviews, freeze=("embedings",))
    with pytest.raises(BadInput, match="leaves no parameter"):
        train(tiny_bert(), reviews, freeze=("bert", "classifier"))


def test_dropout_is_replaced_while_training_alone(reviews):
    model = tiny_bert()
    train(model, reviews, dropout=0.0, max_steps=1)
    assert model.dropout.p == 0.1
    without = train(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), reviews)
    assert torch.equal(train(tiny_bert(), reviews, dropout=0.0), without)
    assert not torch.equal(train(tiny_bert(), reviews), without)


def test_training_leaves_nothing_on_the_model_object(reviews):
    """Precisions may alternate in one process, and the model can be copied and exported after."""
    model = tiny_bert()
    names = set(vars(model))
    for bf16 in (True, False, True):
        train(model, reviews, bf16=bf16, max_steps=1)
        assert set(vars(model)) == names
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    batch = {
        "input_ids": torch.tensor([[5, 6]]),
        "attention_mask": torch.ones(1, 2, dtype=torch.long),
    }
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**batch).logits, model(**batch).logits)


def test_bf16_trains_otherwise_than_fp32(reviews):
    assert not torch.equal(train(tiny_bert(), reviews, bf16=True), train(tiny_bert(), reviews))


def test_bf16_auto_follows_the_hardware(monkeypatch):
    for flags, expected in (({"amx_bf16": True}, True), ({"avx2": True, "amx_bf16": False}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert uses_bf16(FinetuneOptions(), torch.device("cpu")) is expected
    assert uses_bf16(FinetuneOptions(bf16=True), torch.device("cpu")) is True


# -- distillation --------------------------------------------------------------------------------


def test_student_follows_a_teacher_that_contradicts_the_labels(reviews):
    lying = CachedTeacher(
        np.stack([10.0 * reviews.labels, 10.0 - 10.0 * reviews.labels], 1).astype("f4")
    )
    model = tiny_bert()
    train(
        model, reviews, teacher=lying, num_train_epochs=15.0, learning_rate=5e-3,
        distillation={"alpha": 1.0, "temperature": 2.0},
    )  # fmt: skip
    assert (
        TASK.metrics(predict(model, TASK, reviews, batch_size=16, device="cpu"))["accuracy"][0] == 0
    )


def test_cached_teacher_says_what_a_live_one_says(reviews):
    teacher = tiny_bert(1)
    indices = np.array([40, 3, 17])
    batch = {n: torch.from_numpy(a) for n, a in TASK.collate(reviews, indices.tolist()).items()}
    cached = cached_teacher(teacher, TASK, reviews, "cpu")(indices, batch)
    live = LiveTeacher(teacher, TASK)(indices, batch)
    assert torch.allclose(cached, live, atol=1e-5) and not live.requires_grad


def test_alpha_zero_is_training_without_a_teacher(reviews):
    teacher = LiveTeacher(tiny_bert(1), TASK)
    taught = train(tiny_bert(), reviews, teacher=teacher, distillation={"alpha": 0.0})
    assert torch.allclose(taught, train(tiny_bert(), reviews), atol=1e-6)


def test_hidden_distance_is_the_unexplained_share_of_variance_where_tokens_align():
    states = {"student": torch.randn(3, 4, 6), "teacher": torch.randn(3, 5, 6)}
    layers = {name: torch.nn.Identity() for name in states}
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    batch = {"input_ids": torch.zeros_like(mask), "attention_mask": mask}
    aligned = np.array([True, False, False, True])  # of all rows; the batch has rows 3, 0 and 2
    with HiddenDistance([layers["student"]], [layers["teacher"]], aligned=aligned) as distance:
        for name, layer in layers.items():
            layer(states[name])
        found = distance(np.array([3, 0, 2]), batch)
    assert not any(layer._forward_hooks for layer in layers.values())
    student = torch.cat([states["student"][0], states["student"][1, :2]])
    teacher = torch.cat([states["teacher"][0, :4], states["teacher"][1, :2]])
    spread = (teacher - teacher.mean(0)).square().sum()
    assert found.item() == pytest.approx(((student - teacher).square().sum() / spread).item())


def test_a_student_taught_by_layers_comes_closer_to_the_teachers_layers(reviews):
    def distance(hidden: float) -> float:
        teacher, student = tiny_bert(1), tiny_bert(0)
        pairs = [layers_of(student), layers_of(teacher)]
        options = {"alpha": 1.0, "hidden": hidden}
        asked = HiddenDistance(*pairs) if hidden else None
        train(
            student, reviews, teacher=LiveTeacher(teacher, TASK), hidden=asked,
            num_train_epochs=8.0, learning_rate=5e-3, distillation=options,
        )  # fmt: skip
        rows = np.arange(16)
        batch = to_device(TASK.collate(reviews, rows.tolist()), "cpu")
        with torch.no_grad(), HiddenDistance(*pairs) as told:
            TASK.logits(student, batch), TASK.logits(teacher, batch)
            return told(rows, batch).item()

    assert distance(1.0) < 0.7 * distance(0.0)


# -- order and rate ------------------------------------------------------------------------------


def test_every_row_comes_once_an_epoch_and_bucketing_saves_padding():
    lengths = np.random.default_rng(0).integers(2, 100, size=1003)

    def padded(by_length: bool) -> int:
        batches = epoch_batches(lengths, 16, np.random.default_rng(1), by_length=by_length)
        assert sorted(np.concatenate(batches)) == list(range(1003))
        return sum(lengths[batch].max() * len(batch) for batch in batches)

    assert padded(True) < 1.1 * lengths.sum() < padded(False)


def test_bucketed_batches_come_in_random_order():
    lengths = np.arange(1000)
    batches = epoch_batches(lengths, 10, np.random.default_rng(0), by_length=True)
    longest = np.array([lengths[batch].max() for batch in batches])
    assert abs(np.corrcoef(longest, np.arange(100))[0, 1]) < 0.3


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_rate_warms_up_to_its_peak_and_every_step_trains(kind):
    options = FinetuneOptions(lr_scheduler_type=kind, learning_rate=1.0, warmup_ratio=0.2)
    rates = [learning_rate(options, step, 20) for step in range(1, 21)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert min(rates) > 0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert (rates[-1] == 1.0) == (kind == "constant")
    assert learning_rate(options, 1, 1) == 1.0


def test_steps_follow_epochs_unless_they_are_given(reviews):
    def steps(max_steps: int | None = None, **options: Any) -> int:
        chosen = FinetuneOptions(bf16=False, learning_rate=0.0, **options)
        return finetune(
            tiny_bert(), TASK, reviews, chosen, seed=0, device="cpu", max_steps=max_steps
        ).steps

    assert steps(per_device_train_batch_size=10, num_train_epochs=0.5) == 4
    assert steps(per_device_train_batch_size=8, gradient_accumulation_steps=4) == 2
    assert steps(max_steps=3) == steps(num_train_epochs=9, max_steps=None) // 6 == 3
    assert steps(max_steps=1, num_train_epochs=5.0) == 1


def test_unknown_options_are_refused():
    for wrong in (
        {"lr": 1},
        {"learning_rate": -1},
        {"lr_scheduler_type": "step"},
        {"dropout": 1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FinetuneOptions(**wrong)


# -- answers -------------------------------------------------------------------------------------


def test_records_come_in_the_order_of_the_rows(reviews, text):
    records = predict(tiny_bert(), TASK, reviews, batch_size=7, device="cpu")
    alone = predict(tiny_bert(), TASK, reviews, batch_size=1, device="cpu")
    assert [record["id"] for record in records] == list(reviews.ids)
    assert [record["label"] for record in records] == reviews.labels.tolist()
    for record, single in zip(records, alone, strict=True):
        assert record["logits"] == pytest.approx(single["logits"], abs=1e-5)
    counts = [
        record["num_tokens"]
        for record in predict(tiny_llama(), CausalLm(data="x"), text, batch_size=4, device="cpu")
    ]
    assert counts == [12 - number % 9 for number in range(16)]


# -- encoder-decoders ----------------------------------------------------------------------------


def test_an_encoder_decoder_trains_by_the_same_loop():
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 32, size=rng.integers(3, 9)) for _ in range(8)]
    encoded = Encoded(
        ids=[str(number) for number in range(8)],
        features=[
            {"input_ids": row, "attention_mask": np.ones_like(row), "labels": row[::-1][:-1]}
            for row in rows
        ],
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    before = weights(model)
    task = Reversal(sentences=("unused",))
    report = finetune(model, task, encoded, PLAIN, seed=0, device="cpu", max_steps=2)
    assert report.steps == 2 and not torch.equal(weights(model), before)
    records = predict(model, task, encoded, batch_size=3, device="cpu")
    assert [record["num_tokens"] for record in records] == [len(row) - 1 for row in rows]
