"""The part of a TrainJob that is compiled into a task: the task's image, environment, volumes and labels, for each node."""

from __future__ import annotations

from typing import Any

from kfp import dsl

from mixtune.components.shared.nodes.manifest import patched
from mixtune.components.shared.nodes.state import CONTAINER

RUNTIME = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "mixtune"}
"""The TrainingRuntime of k8s/components/trainer."""
NODE_LABEL = {"mixtune/node": "true"}
"""By which a network policy lets the nodes reach each other."""
_SHM = "shm"
# Of the launching pod alone, and what no patch of a TrainingRuntime can set: the pull policy is part of the TrainingRuntime.
_OF_THE_POD = frozenset({"fieldPathAsEnv", "imagePullPolicy"})


def trainjob_of(
    task: dsl.PipelineTask,
    nodes: int,
    limits: dict[str, str],
    shared_memory: str | None,
    queue: dict[str, str],
    deadline_hours: float | None,
) -> dict[str, Any]:
    """Returns labels and specification of the TrainJob that a task launches, as `complete` in `nodes/manifest.py` takes them.

    Args:
        task: the task, with everything set except what depends on GPUs.
        nodes: number of nodes.
        limits: CPU and memory of a node.
        shared_memory: size of /dev/shm; None is no limit.
        queue: label of the queue; empty without one. Kueue manages the TrainJob, not its pods.
        deadline_hours: maximum time.
    """
    container = task.container_spec
    assert container is not None
    settings = dict(task.platform_config["kubernetes"])
    env = [{"name": name, "value": value} for name, value in (container.env or {}).items()]
    env += _env_from(settings.pop("secretAsEnv", []), "secretKeyRef", "secretName", "secretKey")
    env += _env_from(settings.pop("configMapAsEnv", []), "configMapKeyRef", "configMapName", "configMapKey")
    memory = {"medium": "Memory"} | ({"sizeLimit": shared_memory} if shared_memory else {})
    volumes: list[dict[str, Any]] = [{"name": _SHM, "emptyDir": memory}]
    mounts: list[dict[str, Any]] = [{"name": _SHM, "mountPath": "/dev/shm"}]
    for number, claim in enumerate(settings.pop("pvcMount", [])):
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim["constant"]}})
        mounts.append({"name": f"claim-{number}", "mountPath": claim["mountPath"]})
    for number, files in enumerate(settings.pop("configMapAsVolume", [])):
        volumes.append({"name": f"files-{number}", "configMap": {"name": files["configMapName"]}})
        mounts.append({"name": f"files-{number}", "mountPath": files["mountPath"], "readOnly": True})
    inside: dict[str, Any] = {"name": CONTAINER, "volumeMounts": mounts}
    if user := settings.pop("securityContext", None):
        whole_numbers = {key: int(user[key]) for key in ("runAsUser", "runAsGroup") if key in user}
        inside["securityContext"] = {**user, **whole_numbers}
    pod: dict[str, Any] = {"volumes": volumes, "containers": [inside]}
    if secrets := settings.pop("imagePullSecret", None):
        pod["imagePullSecrets"] = [{"name": one["secretName"]} for one in secrets]
    labels: dict[str, str] = settings.pop("podMetadata")["labels"]
    assert settings.keys() <= _OF_THE_POD, f"not known to a TrainJob: {sorted(settings)}"
    spec: dict[str, Any] = {
        "runtimeRef": RUNTIME,
        "trainer": {
            "image": container.image, "numNodes": nodes, "env": env, "resourcesPerNode": {"limits": limits},
        },
        "runtimePatches": patched({"labels": labels | NODE_LABEL}, pod),
    }  # fmt: skip
    if deadline_hours:
        spec["activeDeadlineSeconds"] = round(3600 * deadline_hours)
    return {"labels": labels | queue, "spec": spec}


def _env_from(sources: list[dict[str, Any]], reference: str, name: str, key: str) -> list[dict[str, Any]]:
    return [
        {
            "name": pair["envVar"],
            "valueFrom": {
                reference: {"name": one[name], "key": pair[key], "optional": bool(one.get("optional"))}
            },
        }
        for one in sources
        for pair in one["keyToEnv"]
    ]  # fmt: skip
