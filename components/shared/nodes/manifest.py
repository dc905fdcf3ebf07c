"""The TrainJob of a training: the part that is compiled into the pipeline, completed with what is known in the run."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.device import GPUS
from ..running.processes import trains
from ..section import Section
from .exchange import Artifacts
from .state import CONTAINER, RUN_LABEL

TRAINJOB = "MIXTUNE_TRAINJOB"
POD_NAMESPACE = "MIXTUNE_POD_NAMESPACE"
POD_NAME = "MIXTUNE_POD_NAME"
TASK = "mixtune/task"
TITLE = "mixtune/title"
"""Annotations: the hash of everything that the task is given, and its title."""
AT = ("gpus", "gpu_type", "node_selector", "tolerations", "affinity")
"""What a run can change of the placement."""


def variable_of(option: str) -> str:
    """Returns the environment variable through which the launching pod receives an option of the placement."""
    return f"{TRAINJOB}_{option.upper()}"


def runs_on_nodes(step: str, config: Section) -> bool:
    """Tells whether this pod launches a training on several nodes instead of running it."""
    return TRAINJOB in os.environ and "RANK" not in os.environ and trains(step, config)


def task_key(run_id: str, step: str, config: str, inputs: Artifacts, parameters: Mapping[str, Any]) -> str:
    """Identifies a task of a run. All attempts of the task have the same key, and no other task has it."""
    uris = {name: getattr(one, "uri", None) for name, one in inputs.items()}
    given = [run_id, step, config, uris, dict(parameters)]
    return hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()


def trainjob_name(step: str, key: str) -> str:
    """Returns the name of a task's TrainJob. Names of its pods and hosts begin with it, so it must be short."""
    return f"mixtune-{step}-{key[:16]}"


def complete(
    compiled: Mapping[str, Any],
    name: str,
    key: str,
    title: str,
    run_id: str,
    folder: Path,
    owners: list[dict[str, Any]],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Returns the TrainJob of a task.

    Args:
        compiled: the compiled part: `labels` and `spec`.
        folder: the folder of the TrainJob.
        owners: objects with which it is deleted.
        environment: where the placement is read from; that of this process by default.
    """
    spec, given = copy.deepcopy(compiled["spec"]), os.environ if environment is None else environment
    at = {option: given.get(variable_of(option), "") for option in AT}
    gpus = int(at["gpus"] or 0)
    trainer = spec["trainer"]
    trainer["command"] = ["python3", "-m", f"{__package__}.node", str(folder)]
    trainer["numProcPerNode"] = max(1, gpus)
    trainer["env"] = [
        *trainer["env"],
        {"name": GPUS, "value": str(gpus)},
        {"name": "MIXTUNE_RUN_ID", "value": run_id},
    ]
    if gpus:
        trainer["resourcesPerNode"]["limits"][at["gpu_type"]] = str(gpus)
    pod = _pod(spec)
    for field, option in (("nodeSelector", "node_selector"), ("tolerations", "tolerations"), ("affinity", "affinity")):
        if value := json.loads(at[option] or "null"):
            pod[field] = {"nodeAffinity": value} if field == "affinity" else value
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": {**compiled["labels"], RUN_LABEL: run_id},
            "annotations": {TASK: key, TITLE: title},
            "ownerReferences": owners,
        },
        "spec": spec,
    }


def patched(metadata: Mapping[str, Any], pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the patches of the TrainingRuntime that set metadata and fields of the pods."""
    job = {"name": CONTAINER, "template": {"spec": {"template": {"metadata": dict(metadata), "spec": dict(pod)}}}}
    return [{"manager": "mixtune/launcher", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}]


def _pod(spec: Mapping[str, Any]) -> dict[str, Any]:
    (patch,) = spec["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod: dict[str, Any] = job["template"]["spec"]["template"]["spec"]
    return pod
