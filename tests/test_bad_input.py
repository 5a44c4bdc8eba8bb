"""What a user may get wrong, and what the command says: one message, status 2, before any work.

`python -m pytest tests/test_bad_input.py -q -rA` prints each mistake with its message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_study
import torch
import transformers
from conftest import Ended, Here
from huggingface_hub import constants
from tiny_tokenizers import wordpiece

from orchestrator import base_model_checks, hub
from orchestrator.base_model import load_base
from orchestrator.manifest import read_manifest, write_manifest
from orchestrator.recipe import ModelOptions, make_recipe
from orchestrator.study import Study
from orchestrator.tasks import TASKS
from orchestrator.trial import BadInput

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_GPT2 = "model.config={model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 16}"
CAUSAL = [
    "task={name: causal_lm, data: '{files}/text.txt', block_size: 16}",
    "objectives=[perplexity, size_mb]",
    "target.prompt_tokens=8",
    "target.new_tokens=8",
]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here asks the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reachable = hub.is_reachable
    reachable.cache_clear()
    yield
    reachable.cache_clear()


# -- what the rows of the table speak of ---------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models and folders that something is wrong with."""
    folder = tmp_path_factory.mktemp("files")
    write_data(folder)
    write_models(folder / "models")
    write_studies(folder)
    return folder


def write_data(folder: Path) -> None:
    rows = [f"word{n} text,{'good' if n % 2 else 'bad'}" for n in range(40)]
    contents = {
        "good.csv": ["text,label", *rows],
        "nothing.csv": [],
        "header.csv": ["text,label"],
        "one_class.csv": ["text,label", *(f"word{n},good" for n in range(40))],
        "two_rows.csv": ["text,label", "one,good", "two,bad"],
        "gap.csv": ["text,label", *rows, ",good"],
        "third.csv": ["text,label", "three,fine"],
        "ragged.csv": ["text,label", *rows, "one,two,three"],
        "rows.xlsx": ["text,label", *rows],
        "text.txt": ["the quick brown fox jumps over the lazy dog"] * 60,
        "short.txt": ["the quick brown fox"],
        "not.yaml": ["model: [1", "task: x"],
        "twice.yaml": ["seed: 1", "seed: 2"],
        "words.yaml": ["just words"],
    }
    for name, lines in contents.items():
        (folder / name).write_text("\n".join([*lines, ""]) if lines else "")
    (folder / "bytes.csv").write_bytes(b"text,label\n\xff\xfe,good\n")


def write_models(folder: Path) -> None:
    tokenizer = wordpiece()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        id2label={0: "spam", 1: "ham"},
    )
    model = transformers.BertForSequenceClassification(config)
    names = ["good", "remote", "no_config", "no_weights", "no_tokenizer", "cut", "shapes", "new"]
    for name in names:
        model.save_pretrained(folder / name)
        if name != "no_tokenizer":
            tokenizer.save_pretrained(folder / name)
    (folder / "no_config" / "config.json").unlink()
    (folder / "no_weights" / "model.safetensors").unlink()
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    change(folder / "remote" / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    change(folder / "shapes" / "config.json", hidden_size=32)
    change(folder / "new" / "config.json", model_type="not-yet-invented")
    config.vocab_size = 5
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "few_tokens")
    tokenizer.save_pretrained(folder / "few_tokens")


def write_studies(folder: Path) -> None:
    for name in ("thesis", "damaged", "older", "other"):
        (folder / name).mkdir()
    (folder / "thesis" / "thesis.tex").write_text("years of work")
    (folder / "damaged" / "manifest.json").write_text("{")
    (folder / "older" / "manifest.json").write_text('{"schema": 0}')
    written = tiny_study.recipe(folder)
    written["task"]["max_length"] = 16
    other = make_recipe(written)
    write_manifest(folder / "other", other, {})


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- the table -----------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    # the recipe itself: what the user wrote, and words that the message has
    "no such recipe": (["{files}/none.yaml"], ["none.yaml cannot be read: No such file"]),
    "a folder for a recipe": (
        ["{files}/models"],
        ["is a folder and holds no study; name a recipe"],
    ),
    "bad YAML": (["{files}/not.yaml"], ["not.yaml is not valid YAML", "in line 2"]),
    "a key twice": (["{files}/twice.yaml"], ["`seed` is given twice in line 2"]),
    "no mapping": (["{files}/words.yaml"], ["has to be a mapping of keys to values, got 'just wo"]),
    "unknown key": (["kep=all"], ["kep is not a key of `recipe`; did you mean `keep`?"]),
    "unknown option": (["task.max_lenght=3"], ["task.max_lenght is not a key", "`max_length`?"]),
    "wrong type": (["seed=many"], ["seed should be a valid integer", "got 'many'"]),
    "an override without =": (["seed"], ["command line: seed has no `=`"]),
    "an override of bad YAML": (["seed=["], ["command line: seed=[ expected"]),
    "an override into a value": (["seed=1", "seed.x=1"], ["seed.x=1 goes into `seed`"]),
    "an unknown flag": (["--dri-run"], ["No such option: --dri-run"]),
    "a name that is no folder's": (["name=a/b"], ["name should match pattern", "got 'a/b'"]),
    # data
    "missing data": (["task.data={files}/none.csv"], ["task.data: there is no file or folder"]),
    "missing split": (
        ["task.data={files}", "task.train=good.csv", "task.test=dev.csv"],
        ["task.test: there is no file", "good.csv"],
    ),
    "no split named": (["task.data={files}"], ["task.train must name a file of"]),
    "missing column": (["task.text_column=txt"], ["`txt` is not a column", "mean `text`?"]),
    "a file of no bytes": (["task.data={files}/nothing.csv"], ["nothing.csv has no rows"]),
    "a header alone": (["task.data={files}/header.csv"], ["header.csv has no rows"]),
    "one class": (["task.data={files}/one_class.csv"], ["the one class `good`", "at least two"]),
    "too few rows": (["task.data={files}/two_rows.csv"], ["too few rows (2) to cut off a test"]),
    "swapped columns": (
        ["task.text_column=label", "task.label_column=text"],
        ["task.label_column: `text` has 240 distinct values in the 240 rows", "holds no classes"],
    ),
    "columns of a file with a header": (
        ["task.columns=[text, label]"],
        ["task.columns: the first row", "names its columns; leave them out"],
    ),
    "an empty cell": (["task.data={files}/gap.csv"], ["1 of 41 rows have nothing", "`text`"]),
    "rows of different lengths": (["task.data={files}/ragged.csv"], ["do not have its 2 columns"]),
    "no text": (["task.data={files}/bytes.csv"], ["bytes.csv is not UTF-8 text"]),
    "an unknown kind of file": (["task.data={files}/rows.xlsx"], ["is of no known kind"]),
    "data nowhere on the hub": (
        ["task.data=owner/nothing", "task.train=train"],
        ["owner/nothing (train) is no file or folder here, and the hub cannot be reached"],
    ),
    "train is test": (
        ["task.data={files}", "task.train=good.csv", "task.test=good.csv"],
        ["task.train and task.test are the same data"],
    ),
    "a label without a name": (
        ["task.label_map={positive: good}"],
        ["task.label_map has no name for the label `negative`"],
    ),
    "a label that train has not": (
        ["task.data={files}", "task.train=good.csv", "task.test=third.csv"],
        ["test has the label `fine` in 1 of 1 rows, which train does not have"],
    ),
    "too few class weights": (["task.class_weights=[1.0]"], ["1 weights for 2 classes"]),
    "too little text": (
        [*CAUSAL, TINY_GPT2, "task.data={files}/short.txt"],
        ["tokens, fewer than a block of 16"],
    ),
    # the base model
    "no such folder": (["model={name: /no/such/model}"], ["model.name: there is no folder /no/s"]),
    "a model nowhere on the hub": (
        ["model={name: owner/nothing}"],
        ["owner/nothing is no folder here", "the model hub cannot be reached"],
    ),
    "a model with code of its own": (
        ["model={name: '{files}/models/remote'}"],
        ["needs code of its own to run", "model.trust_remote_code: true"],
    ),
    "no config.json": (["model={name: '{files}/models/no_config'}"], ["has no config.json"]),
    "no weights": (["model={name: '{files}/models/no_weights'}"], ["no file named model.safe"]),
    "weights cut short": (["model={name: '{files}/models/cut'}"], ["cut cannot be used: "]),
    "weights of other shapes": (
        ["model={name: '{files}/models/shapes'}"],
        ["has weights of other shapes for", "it is no checkpoint of such a model"],
    ),
    "no tokenizer": (["model={name: '{files}/models/no_tokenizer'}"], ["has no tokenizer; name"]),
    "another model's tokenizer": (
        ["model={name: '{files}/models/few_tokens'}"],
        ["tokens, but the model has embeddings for 5"],
    ),
    "a model too new": (["model={name: '{files}/models/new'}"], ["not-yet-invented"]),
    "another model's labels": (
        ["model={name: '{files}/models/good', finetuned: true}"],
        ["was fine-tuned for the labels spam, ham, but the data have negative, positive"],
    ),
    "an unknown architecture": (
        ["model.config.model_type=brt"],
        ["model.config.model_type names no architecture, got `brt`; did you mean `bert`?"],
    ),
    "a slip in a config": (
        ["model.config.hiden_size=16"],
        ["model.config.hiden_size is not an option of bert; did you mean `hidden_size`?"],
    ),
    "a config that contradicts itself": (
        ["model.config.num_attention_heads=5"],
        ["model.config cannot be used: The hidden size (32) is not a multiple"],
    ),
    "a config of wrong types": (
        ["model.config.hidden_size=big"],
        ["model.config cannot be used: Validation error for field 'hidden_size'", "expected int"],
    ),
    "an encoder for running text": (
        CAUSAL,
        ["model.config sees the tokens that causal_lm asks it to predict: it is an encoder"],
    ),
    "an encoder-decoder for classes": (
        ["model.config={model_type: t5, d_model: 16, d_kv: 4, num_heads: 2, num_layers: 1}"],
        ["model.config is an encoder-decoder, which text_classification cannot use"],
    ),
    "an image model": (
        ["model.config={model_type: vit}"],
        ["transformers has no AutoModelForSequenceClassification of its type"],
    ),
    "blocks longer than the positions": (
        [*CAUSAL, TINY_GPT2, "task.block_size=32"],
        ["has 16 positions, but task.block_size is 32"],
    ),
    # the space
    "sparsity 1": (
        ["space.prune.choice.1.heads=1.0"],
        ["space.prune.choice.1.heads should be less than 1, got 1.0"],
    ),
    "negative sparsity": (
        ["space.prune.choice.1={method: magnitude, sparsity: -0.1}"],
        ["sparsity should be greater than or equal to 0, got -0.1"],
    ),
    "a scheme that no runtime serves": (
        ["space.quantize=W9A9"],
        ["space.quantize.scheme is served by no runtime: onnxruntime does not"],
    ),
    "a scheme that this runtime does not serve": (
        ["space.quantize=bf16"],
        ["none of its configurations can work", "onnxruntime does not serve bf16"],
    ),
    "groups of no kernel": (
        ["space.quantize={scheme: W4A16, group_size: 24}"],
        ["group_size must be a power of two", "got 24"],
    ),
    "groups that do not divide": (
        ["space.quantize={scheme: W4A16, group_size: 64}"],
        ["group size 64 does not divide the 32 inputs of"],
    ),
    "2:4 that does not divide": (
        ["space={prune: n_m}", "model.config.intermediate_size=62"],
        ["blocks of 4 do not divide the 62 inputs of"],
    ),
    "QAT without training": (
        ["space={quantize: {scheme: W8A8, qat: true}, finetune: {max_steps: 0}}"],
        ["QAT needs optimizer steps, but the budget is 0"],
    ),
    "all is forbidden": (
        ["space={forbid: [{prune.method: none}]}"],
        ["space: none of its configurations can work: it is empty"],
    ),
    "a limit on an unknown metric": (["limits.size.max=3"], ["limits.size names no metric"]),
    "a limit out of reach": (
        ["limits.size_mb.max=0.0001"],
        ["limits.size_mb is {max: 0.0001}, and what comes nearest has"],
    ),
    "a limit that nothing meets": (
        ["limits.accuracy.min=1.5"],
        ["limits.accuracy can be met by no model: it is between 0 and 1"],
    ),
    # where the study goes
    "a study below a file": (
        ["output_dir={files}/good.csv/study"],
        ["good.csv/study cannot be written: ", "good.csv is a file"],
    ),
    "a study in place of a file": (["output_dir={files}/good.csv"], ["good.csv is a file"]),
    "a study among other things": (
        ["output_dir={files}/thesis"],
        ["thesis holds thesis.tex and no study; choose an empty or new folder"],
    ),
    "another study": (
        ["output_dir={files}/other"],
        ["holds a study with another `task.max_length`: 16 there, 32 here"],
    ),
    "a damaged study": (["output_dir={files}/damaged"], ["manifest.json is damaged"]),
    "an older study": (["output_dir={files}/older"], ["was written by another version"]),
    # gangs
    "one strategy for one worker": (
        ["resources={workers_per_trial: 2, strategy: single}"],
        ["resources", "`strategy: single` is for one worker, not for 2"],
    ),
    "several workers in one process": (
        ["resources={engine: inline, workers_per_trial: 2}"],
        ["`engine: inline` trains in one process: several workers need `engine: ray`"],
    ),
    "gangs for a model that is not there": (
        ["resources={per_model: {gpt: {workers_per_trial: 2}}}"],
        ["resources.per_model.gpt names no model of this recipe, which has bert"],
    ),
    "a DeepSpeed file of another batch": (
        ["resources={strategy: zero2, deepspeed: {train_batch_size: 7}}"],
        ["resources.deepspeed has train_batch_size 7, but the recipe trains with 32"],
    ),
    "a DeepSpeed file that is not there": (
        ["resources={strategy: zero2, deepspeed: absent.json}"],
        ["cannot read absent.json: No such file or directory"],
    ),
    # the machine
    "no threads": (["target.threads=0"], ["target.threads should be greater than or equal to 1"]),
    "an unknown device": (["target.device=tpu"], ["target.device should match pattern", "'tpu'"]),
}

NO_GPU = {
    "a target host where nodes have no labels": (
        ["target.host={role: serves}"],
        ["target.host needs `resources.engine: ray`"],
    ),
    "a target without its GPU": (["target.device=cuda"], ["target.device is cuda, but"]),
    "training without a GPU": (["--device", "cuda"], ["torch cannot use cuda here"]),
}


def ask(slimtune: Here, files: Path, folder: Path, wrote: list[str]) -> Ended:
    """What `run` says to a recipe, or to the tiny one with these overrides."""
    arguments = [text.replace("{files}", str(files)) for text in wrote]
    if not arguments[0].startswith(str(files)):
        arguments.insert(0, str(tiny_study.write_recipe(folder)))
    return slimtune("run", *arguments)


def everything_below(*folders: Path) -> list[tuple[str, int]]:
    paths = (path for folder in folders for path in folder.rglob("*"))
    return sorted((str(path), path.stat().st_mtime_ns) for path in paths)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_and_nothing_is_started(
    mistake: str, files: Path, tmp_path: Path, slimtune: Here
) -> None:
    wrote, words = MISTAKES[mistake]
    tiny_study.write_recipe(tmp_path)
    before = everything_below(tmp_path, files)
    told = ask(slimtune, files, tmp_path, wrote)
    print(told.err)
    assert told.status == 2, told
    assert told.out == "" and "Traceback" not in told.err
    for word in words:
        assert any(word in p for p in told.problems), told.err
    assert [path for path, _ in everything_below(tmp_path, files)] == [path for path, _ in before]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("mistake", NO_GPU)
def test_a_device_that_is_not_there_is_told(
    mistake: str, files: Path, tmp_path: Path, slimtune: Here
) -> None:
    wrote, words = NO_GPU[mistake]
    told = ask(slimtune, files, tmp_path, wrote)
    print(told.err)
    assert told.status == 2 and words[0] in told.problems[0], told
    assert not (tmp_path / "study").exists()


# -- all at once ---------------------------------------------------------------------------------


def test_every_problem_of_a_recipe_is_told_at_once(
    files: Path, tmp_path: Path, slimtune: Here
) -> None:
    wrote = ["kep=all", "seed=many", "task.dat=x", "limits.size.max=1", "space.quantize=W9A9"]
    told = ask(slimtune, files, tmp_path, wrote)
    assert told.status == 2 and len(told.problems) == len(wrote)
    assert told.err.endswith("5 problems; nothing was started.\n")


def test_problems_of_data_and_models_are_told_together(
    files: Path, tmp_path: Path, slimtune: Here
) -> None:
    wrote = [
        "model=[{name: /no/such/model}, {name: '{files}/models/no_config'}]",
        "task.data={files}/header.csv",
    ]
    told = ask(slimtune, files, tmp_path, wrote)
    print(told.err)
    assert told.status == 2 and len(told.problems) == 3, told.err


def test_problems_of_several_models_are_told_together(
    files: Path, tmp_path: Path, slimtune: Here
) -> None:
    wrote = ["model=[{name: '{files}/models/cut'}, {name: '{files}/models/shapes'}]"]
    told = ask(slimtune, files, tmp_path, wrote)
    print(told.err)
    assert told.status == 2 and len(told.problems) == 2, told.err


@pytest.mark.slow
def test_planning_finds_the_same_problems_without_torch_in_the_process(
    files: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from orchestrator import cli\n"
        "try: cli.main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    path = tiny_study.write_recipe(tmp_path)
    wrote = ["plan", path, f"task.data={files}/header.csv", "model={name: /no/such/model}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, wrote)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "SLIMTUNE_CACHE": str(tmp_path / "c")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "header.csv has no rows" in done.stderr and "there is no folder" in done.stderr
    assert "Traceback" not in done.stderr


# -- what is no mistake --------------------------------------------------------------------------


def test_a_model_tuned_for_other_labels_gets_a_new_head(files: Path) -> None:
    task = TASKS["text_classification"](data="unused")
    options = ModelOptions(name=str(files / "models" / "good"))
    labels = ["bad", "fine", "good"]
    base = load_base(options, task, texts=iter(()), labels=labels, seed=0)
    assert base.model.classifier.out_features == 3
    saved = transformers.AutoModel.from_pretrained(options.name).state_dict()
    for name, value in base.model.bert.state_dict().items():
        assert torch.equal(value, saved[name]), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_saved_decoder_with_tied_embeddings_is_whole(family: str, tmp_path: Path) -> None:
    from tiny_models import make

    make(family, tie_word_embeddings=True, vocab_size=400).save_pretrained(tmp_path)
    wordpiece().save_pretrained(tmp_path)
    task = TASKS["causal_lm"](data="unused", block_size=16)
    options = ModelOptions(name=str(tmp_path))
    assert (
        load_base(options, task, texts=iter(()), labels=[], seed=0).model.config.vocab_size == 400
    )


def test_options_that_a_config_takes_and_does_not_list_pass() -> None:
    base_model_checks.check_config_keys({"model_type": "llama", "rope_theta": 5e5, "num_labels": 3})


def test_a_study_is_the_same_one_wherever_it_lies(tmp_path: Path) -> None:
    recipe = make_recipe(tiny_study.recipe(tmp_path))
    moved = make_recipe(
        tiny_study.recipe(tmp_path, output_dir=str(tmp_path / "moved"), keep="front")
    )
    assert recipe.identity() == moved.identity()
    assert read_manifest(tmp_path / "none") is None


# -- the hub -------------------------------------------------------------------------------------


def test_a_hub_that_does_not_answer_is_asked_once_and_briefly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    import huggingface_hub

    asked = []

    class Silent:
        def head(self, address: str, *, timeout: float) -> None:
            asked.append(timeout)
            raise ConnectionError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Silent)
    started = time.perf_counter()
    options = ModelOptions(name="owner/nothing")
    for _ in range(2):
        with pytest.raises(BadInput, match="the model hub cannot be reached"):
            load_base(options, TASKS["causal_lm"](data="unused"), texts=iter(()), labels=[], seed=0)
    assert asked == [hub.PATIENCE_S] and constants.HF_HUB_OFFLINE
    assert time.perf_counter() - started < 30  # left alone, its library tries for longer


def test_what_the_hub_says_of_a_model_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    with (
        pytest.raises(
            BadInput, match=r"^x/y cannot be used: x/y is not a valid model identifier\.$"
        ),
        base_model_checks.refusals("x/y", "x/y"),
    ):
        raise OSError("x/y is not a valid model identifier.\nIf this is a private repository, …")


# -- an output folder that cannot be written -----------------------------------------------------


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    recipe = make_recipe(tiny_study.recipe(tmp_path, output_dir=str(tmp_path / "locked" / "study")))
    with pytest.raises(BadInput, match="Permission denied"):
        Study(recipe).run()
