"""What a recipe may say, what it comes to, and that every mistake in one is told at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml

from orchestrator.prune.magnitude import Magnitude
from orchestrator.recipe import Recipe, load_recipe, make_recipe
from orchestrator.search.grid import Grid
from orchestrator.signature import Group, Signature, Weight
from orchestrator.tasks import TASKS
from orchestrator.trial import BadInput, Frozen

TEXT = """\
# A comment that is kept.
model: {name: some/bert, id: bert}
task: {name: text_classification, data: rows.csv}
objectives: [accuracy, size_mb, latency_ms]
limits: {latency_ms: {max: 5}, accuracy: {min: 0.9}}
baseline: {finetune: {learning_rate: {choice: [1e-4, 5e-5]}, num_train_epochs: 2}}
space:
  prune:
    choice:
      - none
      - {method: magnitude, sparsity: {choice: [0.5, 0.75]}}
      - {method: structured, heads: 0.5}
  quantize: {choice: [none, W8A8, {scheme: W8A8, qat: true}]}
  finetune: {num_train_epochs: 1, learning_rate: 1e-4}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "study-1.yaml"
    file.write_text(TEXT, encoding="utf-8")
    return file


def written(**sections: object) -> dict[str, object]:
    return {**yaml.safe_load(TEXT), **sections}


def problems(path: Path, *overrides: str) -> list[str]:
    """What is told, without the name of the file it is told of."""
    with pytest.raises(BadInput) as caught:
        load_recipe(path, overrides)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


# -- what it comes to ----------------------------------------------------------------------------


def test_names_and_defaults_follow_from_the_file(path):
    recipe = load_recipe(path)
    assert recipe.name == "study-1"
    assert recipe.output_dir == "runs/study-1"
    assert recipe.source == TEXT
    assert recipe.keep == "front"
    assert recipe.references.dense_int8
    assert recipe.references.random_twin
    assert isinstance(recipe.search, Grid)
    assert recipe.num_trials() == 12
    assert recipe.target.runtime == "onnxruntime"
    assert isinstance(recipe.task, TASKS["text_classification"])


def test_directions_and_limits_come_with_the_metrics(path):
    recipe = load_recipe(path)
    directions = {objective.name: objective.direction for objective in recipe.objectives}
    assert directions == {"accuracy": "max", "size_mb": "min", "latency_ms": "min"}
    assert {limit.name: (limit.min, limit.max) for limit in recipe.limits} == {
        "latency_ms": (None, 5),
        "accuracy": (0.9, None),
    }
    assert recipe.sign("accuracy") == 1
    assert recipe.sign("size_mb") == -1


def test_numbers_in_exponents_are_numbers(path):
    rates = [options.learning_rate for options in load_recipe(path).baseline_grid("bert")]
    assert rates == [1e-4, 5e-5]
    file = written(space={"finetune": {"learning_rate": {"range": [1e-5, 1e-3], "log": True}}})
    path.write_text(yaml.safe_dump(file).replace("1.0e-05", "1e-5"), encoding="utf-8")
    assert load_recipe(path, ["search=random"]).num_trials() == 20


def test_models_have_ids_and_are_a_choice_of_the_space():
    models = [{"name": "org/small"}, {"name": "org/large", "id": "big"}]
    recipe = make_recipe(written(model=models, space={}))
    assert [model.id for model in recipe.models] == ["small", "big"]
    assert recipe.num_trials() == 2
    folders = [recipe.baseline_folder(Path("s"), model.id) for model in recipe.models]
    assert folders == [Path("s/baseline/small"), Path("s/baseline/big")]


def test_a_model_that_is_fine_tuned_already_is_not_trained():
    recipe = make_recipe(written(model={"name": "org/done", "finetuned": True}))
    (options,) = recipe.baseline_grid("done")
    assert options.max_steps == 0
    assert recipe.continued_baseline(options) is None
    assert len(recipe.baseline_budgets("done")) == 1


def test_the_dense_model_is_trained_on_for_the_largest_budget_of_a_trial():
    finetune = {"max_steps": {"choice": [10, 200, 50]}, "distillation": {}}
    recipe = make_recipe(written(space={"finetune": finetune}))
    assert recipe.largest_budget()["max_steps"] == 200
    longer = recipe.continued_baseline(recipe.baseline_grid("bert")[0])
    assert longer is not None
    assert longer.max_steps == 200
    assert longer.distillation is None
    untrained = make_recipe(written(space={"finetune": {"max_steps": 0}}))
    assert untrained.continued_baseline(recipe.baseline_grid("bert")[0]) is None


# -- identity ------------------------------------------------------------------------------------


def test_a_recipe_survives_its_own_manifest(path):
    recipe = load_recipe(path, ["target.threads=2", "references.first_layers=[1]"])
    again = Recipe.from_resolved(recipe.resolved(), output_dir=Path("elsewhere"))
    assert again.hash == recipe.hash
    assert again.resolved() == {**recipe.resolved(), "output_dir": "elsewhere"}
    assert again.identity() == recipe.identity()


def test_writing_the_same_thing_otherwise_changes_nothing(path):
    recipe = load_recipe(path)
    path.write_text("keep: all\nseed: 0\nname: other\n" + TEXT, encoding="utf-8")
    assert load_recipe(path).hash == recipe.hash


@pytest.mark.parametrize(
    "override", ["seed=1", "target.threads=2", "task.max_length=64", "limits.accuracy.min=0.8"]
)
def test_asking_for_other_work_makes_another_study(path, override):
    assert load_recipe(path, [override]).hash != load_recipe(path).hash
    assert load_recipe(path, [override]).identity() != load_recipe(path).identity()


def test_a_search_may_be_made_longer_in_the_same_study(path):
    short, long = (
        load_recipe(path, [f"search.num_trials={n}", "search.name=random"]) for n in (3, 5)
    )
    assert short.identity() == long.identity()


# -- overrides -----------------------------------------------------------------------------------


def test_values_from_the_command_line_replace_those_of_the_file(path):
    overrides = [
        "model.name=other/bert",
        "space.prune.choice.1.sparsity.choice=[0.25]",
        "task.columns=[text, label]",
        "target.threads=4",
        "name=named",
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.models[0].name == "other/bert"
    assert recipe.num_trials() == 9
    assert recipe.task.columns == ("text", "label")
    assert recipe.target.threads == 4
    assert recipe.output_dir == "runs/named"
    assert recipe.overrides == tuple(overrides)
    assert recipe.source == TEXT


def test_items_of_a_list_are_counted_from_0(path):
    path.write_text(TEXT.replace("{name: some/bert, id: bert}", "[{name: a/b}, {name: c/d}]"))
    assert load_recipe(path, ["model.1.name=e/f"]).models[1].id == "f"
    assert "counted from 0" in problems(path, "model.2.name=e/f")[0]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("target.thread=3", "command line: target.thread is not a key of `target`; did you mean"),
        ("targt.threads=3", "command line: targt is not a key of `recipe`; did you mean `target`"),
        ("seed", "command line: seed has no `=`"),
        ("seed.x=1", "command line: seed.x"),
        ("objectives.0.name=f1", "command line: objectives.0.name=f1 goes into `objectives.0`"),
        ("seed=[", "command line: seed=[ "),
        ("seed=minus", "command line: seed should be a valid integer"),
    ],
)
def test_overrides_that_lead_nowhere_are_refused(path, override, told):
    path.write_text(TEXT + "seed: 3\n")
    assert any(problem.startswith(told) for problem in problems(path, override))


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("keep=non", "keep should be 'front' or 'all', got 'non'."),
        ("seed=-1", "seed should be greater than or equal to 0, got -1."),
        ("kep=all", "kep is not a key of `recipe`; did you mean `keep`?"),
        ("source=x", "source is not a key of `recipe`."),
        ("name=a/b", "name should match pattern '^["),
        ("model=[]", "model is missing."),
        (
            "model=bert",
            "model should be a valid dictionary or instance of ModelOptions, got 'bert'.",
        ),
        ("model={}", "model is missing."),
        (
            "model={id: x}",
            "model: needs either `name` (hub id or folder) or `config` (from scratch).",
        ),
        ("model.config={}", "model: needs either `name`"),
        ("model={config: {}}", "model: needs `model_type` in `config`"),
        ("model={config: {model_type: bert}}", "model: needs `tokenizer` beside `config`"),
        ("model.nmae=x", "model.nmae is not a key of `model`; did you mean `name`?"),
        (
            "model=[{name: a/b}, {name: c/b}]",
            "model.1.id has to differ between models, got `b` twice.",
        ),
        (
            "task.name=text_clasification",
            "task.name names no task, got `text_clasification`; did you",
        ),
        ("task={data: x}", "task.name is missing. Choices: causal_lm, text_classification."),
        (
            "task.max_lenght=3",
            "task.max_lenght is not a key of `text_classification`; did you mean",
        ),
        ("task.max_length=many", "task.max_length should be a valid integer"),
        ("task={name: causal_lm}", "task.data is missing."),
        ("target.runtime=onnx", "target.runtime names no runtime, got `onnx`; did you mean `onnxr"),
        ("search=gird", "search.name names no searcher, got `gird`; did you mean `grid`?"),
        ("search={name: grid, trials: 3}", "search.trials is not a key of `grid`"),
        (
            "search={name: random, num_trials: 0}",
            "search.num_trials should be greater than or equal",
        ),
        ("objectives=[]", "objectives is missing."),
        ("objectives=[accuracy, accuracy]", "objectives.1 names `accuracy` again."),
        ("objectives=[accuracy, latency]", "objectives.1 names no metric that text_classification"),
        (
            "objectives=[perplexity, size_mb]",
            "objectives.0 names no metric that text_classification",
        ),
        ("objectives=[accuracy, ttft_ms]", "objectives.1 names no metric that text_classification"),
        (
            "objectives=[{name: accuracy, direction: min}]",
            "objectives.0.direction of accuracy is max",
        ),
        ("objectives=[3]", "objectives.0 should be a valid dictionary"),
        ("limits.perplexity.max=3", "limits.perplexity names no metric that text_classification"),
        (
            "limits.size.max=3",
            "limits.size names no metric that text_classification gives, got `size`",
        ),
        ("limits.size_mb=3", "limits.size_mb has to be {min: …}, {max: …} or both, got 3."),
        ("limits.size_mb={maximum: 3}", "limits.size_mb has to be {min: …}, {max: …} or both"),
        ("limits.size_mb={max: small}", "limits.size_mb has to hold numbers"),
        ("limits.size_mb={min: 3, max: 2}", "limits.size_mb has to have min <= max"),
        (
            "limits.accuracy.min=1.5",
            "limits.accuracy can be met by no model: it is between 0 and 1, got {'min': 1.5",
        ),
        ("limits.latency_ms={max: -1}", "limits.latency_ms can be met by no model: it is at least"),
        ("references.first_layers=[0]", "references.first_layers.0 should be greater than 0"),
        (
            "references.first_layer=[2]",
            "references.first_layer is not a key of `references`; did you",
        ),
        ("measure.max_second=2", "measure.max_second is not a key of `measure`; did you mean"),
        ("space=3", "space should be a valid dictionary"),
        ("space.prun=none", "space.prun is not a key of `space`; did you mean `prune`?"),
        ("space.model=a", "space.model is not set here"),
        (
            "space.prune=magnitud",
            "space.prune.method names no pruning method, got `magnitud`; did you",
        ),
        ("space.prune={sparsity: 0.5}", "space.prune.method is missing. Choices: magnitude"),
        ("space.prune={method: magnitude}", "space.prune.sparsity is missing."),
        ("space.prune={method: vocabulary}", "space.prune: give either `vocab_size` or `sparsity`"),
        (
            "space.prune={method: magnitude, sparsty: 0.5, sparsity: 0.5}",
            "space.prune.sparsty is not a key of `magnitude`; did you mean `sparsity`?",
        ),
        (
            "space.prune={method: {choice: [none, threshold]}}",
            "space.prune.method has to be one name: offer alternatives of the whole `prune`",
        ),
        (
            "space.prune.choice.1.sparsity=1.0",
            "space.prune.choice.1.sparsity should be less than 1, got 1.0.",
        ),
        (
            "space.prune.choice.1.sparsity.choice=[0.5, -0.1]",
            "space.prune.choice.1.sparsity.choice.1 should be greater than or equal to 0, got -0.1.",
        ),
        (
            "space.prune.choice.1.sparsity={range: [0.5, 1.0], num: 2}",
            "space.prune.choice.1.sparsity.range.1 should be less than 1, got 1.0.",
        ),
        (
            "space.prune.choice.1.sparsity={range: [0.5, 0.9]}",
            "space.prune.choice.1.sparsity needs `num` (how many points) or `step`",
        ),
        (
            "space.prune.choice.1.sparsity={range: [0.9, 0.5]}",
            "space.prune.choice.1.sparsity: needs low < high, but got low=0.9, high=0.5.",
        ),
        ("space.prune.choice=[]", "space.prune.choice is empty."),
        ("space.prune=[none, [{method: n_n}]]", "space.prune.1.0.method names no pruning method"),
        (
            "space.quantize=W9A9",
            "space.quantize.scheme is served by no runtime: onnxruntime does not",
        ),
        (
            "space.quantize.choice.2.qta=true",
            "space.quantize.choice.2.qta is not a key of `quantize`",
        ),
        (
            "space.quantize={choice: [3]}",
            "space.quantize.choice.0 has to map options of `quantize`",
        ),
        ("space.finetune.learning_rat=1", "space.finetune.learning_rat is not a key of `finetune`"),
        (
            "space.finetune.distillation={alpha: {choice: [0.5, 2.0]}}",
            "space.finetune.distillation.alpha.choice.1 should be less than or equal to 1",
        ),
        (
            "space.finetune.max_steps={choice: [1], when: {quantize.schem: W8A8}}",
            "space.finetune.max_steps.when.quantize.schem names nothing in the space, got",
        ),
        (
            "space.finetune.max_steps={choice: [1], when: {quantize.scheme: W4A16}}",
            "space.finetune.max_steps.when.quantize.scheme asks for what never is, got 'W4A16'.",
        ),
        (
            "space.finetune={max_steps: {choice: [1], when: {finetune.max_steps: 1}}}",
            "space has conditions that wait for each other: finetune.max_steps",
        ),
        (
            "space.forbid=[{prune.methd: none}]",
            "space.forbid.0.prune.methd names nothing in the space",
        ),
        ("space.forbid=3", "space.forbid should be a valid tuple, got 3."),
        (
            "baseline.finetune.max_step=3",
            "baseline.finetune.max_step is not a key of `finetune`; did",
        ),
        (
            "baseline.finetune.weight_decay={range: [0.0, 0.1]}",
            "baseline.finetune.weight_decay needs",
        ),
        (
            "baseline.finetune.max_steps={choice: []}",
            "baseline.finetune.max_steps.choice is empty.",
        ),
        ("baseline.finetune.distillation={}", "baseline.finetune.distillation has no teacher: the"),
        ("baseline=3", "baseline should be a valid dictionary"),
    ],
)
def test_each_mistake_is_told_with_its_key_and_what_is_valid(path, override, told):
    assert any(
        problem.removeprefix("command line: ").startswith(told)
        for problem in problems(path, override)
    ), problems(path, override)


def test_all_mistakes_are_told_at_once(path):
    overrides = [
        "seed",
        "kep=all",
        "task.dat=x",
        "search=gird",
        "objectives.0=acuracy",
        "limits.size_mb=1",
        "space.prune.choice.1.sparsity.choice=[0.5, 2]",
        "space.prune.choice.2.hedas=0.1",
        "space.quantize.choice.1=W9A9",
        "space.finetune.max_steps={range: [3, 1]}",
        "baseline.finetune.foo=1",
    ]
    assert len(problems(path, *overrides)) == len(overrides)


def test_mistakes_of_the_file_name_the_file_and_others_the_command_line(path):
    path.write_text(TEXT.replace("sparsity:", "sparsty:"), encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        load_recipe(path, ["kep=all"])
    told = str(caught.value)
    assert f"{path}: space.prune.choice.1.sparsty is not a key of `magnitude`; did you" in told
    assert "command line: kep is not a key" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: [1\ntask: x", "is not valid YAML: "),
        ("model: [1\ntask: x", "line 2"),
        ("seed: 1\nseed: 2", "`seed` is given twice in line 2"),
        ("just words", "has to be a mapping of keys to values"),
        ("", "has to be a mapping"),
    ],
)
def test_what_is_no_recipe_at_all_is_told_with_its_line(path, text, told):
    path.write_text(text, encoding="utf-8")
    (problem,) = problems(path)
    assert str(path) in problem
    assert told in problem


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(BadInput, match=r"none\.yaml cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_the_users_own_command_may_give_any_metric(path):
    objectives = "objectives=[accuracy, {name: energy_j, direction: min}]"
    recipe = load_recipe(path, [objectives, "target.command=./measure.sh", "limits.heat.max=80"])
    assert recipe.objectives[1].direction == "min"
    assert "energy_j" in problems(path, objectives)[0]
    without = ["objectives=[accuracy, energy_j]", "target.command=./measure.sh"]
    assert problems(path, *without) == ["command line: objectives.1.direction is missing."]


# -- code of one's own ---------------------------------------------------------------------------


class OwnMagnitude(Magnitude):
    strength: float = 1.0


class OwnTask(Frozen):
    kind: ClassVar[Literal["encoder"]] = "encoder"
    quality: ClassVar[str] = "accuracy"
    comparable_vocabulary: ClassVar[bool] = True
    rows: int


METHOD = f"{__name__}:OwnMagnitude"
OWN = {
    "task": {"name": f"{__name__}:OwnTask", "rows": 3},
    "space": {"prune": {"method": METHOD, "sparsity": 0.5, "strength": 2.0}},
    "search": {"name": "orchestrator.search.grid:Grid", "num_trials": 1},
}


@pytest.mark.parametrize("section", OWN)
def test_code_outside_the_catalogs_needs_consent(section):
    with pytest.raises(BadInput, match="allow_code: true"):
        make_recipe(written(**{section: OWN[section]}))
    recipe = make_recipe(written(**{section: OWN[section], "allow_code": True}))
    assert Recipe.from_resolved(recipe.resolved()).hash == recipe.hash


def test_methods_of_ones_own_are_checked_and_resolved_like_others():
    recipe = make_recipe(written(space=OWN["space"], allow_code=True))
    (config,) = recipe.asked()
    assert config is not None
    assert config.prune[0]["method"] == METHOD
    assert config.prune[0]["strength"] == 2.0
    bad = {"prune": {"method": METHOD, "sparsity": 0.5, "strenght": 2.0}}
    with pytest.raises(BadInput, match="did you mean `strength`"):
        make_recipe(written(space=bad, allow_code=True))


@pytest.mark.parametrize("name", ["no_such_module:Name", f"{__name__}:NoSuchName"])
def test_code_that_cannot_be_imported_is_told(name):
    with pytest.raises(BadInput, match="cannot be imported"):
        make_recipe(written(space={"prune": name}, allow_code=True))


# -- what only the data and the model tell -------------------------------------------------------


def facts(features: int) -> dict[str, object]:
    """What a worker would say of a model of one matrix."""
    weight = Weight(name="w", shape=(1000, features), role="linear", layer="layer.0")
    signature = Signature(
        model_type="bert",
        architecture="Bert",
        hidden_size=features,
        weights=(weight,),
        groups=(Group(name="layers", kind="layers", num_units=1),),
    )
    return {"models": {"bert": {"signature": signature.model_dump(mode="json")}}}


def test_a_space_in_which_nothing_can_work_is_refused():
    recipe = make_recipe(written(space={"prune": {"method": "n_m"}}))
    recipe.check_facts(facts(64))
    with pytest.raises(BadInput, match="blocks of 4 do not divide the 63 inputs of w"):
        recipe.check_facts(facts(63))


def test_a_limit_that_no_configuration_can_meet_is_refused():
    def asking(size_mb: float) -> Recipe:
        sections = {"limits": {"size_mb": {"max": size_mb}}, "space": {"quantize": "W8A8"}}
        return make_recipe(written(**sections))

    asking(0.1).check_facts(facts(64))
    with pytest.raises(
        BadInput, match=r"size_mb is \{max: 0.01\}, and what comes nearest has 0.06"
    ):
        asking(0.01).check_facts(facts(64))


def test_a_large_space_is_not_refused_for_how_it_begins(monkeypatch):
    monkeypatch.setattr("orchestrator.recipe.MAX_CHECKED", 3)
    nothing = {"method": "n_m", "m": {"choice": [3, 5, 6, 7]}}
    recipe = make_recipe(written(space={"prune": {"choice": [nothing, "none"]}}))
    recipe.check_facts(facts(64))


# -- the driver's side ---------------------------------------------------------------------------


def test_reading_a_recipe_takes_no_tensor_library(path):
    code = f"""
import sys
from orchestrator.recipe import load_recipe
recipe = load_recipe({str(path)!r})
assert recipe.num_trials() == 12
heavy = {{"torch", "transformers", "onnx", "onnxruntime", "datasets", "ray"}} & set(sys.modules)
assert not heavy, heavy
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
