"""A small HTTP server that speaks the part of KFP's v2beta1 REST API that mixtune uses, and can be told to misbehave.

It stands in for a KFP backend, which cannot run here. Requests are held to the models of `kfp_server_api`: an unknown
field, a wrong type, an unknown path or parameter is an error, and so are parameters that the uploaded package does not
have. Answers are built from the same models.
"""

from __future__ import annotations

import datetime
import email.parser
import email.policy
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as kfp_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from tests.served import Served

from .recordings import as_of, recorded_run

_TYPES: dict[str, Any] = {
    "STRING": str,
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": (int, float),
    "LIST": list,
    "STRUCT": dict,
    "BOOLEAN": bool,
}
_serialise: Any = kfp_api.ApiClient(kfp_api.Configuration(host="http://nowhere")).sanitize_for_serialization


class RefusedRequestError(Exception):
    """The request is wrong; answered with a status and KFP's kind of body."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Fault:
    """What goes wrong with the next requests.

    Attributes:
        kind: `status`, `half` (the connection ends in the middle), `cut` (whole by its length, but half the JSON), `hang`,
            `drop` (no answer at all), `none` (nothing goes wrong with the first ones).
        method: of the requests that it meets.
        path: pattern of their path.
        times: how many of them.
        done: whether the server does what was asked before it goes wrong.
    """

    kind: str
    path: str = ""
    method: str = ""
    times: int = 1
    status: int = 500
    done: bool = False
    message: str = "an error of the server"


@dataclass
class Store:
    """What the server knows."""

    pipelines: dict[str, kfp_api.V2beta1Pipeline] = field(default_factory=dict)
    versions: dict[str, kfp_api.V2beta1PipelineVersion] = field(default_factory=dict)
    packages: dict[str, dict[str, Any]] = field(default_factory=dict)
    experiments: dict[str, kfp_api.V2beta1Experiment] = field(default_factory=dict)
    runs: dict[str, kfp_api.V2beta1Run] = field(default_factory=dict)
    scripts: dict[str, list[Any]] = field(default_factory=dict)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)  # noqa: UP017 - datetime.UTC is no attribute of the type stubs' 3.10


def parse(text: bytes, model: type) -> Any:
    """A request's body as a model.

    Raises:
        RefusedRequestError: where it is none.
    """
    try:
        return _checked(json.loads(text), model.__name__, "")
    except ValueError as error:
        raise RefusedRequestError(400, f"invalid JSON: {error}") from None


def _checked(value: Any, kind: str, where: str) -> Any:
    plain = {"str": str, "int": int, "bool": bool, "object": object, "datetime": str}
    if kind in plain:
        if not isinstance(value, plain[kind]):
            raise RefusedRequestError(400, f"{where}: must be {kind}, found {type(value).__name__}")
        return value
    if found := re.fullmatch(r"dict\(str, (.*)\)", kind):
        return {key: _checked(one, found.group(1), f"{where}.{key}") for key, one in value.items()}
    if found := re.fullmatch(r"list\[(.*)\]", kind):
        return [_checked(one, found.group(1), where) for one in value]
    model = getattr(kfp_api, kind)
    known = {key: name for name, key in model.attribute_map.items()}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise RefusedRequestError(400, f"unknown field {unknown[0]} in {kind}")
    return model(**{known[key]: _checked(one, model.openapi_types[known[key]], key) for key, one in value.items()})


class KfpServer(Served):
    """The server; use it as a context manager.

    Attributes:
        faults: what goes wrong, first come first served.
        script: states that a new run goes through, one at each look: a state, or a run as `as_of` gives it.
        logs: what the containers of pods wrote, by the pods' names.
        token: bearer token that is asked for.
        cookie: cookie that is asked for.
        forbidden: path pattern that is answered with 403.
        seen: method and path of every request.
    """

    script: ClassVar[list[Any]] = ["PENDING", "RUNNING", "SUCCEEDED"]

    def __init__(self, multi_user: bool = False, certificate: tuple[str, str] | None = None) -> None:
        self.store = Store()
        self.faults: list[Fault] = []
        self.token: str | None = None
        self.cookie: str | None = None
        self.forbidden: str | None = None
        self.multi_user = multi_user
        self.seen: list[tuple[str, str]] = []
        self.logs: dict[str, str] = {}
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        super().__init__(_Handler, "kfp")
        if certificate:
            import ssl

            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
            self.url = self.url.replace("http://", "https://")

    def __exit__(self, *of_what: object) -> None:
        self._stopped.set()
        super().__exit__(*of_what)

    def count(self, method: str, path: str) -> int:
        """How many requests came for a path."""
        return sum(1 for one, other in self.seen if one == method and re.search(path, other))

    def fault_for(self, method: str, path: str) -> Fault | None:
        """The fault that meets a request."""
        with self._lock:
            for fault in self.faults:
                if fault.times and (not fault.method or fault.method == method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def hang(self) -> None:
        self._stopped.wait(20)

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Any:
        """What a request is answered with.

        Raises:
            RefusedRequestError: where it is wrong.
        """
        address = urlsplit(target)
        query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            raise RefusedRequestError(401, "the token has expired")
        if self.cookie is not None and headers.get("Cookie") != self.cookie:
            raise RefusedRequestError(401, "no session")
        if self.forbidden and re.search(self.forbidden, address.path):
            raise RefusedRequestError(403, "User is not authorized")
        with self._lock:
            for (wanted, pattern), name in _ROUTES.items():
                found = re.fullmatch(pattern, address.path)
                if wanted == method and found:
                    return getattr(self, name)(query, headers, body, *found.groups())
        raise RefusedRequestError(404, f"no such path: {method} {address.path}")

    def _healthz(self, query: dict[str, str], headers: Any, body: bytes) -> Any:
        return kfp_api.V2beta1GetHealthzResponse(multi_user=self.multi_user)

    def _matching(self, items: Any, query: dict[str, str]) -> list[Any]:
        allowed = {"filter", "namespace", "page_size", "page_token", "sort_by", "experiment_id"}
        if set(query) - allowed:
            raise RefusedRequestError(400, f"unknown query parameters {set(query) - allowed}")
        found = list(items)
        for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
            key, value = predicate["key"], predicate["stringValue"]
            if predicate["operation"] not in ("EQUALS", "IS_SUBSTRING"):
                raise RefusedRequestError(400, f"unknown operation {predicate['operation']}")
            whole = predicate["operation"] == "EQUALS"
            of = {id(one): getattr(one, key) or "" for one in found}
            found = [one for one in found if (of[id(one)] == value if whole else value in of[id(one)])]
        if "experiment_id" in query:
            found = [one for one in found if one.experiment_id == query["experiment_id"]]
        if query.get("namespace"):
            found = [one for one in found if getattr(one, "namespace", query["namespace"]) == query["namespace"]]
        if query.get("sort_by", "").endswith("desc"):
            found.reverse()
        return found[: int(query.get("page_size", 10))]

    def _list_pipelines(self, query: dict[str, str], headers: Any, body: bytes) -> Any:
        return kfp_api.V2beta1ListPipelinesResponse(
            pipelines=self._matching(self.store.pipelines.values(), query) or None
        )

    def _create_pipeline(self, query: dict[str, str], headers: Any, body: bytes) -> Any:
        made = parse(body, kfp_api.V2beta1Pipeline)
        if any(one.display_name == made.display_name for one in self.store.pipelines.values()):
            raise RefusedRequestError(409, "Already exist error: there is a pipeline of this name")
        made.pipeline_id, made.created_at = str(uuid.uuid4()), _now()
        self.store.pipelines[made.pipeline_id] = made
        return made

    def _list_versions(self, query: dict[str, str], headers: Any, body: bytes, pipeline: str) -> Any:
        found = [one for one in self.store.versions.values() if one.pipeline_id == pipeline]
        return kfp_api.V2beta1ListPipelineVersionsResponse(pipeline_versions=self._matching(found, query) or None)

    def _get_version(self, query: dict[str, str], headers: Any, body: bytes, pipeline: str, version: str) -> Any:
        found = self.store.versions.get(version)
        if found is None or found.pipeline_id != pipeline:
            raise RefusedRequestError(404, "there is no such version")
        package = dict(self.store.packages[version])
        platform = package.pop("platform")
        return kfp_api.V2beta1PipelineVersion(
            **{name: getattr(found, name) for name in ("pipeline_id", "pipeline_version_id", "name", "display_name")},
            pipeline_spec={"pipeline_spec": package, "platform_spec": platform} if platform else package,
        )

    def _upload_version(self, query: dict[str, str], headers: Any, body: bytes) -> Any:
        if query.get("pipelineid") not in self.store.pipelines:
            raise RefusedRequestError(404, "there is no such pipeline")
        if any(one.name == query["name"] for one in self.store.versions.values()):
            raise RefusedRequestError(409, "Already exist error: there is a version of this name")
        package = _package_in(headers, body)
        made = kfp_api.V2beta1PipelineVersion(
            pipeline_id=query["pipelineid"],
            pipeline_version_id=str(uuid.uuid4()),
            name=query["name"],
            display_name=query["display_name"],
            description=query.get("description"),
            created_at=_now(),
        )
        self.store.versions[made.pipeline_version_id] = made
        self.store.packages[made.pipeline_version_id] = package
        return made

    def _check_namespace(self, namespace: str | None) -> None:
        if self.multi_user and not namespace:
            raise RefusedRequestError(400, "In multi-user mode, the namespace cannot be empty")
        if namespace and not self.multi_user:
            raise RefusedRequestError(400, "In single-user mode, the namespace must be empty")

    def _list_experiments(self, query: dict[str, str], headers: Any, body: bytes) -> Any:
        self._check_namespace(query.get("namespace"))
        found = self._matching(self.store.experiments.values(), query)
        return kfp_api.V2beta1ListExperimentsResponse(experiments=found or None)

    def _create_experiment(self, query: dict[str, str], headers: Any, body: bytes) -> Any:
        made = parse(body, kfp_api.V2beta1Experiment)
        if any(one.display_name == made.display_name for one in self.store.experiments.values()):
            raise RefusedRequestError(409, "Already exist error: there is an experiment of this name")
        self._check_namespace(made.namespace)
        made.experiment_id, made.created_at = str(uuid.uuid4()), _now()
        self.store.experiments[made.experiment_id] = made
        return made

    def _list_runs(self, query: dict[str, str], headers: Any, body: bytes) -> Any:
        return kfp_api.V2beta1ListRunsResponse(runs=self._matching(self.store.runs.values(), query) or None)

    def _create_run(self, query: dict[str, str], headers: Any, body: bytes) -> Any:
        made = parse(body, kfp_api.V2beta1Run)
        if made.experiment_id not in self.store.experiments:
            raise RefusedRequestError(404, "there is no such experiment")
        version = made.pipeline_version_reference.pipeline_version_id
        if version not in self.store.packages:
            raise RefusedRequestError(404, "there is no such version of the pipeline")
        self._check_parameters(self.store.packages[version], made.runtime_config.parameters)
        return self.add_run(made)

    def add_run(self, made: kfp_api.V2beta1Run) -> kfp_api.V2beta1Run:
        """Puts a run on the list, in its first state."""
        made.run_id, made.created_at, made.state = str(uuid.uuid4()), _now(), "PENDING"
        self.store.runs[made.run_id] = made
        self.store.scripts[made.run_id] = list(self.script)
        return made

    def _check_parameters(self, package: dict[str, Any], given: dict[str, Any]) -> None:
        known = package["root"].get("inputDefinitions", {}).get("parameters", {})
        for name, value in given.items():
            if name not in known:
                raise RefusedRequestError(400, f"parameter {name} is not an input of the pipeline")
            if not isinstance(value, _TYPES[known[name]["parameterType"]]) or value is None:
                raise RefusedRequestError(400, f"parameter {name} must be {known[name]['parameterType']}")
        for name, one in known.items():
            if name not in given and "defaultValue" not in one and not one.get("isOptional"):
                raise RefusedRequestError(400, f"parameter {name} is missing")

    def _run(self, run: str) -> kfp_api.V2beta1Run:
        if run not in self.store.runs:
            raise RefusedRequestError(404, f"Run {run} not found")
        return self.store.runs[run]

    def _get_run(self, query: dict[str, str], headers: Any, body: bytes, run: str) -> Any:
        found, script = self._run(run), self.store.scripts[run]
        if script:
            step = script.pop(0) if len(script) > 1 else script[0]
            if isinstance(step, kfp_api.V2beta1Run):
                found.state, found.state_history, found.run_details = step.state, step.state_history, step.run_details
            else:
                self._enter(found, step)
        return found

    def _enter(self, run: kfp_api.V2beta1Run, state: str) -> None:
        history = run.state_history or []
        if not history or history[-1].state != state:
            run.state_history = [*history, kfp_api.V2beta1RuntimeStatus(update_time=_now(), state=state)]
        run.state = state

    def replay(self, name: str, *, parameters: dict[str, Any] | None = None, moments: Sequence[str] = ()) -> str:
        """Puts a recorded run on the list, under its own id.

        Args:
            name: of the recording, such as `succeeded`.
            parameters: of the run, which the recording leaves out.
            moments: times of that day at which a look finds it, before it is found as it ended.
        """
        run = recorded_run(name)
        run.runtime_config = kfp_api.V2beta1RuntimeConfig(parameters=parameters or {})
        self.store.runs[run.run_id] = run
        self.store.scripts[run.run_id] = [*(as_of(recorded_run(name), time) for time in moments), recorded_run(name)]
        return str(run.run_id)

    def _get_log(self, query: dict[str, str], headers: Any, body: bytes, run: str, pod: str) -> Any:
        """Like KFP, which has sent its 200 before it looks for the pod."""
        if pod not in self.logs:
            return json.dumps({"error_message": f"Failed to read logs for run {run}: pods {pod!r} not found"})
        return self.logs[pod]

    def _retry(self, query: dict[str, str], headers: Any, body: bytes, run: str) -> Any:
        if self._run(run).state != "FAILED":
            raise RefusedRequestError(400, "Workflow's status is not Failed or Error. Cannot retry")
        self._enter(self.store.runs[run], "RUNNING")
        self.store.scripts[run] = ["RUNNING", "SUCCEEDED"]
        return {}

    def _terminate(self, query: dict[str, str], headers: Any, body: bytes, run: str) -> Any:
        self._enter(self._run(run), "CANCELING")
        self.store.scripts[run] = ["CANCELING", "FAILED"]  # what KFP calls it in the end
        return {}


_ROUTES = {
    ("GET", "/apis/v2beta1/healthz"): "_healthz",
    ("GET", "/apis/v2beta1/pipelines"): "_list_pipelines",
    ("POST", "/apis/v2beta1/pipelines"): "_create_pipeline",
    ("POST", "/apis/v2beta1/pipelines/upload_version"): "_upload_version",
    ("GET", "/apis/v2beta1/pipelines/([^/]+)/versions"): "_list_versions",
    ("GET", "/apis/v2beta1/pipelines/([^/]+)/versions/([^/]+)"): "_get_version",
    ("GET", "/apis/v2beta1/experiments"): "_list_experiments",
    ("POST", "/apis/v2beta1/experiments"): "_create_experiment",
    ("GET", "/apis/v2beta1/runs"): "_list_runs",
    ("POST", "/apis/v2beta1/runs"): "_create_run",
    ("GET", "/apis/v2beta1/runs/([^/:]+)"): "_get_run",
    ("GET", "/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log"): "_get_log",
    ("POST", "/apis/v2beta1/runs/([^/:]+):retry"): "_retry",
    ("POST", "/apis/v2beta1/runs/([^/:]+):terminate"): "_terminate",
}


def _package_in(headers: Any, body: bytes) -> dict[str, Any]:
    """The package in a form with a file, read as KFP reads it: an unknown field of the IR is an error."""
    text = b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body
    form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(text)
    files = [part for part in form.iter_parts() if part.get_param("name", header="content-disposition") == "uploadfile"]
    if len(files) != 1:
        raise RefusedRequestError(400, "Failed to read pipeline from file: no uploadfile in the form")
    content: Any = files[0].get_payload(decode=True)
    package, *platform = yaml.safe_load_all(content)
    try:
        json_format.ParseDict(package, pipeline_spec_pb2.PipelineSpec())
        for one in platform:
            json_format.ParseDict(one, pipeline_spec_pb2.PlatformSpec())
    except json_format.ParseError as error:
        raise RefusedRequestError(400, f"invalid v2 pipeline spec: {error}") from None
    return dict(package) | {"platform": platform[0] if platform else {}}


class _Handler(BaseHTTPRequestHandler):
    kfp: ClassVar[KfpServer]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _handle(self, method: str) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.kfp.seen.append((method, path))
        fault = self.kfp.fault_for(method, path)
        if fault is not None and fault.kind in ("status", "drop", "hang") and not fault.done:
            self._go_wrong(fault, b"")
            return
        try:
            found, status = self.kfp.answer(method, self.path, self.headers, body), 200
            answer = found if isinstance(found, str) else json.dumps(_serialise(found))
        except RefusedRequestError as error:
            answer, status = _error(error.status, str(error)), error.status
        if fault is not None and fault.kind != "none":
            self._go_wrong(fault, answer.encode())
            return
        self._send(status, answer.encode())

    def _go_wrong(self, fault: Fault, answer: bytes) -> None:
        if fault.kind == "status":
            self._send(fault.status, _error(fault.status, fault.message).encode())
            return
        if fault.kind == "cut":
            self._send(200, answer[: len(answer) // 2])
            return
        if fault.kind == "hang":
            self.kfp.hang()
        elif fault.kind == "half":
            self._send(200, answer, length=len(answer) * 2)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, answer: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer) if length is None else length))
        self.end_headers()
        self.wfile.write(answer)
        self.wfile.flush()


def _error(status: int, message: str) -> str:
    return json.dumps({"error": message, "code": status, "message": message, "details": []})


def settle(condition: Any, seconds: float = 5.0) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
