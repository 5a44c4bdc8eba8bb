"""Every task keeps the contract; its data are checked before anything is trained; its scores are right."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from orchestrator import hub
from orchestrator.tasks import TASKS, Record, Task
from orchestrator.tasks.causal_lm import CausalLm
from orchestrator.tasks.data import read_table
from orchestrator.tasks.statistics import mean_difference, resample, wilson
from orchestrator.tasks.text_classification import TextClassification
from orchestrator.trial import BadInput

WORDS = re.findall(
    r"\w+", "the film is was good bad fine poor plot actor scene music and but very not"
)


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(WORDS, size=rng.integers(3, 9))) + f" {number}"
        for number in range(count)
    ]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    names = ["[PAD]", "[UNK]", "[END]", *WORDS, *map(str, range(10))]
    tokenizer = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    )


def write_reviews(folder: Path, rows: int = 40) -> Path:
    path = folder / "reviews.tsv"
    lines = [f"{text}\t{number % 2}" for number, text in enumerate(sentences(rows))]
    path.write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return path


def classification(folder: Path) -> tuple[Task, Any]:
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    task = TextClassification(data=str(write_reviews(folder)), max_length=32)
    return task, BertForSequenceClassification(config)


def language_model(folder: Path) -> tuple[Task, Any]:
    path = folder / "book.txt"
    path.write_text("\n".join(sentences(120)))
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32,
    )  # fmt: skip
    return CausalLm(data=str(path), block_size=16), LlamaForCausalLM(config)


SETUPS: dict[str, Callable[[Path], tuple[Task, Any]]] = {
    "text_classification": classification,
    "causal_lm": language_model,
}


@dataclass(frozen=True)
class Bench:
    task: Task
    model: Any
    tokenizer: Any


@pytest.fixture(params=TASKS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    torch.manual_seed(0)
    task, model = SETUPS[request.param](tmp_path)
    return Bench(task, model.eval(), tiny_tokenizer())


def answer(
    bench: Bench, split: str, *, length: int | None = None, batch_size: int = 8
) -> list[Record]:
    encoded = bench.task.encode(bench.task.load()[split], bench.tokenizer)
    records = []
    for start in range(0, len(encoded), batch_size):
        indices = range(start, min(start + batch_size, len(encoded)))
        batch = bench.task.collate(encoded, indices, length=length)
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        with torch.no_grad():
            logits = bench.task.logits(bench.model, tensors).numpy()
        records += bench.task.records(logits, batch, [encoded.ids[index] for index in indices])
    return records


# -- every task ----------------------------------------------------------------------------------


def test_catalog_names_each_task_as_the_recipe_does(bench):
    assert TASKS[bench.task.name] is type(bench.task)
    assert type(bench.task)(**bench.task.model_dump(mode="json")) == bench.task


def test_splits_are_there_are_the_same_each_time_and_share_no_text(bench):
    rows, again = bench.task.load(), bench.task.load()
    assert list(rows) == ["train", "validation", "test"]
    assert rows == again
    texts = [set(part.texts) for part in rows.values()]
    assert all(texts)
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert all(part.split == split for split, part in rows.items())


def test_batches_are_int64_and_padded_to_what_was_asked(bench):
    encoded = bench.task.encode(bench.task.load()["train"], bench.tokenizer)
    batch = bench.task.collate(encoded, [0, 1, 2])
    longest = max(len(encoded.features[index]["input_ids"]) for index in (0, 1, 2))
    padded = bench.task.collate(encoded, [0, 1, 2], length=40)
    assert all(array.dtype == np.int64 for array in batch.values())
    assert batch["input_ids"].shape == (3, longest)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (3, 40)
    assert (padded["attention_mask"].sum(1) == batch["attention_mask"].sum(1)).all()


def test_padding_changes_no_answer(bench):
    for short, long in zip(answer(bench, "test"), answer(bench, "test", length=40), strict=True):
        for name, value in short.items():
            assert value == (pytest.approx(long[name], rel=1e-4) if name != "id" else long[name])


def test_records_are_json_and_score_within_their_intervals(bench):
    records = json.loads(json.dumps(answer(bench, "test")))
    scores = bench.task.metrics(records, records)
    assert bench.task.quality in scores
    assert all(low <= value <= high for value, low, high in scores.values())
    assert bench.task.metrics(records, records) == scores


def test_a_model_does_not_differ_from_itself_and_other_rows_are_refused(bench):
    records = answer(bench, "validation")
    assert bench.task.paired_difference(records, records[::-1]) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same rows"):
        bench.task.paired_difference(records, records[1:])


def test_losses_are_means_over_what_is_asked(bench):
    """The mean over a batch is that over its parts, each weighed by the labels that are asked."""
    encoded = bench.task.encode(bench.task.load()["train"], bench.tokenizer)
    batch = {n: torch.from_numpy(a) for n, a in bench.task.collate(encoded, [0, 1, 2]).items()}
    if batch["labels"].ndim > 1:
        batch["labels"][0, :5] = -100
    logits = bench.task.logits(bench.model, batch).detach()
    teacher = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))

    def losses(rows: slice) -> np.ndarray:
        part = {name: value[rows] for name, value in batch.items()}
        loss = bench.task.loss(logits[rows], part)
        distance = bench.task.distillation_loss(logits[rows], teacher[rows], part, temperature=2.0)
        return (part["labels"] != -100).sum().item() * np.array([1.0, loss, distance])

    assert losses(slice(0, 1)) + losses(slice(1, 3)) == pytest.approx(losses(slice(0, 3)), rel=1e-4)


def test_distillation_vanishes_for_the_teacher_itself_and_follows_hinton(bench):
    encoded = bench.task.encode(bench.task.load()["train"], bench.tokenizer)
    batch = {n: torch.from_numpy(a) for n, a in bench.task.collate(encoded, [0, 1]).items()}
    logits = bench.task.logits(bench.model, batch).detach()
    other = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    assert bench.task.distillation_loss(logits, logits, batch, temperature=3.0).item() == 0
    p, q = (torch.softmax(scores / 3.0, -1) for scores in (other, logits))
    expected = 9.0 * (p * (p / q).log()).sum(-1).mean()
    found = bench.task.distillation_loss(logits, other, batch, temperature=3.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


# -- classification data -------------------------------------------------------------------------


def problems_of(**options: Any) -> list[str]:
    with pytest.raises(BadInput) as caught:
        TextClassification(**options).load()
    return caught.value.problems


def test_every_kind_of_file_says_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"text": f'{text}, "so" it goes', "label": n % 2} for n, text in enumerate(sentences(20))
    ]
    columns = {name: [row[name] for row in rows] for name in ("text", "label")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.tsv").write_text(
        "\n".join(["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in rows)])
    )
    quoted = (row["text"].replace('"', '""') for row in rows)
    (tmp_path / "a.csv").write_text(
        "\n".join(
            ["text,label", *(f'"{t}",{row["label"]}' for t, row in zip(quoted, rows, strict=True))]
        )
    )
    loaded = [
        TextClassification(data=str(tmp_path / f"a.{kind}")).load()
        for kind in ("tsv", "csv", "jsonl", "parquet")
    ]
    assert loaded[0]["train"].texts[0][0].endswith('"so" it goes')
    assert all(rows == loaded[0] for rows in loaded)


def test_files_without_a_header_have_their_columns_named(tmp_path):
    (tmp_path / "a.tsv").write_text(
        "\n".join(f"{text}\tx\t{n % 2}" for n, text in enumerate(sentences(20)))
    )
    rows = TextClassification(
        data=str(tmp_path / "a.tsv"), columns=("text", "other", "label"), text_pair_column="other"
    ).load()
    assert sum(len(part.ids) for part in rows.values()) == 20
    assert rows["train"].texts[0][1] == "x"


def test_pairs_are_encoded_as_pairs(tmp_path):
    (tmp_path / "a.csv").write_text(
        "\n".join(
            ["text,other,label", *(f"{text},good,{n % 2}" for n, text in enumerate(sentences(20)))]
        )
    )
    task = TextClassification(data=str(tmp_path / "a.csv"), text_pair_column="other")
    rows, tokenizer = task.load()["train"], tiny_tokenizer()
    tokens = task.encode(rows, tokenizer).features[0]["input_ids"]
    assert tokens.tolist() == tokenizer(*rows.texts[0])["input_ids"]
    assert tokens[-1] == tokenizer.convert_tokens_to_ids("good")


def test_labels_follow_sorted_names_or_the_order_of_the_map(tmp_path):
    data = str(write_reviews(tmp_path))
    plain = TextClassification(data=data).load()["train"]
    mapped = TextClassification(data=data, label_map={0: "positive", 1: "negative"}).load()["train"]
    assert plain.label_names == ("0", "1")
    assert mapped.label_names == ("positive", "negative")
    assert mapped.labels == plain.labels


def test_numbered_labels_are_ordered_as_numbers(tmp_path):
    (tmp_path / "a.csv").write_text(
        "\n".join(["text,label", *(f"{text},{n % 12}" for n, text in enumerate(sentences(240)))])
    )
    rows = TextClassification(data=str(tmp_path / "a.csv")).load()["train"]
    assert rows.label_names == tuple(str(number) for number in range(12))


def test_splits_are_cut_by_class(tmp_path):
    (tmp_path / "a.csv").write_text(
        "\n".join(
            [
                "text,label",
                *(f"{t},{'rare' if n < 20 else 'often'}" for n, t in enumerate(sentences(200))),
            ]
        )
    )
    rows = TextClassification(data=str(tmp_path / "a.csv"), validation_share=0.2).load()
    counts = {split: np.bincount(part.labels).tolist() for split, part in rows.items()}
    assert counts == {"train": [126, 14], "validation": [36, 4], "test": [18, 2]}


def test_rows_of_train_that_are_held_out_too_are_dropped_and_counted(tmp_path):
    rows = [f"{text}\t{n % 2}" for n, text in enumerate(sentences(40))]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows]))
    (tmp_path / "test.tsv").write_text("\n".join(["text\tlabel", *rows[:4], "a new one\t1"]))
    options = {"data": str(tmp_path), "train": "train.tsv", "test": "test.tsv"}
    kept = TextClassification(**options, drop_leaks=False).load()["train"]
    clean = TextClassification(**options).load()
    assert len(kept.ids) - len(clean["train"].ids) == 4 - sum(
        text in clean["validation"].texts for text in clean["test"].texts
    )
    assert "dropped" in clean["train"].notes[0]
    assert "kept" in kept.notes[0]
    assert len(clean["test"].ids) == 5


def test_balanced_weights_make_classes_count_alike(tmp_path):
    (tmp_path / "a.csv").write_text(
        "\n".join(["text,label", *(f"{t},{int(n < 20)}" for n, t in enumerate(sentences(200)))])
    )
    data = str(tmp_path / "a.csv")
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    rare, often = ({"labels": torch.tensor([label, label])} for label in (1, 0))
    plain, balanced = (
        TextClassification(data=data),
        TextClassification(data=data, class_weights="balanced"),
    )
    ratio = [balanced.loss(logits, b) / plain.loss(logits, b) for b in (rare, often)]
    assert ratio[0] / ratio[1] == pytest.approx(9.0, rel=0.01)


def test_all_problems_of_the_data_come_at_once(tmp_path):
    write_reviews(tmp_path)
    found = problems_of(data=str(tmp_path), train="reviews.tsv", test="dev.tsv", text_column="txt")
    assert len(found) == 2
    assert "no file" in found[0] and "reviews.tsv" in found[0]
    assert "did you mean `text`" in found[1]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("text\tlabel\n", {}, "has no rows"),
        ("", {}, "has no rows"),
        ("text\tlabel\na\tx\nb\tx\n", {"test_share": 0.4, "validation_share": 0.4}, "too few rows"),
        ("text\tlabel\n" + "".join(f"t{n}\tx\n" for n in range(30)), {}, "the one class `x`"),
        ("text\tlabel\n \tx\nb\t\nc\t\n", {}, "2 of 3 rows have nothing in the column `label`; the first is row 2"),
        ("text\tlabel\nb\n", {}, "row 1 with 1"),
        ("text\tlabel\na\tx\nb\ty\n", {"label_map": {"x": "X"}}, "no name for the label `y`"),
        ("text\tlabel\na\tx\nb\tx\n", {"label_map": {"x": "X", "z": "Z"}}, "names `z`, which"),
        ("a text\tx\nanother\ty\n", {}, "task.columns"),
        ("text\tlabel\na\tx\n", {"columns": ("text", "label")}, "names its columns; leave them out"),
        (
            "text\tlabel\n" + "".join(f"t{n}\t{n % 2}\n" for n in range(30)),
            {"text_column": "label", "label_column": "text"},
            "`text` has 30 distinct values in the 30 rows",
        ),
        (
            "text\tlabel\n" + "".join(f"t{n}\t{n % 2}\n" for n in range(30)),
            {"class_weights": (1.0, 1.0, 1.0)},
            "3 weights for 2 classes (0, 1)",
        ),
    ],
)  # fmt: skip
def test_bad_data_are_refused_with_a_reason(tmp_path, content, options, message):
    (tmp_path / "a.tsv").write_text(content)
    assert any(
        message in problem for problem in problems_of(data=str(tmp_path / "a.tsv"), **options)
    )


def test_a_label_that_train_never_shows_is_refused(tmp_path):
    write_reviews(tmp_path)
    (tmp_path / "test.tsv").write_text("text\tlabel\nnew\t7\nold\t7\n")
    found = problems_of(data=str(tmp_path), train="reviews.tsv", test="test.tsv")
    told = "test has the label `7` in 2 of 2 rows, which train does not have. Choices: 0, 1."
    assert found == [told]


def test_many_alike_problems_are_not_all_listed(tmp_path):
    write_reviews(tmp_path)
    rows = "".join(f"t{n}\tlabel {n % 9}\n" for n in range(40))
    (tmp_path / "test.tsv").write_text(f"text\tlabel\n{rows}")
    found = problems_of(data=str(tmp_path), train="reviews.tsv", test="test.tsv")
    assert len(found) == 6 and found[-1] == "… and 4 more like the last."


def test_one_file_cannot_be_two_splits(tmp_path):
    write_reviews(tmp_path)
    found = problems_of(data=str(tmp_path), train="reviews.tsv", test="reviews.tsv")
    assert len(found) == 1 and "the same data" in found[0]


def test_what_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n{')
    assert "not UTF-8" in problems_of(data=str(tmp_path / "a.csv"))[0]
    assert "line 2 is not JSON" in problems_of(data=str(tmp_path / "a.jsonl"))[0]
    assert (
        "no known kind"
        in problems_of(data=str(write_reviews(tmp_path).rename(tmp_path / "a.txt")))[0]
    )


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\na,1\n")
    assert list(read_table(tmp_path / "a.csv").columns) == ["text", "label"]


def test_hub_data_give_class_names_and_hide_no_labels(tmp_path, monkeypatch):
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )

    def load(name: str, config: str | None, *, split: str, revision: None) -> datasets.Dataset:
        labels = [-1] * 30 if split == "test" else [number % 2 for number in range(30)]
        rows = {"sentence": sentences(30, seed=len(split)), "label": labels}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    options = {"data": "owner/reviews", "text_column": "sentence", "validation": "validation"}
    assert TextClassification(**options).load()["test"].label_names == ("neg", "pos")
    found = problems_of(**options, test="test")
    assert found == [
        "owner/reviews (test): 30 of 30 rows have nothing in the column `label`; the first is row 1."
    ]


def test_data_that_are_nowhere_are_refused(monkeypatch):
    import datasets

    def load(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'no/such' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for reachable, why in ((True, "the hub does not give it"), (False, "cannot be reached")):
        monkeypatch.setattr(hub, "is_reachable", lambda reachable=reachable: reachable)
        (problem,) = problems_of(data="no/such")
        assert "is no file or folder here" in problem and why in problem
    assert problems_of(data="no/such.csv") == ["task.data: there is no file or folder no/such.csv."]
    with pytest.raises(BadInput, match="no file or folder"):
        CausalLm(data="./nothing").load()


# -- classification scores -----------------------------------------------------------------------


def classified(labels: list[int], predicted: list[int]) -> list[Record]:
    return [
        {"id": str(row), "label": label, "logits": np.eye(3)[guess].tolist()}
        for row, (label, guess) in enumerate(zip(labels, predicted, strict=True))
    ]


def test_scores_are_those_of_the_textbook():
    records = classified([0] * 5 + [1] * 3 + [2] * 2, [0, 0, 0, 0, 1, 1, 1, 0, 2, 0])
    scores = TextClassification(data="x").metrics(records, classified([0] * 10, [0] * 10))
    assert scores["accuracy"][0] == 0.7
    assert scores["f1"][0] == pytest.approx((8 / 11 + 4 / 6 + 2 / 3) / 3)
    assert scores["worst_class_accuracy"][0] == 0.5
    assert scores["agreement"][0] == 0.6


def test_wilson_interval_is_the_published_one():
    share, low, high = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(share, 4), round(low, 4), round(high, 4)) == (0.3080, 0.2553, 0.3662)
    assert wilson(0, 20)[1] == 0.0 and 0 < wilson(0, 20)[2] < 0.2


def test_paired_difference_is_signed_and_narrower_than_unpaired():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 500)
    good = np.where(rng.random(500) < 0.9, labels, (labels + 1) % 3)
    worse = np.where(rng.random(500) < 0.05, (good + 1) % 3, good)
    task = TextClassification(data="x")
    a, b = classified(labels, good), classified(labels, worse)
    value, low, high = task.paired_difference(a, b)
    assert value == pytest.approx(task.metrics(a)["accuracy"][0] - task.metrics(b)["accuracy"][0])
    assert 0 < low < value < high
    assert task.paired_difference(b, a)[0] == pytest.approx(-value)
    assert high - low < task.metrics(a)["accuracy"][2] - task.metrics(a)["accuracy"][1]


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        _, low, high = mean_difference(rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=200))
        hits += low <= 0.1 <= high
    assert 0.91 <= hits / 300 <= 0.98


def test_resampling_draws_rows_with_replacement():
    counts = resample(np.array([30, 70]))
    assert (counts.sum(1) == 100).all()
    assert counts[:, 0].std() == pytest.approx(math.sqrt(100 * 0.3 * 0.7), rel=0.1)


# -- language model data and scores --------------------------------------------------------------


def test_standard_library_is_split_by_file_and_leaves_tests_out():
    rows = CausalLm(data="python_stdlib", max_chars=500_000).load()
    names = [name for part in rows.values() for name in part.ids]
    assert len(names) == len(set(names))
    assert not [name for name in names if re.search(r"(^|/)(tests?|idlelib|site-packages)/", name)]
    assert 300_000 < sum(len(text) for (text,) in rows["train"].texts) <= 500_000
    sizes = {split: sum(len(text) for (text,) in part.texts) for split, part in rows.items()}
    assert min(sizes.values()) > 100_000


def test_one_text_is_cut_in_order_and_nothing_is_lost(tmp_path):
    text = "\n".join(sentences(200))
    (tmp_path / "a.txt").write_text(text)
    parts = [part.texts[0][0] for part in CausalLm(data=str(tmp_path / "a.txt")).load().values()]
    assert "".join(parts) == text
    assert [round(len(part) / len(text), 1) for part in parts] == [0.8, 0.1, 0.1]
    assert all(part.endswith("\n") for part in parts[:2])


def test_files_of_a_folder_stay_whole(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("\n".join(sentences(20, seed=number)))
    rows = CausalLm(data=str(tmp_path)).load()
    assert {split: len(part.ids) for split, part in rows.items()} == {
        "train": 8,
        "validation": 1,
        "test": 1,
    }
    assert len(CausalLm(data=str(tmp_path), max_files=5).load()["train"].ids) == 3


def test_rows_of_a_table_and_named_files_are_documents(tmp_path):
    lines = [json.dumps({"body": text}) for text in sentences(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n".join(sentences(9)))
    options = {"data": str(tmp_path), "train": "a.jsonl", "test": "b.txt"}
    rows = CausalLm(**options, text_column="body").load()
    assert rows["test"].texts[0][0] == (tmp_path / "b.txt").read_text()
    assert len(rows["train"].ids) + len(rows["validation"].ids) == 50
    with pytest.raises(BadInput, match="`text` is not a column"):
        CausalLm(**options).load()


def test_blocks_predict_each_token_once_with_ends_between_documents(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("the film is good")
    task, tokenizer = (
        CausalLm(data=str(tmp_path), block_size=4, train="0.txt", test="1.txt", validation="2.txt"),
        tiny_tokenizer(),
    )
    rows = task.load()["train"]
    encoded = task.encode(rows, tokenizer)
    assert len(encoded) == 1
    stream = tokenizer("the film is good [END]")["input_ids"]
    assert encoded.features[0]["input_ids"].tolist() == stream[:4]
    assert encoded.features[0]["labels"].tolist() == stream[1:]


def test_evaluation_blocks_are_limited_and_spread(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(sentences(2000)))
    task = CausalLm(data=str(tmp_path / "a.txt"), block_size=8, max_eval_blocks=10)
    rows = task.load()
    starts = [int(id.split("-")[1]) for id in task.encode(rows["test"], tiny_tokenizer()).ids]
    assert len(starts) == 10
    assert starts[0] == 0 and starts[-1] > 500
    assert len(task.encode(rows["train"], tiny_tokenizer())) > 10


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("the film is good\n" * 10)
    task = CausalLm(data=str(tmp_path / "a.txt"), block_size=64)
    with pytest.raises(BadInput, match="fewer than a block of 64"):
        task.encode(task.load()["test"], tiny_tokenizer())
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BadInput, match="no text"):
        CausalLm(data=str(tmp_path / "empty.txt")).load()
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput, match="no .txt files"):
        CausalLm(data=str(tmp_path / "folder")).load()


def test_perplexity_weighs_tokens_and_agrees_with_torch(tmp_path):
    task, model = language_model(tmp_path)
    bench = Bench(task, model.eval(), tiny_tokenizer())
    records = answer(bench, "test")
    encoded = task.encode(task.load()["test"], bench.tokenizer)
    batch = task.collate(encoded, range(len(encoded)))
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    loss = task.loss(task.logits(model, tensors), tensors).item()
    assert task.metrics(records)["perplexity"][0] == pytest.approx(math.exp(loss), rel=1e-5)
    uneven = [
        {"id": "a", "nll": 10.0, "num_tokens": 10},
        {"id": "b", "nll": 90.0, "num_tokens": 30},
    ]
    assert task.metrics(uneven)["perplexity"][0] == pytest.approx(math.exp(2.5))


# -- real data -----------------------------------------------------------------------------------


@pytest.mark.realdata
def test_sst2_is_read_as_its_readme_says(shared_data):
    rows = TextClassification(
        data=str(shared_data / "sst2_sentences"),
        train="train.tsv",
        test="dev.tsv",
        columns=("text", "label"),
        label_map={0: "negative", 1: "positive"},
    ).load()
    assert len(rows["test"].ids) == 872
    assert 6_900 <= len(rows["train"].ids) + len(rows["validation"].ids) <= 6_920
    assert not set(rows["train"].texts) & set(rows["test"].texts)


@pytest.mark.realdata
def test_quoted_csv_of_tweets_is_read_whole(shared_data):
    rows = TextClassification(
        data=str(shared_data / "multilingual_sentiment_umsab" / "french"),
        train="train.csv",
        validation="valid.csv",
        test="test.csv",
    ).load()
    assert len(rows["validation"].ids) == 324 and len(rows["test"].ids) == 870
    assert len(rows["train"].label_names) == 3
    assert "share 1 texts" in rows["test"].notes[0] or rows["train"].notes
