"""The fields of KubeRay that the cluster files use, as its API reference documents them.

Strict on purpose: a field that is not in here is a mistake or must be looked up and added.
"""

VERSION = "1.6.2"

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}


def record(required, **properties):
    """Schema of an object with these properties and no other."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": properties,
    }


def array(items):
    return {"type": "array", "minItems": 1, "items": items}


TEXT = {"type": "string", "minLength": 1}
CONTAINER = record(
    ["name", "image", "resources"],
    name=TEXT,
    image=TEXT,
    envFrom=array(
        record(["secretRef"], secretRef=record(["name"], name=TEXT, optional={"type": "boolean"}))
    ),
    lifecycle=record(
        ["preStop"],
        preStop=record(["exec"], exec=record(["command"], command=array(TEXT))),
    ),
    ports=array(record(["containerPort"], containerPort=COUNT, name=TEXT)),
    resources=record(["requests", "limits"], requests=STRINGS, limits=STRINGS),
    volumeMounts=array(record(["name", "mountPath"], name=TEXT, mountPath=TEXT)),
)
VOLUME = record(
    ["name", "persistentVolumeClaim"],
    name=TEXT,
    persistentVolumeClaim=record(["claimName"], claimName=TEXT),
)
TOLERATION = record(
    ["key", "operator", "effect"],
    key=TEXT,
    operator={"enum": ["Exists", "Equal"]},
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
TEMPLATE = record(
    ["spec"],
    spec=record(
        ["containers"],
        restartPolicy={"const": "Never"},  # what autoscaler v2 asks
        securityContext=record(
            ["fsGroup"], fsGroup=COUNT, fsGroupChangePolicy={"enum": ["OnRootMismatch", "Always"]}
        ),
        terminationGracePeriodSeconds=COUNT,
        nodeSelector=STRINGS,
        tolerations=array(TOLERATION),
        containers=array(CONTAINER),
        volumes=array(VOLUME),
    ),
)
# `resources` and the same in `rayStartParams` exclude each other: the latter stay empty here.
GROUP = {
    "resources": STRINGS,
    "labels": STRINGS,
    "rayStartParams": {"type": "object", "maxProperties": 0},
    "template": TEMPLATE,
}
CLUSTER_SPEC = record(
    ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=record(["mode"], mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=record(
        [],
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=COUNT,
    ),
    headGroupSpec=record(["template"], **GROUP),
    workerGroupSpecs=array(
        record(
            ["groupName", "minReplicas", "maxReplicas", "template"],
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            idleTimeoutSeconds=COUNT,
            **GROUP,
        )
    ),
)
METADATA = record(["name"], name={"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$"})
API = {"const": "ray.io/v1"}
RAY_CLUSTER = record(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion=API,
    kind={"const": "RayCluster"},
    metadata=METADATA,
    spec=CLUSTER_SPEC,
)
RAY_JOB = record(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion=API,
    kind={"const": "RayJob"},
    metadata=METADATA,
    spec=record(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=TEXT,
        backoffLimit=COUNT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=CLUSTER_SPEC,
    ),
)
