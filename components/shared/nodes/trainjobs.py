"""TrainJobs of Kubeflow Trainer v2: the requests to the Kubernetes API, repeated until the cluster answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import tenacity
import urllib3

from ..errors import RefusedError, UnreachableError, first_line
from .connection import connect
from .state import CONTAINER, RUN_LABEL, Pod

JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
_VERSION = "v1alpha1"
_TIMEOUT = (5.0, 30.0)
_NOT_FOUND, _CONFLICT = HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT
# 401: a token is renewed while it is used. 429 and the others: the API server or a webhook is overloaded or restarts.
_TRANSIENT = frozenset({401, 408, 429, 500, 502, 503, 504})
_INSTALL = "apply k8s/components/trainer, see docs/cluster.md"
T = TypeVar("T")


@dataclass(frozen=True)
class Pace:
    """Times in seconds.

    Attributes:
        look: between two looks at a job.
        first: before a request is repeated; doubles up to `longest`.
        patience: for an API that does not answer.
        settle: until what other nodes wrote is visible here; network file systems cache attributes for up to a minute.
    """

    look: float = 10.0
    first: float = 1.0
    longest: float = 60.0
    patience: float = 900.0
    settle: float = 120.0


class TrainJobs:
    """The TrainJobs of a namespace.

    Args:
        namespace: the namespace.
        say: shows a line.
        pace: how often requests are repeated.
    """

    def __init__(self, namespace: str, say: Callable[[str], None], pace: Pace) -> None:
        from kubernetes import client

        self.namespace = namespace
        self._say, self._pace = say, pace
        api = connect()
        self._custom, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    def create(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """Creates a TrainJob and returns it as it is stored; None if there is one of its name.

        Raises:
            RefusedError: if the cluster does not accept it.
        """
        return self._ask(
            "create trainjobs.trainer.kubeflow.org",
            lambda **options: self._custom.create_namespaced_custom_object(
                "trainer.kubeflow.org", _VERSION, self.namespace, "trainjobs", job, **options
            ),
            unless=_CONFLICT,
        )

    def find(self, name: str) -> dict[str, Any] | None:
        """Returns a TrainJob; None if there is none."""
        return self._ask(
            "get trainjobs.trainer.kubeflow.org",
            lambda **options: self._custom.get_namespaced_custom_object(
                "trainer.kubeflow.org", _VERSION, self.namespace, "trainjobs", name, **options
            ),
            unless=_NOT_FOUND,
        )

    def of_run(self, run_id: str) -> list[str]:
        """Returns the names of the TrainJobs of a run."""
        found = self._ask(
            "list trainjobs.trainer.kubeflow.org",
            lambda **options: self._custom.list_namespaced_custom_object(
                "trainer.kubeflow.org", _VERSION, self.namespace, "trainjobs", label_selector=f"{RUN_LABEL}={run_id}",
                **options,
            ),
            unless=_NOT_FOUND,
        )  # fmt: skip
        return [item["metadata"]["name"] for item in (found or {}).get("items") or []]

    def delete(self, name: str) -> None:
        """Deletes a TrainJob with its pods. It exists until they have ended, so that none of its name starts beside them."""
        self._ask(
            "delete trainjobs.trainer.kubeflow.org",
            lambda **options: self._custom.delete_namespaced_custom_object(
                "trainer.kubeflow.org", _VERSION, self.namespace, "trainjobs", name, propagation_policy="Foreground",
                **options,
            ),
            unless=_NOT_FOUND,
        )  # fmt: skip

    def pods(self, name: str) -> list[Pod]:
        """Returns the pods of a TrainJob."""
        answer = self._ask(
            "list pods",
            lambda **options: self._core.list_namespaced_pod(
                self.namespace, label_selector=f"{JOBSET_LABEL}={name}", _preload_content=False, **options
            ),
        )
        assert answer is not None
        items: list[Pod] = json.loads(answer.data).get("items") or []
        return items

    def owners(self, pod: str) -> list[dict[str, Any]]:
        """Returns the owners of a pod, of which other objects can be made dependants, too."""
        answer = self._ask(
            "get pods",
            lambda **options: self._core.read_namespaced_pod(pod, self.namespace, _preload_content=False, **options),
            unless=_NOT_FOUND,
        )
        found = json.loads(answer.data)["metadata"].get("ownerReferences") or [] if answer is not None else []
        return [{key: one[key] for key in ("apiVersion", "kind", "name", "uid")} for one in found]

    def log(self, pod: str, **lines: Any) -> str | None:
        """Returns lines of a pod's log; None if it has none, such as before its container starts and after it was deleted.

        Args:
            lines: `tail_lines`, `since_seconds` and `timestamps`, as in the client.
        """
        from kubernetes.client import ApiException

        try:
            text: str = self._core.read_namespaced_pod_log(
                pod, self.namespace, container=CONTAINER, _request_timeout=_TIMEOUT, **lines
            )
        except (ApiException, urllib3.exceptions.HTTPError, OSError):
            return None  # only shown; the next look asks again
        return text

    def _ask(self, right: str, call: Callable[..., T], unless: int | None = None) -> T | None:
        """Calls the API until it answers.

        Args:
            right: the permission that it needs.
            unless: status for which None is returned.

        Raises:
            RefusedError: if the cluster refuses the request.
            UnreachableError: if it does not answer for a long time.
        """
        from kubernetes.client import ApiException

        def transient(error: BaseException) -> bool:
            if isinstance(error, ApiException):
                return error.status in _TRANSIENT
            return isinstance(error, urllib3.exceptions.HTTPError | OSError)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = (getattr(error, "headers", None) or {}).get("Retry-After", "")
            return (
                float(asked)
                if asked.isdecimal()
                else min(self._pace.longest, self._pace.first * 2**state.attempt_number)
            )

        def tell(state: tenacity.RetryCallState) -> None:
            if state.attempt_number == 1 and state.outcome is not None:
                self._say(f"the cluster does not answer ({_shortly(state.outcome.exception())}); trying again")

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(transient),
            wait=wait,
            stop=tenacity.stop_after_delay(self._pace.patience),
            before_sleep=tell,
            reraise=True,
        )
        try:
            return retrying(call, _request_timeout=_TIMEOUT)
        except ApiException as error:
            if error.status == unless:
                return None
            if transient(error):
                raise UnreachableError(self._gave_up(error)) from None
            raise RefusedError(self._refusal(right, error)) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise UnreachableError(self._gave_up(error)) from None

    def _gave_up(self, error: BaseException) -> str:
        return (
            f"the cluster does not answer since {self._pace.patience / 60:.0f} minutes ({_shortly(error)}); the TrainJob goes "
            "on, and a retry of this task finds it again"
        )

    def _refusal(self, right: str, error: Any) -> str:
        said = _message(error)
        if error.status == HTTPStatus.FORBIDDEN and "admission webhook" not in said:
            return f"placement.nodes: the account of this pod may not {right} in {self.namespace}; {_INSTALL}"
        if error.status == _NOT_FOUND:
            return f"placement.nodes: Kubeflow Trainer is not installed in this cluster; {_INSTALL}"
        return f"placement.nodes: the cluster refuses the request to {right} ({error.status}: {said})"


def _shortly(error: BaseException | None) -> str:
    status = getattr(error, "status", None)
    return f"status {status}" if status else first_line(error or Exception())


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
