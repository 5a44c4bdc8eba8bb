"""KubeRay's RayCluster and RayJob as JSON schemas, and everything else as Kubernetes publishes it.

The fields of ray.io/v1 are written down here with types, enumerations and what is required, as
KubeRay's Go types have them; those that not every release from 1.5.1 on has are left out, so that
a manifest which uses one is refused. Pods and other parts of Kubernetes itself are references to
its published OpenAPI definitions, which the package kubernetes-validate carries.
"""

from __future__ import annotations

from typing import Any

import jsonschema
from kubernetes_validate.utils import latest_version, schema_contents, validate
from referencing import Registry, Resource

Json = dict[str, Any]

STRING, BOOLEAN, NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "number"}
INT32 = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
COUNT = INT32 | {"minimum": 0}
STRINGS = {"type": "object", "additionalProperties": STRING}


def choice(*values: str) -> Json:
    return {"enum": list(values)}


def many(each: Json) -> Json:
    return {"type": "array", "items": each}


def fields(*required: str, **properties: Json) -> Json:
    """An object with these fields and no other."""
    assert set(required) <= set(properties)
    closed = {"type": "object", "additionalProperties": False}
    return closed | {"required": list(required), "properties": properties}


def kubernetes(name: str) -> Json:
    """A definition of Kubernetes itself, such as `api.core.v1.PodTemplateSpec`."""
    return {"$ref": f"https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.{name}"}


def core(name: str) -> Json:
    return kubernetes(f"api.core.v1.{name}")


POD_TEMPLATE = core("PodTemplateSpec")
SERVICE_TYPE = choice("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
PULL_POLICY = choice("Always", "IfNotPresent", "Never")
MANAGER = choice("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
CREDENTIAL = fields(value=STRING, valueFrom=core("EnvVarSource"))

AUTOSCALER = fields(
    env=many(core("EnvVar")),
    envFrom=many(core("EnvFromSource")),
    idleTimeoutSeconds=INT32,
    image=STRING,
    imagePullPolicy=PULL_POLICY,
    resources=core("ResourceRequirements"),
    securityContext=core("SecurityContext"),
    upscalingMode=choice("Default", "Aggressive", "Conservative"),
    volumeMounts=many(core("VolumeMount")),
)
HEAD_GROUP = fields(
    "rayStartParams",
    "template",
    enableIngress=BOOLEAN,
    headService=core("Service"),
    rayStartParams=STRINGS,
    serviceType=SERVICE_TYPE,
    template=POD_TEMPLATE,
)
WORKER_GROUP = fields(
    "groupName",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
    groupName=STRING,
    idleTimeoutSeconds=INT32,
    maxReplicas=COUNT,
    minReplicas=COUNT,
    numOfHosts=INT32,
    rayStartParams=STRINGS,
    replicas=COUNT,
    scaleStrategy=fields(workersToDelete=many(STRING)),
    suspend=BOOLEAN,
    template=POD_TEMPLATE,
)
CLUSTER = fields(
    "headGroupSpec",
    authOptions=fields(mode=choice("disabled", "token")),
    autoscalerOptions=AUTOSCALER,
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions=fields(
        "redisAddress",
        externalStorageNamespace=STRING,
        redisAddress=STRING,
        redisPassword=CREDENTIAL,
        redisUsername=CREDENTIAL,
    ),
    headGroupSpec=HEAD_GROUP,
    headServiceAnnotations=STRINGS,
    managedBy=MANAGER,
    rayVersion=STRING,
    suspend=BOOLEAN,
    workerGroupSpecs=many(WORKER_GROUP),
)
JOB = fields(
    activeDeadlineSeconds=INT32 | {"minimum": 1},
    backoffLimit=COUNT,
    clusterSelector=STRINGS,
    entrypoint=STRING,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=STRING,
    jobId=STRING,
    managedBy=MANAGER,
    metadata=STRINGS,
    rayClusterSpec=CLUSTER,
    runtimeEnvYAML=STRING,
    shutdownAfterJobFinishes=BOOLEAN,
    submissionMode=choice("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=fields(backoffLimit=COUNT),
    submitterPodTemplate=POD_TEMPLATE,
    suspend=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB}


def check(document: Json) -> None:
    """Raises `jsonschema.ValidationError` where a manifest is not what its kind says."""
    if document["kind"] not in SPECS:
        validate(document, latest_version(), strict=True)
        return
    schema = fields(
        "apiVersion", "kind", "metadata", "spec",
        apiVersion=choice("ray.io/v1"),
        kind=choice(document["kind"]),
        metadata=kubernetes("apimachinery.pkg.apis.meta.v1.ObjectMeta"),
        spec=SPECS[document["kind"]],
    )  # fmt: skip
    jsonschema.Draft202012Validator(schema, registry=definitions()).validate(document)


def definitions() -> Registry[Json]:
    """Those of the newest Kubernetes that is known; no field beyond them is allowed."""
    version = latest_version()
    name = f"kubernetes-json-schema/v{version}-local-strict/_definitions.json"
    return Resource.from_contents(schema_contents(name, version)) @ Registry()
