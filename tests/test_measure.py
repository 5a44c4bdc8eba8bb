"""Numbers are those of the artifact as it is served: bytes, memory, zeros, tokens, a user's own script."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_study
import torch

from orchestrator.bench import Bench
from orchestrator.measure import latency
from orchestrator.measure.command import run_command
from orchestrator.measure.memory import example_inputs, peak_memory_mb
from orchestrator.measure.quality import (
    inputs_of,
    num_equal_tokens,
    served_batches,
    served_difference,
    served_records,
)
from orchestrator.measure.served import Served, _rows_over_lengths
from orchestrator.measure.shape import shape_metrics, sparsity
from orchestrator.measure.size import size_metrics
from orchestrator.prune import PruneContext, load_methods
from orchestrator.prune.tokens import rebuild_tokenizer
from orchestrator.quantize import ActivationNumerics, Numerics, WeightNumerics
from orchestrator.quantize.convert import convert
from orchestrator.recipe import make_recipe
from orchestrator.run_trial import run_baseline, run_trial
from orchestrator.runtimes import Target
from orchestrator.runtimes.torch_artifact import TorchSession
from orchestrator.tasks import Encoded
from orchestrator.tasks.text_classification import TextClassification
from orchestrator.trial import Reason, TrialStatus

INT8 = WeightNumerics(bits=8, granularity="channel")
DYNAMIC = ActivationNumerics(bits=8, granularity="tensor")

# -- bytes ---------------------------------------------------------------------------------------


def test_size_counts_graph_and_weights_alone_and_zeros_show_in_the_download(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "encoder.onnx").write_bytes(noise)
    (tmp_path / "decoder.onnx").write_bytes(bytes(200_000))
    (tmp_path / "decoder.onnx.data").write_bytes(bytes(100_000))
    (tmp_path / "tokenizer.json").write_bytes(noise)
    (tmp_path / "predictions.jsonl.zst").write_bytes(noise)
    found = size_metrics(tmp_path)
    assert found["size_mb"] == 0.6
    assert 0.3 <= found["download_mb"] < 0.302


# -- memory --------------------------------------------------------------------------------------

FAT = """
import json
import numpy as np

class Session:
    def __init__(self, folder):
        self.folder = folder
        self.ballast = np.ones(int((folder / "megabytes").read_text()) * 125_000)

    def run(self, inputs):
        self.note({name: list(value.shape) for name, value in inputs.items()})

    def prefill(self, ids):
        self.note(["prefill", *ids.shape])
        return np.zeros((len(ids), 2)), None

    def decode(self, token, cache):
        self.note("decode")
        return np.zeros((len(token), 2)), None

    def note(self, what):
        with (self.folder / "asked").open("a") as stream:
            stream.write(json.dumps(what) + "\\n")

class Fat:
    def load(self, folder, target):
        return Session(folder)

RUNTIME = Fat()
"""


@pytest.fixture
def fat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes the artifact of a runtime of the user's own, which is as large as it is told to be."""
    (tmp_path / "fat.py").write_text(FAT)
    paths = [str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    def make(megabytes: str, *, kind: str = "encoder") -> Path:
        folder = tmp_path / f"{kind}-{megabytes}"
        folder.mkdir()
        (folder / "megabytes").write_text(megabytes)
        description = {"kind": kind, "inputs": [{"name": "input_ids"}]}
        (folder / "artifact.json").write_text(json.dumps(description))
        return folder

    return make


def asked(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "asked").read_text().splitlines()]


def test_memory_is_the_peak_of_a_process_of_its_own(fat: Callable[..., Path]) -> None:
    target = Target(runtime="fat:RUNTIME", batch_size=2)
    ballast = np.ones(40_000_000)  # of this process: 320 MB that do not count
    small, large = (peak_memory_mb(fat(mb), target, length=5) for mb in ("10", "210"))
    assert 180 < large - small < 220 and small < 320 <= ballast.nbytes / 1e6


def test_memory_is_asked_for_at_the_batch_and_length_that_are_served(
    fat: Callable[..., Path],
) -> None:
    encoder, decoder = fat("1"), fat("1", kind="decoder")
    target = Target(runtime="fat:RUNTIME", batch_size=2, prompt_tokens=6, new_tokens=4)
    for folder in (encoder, decoder):
        peak_memory_mb(folder, target, length=5)
    assert asked(encoder) == 3 * [{"input_ids": [2, 5]}]
    assert asked(decoder) == 3 * [["prefill", 2, 6], *4 * ["decode"]]


def test_a_process_that_cannot_serve_says_why(fat: Callable[..., Path]) -> None:
    with pytest.raises(RuntimeError, match="memory failed: ValueError: .*'a lot'"):
        peak_memory_mb(fat("a lot"), Target(runtime="fat:RUNTIME"), length=5)


def test_made_up_inputs_are_those_that_the_artifact_names() -> None:
    names = ["input_ids", "attention_mask", "decoder_input_ids", "past_key_values.0.key"]
    found = example_inputs({"inputs": [{"name": name} for name in names]}, batch=3, length=7)
    assert list(found) == names[:3]
    assert all(value.shape == (3, 7) and value.dtype == np.int64 for value in found.values())


# -- a user's own script -------------------------------------------------------------------------


def script(folder: Path, body: str) -> str:
    path = folder / "it's a script.py"
    path.write_text(f"import json, sys\nfrom pathlib import Path\n{body}\n")
    return f'{sys.executable} "{path}"'


def test_a_script_gets_the_folder_and_gives_numbers(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(bytes(5))
    size = "Path(sys.argv[1], 'model.onnx').stat().st_size"
    command = script(tmp_path, f"print(json.dumps({{'flash_bytes': {size}, 'joules': 0.5}}))")
    assert run_command(command, tmp_path) == {"flash_bytes": 5.0, "joules": 0.5}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('no phone is attached')", "ended with 1: no phone is attached"),
        ("print('0.5 J')", "JSON object of finite numbers, but printed '0.5 J'"),
        ('print(\'{"joules": "many"}\')', "JSON object of finite numbers"),
        ("print('{\"joules\": NaN}')", "JSON object of finite numbers"),
        ("print('[1]')", "JSON object of finite numbers"),
    ],
)
def test_a_script_that_gives_none_says_so(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_command(script(tmp_path, body), tmp_path)


def test_a_script_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be started: .*no-such-program"):
        run_command("no-such-program --fast", tmp_path)


# -- shapes and zeros ----------------------------------------------------------------------------


def test_the_cache_is_what_keys_and_values_take() -> None:
    model = tiny_models.make("llama")  # 3 layers, 4 key-value heads of 6
    target = Target(batch_size=2, prompt_tokens=5, new_tokens=3)
    found = shape_metrics(model, model, target, kind="decoder", length=8)
    assert found["kv_cache_mb"] == 3 * 2 * 4 * 6 * 4 * (2 * (5 + 3)) / 1e6
    session = TorchSession(model, device="cpu")
    logits, cache = session.prefill(np.ones((2, 5), np.int64))
    for _ in range(3):
        logits, cache = session.decode(logits.argmax(-1), cache)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found["kv_cache_mb"] == stored / 1e6
    half = shape_metrics(model, model.to(torch.bfloat16), target, kind="decoder", length=8)
    assert half["kv_cache_mb"] == found["kv_cache_mb"] / 2


def test_shape_metrics_of_an_encoder_follow_batch_and_length() -> None:
    model = tiny_models.make("bert")
    one, many = (
        shape_metrics(model, model, Target(batch_size=batch), kind="encoder", length=8)
        for batch in (1, 3)
    )
    assert many["macs"] == 3 * one["macs"] and "kv_cache_mb" not in one
    assert one["num_params"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "section",
    [
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "threshold", "threshold": 0.5, "unit": "std"},
        {"method": "n_m"},
    ],
)
def test_zeros_of_masks_are_zeros_of_the_codes_that_are_served(section: dict[str, Any]) -> None:
    model = tiny_models.make("bert")
    assert sparsity(model) < 0.01
    nothing: Any = SimpleNamespace()
    context = PruneContext(tokenizer=nothing, texts=nothing, batches=nothing, loss=nothing, seed=0)
    (method,) = load_methods([section])
    method.start(model, context).finish()
    pruned, zeros = sparsity(model), model.bert.encoder.layer[0].output.dense.weight == 0
    converted = convert(model, Numerics(scheme="W8A8", weight=INT8, activation=DYNAMIC))
    codes = converted.bert.encoder.layer[0].output.dense.codes
    assert zeros.float().mean() > 0.3 and (codes[zeros] == 0).all()
    assert pruned <= sparsity(converted) < pruned + 0.02  # few more are rounded to zero


def test_a_tied_head_counts_once() -> None:
    model = tiny_models.make("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    expected = model.lm_head.weight.numel() / total
    assert sparsity(model) == pytest.approx(expected)
    convert(model, Numerics(scheme="W8A8", weight=INT8, activation=DYNAMIC, embedding=INT8))
    assert expected <= sparsity(model) < expected + 0.02


# -- quality -------------------------------------------------------------------------------------


class Echo:
    """A session whose logits are its inputs, and that remembers what it was sent."""

    def __init__(self) -> None:
        self.sent: list[dict[str, np.ndarray]] = []

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self.sent.append(inputs)
        return inputs["input_ids"].astype(np.float32)

    prefill = decode = run


def encoded(lengths: list[int]) -> tuple[Any, Encoded]:
    task = TextClassification(data="nowhere.csv")
    rows = [{"input_ids": np.full(n, n), "attention_mask": np.ones(n, np.int64)} for n in lengths]
    ids = [f"row-{n}" for n in lengths]
    return task, Encoded(ids=ids, features=rows, labels=np.zeros(len(rows), np.int64))


@pytest.mark.parametrize("length", [None, 9])
def test_rows_are_asked_in_their_order_at_the_targets_batch_and_padding(length: int | None) -> None:
    task, rows = encoded([5, 2, 7, 3, 4])
    session = Echo()
    records = served_records(session, task, rows, Target(batch_size=2), length=length)
    assert [record["id"] for record in records] == list(rows.ids)
    assert [record["logits"][0] for record in records] == [5, 2, 7, 3, 4]
    widths = [sent["input_ids"].shape for sent in session.sent]
    assert widths == ([(2, 9), (2, 9), (1, 9)] if length else [(2, 5), (2, 7), (1, 4)])
    assert all("labels" not in sent for sent in session.sent)
    assert [
        len(batch) for batch, _ in served_batches(task, rows, Target(), length=None, rows=3)
    ] == 3 * [1]


def test_the_served_difference_leaves_out_what_nobody_asks() -> None:
    batch = {"input_ids": np.ones((1, 3), np.int64), "labels": np.array([[4, 5, -100]])}
    trained = np.zeros((1, 3, 2), np.float32)
    trained[0, 0, 0] = 1.0
    served = trained.copy()
    served[0, 1, 1] += 0.25
    served[0, 2] += 100.0
    session: Any = SimpleNamespace(run=lambda inputs: served)
    found = served_difference(lambda batch: trained, session, [batch])
    assert found["max_difference"] == 0.25 and found["num_inputs"] == 1
    assert found["logits_std"] == pytest.approx(trained[0, :2].std())
    assert "labels" not in inputs_of(batch)


def test_one_rounding_that_fell_the_other_way_moves_the_largest_difference_alone() -> None:
    batches = [{"input_ids": np.full((1, 3), row)} for row in range(5)]
    session: Any = SimpleNamespace(
        run=lambda inputs: np.full((1, 2), 1.0 if inputs["input_ids"][0, 0] == 3 else 1e-6)
    )
    found = served_difference(lambda batch: np.zeros((1, 2)), session, batches)
    assert found["max_difference"] == 1.0
    assert found["median_difference"] == pytest.approx(1e-6)


def test_greedy_tokens_are_counted_up_to_the_first_that_differs() -> None:
    model = tiny_models.make("gpt2", n_positions=48)
    prompt = np.arange(5, 13)[None]
    faithful = TorchSession(model, device="cpu")
    assert num_equal_tokens(faithful, model, prompt) == 48 - 8  # as many as there are positions
    unlimited = tiny_models.make("llama")
    assert num_equal_tokens(TorchSession(unlimited, device="cpu"), unlimited, prompt) == 64

    class Strays(TorchSession):
        steps = 0

        def decode(self, token: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
            logits, cache = super().decode(token, cache)
            self.steps += 1
            return (-logits if self.steps == 4 else logits), cache

    assert num_equal_tokens(Strays(model, device="cpu"), model, prompt) == 4


# -- latency -------------------------------------------------------------------------------------


def test_a_decoders_times_are_those_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    class Steady:
        def prefill(self, ids: np.ndarray) -> tuple[np.ndarray, None]:
            now[0] += 0.010
            return np.zeros((len(ids), 3)), None

        def decode(self, token: np.ndarray, cache: None) -> tuple[np.ndarray, None]:
            now[0] += 0.002
            return np.zeros((len(token), 3)), None

    session: Any = Steady()
    timing = latency.decoder_round(session, np.ones((2, 6), np.int64), 5)
    assert timing == pytest.approx(
        {"ttft_ms": 10, "tpot_ms": 2, "latency_ms": 20, "tokens_per_s": 2 * 5 / 0.010}
    )


# -- a whole artifact ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measure")


def make_bench(folder: Path, **target: Any) -> Bench:
    recipe = tiny_study.recipe(folder)
    recipe["target"] = recipe["target"] | target
    if "command" in target:
        recipe["objectives"] = ["accuracy", "size_mb", {"name": "joules", "direction": "min"}]
    return Bench(make_recipe(recipe), folder / "study", device="cpu")


def test_a_whole_measurement_and_the_users_own_numbers_before_ours(folder: Path) -> None:
    numbers = {"joules": 0.25, "latency_ms": 7.0}
    command = script(folder, f"print(json.dumps({numbers}))")
    bench = make_bench(folder, command=command)
    result = run_baseline("bert", bench, lambda stage: None)
    assert result.status is TrialStatus.COMPLETED, result.message
    found = result.measurement
    assert found is not None and found.fingerprint and found.num_examples == 24
    assert {name: found.metrics[name] for name in numbers} == numbers
    assert "latency_ms" not in found.intervals and "accuracy" in found.intervals
    assert found.metrics["agreement"] == 1.0  # of the dense model with itself
    assert result.details["peak_training_memory_mb"] > 10
    stages = result.details["stage_seconds"]
    assert list(stages) == [
        "finetune",
        "export",
        "check",
        "quality",
        "latency",
        "memory",
        "command",
    ]


def test_a_script_that_fails_gives_the_trial_its_reason(folder: Path) -> None:
    bench = make_bench(folder, command=script(folder, "sys.exit('no phone is attached')"))
    result = run_baseline("bert", bench, lambda stage: None)
    assert (result.status, result.reason) == (TrialStatus.FAILED, Reason.ERROR)
    assert "target.command ended with 1: no phone is attached" in result.message
    assert not (folder / "study" / "baseline" / "artifact").exists()


def test_requests_cover_all_lengths_and_are_the_same_rows_for_every_vocabulary(
    folder: Path,
) -> None:
    bench = make_bench(folder)
    tokenizer = bench.base("bert").tokenizer
    config = bench.dense_config("bert", bench.recipe.baseline_grid("bert")[0])
    served = Served(bench, config, folder, tokenizer)
    rows = _rows_over_lengths(served, 8)
    lengths = np.array([len(row["input_ids"]) for row in served.encoded("validation").features])
    assert {lengths.min(), lengths.max()} <= set(lengths[rows])
    assert abs(lengths[rows].mean() - lengths.mean()) < 1.5
    smaller = Served(bench, config, folder, rebuild_tokenizer(tokenizer, range(300)))
    assert _rows_over_lengths(smaller, 8).tolist() == rows.tolist()


def test_padding_to_the_maximal_length_holds_for_everything_that_is_measured(folder: Path) -> None:
    bench = make_bench(folder, padding="max_length")
    config = bench.dense_config("bert", bench.recipe.baseline_grid("bert")[0])
    served = Served(bench, config, folder, bench.base("bert").tokenizer)
    assert served.padded_length == served.longest_length == 32
    model = tiny_models.make("bert")
    padded = served.shape(model, model)["macs"]
    short = Served(make_bench(folder), config, folder, served.tokenizer)
    assert short.padded_length is None and short.longest_length < 32
    assert padded > short.shape(model, model)["macs"]


def test_a_torch_session_keeps_to_its_threads_and_training_gets_its_own_back(
    folder: Path,
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        bench = make_bench(folder, runtime="torch", threads=1)
        session = TorchSession(tiny_models.make("bert"), device="cpu", threads=1)
        assert torch.get_num_threads() == 2
        session.run({"input_ids": np.ones((1, 4), np.int64)})
        assert torch.get_num_threads() == 1
        config = bench.recipe.trial_config(model="bert", quantize="W4A16")
        failed = run_trial(config, bench, lambda stage: None)  # torch serves no such scheme
        assert failed.reason is Reason.INFEASIBLE and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
