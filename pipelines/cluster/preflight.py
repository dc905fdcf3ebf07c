"""Checks what a cluster lacks for a configuration before a run: nodes, secrets, claims, queues, KFP, MLflow, permissions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import urllib3

from mixtune.components.config import Config
from mixtune.components.shared.errors import MixtuneError, UnreachableError, first_line, without_credentials
from mixtune.components.shared.running.context import TRACKING_KEYS

from ..placement import Placer, Profile
from .api import Api, Connection
from .estimate import estimate
from .kubernetes_api import SECONDS, SINGLE_USER_NAMESPACE, condition_of, connect, kueue_version

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        kind: `there`, `missing`, `away` (a server does not answer), `unknown` (access is forbidden), `note`.
        sentence: message for the user.
    """

    kind: Literal["there", "missing", "away", "unknown", "note"]
    sentence: str


def check_cluster(config: Config, connection: Connection | None, why_no_connection: str = "") -> list[Finding]:
    """Checks everything that a run of a configuration needs, and reports all problems at once.

    Args:
        connection: connection to KFP; None if it is not configured.
        why_no_connection: message for the user if there is no connection.

    Raises:
        RefusedError: if the configuration names no profile.
    """
    place = Placer.cluster(config)
    own = (connection.namespace or connection.pod_namespace) if connection else None
    namespace = own or SINGLE_USER_NAMESPACE
    findings = list(_kubernetes(place, namespace))
    findings += [_kfp(connection) if connection else Finding("missing", why_no_connection), _mlflow()]
    return findings + [Finding("note", sentence) for sentence in estimate(config).sentences]


def _kfp(connection: Connection) -> Finding:
    address = without_credentials(connection.host)
    try:
        api = Api(connection)
        health = api.call("say how it is", api.health.healthz_service_get_healthz, seconds=SECONDS)
        if health.multi_user and not api.namespace:
            return Finding("missing", f"--namespace: KFP at {address} is for several users; give your namespace")
        listing = {"namespace": api.namespace} if api.namespace else {}
        list_runs: Any = api.runs.run_service_list_runs
        api.call("list the runs", lambda **named: list_runs(page_size=1, **listing, **named), seconds=SECONDS)
    except MixtuneError as error:
        return Finding("away", error.problems[0])
    return Finding("there", f"KFP answers at {address}, and lets this user in")


def _mlflow() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return Finding(
            "unknown",
            "MLflow was not looked at, since MLFLOW_TRACKING_URI is not set here; without it `mixtune submit --wait` cannot "
            "tell whether the gate was met",
        )
    from mixtune.components.shared.tracking.connection import connect as connect_mlflow

    try:
        connect_mlflow(uri)
    except UnreachableError as error:
        return Finding("away", error.problems[0])
    return Finding("there", f"MLflow answers at {without_credentials(uri)}")


def _kubernetes(place: Placer, namespace: str) -> Iterator[Finding]:
    from kubernetes import client

    try:
        api = connect()
    except UnreachableError as error:
        yield Finding("away", error.problems[0])
        return
    look = _Look(namespace)
    core, custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
    parameters = {name: default for name, (_, default, _) in place.parameters().items()}
    profile = place.profile
    assert profile is not None

    nodes = look("nodes", "list nodes", lambda: core.list_node(_request_timeout=SECONDS).items)
    if isinstance(nodes, Finding):
        yield nodes
        if nodes.kind == "away":
            return  # other requests would fail too
    else:
        yield _fits("tasks without a GPU", nodes, _Wanted.cpu(profile, parameters))
        if place.where.gpus:
            yield _fits("GPU tasks", nodes, _Wanted.gpu(profile, place.where.gpus))

    secrets = {"mlflow_secret": [TRACKING_KEYS[0]], "checkpoint_secret": []}
    for parameter, keys in secrets.items():
        if parameter not in parameters:
            continue
        name = parameters[parameter]
        read = partial(core.read_namespaced_secret, name, namespace, _request_timeout=SECONDS)
        found: Any = look(f"the secret {name}", "get secrets", read)
        if isinstance(found, Finding):
            yield found
            continue
        lacking = [key for key in keys if key not in (found.data or {})]
        if lacking:
            yield Finding("missing", f"the secret {name} in {namespace} has no key {lacking[0]}; add it")
        else:
            yield Finding("there", f"the secret {name} in {namespace}")
    if claim := place.where.checkpoint_claim:
        found = look(
            f"the claim {claim}",
            "get persistentvolumeclaims",
            lambda: core.read_namespaced_persistent_volume_claim(claim, namespace, _request_timeout=SECONDS),
        )
        yield found if isinstance(found, Finding) else _claim(found, claim, namespace)
    if queue := place.where.queue:
        found = look(
            f"the Kueue queue {queue}",
            "get localqueues.kueue.x-k8s.io",
            lambda: custom.get_namespaced_custom_object(
                "kueue.x-k8s.io", kueue_version(api), namespace, "localqueues", queue, _request_timeout=SECONDS
            ),
        )
        yield found if isinstance(found, Finding) else _queue(found, queue, namespace)


def _queue(queue: dict[str, Any], name: str, namespace: str) -> Finding:
    """Checks that Kueue reports a queue as active, which requires an active ClusterQueue."""
    active = condition_of(queue, "Active")
    if active is not None and active.get("status") == "True":
        return Finding("there", f"the Kueue queue {name} in {namespace}")
    said = (active or {}).get("message") or "Kueue has not said that it is active"
    return Finding("missing", f"the Kueue queue {name} in {namespace} takes no pods: {said}; see k8s/overlays/kueue")


def _claim(claim: Any, name: str, namespace: str) -> Finding:
    if claim.status.phase == "Lost":
        return Finding("missing", f"the claim {name} in {namespace} has lost its volume; make it anew")
    if "ReadWriteMany" not in (claim.spec.access_modes or []):
        return Finding(
            "note",
            f"the claim {name} in {namespace} is not ReadWriteMany: candidates that train at the same time must find room on "
            "one node",
        )
    return Finding("there", f"the claim {name} in {namespace}")


class _Look:
    """Reads objects through the Kubernetes API and converts errors to findings."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def __call__(self, what: str, right: str, ask: Callable[[], T]) -> T | Finding:
        from kubernetes.client import ApiException

        try:
            return ask()
        except ApiException as error:
            if error.status == 404:
                return Finding("missing", f"{what} is not there in the namespace {self._namespace}; make it, see k8s/")
            if error.status == 403:
                return Finding("unknown", f"{what} may not be looked at: this user has no right to {right}")
            if error.status == 401:
                return Finding("away", "KUBECONFIG: the cluster turns these credentials away (401); log in again")
            return Finding("away", f"KUBECONFIG: the cluster answers {error.status} when asked to {right}; try again")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            return Finding("away", f"KUBECONFIG: the cluster does not answer ({first_line(error)})")


@dataclass(frozen=True)
class _Wanted:
    """The requirements of a pod for its node."""

    resources: dict[str, str]
    selector: dict[str, str]
    tolerations: list[dict[str, str]]
    affinity: dict[str, Any]
    where: str

    @classmethod
    def gpu(cls, profile: Profile, count: int) -> _Wanted:
        assert profile.accelerator is not None
        resources = {profile.accelerator: str(count), "cpu": profile.gpu_cpu, "memory": profile.gpu_memory}
        return cls(resources, profile.node_selector, profile.tolerations, profile.gpu_affinity, "placement.profile")

    @classmethod
    def cpu(cls, profile: Profile, parameters: dict[str, Any]) -> _Wanted:
        resources = {"cpu": profile.cpu, "memory": profile.memory}
        return cls(resources, {}, [], parameters["cpu_affinity"], "placement.cpu, placement.memory")


def _fits(what: str, nodes: list[Any], wanted: _Wanted) -> Finding:
    """Checks whether an empty node could run the pod. Otherwise reports the reason for the closest nodes."""
    from kubernetes.utils.quantity import parse_quantity

    scaled = "; a pool that is scaled up from zero has none until it is asked for"
    selected = [
        node
        for node in nodes
        if all((node.metadata.labels or {}).get(key) == value for key, value in wanted.selector.items())
        and _affine(node, wanted.affinity)
    ]
    labels = ", ".join(f"{key}={value}" for key, value in wanted.selector.items()) or "what keeps them off GPU nodes"
    if not selected:
        return Finding("missing", f"{what}: no node fits {labels} ({wanted.where}){scaled}")
    open_to = [node for node in selected if not (why := _closed(node, wanted.tolerations)) or not why]
    if not open_to:
        reasons = sorted({_closed(node, wanted.tolerations) for node in selected})
        return Finding(
            "missing", f"{what}: {len(selected)} nodes fit {labels}, but they are closed: {', '.join(reasons)}"
        )
    for name, amount in wanted.resources.items():
        most = max(parse_quantity((node.status.allocatable or {}).get(name, "0")) for node in open_to)
        if most < parse_quantity(amount):
            return Finding(
                "missing",
                f"{what}: they ask for {amount} {name}, but the largest node that they may go to has {_plain(most)}{scaled}",
            )
    large = [
        node
        for node in open_to
        if all(
            parse_quantity((node.status.allocatable or {}).get(name, "0")) >= parse_quantity(amount)
            for name, amount in wanted.resources.items()
        )
    ]
    if not large:
        asked = ", ".join(f"{amount} {name}" for name, amount in wanted.resources.items())
        return Finding("missing", f"{what}: no single node that they may go to has all of {asked}{scaled}")
    return Finding("there", f"{what}: {len(large)} of {len(nodes)} nodes can take one, if they are empty")


def _plain(number: Any) -> str:
    value = float(number)
    return f"{value / 2**30:.1f}Gi" if value >= 2**20 else f"{value:g}"


def _closed(node: Any, tolerations: list[dict[str, str]]) -> str:
    """Returns why a pod with these tolerations cannot run on a node; empty if it can."""
    for condition in node.status.conditions or []:
        if condition.type == "Ready" and condition.status != "True":
            return "not ready"
    for taint in node.spec.taints or []:
        if taint.effect in ("NoSchedule", "NoExecute") and not any(_tolerates(one, taint) for one in tolerations):
            return f"taint {taint.key}{'=' + taint.value if taint.value else ''}:{taint.effect} is not tolerated"
    return "cordoned" if node.spec.unschedulable else ""


def _tolerates(toleration: dict[str, str], taint: Any) -> bool:
    if toleration.get("effect") not in (None, "", taint.effect):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint.key)
    return toleration.get("key") == taint.key and (toleration.get("value") or "") == (taint.value or "")


def _affine(node: Any, affinity: dict[str, Any]) -> bool:
    """Tells whether a node meets a required node affinity."""
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if not required:
        return True
    labels = node.metadata.labels or {}
    return any(
        all(_expression(labels, one) for one in term.get("matchExpressions", []))
        for term in required.get("nodeSelectorTerms", [])
    )


def _expression(labels: dict[str, str], one: dict[str, Any]) -> bool:
    value, values = labels.get(one["key"]), one.get("values") or []
    match one["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and value.isdigit() and int(value) > int(values[0])
        case _:
            return value is not None and value.isdigit() and int(value) < int(values[0])
