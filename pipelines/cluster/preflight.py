"""Checks before a run whether a cluster has what a configuration needs: nodes, secrets, claims, queues, KFP, MLflow."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import urllib3
from kubernetes.utils.quantity import parse_quantity

from mixtune.components.config import Config
from mixtune.components.shared.errors import MixtuneError, UnreachableError, first_line, without_credentials
from mixtune.components.shared.nodes.connection import condition_of, connect
from mixtune.components.shared.running.context import TRACKING_KEYS

from ..placement import Placer, Profile
from ..trainjob import RUNTIME
from .api import Api, Connection
from .estimate import estimate
from .kubernetes_api import SECONDS, SINGLE_USER_NAMESPACE, group_versions, kueue_version

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        kind: `ok`, `missing`, `unreachable` (a server does not answer), `unknown` (not checked), `note`.
        sentence: message for the user.
    """

    kind: Literal["ok", "missing", "unreachable", "unknown", "note"]
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
        health = api.call("report its health", api.health.healthz_service_get_healthz, seconds=SECONDS)
        if health.multi_user and not api.namespace:
            return Finding("missing", f"--namespace: KFP at {address} runs in multi-user mode; give your namespace")
        listing = {"namespace": api.namespace} if api.namespace else {}
        list_runs: Any = api.runs.run_service_list_runs
        api.call("list the runs", lambda **named: list_runs(page_size=1, **listing, **named), seconds=SECONDS)
    except MixtuneError as error:
        return Finding("unreachable", error.problems[0])
    return Finding("ok", f"KFP at {address} answers and accepts this user")


def _mlflow() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return Finding(
            "unknown",
            "MLflow was not checked, since MLFLOW_TRACKING_URI is not set here; without it `mixtune submit --wait` cannot "
            "tell whether the gate was met",
        )
    from mixtune.components.shared.tracking.connection import connect as connect_mlflow

    try:
        connect_mlflow(uri)
    except UnreachableError as error:
        return Finding("unreachable", error.problems[0])
    return Finding("ok", f"MLflow at {without_credentials(uri)} answers")


def _kubernetes(place: Placer, namespace: str) -> Iterator[Finding]:
    from kubernetes import client

    try:
        api = connect()
    except UnreachableError as error:
        yield Finding("unreachable", error.problems[0])
        return
    look = _Look(namespace)
    core, custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
    profile = place.profile
    assert profile is not None

    nodes = look("nodes", "list nodes", lambda: core.list_node(_request_timeout=SECONDS).items)
    if isinstance(nodes, Finding):
        yield nodes
        if nodes.kind == "unreachable":
            return  # other requests would fail too
    else:
        yield _fits("tasks without a GPU", nodes, _Needs.of_other_task(profile, place.where.cpu_tasks_on_gpu_nodes))
        if place.where.gpus:
            yield _fits("GPU tasks", nodes, _Needs.of_gpu_task(profile, place.where.gpus))
            if profile.gpu_affinity:
                yield Finding(
                    "note", f"the gpu_affinity of the profile {place.where.profile} is not compared with the nodes"
                )

    secrets = {place.where.mlflow_secret: [TRACKING_KEYS[0]]}
    if place.where.checkpoint_url:
        secrets[place.where.checkpoint_secret] = []
    for name, keys in secrets.items():
        read = partial(core.read_namespaced_secret, name, namespace, _request_timeout=SECONDS)
        found: Any = look(f"the secret {name}", "get secrets", read)
        if isinstance(found, Finding):
            yield found
            continue
        lacking = [key for key in keys if key not in (found.data or {})]
        if lacking:
            yield Finding("missing", f"the secret {name} in {namespace} has no key {lacking[0]}; add it")
        else:
            yield Finding("ok", f"the secret {name} in {namespace}")
    for claim in filter(None, [place.where.checkpoint_claim, *place.claims]):
        read = partial(core.read_namespaced_persistent_volume_claim, claim, namespace, _request_timeout=SECONDS)
        found = look(f"the claim {claim}", "get persistentvolumeclaims", read)
        if isinstance(found, Finding):
            yield found
        elif claim in place.claims:
            yield _claim(found, claim, namespace, "ReadOnlyMany", "steps that read data at the same time")
        else:
            yield _claim(found, claim, namespace, "ReadWriteMany", "candidates that train at the same time")
    if queue := place.where.queue:
        found = look(
            f"the Kueue queue {queue}",
            "get localqueues.kueue.x-k8s.io",
            lambda: custom.get_namespaced_custom_object(
                "kueue.x-k8s.io", kueue_version(api), namespace, "localqueues", queue, _request_timeout=SECONDS
            ),
        )
        yield found if isinstance(found, Finding) else _queue(found, queue, namespace)
    if place.where.nodes > 1:
        yield _trainer(api, look, namespace)


def _trainer(api: Any, look: _Look, namespace: str) -> Finding:
    """Checks what trainings on several nodes need."""
    from kubernetes import client

    groups, name = group_versions(api), RUNTIME["name"]
    if groups is not None and RUNTIME["apiGroup"] not in groups:
        return Finding(
            "missing",
            "placement.nodes: Kubeflow Trainer is not installed in this cluster, without which no training runs on several "
            "nodes; install it, see docs/cluster.md, or set placement.nodes to 1",
        )
    found = look(
        f"the TrainingRuntime {name}",
        "get trainingruntimes.trainer.kubeflow.org",
        lambda: client.CustomObjectsApi(api).get_namespaced_custom_object(
            "trainer.kubeflow.org", "v1alpha1", namespace, "trainingruntimes", name, _request_timeout=SECONDS
        ),
    )
    return found if isinstance(found, Finding) else Finding("ok", f"the TrainingRuntime {name} in {namespace}")


def _queue(queue: dict[str, Any], name: str, namespace: str) -> Finding:
    """Checks that Kueue reports a queue as active, which requires an active ClusterQueue."""
    active = condition_of(queue, "Active")
    if active is not None and active.get("status") == "True":
        return Finding("ok", f"the Kueue queue {name} in {namespace}")
    said = (active or {}).get("message") or "Kueue has not reported it as active"
    return Finding("missing", f"the Kueue queue {name} in {namespace} admits no pods: {said}; see k8s/overlays/kueue")


def _claim(claim: Any, name: str, namespace: str, mode: str, users: str) -> Finding:
    if claim.status.phase == "Lost":
        return Finding("missing", f"the claim {name} in {namespace} has lost its volume; create it again")
    if not {mode, "ReadWriteMany"} & set(claim.spec.access_modes or []):
        return Finding("note", f"the claim {name} in {namespace} is not {mode}: {users} must all run on one node")
    return Finding("ok", f"the claim {name} in {namespace}")


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
                return Finding(
                    "missing", f"{what} does not exist in the namespace {self._namespace}; create it, see k8s/"
                )
            if error.status == 403:
                return Finding("unknown", f"{what}: not checked, since this user has no permission to {right}")
            if error.status == 401:
                return Finding("unreachable", "KUBECONFIG: the cluster rejects these credentials (401); log in again")
            return Finding(
                "unreachable", f"KUBECONFIG: the cluster answered {error.status} to the request to {right}; try again"
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            return Finding("unreachable", f"KUBECONFIG: the cluster does not answer ({first_line(error)})")


@dataclass(frozen=True)
class _Needs:
    """What a pod needs of its node.

    Attributes:
        sizes: resources that the pod requests.
        labels: labels that the node must have.
        other_than: labels of the nodes that the pod avoids.
        options: options that decide the above, for messages.
    """

    sizes: dict[str, str]
    labels: dict[str, str]
    tolerations: list[dict[str, str]]
    other_than: dict[str, str]
    options: str

    @classmethod
    def of_gpu_task(cls, profile: Profile, count: int) -> _Needs:
        assert profile.accelerator is not None
        sizes = {profile.accelerator: str(count), "cpu": profile.gpu_cpu, "memory": profile.gpu_memory}
        options = "placement.profile, placement.gpus, placement.gpu_cpu, placement.gpu_memory"
        return cls(sizes, profile.node_selector, profile.tolerations, {}, options)

    @classmethod
    def of_other_task(cls, profile: Profile, on_gpu_nodes: bool) -> _Needs:
        other_than = {} if on_gpu_nodes else profile.node_selector
        sizes = {"cpu": profile.cpu, "memory": profile.memory}
        return cls(sizes, {}, [], other_than, "placement.cpu, placement.memory")


def _fits(what: str, nodes: list[Any], needs: _Needs) -> Finding:
    """Compares the labels, taints and allocatable sizes of each node with one pod. Other pods are not considered."""
    reasons = Counter(_why_not(node, needs) for node in nodes)
    if fit := reasons.pop("", 0):
        return Finding("ok", f"{what}: {fit} of {len(nodes)} nodes fit one, if no other pods run there")
    why = "; ".join(f"{count} of them: {reason}" for reason, count in reasons.items())
    return Finding(
        "missing",
        f"{what}: none of {len(nodes)} nodes fits{f' ({why})' if why else ''}; see {needs.options}. A pool that is scaled "
        "down to zero has no nodes until a pod needs one",
    )


def _why_not(node: Any, needs: _Needs) -> str:
    """Returns why the pod does not fit the node; empty if it fits."""
    labels, sizes = node.metadata.labels or {}, node.status.allocatable or {}
    lacking = [f"{key}={value}" for key, value in needs.labels.items() if labels.get(key) != value]
    if lacking:
        return f"no label {', '.join(lacking)}"
    if needs.other_than and needs.other_than.items() <= labels.items():
        return "a GPU node"
    for taint in node.spec.taints or []:  # Kubernetes taints nodes that are cordoned or not ready, too
        if taint.effect != "PreferNoSchedule" and not any(_tolerates(one, taint) for one in needs.tolerations):
            return f"taint {taint.key}{'=' + taint.value if taint.value else ''}:{taint.effect} is not tolerated"
    for name, amount in needs.sizes.items():
        if parse_quantity(sizes.get(name, "0")) < parse_quantity(amount):
            return f"has {sizes.get(name, '0')} {name}, needs {amount}"
    return ""


def _tolerates(toleration: dict[str, str], taint: Any) -> bool:
    if toleration.get("effect") not in (None, "", taint.effect):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint.key)
    return toleration.get("key") == taint.key and (toleration.get("value") or "") == (taint.value or "")
