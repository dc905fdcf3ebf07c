"""Calls the KFP API through its generated REST client: authentication, timeouts and retries.

Idempotent calls are retried after transient errors. Before a call that is not idempotent (creating a run) is retried, a lookup
checks whether the last try succeeded, since the error can occur after the server has acted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import kfp_server_api
import tenacity
import urllib3

from mixtune.components.shared.errors import (
    RefusedError,
    TurnedAwayError,
    UnreachableError,
    first_line,
    without_credentials,
)

from .slow import Say, report_if_slow

TOKEN, TOKEN_FILE = "MIXTUNE_KFP_TOKEN", "MIXTUNE_KFP_TOKEN_FILE"
COOKIES, CA = "MIXTUNE_KFP_COOKIES", "MIXTUNE_KFP_CA"
HOST, UI_HOST = "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT"  # names that KFP defines
IN_CLUSTER_HOST = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
SDK_CONTEXT = Path("~/.config/kfp/context.json")
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

T = TypeVar("T")


@dataclass(frozen=True)
class Connection:
    """Address and credentials of the KFP API.

    Attributes:
        host: address of the API.
        namespace: namespace of the user, on a multi-user cluster.
        token: a fixed bearer token.
        token_file: file with a bearer token that is refreshed externally; read again before every call.
        cookies: cookies of a login page (Dex, OAuth proxies), as `name=value`.
        ca: file with the certificate authority of the address.
        ui: address of the user interface, for links.
        pod_namespace: namespace of the pod that this runs in; used if KFP is in multi-user mode.
    """

    host: str
    namespace: str | None = None
    token: str | None = None
    token_file: Path | None = None
    cookies: str | None = None
    ca: Path | None = None
    ui: str | None = None
    pod_namespace: str | None = None

    @classmethod
    def find(
        cls,
        host: str | None = None,
        namespace: str | None = None,
        token_file: Path | None = None,
        ca: Path | None = None,
    ) -> Connection:
        """Creates a connection from options, else from the environment, else from the pod that this runs in.

        Raises:
            RefusedError: if no address is given, or if a file does not exist.
        """
        in_cluster = bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
        host = host or os.environ.get(HOST) or (IN_CLUSTER_HOST if in_cluster else None)
        if not host:
            raise RefusedError(f"--host: is not given; give the address of KFP, or set {HOST}")
        if "://" not in host:
            host = f"https://{host}"
        context = _sdk_context()
        pod_namespace = None
        if in_cluster and NAMESPACE_FILE.is_file():
            pod_namespace = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
        given = token_file or _path_from(TOKEN_FILE)
        token = None if token_file else os.environ.get(TOKEN)
        if token is None and given is None:
            given = _projected_token()
        ca = ca or _path_from(CA)
        problems = [
            f"{option}: there is no file {path}"
            for option, path in (("--token-file", given), ("--ca", ca))
            if path is not None and not path.is_file()
        ]
        if problems:
            raise RefusedError(*problems)
        return cls(
            host=host.rstrip("/"),
            namespace=namespace or context.get("namespace") or None,
            token=token,
            token_file=None if token else given,
            cookies=os.environ.get(COOKIES) or context.get("client_authentication_cookie"),
            ca=ca,
            ui=os.environ.get(UI_HOST),
            pod_namespace=pod_namespace,
        )

    def link(self, path: str) -> str:
        """Returns the URL of a page in KFP's user interface."""
        return f"{without_credentials(self.ui or self.host).rstrip('/')}/#/{path}"


def _path_from(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value) if value else None


def _projected_token() -> Path | None:
    """Returns the file with a pod's token for KFP, where the SDK looks for it."""
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH

    named = _path_from(KF_PIPELINES_SA_TOKEN_ENV)
    usual = Path(KF_PIPELINES_SA_TOKEN_PATH)
    return named or (usual if usual.is_file() else None)


def _sdk_context() -> dict[str, Any]:
    """Returns the settings that the KFP SDK stores for its own client: namespace and cookie."""
    try:
        found = json.loads(SDK_CONTEXT.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Patience:
    """Timeouts of a call and its retries.

    Attributes:
        seconds: total seconds for all tries.
        first: seconds before the second try; doubled for each further try.
        longest: maximum seconds between two tries.
        answer: seconds to wait for one response.
    """

    seconds: float = 90.0
    first: float = 1.0
    longest: float = 20.0
    answer: float = 30.0


class _HalfAnswerError(Exception):
    """A response that is truncated or does not come from KFP."""


class _Client(kfp_server_api.ApiClient):  # type: ignore[misc]
    def deserialize(self, response: Any, response_type: Any) -> Any:
        """Deserializes a response. Unlike the generated method, raises an error for text that is not a JSON object."""
        try:
            value = json.loads(response.data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise _HalfAnswerError(f"a response that is not from KFP: {response.data[:60]!r}")
        return super().deserialize(response, response_type)


class Api:
    """The KFP API.

    Args:
        connection: address and credentials.
        patience: timeouts and retries.
        say: shows a line if a call takes long; None shows nothing.
    """

    def __init__(self, connection: Connection, patience: Patience | None = None, say: Say | None = None) -> None:
        self.connection = connection
        self.patience = patience or Patience()
        self.say = say
        settings = kfp_server_api.Configuration(host=connection.host)
        settings.retries = urllib3.Retry(0, redirect=3)  # `call` makes and reports all retries
        if connection.ca:
            settings.ssl_ca_cert = str(connection.ca)
        if connection.token or connection.token_file:
            settings.api_key["authorization"] = connection.token or ""
            settings.api_key_prefix["authorization"] = "Bearer"
        if connection.token_file:
            settings.refresh_api_key_hook = self._read_token
        self._client = client = _Client(settings, cookie=connection.cookies)
        self.runs = kfp_server_api.RunServiceApi(client)
        self.experiments = kfp_server_api.ExperimentServiceApi(client)
        self.pipelines = kfp_server_api.PipelineServiceApi(client)
        self.uploads = kfp_server_api.PipelineUploadServiceApi(client)
        self.health = kfp_server_api.HealthzServiceApi(client)

    @cached_property
    def namespace(self) -> str | None:
        """Returns the namespace for requests; None in single-user mode, in which KFP rejects namespaces."""
        if self.connection.namespace or not self.connection.pod_namespace:
            return self.connection.namespace
        health = self.call("report its health", self.health.healthz_service_get_healthz)
        return self.connection.pod_namespace if health.multi_user else None

    def _read_token(self, settings: Any) -> None:
        assert self.connection.token_file is not None
        try:
            settings.api_key["authorization"] = self.connection.token_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise RefusedError(
                f"--token-file: {self.connection.token_file} cannot be read ({error.strerror})"
            ) from None

    def call(
        self,
        what: str,
        function: Callable[..., T],
        *arguments: Any,
        made_already: Callable[[], T | None] | None = None,
        seconds: float | None = None,
        **named: Any,
    ) -> T:
        """Calls the API and retries after transient errors.

        Args:
            what: description of the request, such as `list the runs`.
            function: a function of the generated client.
            made_already: for calls that are not idempotent: looks up the result that the last try may have created.
            seconds: total seconds for all tries; None uses the default.

        Raises:
            UnreachableError: if there was no valid response in time, or if the credentials were rejected.
            RefusedError: if KFP rejects the request.
        """
        tries: list[str] = []
        started = time.monotonic()
        wait: Any = tenacity.wait_exponential(multiplier=self.patience.first, max=self.patience.longest)
        limit = self.patience.seconds if seconds is None else seconds

        def attempt() -> T:
            if tries and made_already is not None:
                found = made_already()
                if found is not None:
                    return found
            return function(*arguments, _request_timeout=(10.0, self.patience.answer), **named)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: self._is_transient(error, tries)),
            wait=wait + tenacity.wait_random(0, self.patience.first / 2),
            stop=tenacity.stop_after_delay(limit),
            reraise=True,
        )
        address = without_credentials(self.connection.host)

        def slow() -> str:
            why = f" ({tries[-1]})" if tries else ""
            return f"KFP at {address} does not answer the request to {what}{why}; retrying for {_for_people(limit)}"

        try:
            with report_if_slow(self.say, slow, "KFP answers again"):
                return retrying(attempt)
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError, _HalfAnswerError, OSError) as error:
            raise self._plain(what, error, tries, time.monotonic() - started) from None

    def log_of(self, run_id: str, pod: str) -> str | None:
        """Returns the log of a pod of a run; None if KFP has no such pod or log.

        Raises:
            UnreachableError: if KFP does not answer.
            RefusedError: if KFP serves no logs.
        """

        def ask(**named: Any) -> Any:
            return self._client.call_api(
                "/apis/v1alpha1/runs/{run}/nodes/{pod}/log",
                "GET",
                path_params={"run": run_id, "pod": pod},
                auth_settings=["Bearer"],
                _preload_content=False,
                _return_http_data_only=True,
                **named,
            )

        text = self.call("get a log", ask, seconds=0).data.decode("utf-8", "replace")
        try:
            # KFP sends status 200 before it looks up the log.
            return None if "error_message" in json.loads(text) else text
        except (ValueError, TypeError):
            return text

    def _is_transient(self, error: BaseException, tries: list[str]) -> bool:
        if isinstance(error, RefusedError) or _is_about_certificates(error):
            return False
        if isinstance(error, kfp_server_api.ApiException):
            # A token that expired between two calls is read again once.
            renewable = error.status == 401 and self.connection.token_file is not None and "status 401" not in tries
            transient = error.status in TRANSIENT or renewable
        else:
            transient = isinstance(error, urllib3.exceptions.HTTPError | _HalfAnswerError)
        if transient:
            tries.append(_shortly(error))
        return transient

    def _plain(self, what: str, error: BaseException, tries: list[str], seconds: float) -> Exception:
        address = without_credentials(self.connection.host)
        if _is_about_certificates(error):
            return UnreachableError(
                f"--host: the certificate of {address} cannot be verified; give its certificate authority with --ca or {CA}"
            )
        status = getattr(error, "status", None)
        if status == 401:
            return TurnedAwayError(
                f"--host: KFP at {address} rejects these credentials (401) for the request to {what}; renew the token in "
                f"{TOKEN} or {TOKEN_FILE}, or the cookie in {COOKIES}"
            )
        if status == 403:
            where = f" in the namespace {self.connection.namespace}" if self.connection.namespace else ""
            return TurnedAwayError(
                f"--host: KFP at {address} does not permit this user to {what}{where} (403: {_message(error)}); ask for the "
                "permission, or choose another --namespace"
            )
        if tries:
            kinds = ", ".join(f"{tries.count(kind)} x {kind}" for kind in dict.fromkeys(tries))
            return UnreachableError(
                f"--host: KFP at {address} did not answer the request to {what}: {len(tries)} attempts in "
                f"{seconds:.0f} s ({kinds}); the last error was: {_message(error)}"
            )
        return RefusedError(f"KFP at {address} refused to {what} ({status}: {_message(error)})")


def _for_people(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def is_missing(error: RefusedError) -> bool:
    """Tells whether KFP reported that the object does not exist."""
    return "(404:" in str(error)


def _is_about_certificates(error: BaseException) -> bool:
    text = f"{type(error).__name__} {getattr(error, 'reason', '')} {error}"
    return "SSLError" in text or "CERTIFICATE_VERIFY_FAILED" in text


def _shortly(error: BaseException) -> str:
    if isinstance(error, kfp_server_api.ApiException):
        return f"status {error.status}"
    if isinstance(error, _HalfAnswerError):
        return "incomplete response"
    text = str(error).lower()
    if "incompleteread" in text or "connection broken" in text:
        return "incomplete response"
    if "timed out" in text:
        return "timeout"
    return "no connection"


def _message(error: BaseException) -> str:
    """Returns KFP's own message, if there is one."""
    body = getattr(error, "body", None)
    if body:
        try:
            parsed = json.loads(body)
            return str(parsed.get("message") or parsed.get("error") or body).strip().splitlines()[0][:300]
        except (ValueError, AttributeError):
            return str(body).strip().splitlines()[0][:200] if str(body).strip() else "no message"
    return str(getattr(error, "reason", None) or first_line(error)).strip().splitlines()[0][:200]
