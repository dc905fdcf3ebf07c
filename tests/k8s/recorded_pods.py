"""The pods of recorded runs: KFP's task details hold ids only, from which the names of Argo's nodes are found again.

Argo numbers a node, and its pod, with the 32-bit FNV-1a hash of the node's name. A name that is put together from the recorded
display names is the real one if its hash is a recorded id.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

RECORDINGS = Path(__file__).parents[1] / "recordings"
NODE_NAME = "workflows.argoproj.io/node-name"
RUN_ID = "pipeline/runid"
# What has a pod: an attempt of a task's container, of a driver, of an importer.
_POD = re.compile(r"(executor|-driver|importer(-\d+)?)\(\d+\)$")


def node_id(workflow: str, name: str) -> str:
    """Returns the id that Argo gives a node, which is also what its pod's name ends with."""
    number = 0x811C9DC5
    for byte in name.encode():
        number = (number ^ byte) * 0x01000193 % 2**32
    return f"{workflow}-{number}"


def recorded() -> list[dict[str, Any]]:
    """Returns the pods that were recorded as such."""
    pods: list[dict[str, Any]] = json.loads((RECORDINGS / "pods.json").read_text())
    return pods


@cache
def node_names(recording: str) -> tuple[str, ...]:
    """Returns the names of the nodes of a recorded run."""
    run = json.loads((RECORDINGS / f"{recording}.json").read_text())
    tasks = [task for task in run["run_details"]["task_details"] if "display_name" in task]
    ids = {child["pod_name"] for task in tasks for child in task.get("child_tasks", [])}
    parts = {task["display_name"] for task in tasks}
    (workflow,) = {identifier.rsplit("-", 1)[0] for identifier in ids}
    names, new = set[str](), {workflow}
    while new:
        names |= new
        longer = {f"{name}({attempt})" for name in new for attempt in range(3)}
        longer |= {f"{name}.{part}" for name in new for part in parts}
        new = {name for name in longer if node_id(workflow, name) in ids} - names
    return tuple(sorted(names))


def pods_of(recording: str) -> list[dict[str, Any]]:
    """Returns the pods that a recorded run had, with the labels and annotations of recorded pods."""
    run = json.loads((RECORDINGS / f"{recording}.json").read_text())
    return [pod(run["run_id"], name) for name in node_names(recording) if _POD.search(name)]


def pod(run_id: str, name: str) -> dict[str, Any]:
    """Returns a pod of a node."""
    workflow = re.split(r"[(.]", name)[0]
    number = node_id(workflow, name).removeprefix(f"{workflow}-")
    kind = "system-container-impl" if ".executor(" in name else "system-container-driver"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{workflow}-{kind}-{number}",
            "namespace": "kubeflow",
            "labels": {RUN_ID: run_id, "workflows.argoproj.io/workflow": workflow},
            "annotations": {NODE_NAME: name},
        },
    }
