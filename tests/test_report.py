"""The report and the tables say what front.json holds. All numbers here are made up."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.pareto import Objective
from orchestrator.report import wording, write_report
from orchestrator.report.page import render
from orchestrator.report.terminal import Progress, front_table, measurement_table
from orchestrator.trial import Measurement, Reason, TrialConfig, TrialResult, TrialStatus

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
STRUCTURED = {"method": "structured", "importance": "taylor", "schedule": "before"}


def config(prune: dict | None = None, scheme: str = "none", **finetune: object) -> dict:
    quantize = {"scheme": scheme, "qat": scheme == "W8A8" and finetune.get("max_steps") != 0}
    tuning = {
        "num_train_epochs": 3.0,
        "learning_rate": 5e-5,
        "max_steps": None,
        "distillation": None,
    }
    methods = [STRUCTURED | prune] if prune else []
    return {
        "model": "minilm",
        "prune": methods,
        "quantize": quantize,
        "finetune": tuning | finetune,
        "seed": 0,
    }


def point(
    trial_id: str,
    values: tuple[float, float, float],
    made: dict,
    role: str = "trial",
    **more: object,
) -> dict:
    accuracy, size, latency = values
    metrics = {
        "accuracy": accuracy,
        "size_mb": size,
        "latency_ms": latency,
        "sparsity": 0.0,
        "num_params": size * 3e5,
    }
    made_up = {
        "trial_id": trial_id * 4,
        "role": role,
        "config": made,
        "metrics": metrics
        | {"agreement": 0.5 + accuracy / 2, "speedup": 9.3 / latency, "macs": latency * 1e8},
        "test": {"accuracy": accuracy - 0.006},
        "intervals": {
            "accuracy": [accuracy - 0.02, accuracy + 0.02],
            "latency_ms": [latency * 0.97, latency * 1.03],
        },
        "test_intervals": {"accuracy": [accuracy - 0.03, accuracy + 0.018]},
        "num_examples": 1384,
        "artifact": f"trials/{trial_id * 4}/artifact",
        "sha256": "9f" * 32,
        "runtime": "onnxruntime",
        "within_noise_of": [],
        "rebuild": f"slimtune export {trial_id * 4} DIR --study runs/made-up",
        "notes": [],
    }
    return made_up | more


def made_up_front() -> dict:
    layers = {"layers": 0.5}
    dense = point("d00d", (0.891, 90.9, 9.30), config(), "baseline")
    front = [
        dense,
        point("a1a1", (0.889, 23.1, 3.61), config(None, "W8A8")),
        point(
            "b2b2",
            (0.884, 19.8, 2.72),
            config({"neurons": 0.25}, "W8A8"),
            within_noise_of=["a1a1" * 4],
        ),
        point(
            "c3c3",
            (0.874, 17.4, 1.98),
            config({"heads": 0.5, "neurons": 0.5}, "W8A8", distillation={}),
        ),
        point("d4d4", (0.861, 15.8, 1.31), config({"heads": 0.5, "neurons": 0.5} | layers, "W8A8")),
        point(
            "e5e5", (0.833, 14.9, 0.94), config({"heads": 0.75, "neurons": 0.75} | layers, "W8A8")
        ),
    ]
    int8 = point("f6f6", (0.886, 23.4, 3.70), config(None, "W8A8", max_steps=0), "dense int8")
    twin = point(
        "f9f9",
        (0.842, 17.4, 1.99),
        config({"heads": 0.5, "importance": "random"}, "W8A8"),
        "random twin",
    )
    references = [
        dense,
        int8,
        point("f7f7", (0.868, 17.9, 1.92), config(layers, "W8A8"), "first 3 layers"),
        point("f8f8", (0.851, 16.5, 1.30), config({"layers": 0.667}, "W8A8"), "first 2 layers"),
        twin,
    ]
    dominated = [int8, twin] + [
        point(
            f"9{i:03x}",
            (0.80 + 0.007 * i, 21.0 + 2.5 * i, 2.2 + 0.35 * i),
            config({"heads": 0.05 + 0.1 * i}, "W4A16"),
            artifact=None,
        )
        for i in range(10)
    ]
    over = [point("8a8a", (0.792, 14.4, 0.81), config({"neurons": 0.9} | layers, "W8A8"))]
    over[0]["notes"] = ["latency did not settle within 5 % before its cap of 200 repetitions"]
    everything = {p["trial_id"]: p for p in [*front, *references, *dominated, *over]}
    trials = [
        {key: p[key] for key in ("trial_id", "role", "config", "metrics")}
        | {"status": "completed", "reason": None, "message": "", "device_seconds": 41.5}
        for p in everything.values()
    ]
    lost = [
        ("0bad" * 4, "failed", "oom", "ran out of memory: 5.1 GB asked for, 4.0 GB there", 12.0),
        ("1bad" * 4, "failed", "diverged", "the loss was nan at step 41", 7.2),
        (
            "2bad" * 4,
            "skipped",
            "infeasible",
            "size_mb of 61 is over the limit of 50 before training",
            0.0,
        ),
        ("3bad" * 4, "stopped", None, "ended at rung 1 of 3", 15.0),
    ]
    for name, status, reason, message, seconds in lost:
        made = {"trial_id": name, "role": "trial", "config": config({"heads": 0.3}), "metrics": {}}
        trials.append(
            made
            | {"status": status, "reason": reason, "message": message, "device_seconds": seconds}
        )
    return {
        "schema": 1,
        "study": "made-up",
        "quality": "accuracy",
        "target": {
            "runtime": "onnxruntime",
            "device": "cpu",
            "threads": 1,
            "batch_size": 1,
            "padding": "longest",
            "command": None,
        },
        "fingerprint": "0123456789abcdef",
        "objectives": [
            {"name": "accuracy", "direction": "max"},
            {"name": "latency_ms", "direction": "min"},
            {"name": "size_mb", "direction": "min"},
        ],
        "limits": [{"name": "accuracy", "direction": "max", "max": None, "min": 0.8}],
        "reference_point": {"accuracy": 0.5, "latency_ms": 1.1, "size_mb": 1.1},
        "hypervolume": 0.40321,
        "baseline": dense,
        "points": front,
        "references": references,
        "dominated": dominated,
        "over_limit": over,
        "trials": {
            "completed": len(everything),
            "stopped": 1,
            "failed": 2,
            "skipped": 1,
            "reused": 3,
        },
        "all_trials": trials,
        "device_seconds": 1234.5,
    }


MANIFEST = {
    "slimtune": "0.1.0",
    "packages": {"torch": "2.13.0+cpu", "onnxruntime": "1.32.0"},
    "recipe": {"name": "made-up", "seed": 0},
    "facts": {
        "environment": {
            "cpu": "Made-up CPU",
            "features": ["avx2"],
            "cores": 2,
            "memory_gb": 6.4,
            "system": "Linux x86_64",
            "python": "3.11.7",
        }
    },
}


def write_study(folder: Path, front: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "front.json").write_text(json.dumps(front))
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    return write_report(folder)


class Reader(HTMLParser):
    """Tags that were opened and never closed, and every address that the page mentions."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "action")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return render(made_up_front(), MANIFEST)


def embedded(page: str) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    )


def test_the_page_needs_no_network_and_is_small(tmp_path):
    path = write_study(tmp_path / "made-up", made_up_front())
    text = path.read_text(encoding="utf-8")
    assert path.name == "report.html" and len(text) < 300_000
    assert all(address.startswith("trials/") for address in Reader(text).addresses)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'" in text


def test_the_page_is_well_formed_and_names_every_trial(page):
    reader = Reader(page)
    assert reader.open == []
    text = " ".join(reader.text)
    for trial in made_up_front()["all_trials"]:
        assert trial["trial_id"][:8] in text
        assert trial["message"] in text
    assert "oom" in text and "diverged" in text and "not settle" in text
    assert "slimtune export c3c3c3c3c3c3c3c3 DIR --study runs/made-up" in text
    assert "Made-up CPU" in text and "2.13.0+cpu" in text


def test_the_picture_shows_each_point_once_and_every_reference(page):
    front = made_up_front()
    points = embedded(page)["points"]
    shown = {p["id"]: p for p in points}
    expected = {
        p["trial_id"]
        for name in ("points", "references", "dominated", "over_limit")
        for p in front[name]
    }
    assert len(points) == len(shown) and set(shown) == expected
    assert all(shown[p["trial_id"]]["reference"] for p in front["references"])
    assert [shown[p["trial_id"]]["number"] for p in front["points"]] == [1, 2, 3, 4, 5, 6]
    assert [p["id"] for p in points if p["over"]] == ["8a8a" * 4]
    assert embedded(page)["axes"] == {"x": "latency_ms", "y": "accuracy", "color": "size_mb"}


def test_text_from_outside_cannot_break_out_of_the_page():
    front = made_up_front()
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    front["study"] = attack
    front["points"][1]["role"] = attack
    front["points"][1]["notes"] = [attack]
    front["points"][1]["rebuild"] = f'" onclick="{attack}'
    front["all_trials"][0]["message"] = attack
    reader = Reader(render(front, MANIFEST))
    assert reader.open == []
    assert reader.addresses == Reader(render(made_up_front(), MANIFEST)).addresses
    assert "".join(reader.text).count(attack) >= 4


def test_numbers_that_json_does_not_have_are_left_out():
    front = made_up_front()
    front["dominated"][3]["metrics"] |= {"accuracy": float("nan"), "size_mb": float("inf")}
    page = render(front, MANIFEST)
    shown = {p["id"]: p for p in embedded(page)["points"]}
    assert shown[front["dominated"][3]["trial_id"]]["metrics"]["accuracy"] is None


def test_a_study_with_one_objective_and_nothing_else_has_a_page():
    front = made_up_front()
    front["objectives"] = [{"name": "perplexity", "direction": "min"}]
    front["baseline"]["metrics"] = {"perplexity": 20.0}
    front |= {
        "points": [],
        "references": [],
        "dominated": [],
        "over_limit": [],
        "limits": [],
        "quality": "perplexity",
    }
    assert "on the front" in render(front, {})


def run_chromium(path: Path, *options: str) -> str:
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        *options,
    ]
    return subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_draws_every_point(tmp_path):
    path = write_study(tmp_path / 'a study\'s "page"', made_up_front())
    drawn = run_chromium(path, "--dump-dom", "--window-size=1400,1000")
    points = embedded(path.read_text(encoding="utf-8"))["points"]
    marks = re.findall(r'class="mark ([a-z ]+)" style[^>]*tabindex', drawn)
    assert len(marks) == len(points)
    assert marks.count("over") == 1
    assert drawn.count('class="limit"') == 1
    assert "NaN" not in re.search(r'id="plot".*?</svg>', drawn, re.S)[0]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (config(), "dense, 3 epochs, lr 5e−5"),
        (config({"heads": 0.5, "neurons": 0.5}, "W8A8"), "heads 50%, neurons 50%, W8A8 QAT, 3 epochs, lr 5e−5"),
        (config(None, "W8A8", max_steps=0), "W8A8 PTQ, not trained"),
        (config({"method": "magnitude", "sparsity": 0.6, "schedule": "gradual"}, max_steps=40, learning_rate=None),
         "magnitude 60%, gradually, 40 steps"),
        (config({"method": "threshold", "threshold": 0.5, "unit": "std"}, "W4A16", num_train_epochs=0), "threshold 0.5 σ, W4A16 PTQ, not trained"),
        (config({"method": "vocabulary", "vocab_size": 8000}, max_steps=9), "vocabulary 8,000, 9 steps, lr 5e−5"),
        (config({"method": "n_m", "n": 2, "m": 4}, distillation={"temperature": 2.0}), "2:4, 3 epochs, lr 5e−5, distilled"),
        (config({"layers": 0.5, "importance": "random"}), "layers 50%, random choice, 3 epochs, lr 5e−5"),
    ],
)  # fmt: skip
def test_a_configuration_is_one_line(made, words):
    assert wording.describe(made) == words


def test_what_differs_in_the_same_words_is_said_besides():
    made = [
        config({"heads": 0.5, "importance": importance}, weight_decay=decay)
        for importance in ("taylor", "magnitude")
        for decay in (0.0, 0.1)
    ]
    shown = wording.telling_apart(made)
    assert shown == ["finetune.weight_decay", "prune.0.importance"]
    lines = [wording.describe(one, shown=shown) for one in made]
    assert lines[1] == "heads 50%, 3 epochs, lr 5e−5, weight_decay 0.1, importance taylor"
    assert len(set(lines)) == 4
    assert wording.telling_apart([config(), config({"heads": 0.5})]) == []


def test_several_base_models_are_always_named():
    made = [config() | {"model": name} for name in ("small", "large")]
    shown = wording.telling_apart(made)
    assert wording.describe(made[0], shown=shown).startswith("small: dense, ")


def test_a_default_configuration_can_be_described():
    assert wording.describe(TrialConfig(model="m").model_dump(mode="json")) == "dense"


@pytest.mark.parametrize(
    ("metric", "value", "dense", "words"),
    [
        ("size_mb", 15.0, 90.0, "6.0× smaller"),
        ("size_mb", 88.0, 90.0, "like dense"),
        ("latency_ms", 10.0, 5.0, "2.0× slower"),
        ("accuracy", 0.874, 0.891, "−1.7 points"),
        ("accuracy", 0.891, 0.891, ""),
        ("perplexity", 23.5, 20.0, "+3.50"),
        ("num_params", 1e6, 4e6, "25% of dense"),
        ("size_mb", None, 90.0, ""),
    ],
)
def test_a_number_is_compared_with_dense(metric, value, dense, words):
    assert wording.compare(metric, value, dense) == words


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [
        ("accuracy", 0.8834, "0.883"),
        ("size_mb", 22.94, "22.9"),
        ("latency_ms", 0.0123, "0.0123"),
        ("perplexity", 1234.5, "1,234"),
        ("num_params", 22_713_216, "22.7 M"),
        ("latency_ms", None, "–"),
        ("latency_ms", float("nan"), "–"),
    ],
)
def test_a_number_has_the_digits_that_matter(metric, value, words):
    assert wording.number(metric, value) == words


def printed(renderable: object, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_the_table_shows_the_front_beside_dense():
    text = printed(front_table(made_up_front()))
    assert "made-up: 6 on the front, served by onnxruntime on cpu, 1 thread, batch 1" in text
    assert "heads 50%, neurons 50%, W8A8 QAT" in text
    assert "−1.7 points" in text and "4.7× faster" in text and "5.2× smaller" in text
    assert "0.854–0.894" in text and "0.868" in text
    assert "· ≈ 2" in text and "≈ accuracy within noise of these points" in text


def test_a_narrow_table_leaves_out_intervals_and_cuts_nothing_off():
    text = printed(front_table(made_up_front(), width=80), width=80)
    assert "0.854–0.894" not in text and "4.7× faster" in text and "on test" in text
    assert "0.868" in text


def test_chosen_points_keep_the_numbers_of_the_front():
    front = made_up_front()
    text = printed(front_table(front, chosen=front["points"][2:3]))
    assert "made-up: 1 of the 6 on the front" in text
    assert re.search(r"^ +3 ", text, re.M) and not re.search(r"^ +2 ", text, re.M)


def test_the_table_survives_markup_and_missing_numbers():
    front = made_up_front()
    front["points"][1]["config"]["model"] = "[bold]"
    front["points"][1]["role"] = "[/red] twin"
    front["points"][1] |= {"test": None, "test_intervals": None}
    assert "[/red] twin" in printed(front_table(front))


def test_a_measurement_is_a_table():
    measured = {
        "trial_id": "ab" * 8,
        "config": config({"heads": 0.5}, "W8A8"),
        "metrics": {"latency_ms": 2.5},
        "intervals": {"latency_ms": (2.4, 2.6)},
        "notes": ("a note",),
    }
    text = printed(measurement_table(measured))
    assert "abababab: heads 50%, W8A8 QAT" in text
    assert "latency (ms)" in text and "2.40–2.60" in text and "a note" in text


OBJECTIVES = [
    Objective(name="accuracy", direction="max"),
    Objective(name="size_mb", direction="min"),
]


def result(accuracy: float | None, size: float = 10.0, seed: int = 0) -> TrialResult:
    made = TrialConfig(model="m", seed=seed)
    if accuracy is None:
        ending = {"status": TrialStatus.FAILED, "reason": Reason.OOM, "message": "asked for [9] GB"}
    else:
        metrics = {"accuracy": accuracy, "size_mb": size}
        ending = {"status": TrialStatus.COMPLETED, "measurement": Measurement(metrics=metrics)}
    return TrialResult(trial_id=made.id, config=made, **ending)


def watch(console: Console) -> Progress:
    with Progress(OBJECTIVES, console=console) as progress:
        progress.trial_started("w", 0, 3, "dense baseline m")
        progress.stage("w", "finetune")
        progress.trial_finished("w", result(0.9, 100.0))
        progress.trial_started("w", 1, 3, "heads 50%")
        progress.stage("w", "measure")
        progress.trial_finished("w", result(0.8, 50.0, seed=1))
        progress.trial_started("w", 2, 3, "heads 75%")
        progress.trial_finished("w", result(None, seed=2))
        progress.stage("w", "test split")
    return progress


def test_progress_in_a_file_is_two_plain_lines_a_trial():
    console = Console(file=io.StringIO(), width=100)
    watch(console)
    lines = console.file.getvalue().splitlines()
    assert lines[:4] == [
        "[0/3] dense baseline m",
        "[0/3] → accuracy 0.900 · size 100 MB · 0 s",
        "[1/3] heads 50%",
        "[1/3] → accuracy 0.800 (−10.0 points) · size 50.0 MB (2.0× smaller) · 0 s",
    ]
    assert lines[4:] == ["[2/3] heads 75%", "[2/3] → failed (oom): asked for [9] GB · 0 s"]


def test_progress_in_a_file_says_once_that_a_trial_waits_for_room():
    console = Console(file=io.StringIO(), width=100)
    with Progress(OBJECTIVES, console=console) as progress:
        progress.trial_started("a", 1, 2, "heads 50%")
        for free in (0, 1):
            progress.stage(
                "a", f"waits for a place with 2 GPU; the whole cluster has free: {free} GPU"
            )
        progress.stage("a", "waits for its worker to start")
        progress.stage("a", "finetune")
    assert console.file.getvalue().splitlines() == [
        "[1/2] heads 50%",
        "[1/2] waits for a place with 2 GPU; the whole cluster has free: 0 GPU",
    ]


def test_progress_on_a_terminal_says_what_runs_and_the_best_so_far():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    watch(console)
    text = console.file.getvalue()
    assert "▸ heads 75%" in text
    assert "best so far: accuracy 0.900 · size 50.0 MB · 2 on the front" in text
    assert "left" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_progress_shows_every_trial_that_runs():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with Progress(OBJECTIVES, console=console) as progress:
        progress.trial_started("a", 1, None, "heads 50%")
        progress.trial_started("b", 2, None, "heads 75%")
        progress.stage("a", "latency")
        progress.trial_lost("b", "the worker died")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", console.file.getvalue())
    assert "▸ heads 50%  latency" in text
    assert "[2] the worker died" in text
    assert "▸ heads 75%  waits for another attempt" in text


def test_progress_on_a_narrow_terminal_breaks_lines_between_words():
    console = Console(file=io.StringIO(), width=40, force_terminal=True, color_system=None)
    watch(console)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", console.file.getvalue())
    lines = [line.rstrip() for line in text.splitlines()]
    place = next(i for i, line in enumerate(lines) if line.endswith("[1/3] heads 50%"))
    assert lines[place + 1 : place + 3] == [
        "      accuracy 0.800 (−10.0 points) ·",
        "      size 50.0 MB (2.0× smaller) · 0 s",
    ]


def test_what_earlier_runs_found_counts_among_the_best():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with Progress(OBJECTIVES, console=console) as progress:
        progress.phase("reading data and models")
        progress.trial_reused(result(0.9, 100.0))
        progress.trial_started("w", 2, 3, "heads 50%")
        progress.trial_finished("w", result(0.8, 50.0, seed=1))
    text = console.file.getvalue()
    assert "▸ reading data and models" in text
    assert "size 50.0 MB (2.0× smaller)" in text
    assert "best so far: accuracy 0.900 · size 50.0 MB · 2 on the front" in text


def test_notes_on_the_data_are_printed():
    console = Console(file=io.StringIO(), width=30)
    with Progress(OBJECTIVES, console=console) as progress:
        progress.note("3 rows of train are in validation or test too: dropped")
    expected = "note: 3 rows of train are in validation or test too: dropped\n"
    assert console.file.getvalue() == expected


def test_progress_does_not_hide_what_stopped_the_study():
    console = Console(file=io.StringIO(), width=100)
    with pytest.raises(KeyboardInterrupt), Progress(OBJECTIVES, console=console) as progress:
        progress.trial_finished("w", result(0.9))
        progress.trial_started("w", 1, 3, "heads 50%")
        raise KeyboardInterrupt
    assert "[1/3] heads 50%" in console.file.getvalue()
    assert console.file.getvalue().endswith("1 completed in 0 s\n")


def test_importing_the_report_needs_no_template_engine():
    code = "import sys, orchestrator.report.terminal; sys.exit('jinja2' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode
        == 0
    )
