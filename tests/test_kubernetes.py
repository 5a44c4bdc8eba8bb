"""The manifests for KubeRay: as the schemas say, parts that fit, and commands that this package has."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny_study
import typer
import yaml
from kuberay_schema import check

from orchestrator import __version__
from orchestrator.cli import app
from orchestrator.recipe import load_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "cluster" / "kubernetes"
DOCKERFILE = (REPOSITORY / "cluster" / "Dockerfile").read_text()
Json = dict[str, Any]


def documents() -> list[Json]:
    files = sorted(FOLDER.glob("*.yaml"))
    return [found for file in files for found in yaml.safe_load_all(file.read_text())]


def of_kind(kind: str) -> Json:
    (found,) = (document for document in documents() if document["kind"] == kind)
    return found


def clusters() -> list[Json]:
    return [of_kind("RayCluster")["spec"], of_kind("RayJob")["spec"]["rayClusterSpec"]]


def groups(cluster: Json) -> list[Json]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods() -> Iterator[Json]:
    for cluster in clusters():
        yield from (group["template"]["spec"] for group in groups(cluster))
    yield of_kind("StatefulSet")["spec"]["template"]["spec"]


@pytest.mark.parametrize("document", documents(), ids=lambda document: document["kind"])
def test_every_manifest_is_what_its_schema_says(document: Json):
    check(document)


def test_groups_have_room_for_their_replicas_and_clusters_want_a_token():
    for cluster in clusters():
        assert cluster["authOptions"] == {"mode": "token"}
        for group in cluster["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


HEAD = ("headGroupSpec",)
CONTAINER = (*HEAD, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("workers",), []),
        (("rayVersion",), 2.6),
        (("authOptions", "mode"), "password"),
        (("gcsFaultToleranceOptions",), {"externalStorageNamespace": "mine"}),
        ((*HEAD, "rayStartParams", "num-cpus"), 0),
        ((*HEAD, "replicas"), 1),
        (("workerGroupSpecs", 0, "replicas"), "2"),
        (("workerGroupSpecs", 0, "replicas"), -1),
        (("workerGroupSpecs", 0, "template", "spec"), {}),
        ((*CONTAINER, "volumeMount"), []),
        ((*CONTAINER, "env", 0, "value"), 1),
        ((*CONTAINER, "resources", "limits", "cpu"), [2]),
    ],
)
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_what_kuberay_would_refuse_is_refused_here(
    kind: str, place: tuple[str | int, ...], value: Any
):
    document = of_kind(kind)
    spec = document["spec"]
    found = spec if kind == "RayCluster" else spec["rayClusterSpec"]
    for name in place[:-1]:
        found = found[name]
    found[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def test_pods_fit_together():
    claims = {of_kind("PersistentVolumeClaim")["metadata"]["name"]}
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
        own = {
            claim["metadata"]["name"]
            for claim in of_kind("StatefulSet")["spec"]["volumeClaimTemplates"]
        }
        named = {
            v["persistentVolumeClaim"]["claimName"]
            for v in volumes.values()
            if "persistentVolumeClaim" in v
        }
        assert named <= claims
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        for mount in container["volumeMounts"]:
            assert mount["name"] in volumes or (
                container["name"] == "redis" and mount["name"] in own
            )


def test_heads_run_no_trials_and_both_kinds_of_workers_are_there():
    for cluster in clusters():
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        offers = {
            group["groupName"]: group["template"]["spec"]["containers"][0]["resources"]["limits"]
            for group in cluster["workerGroupSpecs"]
        }
        assert int(offers["gpu"]["nvidia.com/gpu"]) > 0 and "nvidia.com/gpu" not in offers["cpu"]


def test_a_head_that_is_lost_finds_its_cluster_again_in_redis():
    options = of_kind("RayCluster")["spec"]["gcsFaultToleranceOptions"]
    service, redis = of_kind("Service"), of_kind("StatefulSet")["spec"]["template"]
    port = service["spec"]["ports"][0]["port"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{port}"
    assert redis["metadata"]["labels"] == service["spec"]["selector"]
    (environment,) = redis["spec"]["containers"][0]["env"]
    assert environment["valueFrom"] == options["redisPassword"]["valueFrom"]


def test_the_image_is_the_one_that_the_dockerfile_makes():
    images = {p["containers"][0]["image"] for p in pods() if p["containers"][0]["name"] != "redis"}
    assert images == {f"slimtune:{__version__}"}
    assert f"-t slimtune:{__version__} " in DOCKERFILE
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    ours = [pod for pod in pods() if pod["containers"][0]["name"] != "redis"]
    assert {pod["securityContext"]["runAsUser"] for pod in ours} == {int(user)}
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert all(f"ray=={cluster['rayVersion']}" in pins for cluster in clusters())


def test_the_dockerfile_copies_what_is_there_and_installs_with_the_pins():
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert all((REPOSITORY / name).exists() for names in copied for name in names.split())
    (extras,) = re.findall(r'pip install .*-c constraints.txt "\.\[(.+)\]"', DOCKERFILE)
    known = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras.split(",")) <= set(known)


@pytest.mark.parametrize("text", [of_kind("RayJob")["spec"]["entrypoint"]])
def test_the_command_is_one_that_slimtune_takes(text: str, tmp_path: Path):
    name, verb, recipe, *overrides = shlex.split(text)
    assert name == "slimtune" and verb in typer.main.get_command(app).commands
    head = of_kind("RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {m["mountPath"]: m["name"] for m in head["containers"][0]["volumeMounts"]}
    assert mounts[str(Path(recipe).parent)] == "recipe"
    loaded = load_recipe(tiny_study.write_recipe(tmp_path), overrides)
    assert loaded.resources.engine == "ray" and str(loaded.output_dir).startswith("/study/")
