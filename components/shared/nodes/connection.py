"""Connects to the Kubernetes API, and reads conditions of objects."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import urllib3

from ..errors import UnreachableError, first_line

if TYPE_CHECKING:
    from kubernetes.client import ApiClient


def connect() -> ApiClient:
    """Creates a client for the cluster in KUBECONFIG, or for the cluster that this runs in.

    Raises:
        UnreachableError: if no cluster is configured.
    """
    from kubernetes import client, config

    settings = client.Configuration()
    settings.retries = urllib3.Retry(0)
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config(client_configuration=settings)
        else:
            # Passed explicitly, since the client reads the variable only once.
            file = os.environ.get("KUBECONFIG") or "~/.kube/config"
            config.load_kube_config(config_file=file, client_configuration=settings)
    except (config.ConfigException, OSError, TypeError) as error:
        raise UnreachableError(f"KUBECONFIG: names no cluster ({first_line(error)}); set it, or run in a pod") from None
    return client.ApiClient(settings)


def condition_of(item: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """Returns a condition from the status of an object."""
    conditions = (item.get("status") or {}).get("conditions") or []
    return next((one for one in conditions if one.get("type") == kind), None)
