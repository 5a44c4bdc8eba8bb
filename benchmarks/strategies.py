"""Whether a trial comes to the same result however its ranks share the training, and what that costs.

    python benchmarks/strategies.py [--quick] [--json FILE]

Every strategy trains an encoder and a decoder, pruned, quantized and distilled in every way, on one
process and on two (gloo on this CPU). Its loss at each of 30 steps is held against a plain loop's in
one process, as are the rows that each rank took and what the served artifact scores. Three controls
break the training on purpose and have to be told apart. A model of 202M parameters shows what a rank
holds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from small_study import REPOSITORY, WORDS

Json = dict[str, Any]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STEPS = 30
TOLERANCE, ROUNDED = 1e-5, 5e-3  # of losses; rounding makes steps out of differences of 1e-7
FIRST = 1e-6  # of the first loss, and of the first gradient as a vector
HALF = {"method": "structured", "heads": 0.5, "neurons": 0.5}
MASK = {"method": "magnitude", "sparsity": 0.5}
COMPRESSIONS: dict[str, Json] = {
    "dense": {},
    "magnitude 50 %": {"prune": [MASK]},
    "heads and neurons 50 %": {"prune": [HALF]},
    "W8A8 QAT": {"quantize": {"scheme": "W8A8", "qat": True}},
    "W4A16 QAT": {"quantize": {"scheme": "W4A16", "qat": True, "group_size": 16}},
    "magnitude, W8A8 QAT, distilled": {
        "prune": [MASK],
        "quantize": {"scheme": "W8A8", "qat": True},
        "finetune": {"distillation": {"alpha": 0.5}},
    },
}
QUICK = ("dense", "magnitude, W8A8 QAT, distilled")
FAMILIES: dict[str, Json] = {
    "bert": {
        "model_type": "bert",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
}
LARGE = FAMILIES["bert"] | {
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
CONTROLS = {
    "masks not put back": ("ddp", "magnitude 50 %"),
    "a world of one twice": ("ddp", "dense"),
    "prepared after it was wrapped": ("fsdp2", "W8A8 QAT"),
}


# -- one rank ------------------------------------------------------------------------------------


def recipe_of(family: str, folder: Path, config: Json) -> Json:
    """Made-up sentences to tell apart, or to go on with."""
    rows = [f"{WORDS[i % 4]} {WORDS[4 + i % 6]} {WORDS[i * 7 % 10]}" for i in range(400)]
    common = {
        "name": "small",
        "output_dir": str(folder),
        "model": {
            "id": family,
            "config": config,
            "tokenizer": {"train": "bpe", "vocab_size": 300},
        },
        "baseline": {
            "finetune": {"learning_rate": 1e-3, "max_steps": 10, "dropout": 0.0, "bf16": False}
        },
        "measure": {"max_seconds": 0.2, "num_inputs": 4, "num_check_inputs": 16},
        "keep": "all",
        "resources": {"engine": "inline"},
    }
    data = folder.parent / f"{family}.txt"
    if family == "llama":
        if not data.exists():
            data.write_text("\n".join(rows))
        task = {"name": "causal_lm", "data": str(data), "block_size": 16}
        target = {"prompt_tokens": 8, "new_tokens": 4}
        return common | {
            "task": task,
            "target": target,
            "objectives": ["perplexity", "size_mb"],
        }
    if not data.with_suffix(".csv").exists():
        labelled = (f"{row},{'ab'[i % 2]}" for i, row in enumerate(rows))
        data.with_suffix(".csv").write_text("text,label\n" + "\n".join(labelled) + "\n")
    task = {"name": "text_classification", "data": str(data.with_suffix(".csv")), "max_length": 32}
    return common | {"task": task, "objectives": ["accuracy", "size_mb"]}


def worker(order: Json) -> None:
    """Do one rank's part of trials; write down what it saw, and rank 0 what came of them."""
    import torch

    from orchestrator.quiet import quiet

    quiet()
    torch.set_num_threads(1)
    from orchestrator.bench import Bench
    from orchestrator.measure.memory import reset_peak
    from orchestrator.recipe import make_recipe
    from orchestrator.resources import GangOptions
    from orchestrator.run_trial import run_baseline, run_trial
    from orchestrator.training import Crew, join_ranks

    rank = int(os.environ.get("RANK", "0"))
    folder, family = Path(order["folder"]), order["family"]
    recipe = make_recipe(recipe_of(family, folder, order["config"]))
    bench = Bench(recipe, folder, device="cpu")
    seen = watch(None if order.get("is_lean") else folder)
    if order["strategy"] != "single":
        break_on_purpose(order.get("control", ""))
        join_ranks("cpu", folder, timeout_s=1800)
        options = GangOptions(
            strategy=order["strategy"], workers_per_trial=int(os.environ["WORLD_SIZE"])
        )
        bench.crew = Crew(lambda model: options)
    if rank > 0:
        bench.crew.follow(bench)
        (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
        return
    if order["strategy"] == "single":
        run_baseline(family, bench, lambda stage: None)
        seen.clear()
    results = {}
    for name in order["compressions"]:
        finetune = {"learning_rate": 2e-3, "max_steps": order["steps"], "logging_steps": 1}
        finetune |= {"per_device_train_batch_size": 16, "bf16": False, "dropout": 0.0}
        finetune |= {"warmup_ratio": 0.0}
        sections = COMPRESSIONS[name]
        sections = sections | {"finetune": finetune | sections.get("finetune", {})}
        reset_peak("cpu")
        result = run_trial(recipe.trial_config(model=family, **sections), bench, lambda stage: None)
        if bench.crew is not None and bench.crew.is_broken:
            print(f"\n{result.message}", flush=True)
            os._exit(1)  # the others wait for it
        results[name] = result.model_dump(mode="json")
    if bench.crew is not None:
        bench.crew.dismiss()
    (folder / "seen-0.json").write_text(json.dumps(seen))
    (folder / "results.json").write_text(json.dumps(results))


def watch(folder: Path | None) -> list[Json]:
    """The rows of every step that this rank takes; each training's first gradient as a file there."""
    from safetensors.torch import save_file

    from orchestrator import finetune, optimizer_state
    from orchestrator.checkpoint import Saver

    seen: list[Json] = []
    deal = finetune.dealt_out

    def dealt_out(*arguments: Any) -> Any:
        micros = deal(*arguments)
        rows = [int(row) for micro in micros if micro.share for row in micro.indices]
        seen.append({"rows": rows})
        return micros

    def save(self: Any, step: int, model: Any, optimizer: Any, progress: Any) -> None:
        state = optimizer_state.gather(model, optimizer)
        gradient = {
            n: value for n, value in state.items() if n.endswith(".exp_avg")
        }  # but a factor
        if gradient:
            seen[-1]["gradient"] = str(folder / f"gradient-{len(seen) - 1}.safetensors")
            save_file(gradient, seen[-1]["gradient"])

    finetune.dealt_out = dealt_out
    Saver.is_due = lambda self, step: step == 1 and folder is not None
    Saver.save = save
    return seen


def break_on_purpose(control: str) -> None:
    """Make one of the mistakes that a comparison has to find."""
    from orchestrator import training
    from orchestrator.ranks import Ranks
    from orchestrator.spread_masks import SpreadMasks
    from orchestrator.strategies.replicated import Replicated

    if control == "masks not put back":
        apply = SpreadMasks._apply
        SpreadMasks._apply = lambda self: None
        SpreadMasks._receive = lambda self, receive=SpreadMasks._receive: (
            receive(self),
            apply(self),
        )
    if control == "a world of one twice":
        wrap = Replicated.wrap

        def alone(self: Any, model: Any, optimizer: Any, plan: Any) -> Any:
            here, Ranks.here = Ranks.here, classmethod(lambda cls: cls())
            places = {name: os.environ.pop(name) for name in ("LOCAL_RANK", "WORLD_SIZE")}
            try:
                return wrap(self, model, optimizer, plan)
            finally:
                Ranks.here = here
                os.environ |= places

        Replicated.wrap = alone
    if control == "prepared after it was wrapped":
        # By torchao, which puts other modules in place; ours keeps those that were wrapped.
        import torch
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        training.prepare = lambda *_, **__: None
        filled = training._filled

        def later(*arguments: Any) -> Any:
            model = filled(*arguments)
            weight = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
            quantize_(model, QATConfig(weight_config=weight, step="prepare"))
            return model

        training._filled = later


# -- all of them ---------------------------------------------------------------------------------


def run(order: Json, size: int, *, dense: Path | None = None) -> tuple[Json, list[list[Json]]]:
    """Results by compression, and what each rank saw; raises RuntimeError with the last words."""
    folder = Path(order["folder"])
    folder.mkdir(parents=True)
    if dense is not None:  # where all start
        shutil.copytree(dense / "baseline", folder / "baseline")
        (folder / "stages").mkdir()
        for stage in dense.glob("stages/dense-*"):
            shutil.copytree(stage, folder / "stages" / stage.name)
    command = [sys.executable, __file__, "--worker", json.dumps(order)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    # What is freed goes back to the system: a peak is what was held, not what malloc kept.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "1000000"} if order.get("is_lean") else {}
    if order["strategy"] == "single":
        processes = [_start(command, environment)]
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
        shared["LOCAL_WORLD_SIZE"] = str(size)
        processes = [
            _start(command, environment | shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(size)
        ]
    with ThreadPoolExecutor(size) as readers:
        reading = [readers.submit(lambda p=process: p.communicate()[0]) for process in processes]
        while (states := [process.poll() for process in processes]).count(None):
            if any(states):  # where one fails, the others wait for it
                for process in processes:
                    process.kill()
            time.sleep(0.1)
        said = [each.result() for each in reading]
    first = next(
        (text for text, state in zip(said, states, strict=True) if state and state > 0), None
    )
    if any(states):
        raise RuntimeError((first or said[0]).strip().rpartition("\n")[2])
    seen = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(size)]
    return json.loads((folder / "results.json").read_text()), seen


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(result: Json) -> list[float]:
    return [loss for _, loss in result["details"]["training"]["losses"]]


def steps_of(seen: list[Json], number: int, steps: int) -> list[Json]:
    """What was seen in the training of the `number`-th compression."""
    return seen[number * steps : (number + 1) * steps]


def compare(
    name: str, number: int, steps: int, result: Json, seen: list[list[Json]], single: Any
) -> Json:
    """One compression under one strategy, beside the same in one process."""
    if result["status"] != "completed":
        return {"failed": result["message"]}
    plain, plain_seen = single
    expected, found = losses(plain[name]), losses(result)
    differences = [abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True)]
    own = [steps_of(each, number, steps) for each in seen]
    reference = steps_of(plain_seen[0], number, steps)
    disjoint = all(
        sorted(row for each in own for row in each[at]["rows"]) == sorted(reference[at]["rows"])
        for at in range(steps)
    )
    gradients = relative_error(reference[0]["gradient"], own[0][0]["gradient"])
    is_rounded = "QAT" in name
    measured, expected_metrics = (each["measurement"] for each in (result, plain[name]))
    tolerance = ROUNDED if is_rounded else TOLERANCE
    return {
        "max_relative_loss_difference": max(differences),
        "tolerance": tolerance,
        "first_loss_difference": differences[0],
        "first_gradient_difference": gradients,
        "loss_first": found[0],
        "loss_last": found[-1],
        "rows_disjoint": disjoint,
        "same_metrics": _within(measured, expected_metrics),
        "seconds_per_step": result["details"]["training"]["step_seconds"],
        "peak_memory_mb": max(
            result["details"].get("peak_memory_mb_by_rank")
            or [result["details"]["peak_training_memory_mb"]]
        ),
        "holds": max(differences) <= tolerance
        and max(differences[0], gradients) <= FIRST
        and disjoint,
    }


def relative_error(expected: str, found: str) -> float:
    """Of all values in a file as one vector, in the Euclidean norm."""
    from safetensors.numpy import load_file

    one, other = load_file(expected), load_file(found)
    assert one.keys() == other.keys()
    squares = sum(float(((one[name] - other[name]) ** 2).sum()) for name in one)
    return float((squares / sum(float((each**2).sum()) for each in one.values())) ** 0.5)


def _within(measured: Json, expected: Json) -> bool:
    """Whether every score lies in the other's interval."""
    scores = expected["intervals"].items()
    return all(
        low <= measured["metrics"][name] <= high
        for name, (low, high) in scores
        if name in measured["metrics"]
        and "latency" not in name
        and "speed" not in name
        and not name.startswith(("ttft", "tpot", "tokens_per"))
    )


def memory(folder: Path, steps: int) -> Json:
    """The peak of a rank that trains a large model, beside that of one process."""
    found: Json = {}
    order = {"family": "bert", "config": LARGE, "compressions": ["dense"], "steps": steps}
    order["is_lean"] = True
    single, _ = run(order | {"strategy": "single", "folder": str(folder / "single")}, 1)
    found["num_params"] = single["dense"]["measurement"]["metrics"]["num_params"]
    found["single_mb"] = single["dense"]["details"]["peak_training_memory_mb"]
    for strategy in ("zero3", "fsdp2"):
        there = order | {"strategy": strategy, "folder": str(folder / strategy)}
        results, _ = run(there, 2, dense=folder / "single")
        peaks = results["dense"]["details"]["peak_memory_mb_by_rank"]
        found |= {f"{strategy}_mb": peaks, f"{strategy}_ratio": max(peaks) / found["single_mb"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one family, two strategies")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(json.loads(asked.worker))
        return
    families = ("bert",) if asked.quick else tuple(FAMILIES)
    strategies = ("ddp", "zero3") if asked.quick else STRATEGIES
    compressions = QUICK if asked.quick else tuple(COMPRESSIONS)
    sizes = (2,) if asked.quick else (1, 2)
    report: Json = {"rows": [], "controls": []}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        singles = {}
        for family in families:
            order = {"family": family, "config": FAMILIES[family], "steps": STEPS}
            order["compressions"] = list(compressions)
            plain = home / family / "single"
            there = order | {"strategy": "single", "folder": str(plain)}
            singles[family] = single = run(there, 1)
            for number, name in enumerate(compressions):
                row = compare(name, number, STEPS, single[0][name], single[1], single)
                add(report, row | named("single", 1, name, family))
            for strategy, size in ((s, n) for s in strategies for n in sizes):
                there = order | {"strategy": strategy}
                there["folder"] = str(home / family / f"{strategy}-{size}")
                results, seen = run(there, size, dense=plain)
                for number, name in enumerate(compressions):
                    row = compare(name, number, STEPS, results[name], seen, single)
                    add(report, row | named(strategy, size, name, family))
        for control, (strategy, name) in () if asked.quick else CONTROLS.items():
            there = {"family": "bert", "config": FAMILIES["bert"], "steps": STEPS}
            there |= {"strategy": strategy, "compressions": [name], "control": control}
            there["folder"] = str(home / "controls" / control)
            report["controls"].append(told_apart(control, there, home / "bert" / "single", singles))
        if not asked.quick:
            report["memory"] = memory(home / "large", 3)
            print(json.dumps(report["memory"]))
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))


def told_apart(control: str, order: Json, dense: Path, singles: Json) -> Json:
    """Whether a mistake shows: an error, or losses that differ."""
    [name] = order["compressions"]
    single = singles["bert"]
    number = list(single[0]).index(name)
    try:
        results, seen = run(order, 2, dense=dense)
    except RuntimeError as error:
        found = {"name": control, "failed": True, "how": str(error)[:200]}
    else:
        alone = ({name: single[0][name]}, [steps_of(single[1][0], number, STEPS)])
        row = compare(name, 0, STEPS, results[name], seen, alone)
        how = row.get("failed") or f"losses differ by {row['max_relative_loss_difference']:.1e}"
        found = {"name": control, "failed": not row.get("holds", False), "how": how}
    print(
        f"control: {control}: {'told apart' if found['failed'] else 'NOT told apart'}, {found['how']}"
    )
    return found


def named(strategy: str, size: int, compression: str, family: str) -> Json:
    return {
        "strategy": strategy,
        "world_size": size,
        "compression": compression,
        "family": family,
    }


def add(report: Json, row: Json) -> None:
    report["rows"].append(row)
    told = row.get("failed") or (
        f"{row['max_relative_loss_difference']:.1e}"
        f" (first {row['first_loss_difference']:.1e}, gradient {row['first_gradient_difference']:.1e})"
        f", loss {row['loss_first']:.3f} to {row['loss_last']:.3f}"
        f", {'same' if row['same_metrics'] else 'OTHER'} scores"
        f", {row['seconds_per_step'] * 1e3:.1f} ms a step, {row['peak_memory_mb']:.0f} MB"
    )
    verdict = "" if row.get("holds") else "  DOES NOT HOLD"
    where = f"{row['family']} {row['strategy']} × {row['world_size']}"
    print(f"{where:16} {row['compression']:32} {told}{verdict}", flush=True)


if __name__ == "__main__":
    main()
