"""Whether a recipe can run where it is to run: what each node has, and the one thing to do where it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.node_facts import MARKS, Examiner, remove_marks
from orchestrator.problems import raise_if
from orchestrator.recipe import Recipe
from orchestrator.trial import BadInput

Json = dict[str, Any]
LEAST_DISK_GB, LEAST_SHM_GB = 2.0, 0.1
CLOCK_S = 5.0
SAME = ("slimtune", "torch", "transformers", "ray")  # with others a trial would come out otherwise


@dataclass(frozen=True)
class Finding:
    """Something that is wrong at `where`, and what to do about it; one that is fatal forbids a study."""

    where: str
    what: str
    remedy: str
    is_fatal: bool = True


@dataclass(frozen=True)
class Survey:
    """Facts of the driver and of each node by its name; `silent` nodes have said nothing.

    `sees` tells of each node what it misses of the others' marks, and whom it cannot reach.
    """

    driver: Json
    nodes: Mapping[str, Json]
    sees: Mapping[str, Json]
    silent: tuple[str, ...] = ()


def examine(recipe: Recipe | None, *, address: str | None = None) -> Json:
    """All nodes, the shapes that the recipe needs, model and data. Raises `BadInput` for no cluster."""
    if recipe is not None and address is not None:
        resources = recipe.resources.model_copy(update={"address": address, "engine": "ray"})
        recipe = recipe.model_copy(update={"resources": resources})
    if recipe is None or recipe.resources.engine == "ray":
        from orchestrator.launch.ray_doctor import survey_and_room

        survey, problems = survey_and_room(recipe, address)
    else:
        survey, problems = survey_here(recipe), _unreadable(recipe)
    findings = [*judge(survey), *(Finding("recipe", each, "") for each in problems)]
    return {
        "driver": survey.driver,
        "nodes": [{"name": name, **facts} for name, facts in survey.nodes.items()],
        "findings": [asdict(finding) for finding in findings],
        "can_run": not any(finding.is_fatal for finding in findings),
    }


def raise_if_hopeless(survey: Survey) -> None:
    """Raises `BadInput` with all that is fatal; a node that is silent may just have left."""
    found = [each for each in judge(survey) if each.is_fatal and each.where not in survey.silent]
    raise_if([f"{each.where} {each.what}; {each.remedy}." for each in found])


def survey_here(recipe: Recipe) -> Survey:
    """Of this machine alone."""
    with marks_in(recipe.output_dir, recipe.storage) as folder:
        facts = Examiner().facts(folder, "this machine")
    return Survey(facts, {"this machine": facts}, {})


def _unreadable(recipe: Recipe) -> list[str]:
    """What is wrong with model and data."""
    from orchestrator.facts import facts_of

    try:
        facts_of(recipe)
    except BadInput as error:
        return error.problems
    return []


@contextmanager
def marks_in(folder: str | Path, storage: str | None = None) -> Iterator[str]:
    """Where every node may leave a mark: the study's storage, else its folder. Nothing stays there."""
    if storage is not None:
        try:
            yield storage
        finally:
            with suppress(Exception):  # each node tells why
                remove_marks(storage)
        return
    home = Path(folder).absolute()
    made = [path for path in (home, *home.parents) if not path.exists()]
    try:
        (home / MARKS).mkdir(parents=True, exist_ok=True)
    except OSError:  # each node tells why
        yield str(home)
        return
    try:
        yield str(home)
    finally:
        shutil.rmtree(home / MARKS, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


# -- what is wrong -------------------------------------------------------------------------------


def judge(survey: Survey) -> list[Finding]:
    """What is wrong with any node, as it is beside the driver and the other nodes."""
    found = [
        Finding(name, "does not answer", "see whether Ray still runs there: ray status")
        for name in survey.silent
    ]
    for name, facts in survey.nodes.items():
        found += _versions(name, facts, survey.driver)
        found += _room(name, facts)
        found += _storage(name, facts, survey.sees.get(name, {}))
        found += _network(name, facts, survey.sees.get(name, {}))
    return found


def _versions(name: str, facts: Json, driver: Json) -> Iterator[Finding]:
    mine, theirs = driver["python"].split("."), facts["python"].split(".")
    if mine[:2] != theirs[:2]:
        what = f"has Python {facts['python']}, the driver {driver['python']}"
        yield Finding(name, what, "run both with the same Python, e.g. from one image")
    for package, wanted in driver["packages"].items():
        has = facts["packages"].get(package)
        if _release(has) != _release(wanted):
            what = f"has {package} {has}" if has else f"lacks {package}"
            yield Finding(
                name,
                f"{what}, the driver {wanted}",
                f"pip install {package}=={_release(wanted)} there",
                is_fatal=package in SAME or has is None,
            )


def _release(version: str | None) -> str:
    """Without what tells builds apart: `2.13.0+cu128` trains what `2.13.0+cpu` has planned."""
    return (version or "").partition("+")[0]


def _room(name: str, facts: Json) -> Iterator[Finding]:
    if (facts["disk_free_gb"] or 0.0) < LEAST_DISK_GB:
        what = f"has {facts['disk_free_gb']} GB free for temporary files"
        yield Finding(name, what, "make room there, or point TMPDIR at a larger disk")
    if facts["shm_free_gb"] is not None and facts["shm_free_gb"] < LEAST_SHM_GB:
        what = f"has {facts['shm_free_gb']} GB of shared memory free"
        yield Finding(name, what, "give its container more: docker run --shm-size=2g")


def _storage(name: str, facts: Json, sees: Json) -> Iterator[Finding]:
    what = "the study's storage" if facts["has_uri"] else "the study's folder"
    remedy = (
        "see to the URI, the network, and the credentials in the environment that Ray was started in"
        if facts["has_uri"]
        else "set output_dir to a folder that all nodes share, or storage to a URI that all reach,"
        " such as s3://bucket/study"
    )
    if facts["storage"]:
        yield Finding(name, f"{what} {facts['storage']}", remedy)
    elif sees.get("missing"):
        missing = ", ".join(sees["missing"])
        yield Finding(name, f"does not see what {missing} wrote to {what}", remedy)


def _network(name: str, facts: Json, sees: Json) -> Iterator[Finding]:
    if sees.get("unreachable"):
        what = f"cannot connect to {', '.join(sees['unreachable'])}"
        yield Finding(name, what, "open the ports above 1023 between the nodes")
    late = facts.get("clock_off_s", 0.0)
    if abs(late) > CLOCK_S:
        what = f"its clock is {abs(late):.0f} s {'ahead' if late > 0 else 'behind'}"
        yield Finding(name, what, "synchronise clocks, e.g. with chrony", is_fatal=False)
