"""KubeRay's published schema as far as clusters/ uses it: fields, types, enumerations, and what must be there.

Written down by hand from the repository ray-project/kuberay: RayCluster from the custom resource definition
helm-chart/kuberay-operator/crds/ray.io_rayclusters.yaml at commit 017710c (it has authOptions, labels and resources of
groups: KubeRay 1.6), RayJob from ray-operator/apis/ray/v1/rayjob_types.go at commit 0057210. Pods are Kubernetes' own:
of their hundreds of fields those stand here that clusters/ uses, each compared with the models of the Python package
kubernetes 37.0.2, which had nothing against the files.
"""

from __future__ import annotations

from typing import Any

STRING, BOOLEAN, ANY = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
INT32 = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
STRINGS = {"type": "object", "additionalProperties": STRING}


def one_of(*words: str) -> dict[str, Any]:
    return {"enum": list(words)}


def thing(*required: str, **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def several(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
CONTAINER = thing(
    "name",
    env=several(thing("name", name=STRING, value=STRING)),
    image=STRING,
    lifecycle=thing(preStop=thing(exec=thing(command=several(STRING)))),
    name=STRING,
    ports=several(thing("containerPort", containerPort=INT32, name=STRING)),
    resources=thing(limits=QUANTITIES, requests=QUANTITIES),
    securityContext=thing(allowPrivilegeEscalation=BOOLEAN, capabilities=thing(drop=several(STRING))),
    volumeMounts=several(thing("mountPath", "name", mountPath=STRING, name=STRING)),
)
POD = thing(
    metadata=thing(labels=STRINGS),
    spec=thing(
        "containers",
        containers=several(CONTAINER),
        securityContext=thing(fsGroup=INT32, runAsNonRoot=BOOLEAN, runAsUser=INT32),
        serviceAccountName=STRING,
        terminationGracePeriodSeconds=INT32,
        volumes=several(thing("name", emptyDir=thing(medium=STRING, sizeLimit=STRING), name=STRING)),
    ),
)
RAY_CLUSTER = thing(
    "headGroupSpec",
    authOptions=thing(enableK8sTokenAuth=BOOLEAN, mode=one_of("disabled", "token")),
    autoscalerOptions=thing(
        env=several(ANY),
        envFrom=several(ANY),
        idleTimeoutSeconds=INT32,
        image=STRING,
        imagePullPolicy=STRING,
        resources=ANY,
        securityContext=ANY,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        version=one_of("v1", "v2"),
        volumeMounts=several(ANY),
    ),
    enableInTreeAutoscaling=BOOLEAN,
    gcsFaultToleranceOptions=ANY,
    headGroupSpec=thing(
        "template",
        enableIngress=BOOLEAN,
        headService=ANY,
        labels=STRINGS,
        rayStartParams=STRINGS,
        resources=STRINGS,
        serviceType=STRING,
        template=POD,
    ),
    headServiceAnnotations=STRINGS,
    managedBy=one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    rayVersion=STRING,
    suspend=BOOLEAN,
    ttlSecondsAfterIdle=INT32 | {"minimum": 0},
    upgradeStrategy=thing(type=one_of("Recreate", "None")),
    workerGroupSpecs=several(
        thing(
            *("groupName", "maxReplicas", "minReplicas", "template"),
            groupName=STRING,
            idleTimeoutSeconds=INT32,
            labels=STRINGS,
            maxReplicas=INT32,
            minReplicas=INT32,
            numOfHosts=INT32,
            rayStartParams=STRINGS,
            replicas=INT32,
            resources=STRINGS,
            scaleStrategy=ANY,
            suspend=BOOLEAN,
            template=POD,
        )
    ),
)
RAY_JOB = thing(
    activeDeadlineSeconds=INT32 | {"minimum": 1},
    backoffLimit=INT32,
    clusterSelector=STRINGS,
    deletionStrategy=ANY,
    entrypoint=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=STRING,
    jobId=STRING,
    managedBy=one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
    metadata=STRINGS,
    rayClusterSpec=RAY_CLUSTER,
    runtimeEnvYAML=STRING,
    shutdownAfterJobFinishes=BOOLEAN,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode"),
    submitterConfig=ANY,
    submitterPodTemplate=POD,
    suspend=BOOLEAN,
    ttlSecondsAfterFinished=INT32,
)
