"""Who may import whom. Modules are found by walking the package, so a new one is covered too."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "orchestrator"

PLUGINS = (
    "prune",
    "quantize",
    "tasks",
    "runtimes",
    "search",
    "early_stopping",
    "launch",
    "measure",
    "strategies",
)
DRIVER = ("cli", "fetch", "study", "ledger", "search", "early_stopping", "launch", "report")
WORKER = (
    "gang",
    "run_trial",
    "own_loop",
    "rungs",
    "training",
    "strategies",
    "prune",
    "quantize",
    "finetune",
    "tasks",
    "runtimes",
    "measure",
)
PLAIN = ("trial", "signature", "space", "recipe", "pareto", "stages")  # both sides use them
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "torchao", "datasets", "ray")

IMPORT = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps(sorted(sys.modules)))
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def below(names: tuple[str, ...]) -> list[str]:
    """The modules that are, or lie in, one of the package's files or folders `names`."""
    return [
        module for module in MODULES if module.split(".")[1:2] and module.split(".")[1] in names
    ]


@cache
def loaded_by(module: str) -> frozenset[str]:
    """What is in sys.modules once a fresh interpreter has imported `module`."""
    command = [sys.executable, "-c", IMPORT, module]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"importing {module} alone fails:\n{done.stderr}"
    return frozenset(json.loads(done.stdout.splitlines()[-1]))


def imports(path: Path, *, at_run_time: bool = True) -> Iterator[str]:
    """Dotted names of what a file imports, inside functions too, but not for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(id(inner) for part in node.body for inner in ast.walk(part))
    for node in ast.walk(tree):
        if at_run_time and id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def light() -> list[str]:
    """What the driver imports: its own side, plain data, and each plug-in folder's contract."""
    contracts = [f"orchestrator.{name}" for name in PLUGINS if f"orchestrator.{name}" in MODULES]
    driver = [m for m in below(DRIVER + PLAIN) if not MODULES[m].name.startswith("ray_")]
    return sorted({"orchestrator", *contracts, *driver})


@pytest.mark.parametrize("module", light())
def test_the_driver_side_loads_no_tensor_library(module):
    assert sorted(loaded_by(module).intersection(HEAVY)) == []


@pytest.mark.parametrize("module", ["orchestrator.run_trial", "orchestrator.gang"])
def test_the_worker_side_loads_neither_ray_nor_the_driver_side(module):
    if module not in MODULES:
        pytest.skip(f"{module} does not exist")
    # a worker reads the recipe, which checks the searcher's options; it never searches
    driver = {f"orchestrator.{name}" for name in DRIVER} - {"orchestrator.search"}
    assert sorted(loaded_by(module).intersection({"ray", *driver})) == []


@pytest.mark.parametrize("module", below(WORKER))
def test_a_worker_module_names_neither_ray_nor_the_driver_side(module):
    forbidden = {"ray", *(f"orchestrator.{name}" for name in DRIVER)}
    named = {part for name in imports(MODULES[module]) for part in prefixes(name)}
    assert sorted(named.intersection(forbidden)) == []


def test_only_the_ray_launchers_name_ray():
    naming = [
        m
        for m in MODULES
        if "ray" in {n.split(".")[0] for n in imports(MODULES[m], at_run_time=False)}
    ]
    assert [m for m in naming if not m.startswith("orchestrator.launch.ray_")] == []


@pytest.mark.parametrize("folder", ["prune", "tasks", "runtimes", "search"])
def test_plug_ins_do_not_import_each_other(folder):
    plugins = plugins_of(folder)
    assert plugins, f"{folder}/__init__.py has no dict of plug-ins"
    for module in plugins:
        named = {part for name in imports(MODULES[module]) for part in prefixes(name)}
        assert sorted(named.intersection(plugins - {module})) == [], module


def plugins_of(folder: str) -> set[str]:
    """The modules that what stands in the dict of a folder's `__init__` comes from."""
    tree = ast.parse(MODULES[f"orchestrator.{folder}"].read_text(encoding="utf-8"))
    origin = {
        alias.asname or alias.name: str(node.module)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    catalog = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    values = [value for node in catalog if isinstance(node, ast.Dict) for value in node.values]
    names = {name.id for value in values for name in ast.walk(value) if isinstance(name, ast.Name)}
    return {origin[name] for name in names if name in origin}


def prefixes(name: str) -> Iterator[str]:
    """`a.b.c` as a, a.b, a.b.c."""
    parts = name.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))
