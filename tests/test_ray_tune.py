"""Inside Ray Tune: its Tuner runs a recipe's trials, and its schedulers and searchers hear the truth.

Every cluster and every Tuner is a process of its own: how Ray proves who it is cannot change within
one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_study

from orchestrator.artifact import verify
from orchestrator.plan import make_plan
from orchestrator.rebuild import study_above
from orchestrator.recipe import load_recipe
from orchestrator.stages import Stages
from orchestrator.study import read_result

pytest.importorskip("ray.tune")

pytestmark = pytest.mark.cluster
REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = ("ray_tune_study.py", "ray_tune_own_loop.py")

# A head that takes no work and a node of two CPUs. What is written to it adds a node or kills one.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster, nodes = Cluster(), []
cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=10**8)
cluster.add_node(num_cpus=2, object_store_memory=10**8)
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "add":
        nodes.append(cluster.add_node(labels={"role": "weak"}, object_store_memory=10**8))
    else:
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
    print("done", flush=True)
cluster.shutdown()
"""


class Nodes:
    """A cluster of the tests' own."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", CLUSTER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, env=environment(), **pipes)
        self.address = self._answer()

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def tell(self, order: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        assert self._answer() == "done"


def environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(REPOSITORY),
        **settings,
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.process.communicate(timeout=60)


class Tuning:
    """Starts scripts that use a Tuner, each with a folder as its home."""

    def __init__(self, cluster: Nodes, home: Path) -> None:
        self.home = home
        self.environment = environment(
            RAY_ADDRESS=cluster.address, HOME=str(home), SLIMTUNE_CACHE=str(home / "cache")
        )

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, text=True, env=self.environment, cwd=self.home, **pipes)

    def run(self, *arguments: object) -> str:
        process = self.start(*arguments)
        out, _ = process.communicate(timeout=280)
        assert process.returncode == 0, out[-4000:]
        return out

    def script(self, code: str, *arguments: object) -> Any:
        """What the script prints as its answer; workers' logs come whenever they do."""
        return answer(self.run("-c", code, *arguments))


def answer(out: str) -> Any:
    (line,) = (line for line in out.splitlines() if line.startswith("ANSWER "))
    return json.loads(line.removeprefix("ANSWER "))


@pytest.fixture
def tuning(cluster: Nodes, tmp_path: Path) -> Tuning:
    home = tmp_path / "home"
    home.mkdir()
    return Tuning(cluster, home)


def write_recipe(folder: Path, **sections: Any) -> Path:
    resources = {"cpus_per_trial": 1, **sections.pop("resources", {})}
    finetune = {"learning_rate": 1e-3, "max_steps": 8, "logging_steps": 1}
    space = {"quantize": {"scheme": "W8A8", "qat": True}, "finetune": finetune}
    return tiny_study.write_recipe(folder, **{"space": space, **sections}, resources=resources)


def intact_stages(study: Path, stage: str) -> int:
    """How many results of a stage there are, all of them whole."""
    stages = Stages(study / "stages")
    found = list(stages.each(stage))
    assert all(stages.find(stage, inputs, version=version) for inputs, version in found)
    return len(found)


# -- the examples --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_readme_shows_the_whole_example(name: str) -> None:
    code = (REPOSITORY / "recipes" / name).read_text()
    assert f"```python\n{code}```" in (REPOSITORY / "README.md").read_text()


def test_ten_lines_are_enough_for_a_loop_that_is_there() -> None:
    lines = (REPOSITORY / "recipes" / EXAMPLES[1]).read_text().splitlines()
    assert len([line for line in lines if line.endswith("# +")]) == 10


@pytest.mark.slow
def test_the_example_of_a_study(tuning: Tuning, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    tuning.run(REPOSITORY / "recipes" / EXAMPLES[0], path, "space.quantize.scheme=W8A16")
    (results,) = tuning.home.glob("ray_results/*/*/result.json")
    reports = [json.loads(line) for line in results.read_text().splitlines()]
    assert [report["training_iteration"] for report in reports] == [1, 2, 3, 4]
    assert all({"accuracy", "loss", "step"} <= report.keys() for report in reports)
    last = reports[-1]
    assert {"size_mb", "latency_ms", "accuracy_low"} <= last.keys()
    artifact = Path(last["artifact"])
    assert artifact.parent == tmp_path / "study" / "trials" / last["slimtune_id"]
    assert verify(artifact)["config"] == read_result(artifact.parent).config.model_dump(mode="json")
    assert study_above(artifact) == tmp_path / "study"
    parameters = json.loads((results.parent / "params.json").read_text())
    assert parameters["quantize"] == {"scheme": "W8A16", "qat": True}
    assert "accuracy" in (results.parent / "progress.csv").read_text().splitlines()[0]
    if find_spec("tensorboardX"):
        assert list(results.parent.glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_example_of_a_loop_that_is_there(tuning: Tuning) -> None:
    tuning.run(REPOSITORY / "recipes" / EXAMPLES[1])
    results = sorted(tuning.home.glob("ray_results/*/*/result.json"))
    assert len(results) == 2
    reports = [json.loads(path.read_text().splitlines()[-1]) for path in results]
    assert all(report["accuracy"] > 0.8 and report["latency_ms"] > 0 for report in reports)
    assert len(list(tuning.home.glob("ray_results/*/*/checkpoint_*/model.onnx"))) == 2
    plain, pruned = sorted(reports, key=lambda report: report["config"]["prune"] != "none")
    if plain["config"]["quantize"] == pruned["config"]["quantize"]:
        assert pruned["size_mb"] < plain["size_mb"]


# -- schedulers and searchers of Tune ------------------------------------------------------------

EIGHT = """
import json, sys
import optuna
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch
from orchestrator.launch.ray_tune import trainable

rates = [1e-3, 2e-3, 4e-3, 1e-2, 1e30, 1e-5, 1e-6, 1e-7]
search = OptunaSearch(
    space={"finetune.learning_rate": tune.choice(rates)},
    sampler=optuna.samplers.GridSampler({"finetune.learning_rate": rates}, seed=0),
    metric="accuracy",
    mode="max",
)
results = tune.Tuner(
    trainable(sys.argv[1]),
    tune_config=tune.TuneConfig(
        num_samples=8,
        search_alg=search,
        scheduler=AsyncHyperBandScheduler(metric="loss", mode="min", max_t=4, reduction_factor=2),
        max_concurrent_trials=2,
        reuse_actors=True,
    ),
    run_config=tune.RunConfig(failure_config=tune.FailureConfig(max_failures=1)),
).fit()
told = [{"error": str(r.error or ""), **(r.metrics or {})} for r in results]
print('ANSWER', json.dumps({"told": told, "states": [t.state.name for t in search._ot_study.trials]}))
"""


@pytest.mark.slow
def test_eight_trials_of_which_some_are_stopped_and_one_diverges(
    tuning: Tuning, tmp_path: Path
) -> None:
    found = tuning.script(EIGHT, write_recipe(tmp_path))
    failed = [each for each in found["told"] if each["error"]]
    assert len(found["told"]) == 8 and len(failed) == 1
    assert "diverged: loss or gradient is not finite" in failed[0]["error"]
    assert "status" not in failed[0]
    completed = [each for each in found["told"] if each.get("status") == "completed"]
    stopped = [each for each in found["told"] if each not in completed and each not in failed]
    assert completed and stopped
    assert all("latency_ms" not in each and each["training_iteration"] < 4 for each in stopped)
    # a trial may have trained to its end before it hears that it is stopped
    assert len(completed) <= intact_stages(tmp_path / "study", "trained") <= 7
    assert not [path for path in (tmp_path / "study" / "stages").glob(".*") if path.is_dir()]
    assert sorted(found["states"]) == ["COMPLETE"] * 7 + ["FAIL"]


# -- configurations ------------------------------------------------------------------------------

CONFIGURATIONS = """
import json, sys
from ray import tune
from orchestrator.launch.ray_tune import Searcher
from orchestrator.param_space import configure
from orchestrator.artifact import verify
from orchestrator.plan import make_plan
from orchestrator.rebuild import study_above
from orchestrator.recipe import load_recipe

def tried(path):
    recipe = load_recipe(path)

    def run(config):
        tune.report({"id": configure(recipe, config).id})

    config = tune.TuneConfig(num_samples=-1, search_alg=Searcher(recipe), reuse_actors=True)
    results = tune.Tuner(run, tune_config=config, param_space={"seed": 3}).fit()
    return [result.metrics["id"] for result in results]

print('ANSWER', json.dumps([tried(path) for path in sys.argv[1:]]))
"""

WIDE = {
    "prune": {
        "choice": [
            "none",
            {"method": "structured", "heads": 0.5, "neurons": {"choice": [0.25, 0.5]}},
            {"method": "magnitude", "sparsity": {"range": [0.25, 0.75], "step": 0.25}},
        ]
    },
    "quantize": {
        "choice": [
            {"scheme": "W8A8", "qat": {"choice": [False, True]}},
            {"scheme": "W4A16", "group_size": {"choice": [16, 64]}},  # 64 divides no layer
        ]
    },
    "finetune": {"learning_rate": {"range": [1e-4, 1e-2], "log": True, "num": 2}, "max_steps": 5},
}


@pytest.mark.slow
def test_tune_tries_what_a_study_would(
    tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = ({"name": "grid", "num_trials": 14}, {"name": "random", "num_trials": 8})
    paths = []
    for search in searches:
        (tmp_path / search["name"]).mkdir()
        paths.append(write_recipe(tmp_path / search["name"], space=WIDE, search=search))
    found = tuning.script(CONFIGURATIONS, *paths)
    monkeypatch.setenv("SLIMTUNE_CACHE", tuning.environment["SLIMTUNE_CACHE"])
    for path, tried in zip(paths, found, strict=True):
        planned = make_plan(load_recipe(path))["configurations"]
        trials = [row for row in planned if row["role"] == "trial"]
        expected = [row["trial_id"] for row in trials if row["infeasible"] is None]
        assert len(expected) < len(trials)  # what cannot work is not suggested
        assert tried == expected


def test_a_searcher_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    from orchestrator.launch.ray_tune import Searcher

    search = {"name": "tpe", "num_trials": 16}
    path = write_recipe(tmp_path, space=WIDE, search=search, objectives=["accuracy", "size_mb"])
    recipe = load_recipe(path)
    first, other = Searcher(recipe), Searcher(recipe)
    ends = [
        {"status": "completed", "accuracy": 0.5, "size_mb": 1.0},
        {"accuracy": 0.4, "training_iteration": 1},  # stopped
        None,  # an error
        {"status": "completed", "accuracy": float("nan"), "size_mb": 1.0},
    ]
    for number, end in enumerate(ends):
        first.suggest(str(number))
        first.on_trial_complete(str(number), end, error=end is None)
    first.suggest("runs")
    first.save(str(tmp_path / "state"))
    other.restore(str(tmp_path / "state"))
    other.on_trial_complete("runs", ends[0])
    first.on_trial_complete("runs", ends[0])
    following = [first.suggest(str(number)) for number in range(10, 26)]
    assert [other.suggest(str(number)) for number in range(10, 26)] == following
    assert following[-1] == Searcher.FINISHED and following[0] != Searcher.FINISHED
    assert json.loads(json.dumps(following)) == following


WRONG = """
import json, sys
from ray import tune
from orchestrator.launch.ray_tune import trainable

def errors(**param_space):
    failures = tune.RunConfig(failure_config=tune.FailureConfig(max_failures=1))
    try:
        results = tune.Tuner(trainable(sys.argv[1]), param_space=param_space, run_config=failures).fit()
    except Exception as error:
        return [str(error)]
    return [str(result.error) for result in results]

print('ANSWER', json.dumps([
    errors(**{"finetune.learning_rat": tune.grid_search([1e-3, 1e-2])}),
    errors(**{"finetune.learning_rate": 1e-3}),
    errors(**{"finetune.learning_rate": 1e-3, "quantize": {"scheme": "W4A16", "group_size": 64}}),
]))
"""


@pytest.mark.slow
def test_what_cannot_be_meant_is_told_before_any_trial_and_what_cannot_work_by_its_own(
    tuning: Tuning, tmp_path: Path
) -> None:
    space = {"quantize": {"choice": ["none", "W8A8"]}, "finetune": {"max_steps": 5}}
    path = write_recipe(tmp_path, space=space)
    unknown, still_open, infeasible = tuning.script(WRONG, path)
    assert "`finetune.learning_rat` is not a path of a configuration" in unknown[0]
    assert "did you mean `finetune.learning_rate`? Choices: finetune, " in unknown[0]
    assert "leaves `quantize` open" in still_open[0]
    assert len(infeasible) == 1 and "infeasible: group size 64 does not divide" in infeasible[0]
    assert not (tmp_path / "study" / "stages").exists()  # nothing was trained


# -- nodes and gangs -----------------------------------------------------------------------------

ONE = """
import json, sys
from ray import tune
from orchestrator.launch.ray_tune import trainable

failures = tune.RunConfig(failure_config=tune.FailureConfig(max_failures=2))
(result,) = tune.Tuner(trainable(sys.argv[1]), run_config=failures).fit()
print('ANSWER', json.dumps({"error": str(result.error or ""), **result.metrics}))
"""


def wait_for(path: Path, pattern: str) -> None:
    deadline = time.monotonic() + 200
    while not list(path.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_trial_whose_node_is_killed_goes_on_elsewhere_from_where_it_was(
    cluster: Nodes, tuning: Tuning, tmp_path: Path
) -> None:
    space = {"finetune": {"learning_rate": 1e-3, "max_steps": 600}}
    resources = {"save_steps": 20, "labels": {"role": "weak"}}
    path = write_recipe(tmp_path, space=space, resources=resources)
    cluster.tell("add")
    process = tuning.start("-c", ONE, path)
    wait_for(tmp_path / "study" / "stages", ".going-trained-*/step-*")
    cluster.tell("add")
    cluster.tell("kill the first")
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out[-4000:]
    last = answer(out)
    assert last["error"] == "" and last["status"] == "completed"
    result = json.loads((Path(last["artifact"]).parent / "measurement.json").read_text())
    assert result["details"]["training"]["resumed_at"] > 0
    assert intact_stages(tmp_path / "study", "dense") == 1
    cluster.tell("kill the second")


@pytest.mark.slow
def test_a_trial_of_two_workers(tuning: Tuning, tmp_path: Path) -> None:
    resources = {"cpus_per_trial": 2, "workers_per_trial": 2}
    last = tuning.script(ONE, write_recipe(tmp_path, resources=resources))
    assert last["error"] == "" and last["status"] == "completed"
    result = json.loads((Path(last["artifact"]).parent / "measurement.json").read_text())
    assert len(result["details"]["peak_memory_mb_by_rank"]) == 2
