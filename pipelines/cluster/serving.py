"""Makes the KServe InferenceService of a registered model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.task_kinds import TASK_KINDS
from mixtune.components.shared.tracking.logged_model import MODEL
from mixtune.components.shared.tracking.registered import RegisteredVersion

from ..placement import CANDIDATE_LABEL, POD_LABELS, STEP_LABEL

STORAGE = re.compile(r"(s3|gs|hdfs|https?|pvc|oci)://.+")
"""Addresses from which KServe fetches a model."""
SERVICE_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
"""KServe makes host names of it, of at most 63 characters, with words and the namespace behind it."""
LINEAGE = ("mixtune.candidate", "mixtune.task_metric", "mixtune.task_score", "mixtune.delta_bpb", "mixtune.kfp_run")
"""Tags of a version that become annotations of its service."""


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        name: name of the service; that of the registered model if None.
        namespace: namespace of the service; that of `kubectl` if None.
        storage_uri: address of the model for KServe; None means that of MLflow's artifact store.
        service_account: service account with the credentials of the object store.
        image: image of the runtime's container; that of the runtime if None.
        cpu: CPUs of the container.
        memory: memory of the container.
        gpus: GPUs of the container.
    """

    name: str | None = None
    namespace: str | None = None
    storage_uri: str | None = None
    service_account: str | None = None
    image: str | None = None
    cpu: str = "2"
    memory: str = "8Gi"
    gpus: int = 0


def inference_service(version: RegisteredVersion, serving: Serving) -> dict[str, Any]:
    """Returns the manifest of a service for a registered version.

    A model that writes text is served by KServe's Hugging Face runtime, a model with a task head by its MLflow runtime, which
    answers as `evaluate` scored it.

    Raises:
        RefusedError: if the name or the address cannot be used; names all problems.
    """
    writes = TASK_KINDS[version.task].head is None
    name, problems = serving.name or version.name, []
    if not SERVICE_NAME.fullmatch(name):
        problems.append(
            f"--name: must be at most 40 lower-case letters, digits and hyphens, and begin with a letter, found {name}"
        )
    location = serving.storage_uri or _location(version, writes)
    if not STORAGE.fullmatch(location):
        files = f"the folder {MODEL} in {version.location}" if writes else version.location
        found = "" if serving.storage_uri is None else f", found {location}"
        problems.append(
            f"--storage-uri: must be an address from which KServe can fetch the model, such as s3://bucket/path{found}; MLflow "
            f"has its files at {files}: copy them, or give the address of MLflow's store itself"
        )
    if problems:
        raise RefusedError(*problems)
    limits = {"cpu": serving.cpu, "memory": serving.memory}
    if serving.gpus:
        limits["nvidia.com/gpu"] = str(serving.gpus)
    model = {
        "modelFormat": {"name": "huggingface" if writes else "mlflow"},
        "protocolVersion": None if writes else "v2",
        "args": [f"--model_name={name}"] if writes else None,
        "storageUri": location,
        "image": serving.image,
        "resources": {"requests": limits, "limits": limits},
    }
    candidate = version.tags.get("mixtune.candidate", "")
    labels = POD_LABELS | {STEP_LABEL: "serving"} | ({CANDIDATE_LABEL: candidate} if candidate else {})
    annotations = {one.replace(".", "/", 1): version.tags[one] for one in LINEAGE if one in version.tags}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": _given(
            name=name,
            namespace=serving.namespace,
            labels=labels,
            annotations={"mixtune/registered-model": version.uri, **annotations},
        ),
        "spec": {"predictor": _given(serviceAccountName=serving.service_account, model=_given(**model))},
    }


def _location(version: RegisteredVersion, writes: bool) -> str:
    location = re.sub(r"^s3[an]://", "s3://", version.location).rstrip("/")
    # The Hugging Face runtime wants the folder with config.json, the MLflow runtime that with MLmodel.
    return f"{location}/{MODEL}" if writes else location


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
