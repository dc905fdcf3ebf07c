"""Determines which API groups a cluster has, and in which version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import urllib3

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

SECONDS = 15
SINGLE_USER_NAMESPACE = "kubeflow"
KUEUE = "kueue.x-k8s.io"
_KUEUE_VERSION = "v1beta1"


def kueue_version(api: ApiClient) -> str:
    """Returns the version of Kueue's API that the server prefers; an old version if the server does not report one."""
    return (group_versions(api) or {}).get(KUEUE, _KUEUE_VERSION)


def group_versions(api: ApiClient) -> dict[str, str] | None:
    """Returns the API groups that the server has, with the version that it prefers; None if it does not report them."""
    from kubernetes import client

    try:
        groups: Any = client.ApisApi(api).get_api_versions(_request_timeout=SECONDS).groups
    except (client.ApiException, urllib3.exceptions.HTTPError, OSError):
        return None
    return {str(one.name): str(one.preferred_version.version) for one in groups}
