"""Uploading and submitting, against a server that speaks KFP's REST API and goes wrong in the ways that servers do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mixtune.components.form import read_form
from mixtune.components.shared.errors import RefusedError, TurnedAwayError, UnreachableError
from mixtune.pipelines.cli import app
from mixtune.pipelines.cluster import api as kfp_api
from mixtune.pipelines.cluster import runs as client
from mixtune.pipelines.cluster.api import Api, Connection, Patience
from mixtune.pipelines.cluster.rerun import images_in
from mixtune.pipelines.configuration import read_config
from mixtune.pipelines.images import Images

from .kfp_server import Fault, KfpServer

QUICK = Patience(seconds=3.0, first=0.01, longest=0.05, answer=0.5)
PARAMETERS = r"/runs$"


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with KfpServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KF_PIPELINES_ENDPOINT", "KUBERNETES_SERVICE_HOST", "GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MIXTUNE_GIT_COMMIT", "0123456789abcdef")


@pytest.fixture
def api(server: KfpServer) -> Api:
    return Api(Connection(server.url), QUICK)


@pytest.fixture(scope="module")
def package() -> client.Package:
    """A small one: a step as a pipeline of its own."""
    return client.package_of(read_config(None), "prepare")


def start(api: Api, package: client.Package, key: str | None = None) -> client.Submitted:
    return client.submit(api, client.upload(api, package), "demo", {"config": "{}"}, run_key=key)


def test_a_version_has_a_readable_name_and_is_uploaded_once(
    server: KfpServer, api: Api, package: client.Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = client.upload(api, package)
    assert first.new
    assert re.fullmatch(r"profile cpu, \d{4}-\d\d-\d\d \d\d:\d\d", first.name)
    assert {"0123456789ab", package.digest} <= set(re.findall("[0-9a-f]+", server.store.versions[first.id].description))
    monkeypatch.setenv("MIXTUNE_GIT_COMMIT", "another commit with the same pipeline")
    again = client.upload(api, package)
    assert (again.id, again.name, again.new) == (first.id, first.name, False)
    assert len(server.store.versions) == len(server.store.pipelines) == 1
    other = client.upload(api, client.Package(package.pipeline, package.text + "# more\n", "other"))
    assert other.new
    assert other.pipeline_id == first.pipeline_id


def test_a_key_is_found_as_it_is_and_no_other(server: KfpServer, api: Api, package: client.Package) -> None:
    longer, other = start(api, package, "ci-12"), start(api, package, "ci-1")
    assert (longer.found, other.found) == (False, False)
    assert "ci-1" not in other.name
    again = start(api, package, "ci-1")
    assert (again.id, again.name, again.found) == (other.id, other.name, True)
    assert server.store.runs[other.id].description == "key: ci-1"


def test_values_are_parameters_of_the_run_and_no_new_version(server: KfpServer, api: Api) -> None:
    one = read_config(None, ["mixed.lambdas=[0.25]", "gate.max_forgetting=0.5", "name=other"])
    assert client.package_of(one).digest == client.package_of(read_config(None)).digest
    made = client.submit(
        api, client.upload(api, client.package_of(one)), client.run_title(one), client.run_parameters(one)
    )
    given = server.store.runs[made.id].runtime_config.parameters
    got = read_form(given)
    assert got.mixed == one.mixed
    assert got.gate == one.gate
    assert got.data == one.data
    assert re.fullmatch(r"other, 2 candidates, \d{4}-\d\d-\d\d \d\d:\d\d", server.store.runs[made.id].display_name)


def test_where_tasks_run_is_compiled_in() -> None:
    plain = client.package_of(read_config(None))
    placed = client.package_of(read_config(None, ["placement.checkpoint_claim=claim"]))
    shaped = client.package_of(read_config(None, ["mixed.start=finetuned"]))
    assert len({plain.digest, placed.digest, shaped.digest}) == 3


@pytest.mark.parametrize("kind", ["status", "half", "cut", "drop", "hang"])
@pytest.mark.parametrize("done", [False, True])
def test_a_run_is_made_once_whatever_goes_wrong(
    kind: str, done: bool, server: KfpServer, api: Api, package: client.Package
) -> None:
    server.faults.append(Fault(kind, PARAMETERS, "POST", done=done))
    made = start(api, package)
    assert list(server.store.runs) == [made.id]


def test_every_call_survives_errors_that_pass(server: KfpServer, api: Api, package: client.Package) -> None:
    for status in (429, 500, 502, 503, 504):
        server.faults.append(Fault("status", status=status, times=2))
    made = start(api, package)
    assert list(server.store.runs) == [made.id]
    assert len(server.store.versions) == len(server.store.experiments) == 1


@pytest.mark.parametrize("path", [r"/pipelines$", "/upload_version$", r"/experiments$"])
def test_pipelines_versions_and_experiments_are_made_once(
    path: str, server: KfpServer, api: Api, package: client.Package
) -> None:
    server.faults.append(Fault("drop", path, "POST", done=True))
    start(api, package)
    assert len(server.store.pipelines) == len(server.store.versions) == len(server.store.experiments) == 1


def test_the_last_error_says_what_was_tried(server: KfpServer, package: client.Package) -> None:
    server.faults += [Fault("status", status=503, times=2), Fault("half", times=10**6)]
    api = Api(Connection(server.url), Patience(seconds=0.4, first=0.01, longest=0.05, answer=0.5))
    with pytest.raises(UnreachableError) as told:
        client.upload(api, package)
    sentence = told.value.problems[0]
    assert "the request to list the pipelines" in sentence
    assert "2 x status 503" in sentence
    assert "x incomplete response" in sentence
    assert "attempts in" in sentence


def test_nobody_listening_is_unreachable(package: client.Package) -> None:
    api = Api(Connection("http://127.0.0.1:9"), Patience(seconds=0.2, first=0.01, longest=0.05))
    with pytest.raises(UnreachableError, match="no connection"):
        client.upload(api, package)


def test_a_wrong_request_is_refused_at_once(server: KfpServer, api: Api, package: client.Package) -> None:
    version = client.upload(api, package)
    with pytest.raises(RefusedError, match="parameter lambdas is not an input of the pipeline"):
        client.submit(api, version, "x", {"lambdas": [0.1]})
    assert server.count("POST", PARAMETERS) == 1


def test_a_run_key_finds_the_run(server: KfpServer, api: Api, package: client.Package) -> None:
    first = start(api, package, "job-17")
    again = start(api, package, "job-17")
    assert (again.id, first.found, again.found) == (first.id, False, True)
    assert start(api, package, "job-18").id != first.id
    assert len(server.store.runs) == 2


def test_without_a_run_key_every_submission_is_a_run(server: KfpServer, api: Api, package: client.Package) -> None:
    assert start(api, package).id != start(api, package).id


def test_a_fresh_token_in_the_file_is_taken(server: KfpServer, tmp_path: Path, package: client.Package) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    server.token = "old"
    api = Api(Connection(server.url, token_file=file), QUICK)
    client.upload(api, package)
    server.token = "new"
    # The file is renewed between the call that fails and the next one.
    threading.Timer(0.05, lambda: file.write_text("new\n")).start()
    slow = Api(Connection(server.url, token_file=file), Patience(seconds=5, first=0.3, longest=0.3, answer=1))
    assert not client.upload(slow, package).new


def test_a_token_that_has_expired_is_said(server: KfpServer, package: client.Package) -> None:
    server.token = "good"
    with pytest.raises(TurnedAwayError, match=r"rejects these credentials \(401\).*MIXTUNE_KFP_TOKEN"):
        client.upload(Api(Connection(server.url, token="bad"), QUICK), package)
    assert len(server.seen) == 1


def test_a_user_without_rights_is_told(server: KfpServer, package: client.Package) -> None:
    server.forbidden = "pipelines"
    with pytest.raises(TurnedAwayError, match=r"in the namespace team \(403: User is not authorized\)"):
        client.upload(Api(Connection(server.url, namespace="team"), QUICK), package)


def test_a_session_cookie_is_sent(server: KfpServer, monkeypatch: pytest.MonkeyPatch, package: client.Package) -> None:
    server.cookie = "authservice_session=abc"
    monkeypatch.setenv("MIXTUNE_KFP_COOKIES", "authservice_session=abc")
    assert client.upload(Api(Connection.find(server.url), QUICK), package).new


def test_the_cookie_that_the_sdk_keeps_is_used(server: KfpServer, tmp_path: Path, package: client.Package) -> None:
    server.cookie = "session=sdk"
    kept = tmp_path / "home" / ".config" / "kfp" / "context.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"namespace": "mine", "client_authentication_cookie": "session=sdk"}))
    connection = Connection.find(server.url)
    assert connection.namespace == "mine"
    assert client.upload(Api(connection, QUICK), package).new


def test_several_users_have_namespaces(package: client.Package) -> None:
    with KfpServer(multi_user=True) as server:
        made = start(Api(Connection(server.url, namespace="team"), QUICK), package)
        assert [one.namespace for one in server.store.experiments.values()] == ["team"]
        assert [one.namespace for one in server.store.pipelines.values()] == ["team"]
        assert made.id in server.store.runs


@pytest.mark.parametrize("multi_user", [False, True])
def test_in_a_pod_its_namespace_counts_where_there_are_several_users(
    multi_user: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: client.Package
) -> None:
    file = tmp_path / "namespace"
    file.write_text("pods")
    monkeypatch.setattr(kfp_api, "NAMESPACE_FILE", file)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with KfpServer(multi_user=multi_user) as server:
        start(Api(Connection.find(server.url), QUICK), package)
        wanted = "pods" if multi_user else None
        assert [one.namespace for one in server.store.experiments.values()] == [wanted]


def test_a_custom_certificate_authority(tmp_path: Path, package: client.Package) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
               "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    with KfpServer(certificate=(str(certificate), str(key))) as server:
        with pytest.raises(UnreachableError, match=r"cannot be verified; give its certificate authority with --ca"):
            client.upload(Api(Connection(server.url), QUICK), package)
        assert client.upload(Api(Connection(server.url, ca=certificate), QUICK), package).new


def test_where_to_look_without_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError, match="--host: is not given"):
        Connection.find()
    with pytest.raises(RefusedError, match="--token-file: there is no file"):
        Connection.find("kfp.example", token_file=tmp_path / "none")
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "kfp.example/pipeline/")
    monkeypatch.setenv("MIXTUNE_KFP_TOKEN", "secret")
    found = Connection.find()
    assert (found.host, found.token) == ("https://kfp.example/pipeline", "secret")
    assert found.link("runs/details/x") == "https://kfp.example/pipeline/#/runs/details/x"
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    monkeypatch.delenv("MIXTUNE_KFP_TOKEN")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    token = tmp_path / "projected"
    token.write_text("from the kubelet")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
    found = Connection.find()
    assert found.host == "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
    assert found.token_file == token


def test_retry_is_for_runs_that_failed(server: KfpServer, api: Api, package: client.Package) -> None:
    made = start(api, package)
    with pytest.raises(RefusedError, match="retries only runs that failed"):
        client.retry(api, made.id)
    server.store.scripts[made.id] = ["FAILED"]
    server.faults.append(Fault("half", ":retry", "POST"))
    client.retry(api, made.id)
    assert server.count("POST", ":retry") == 1
    assert server.store.runs[made.id].state in ("RUNNING", "SUCCEEDED")


def test_a_run_that_is_not_there(server: KfpServer, api: Api) -> None:
    for ask in (client.get_run, client.retry, client.stop):
        with pytest.raises(RefusedError, match="has no such run"):
            ask(api, "nothing")


def mixtune(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="mixtune")


def test_submit_without_waiting(server: KfpServer) -> None:
    images = ("--image-prefix", "registry.example/team", "--tag", "1.2.3", "--service-account", "mixtune-runner")
    result = mixtune("submit", "--host", server.url, "--json", "--run-key", "k", *images)
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout)
    assert printed["run_id"] in server.store.runs
    assert printed["links"]["run"] == f"{server.url}/#/runs/details/{printed['run_id']}"
    made = server.store.runs[printed["run_id"]]
    assert made.service_account == "mixtune-runner"
    package = server.store.packages[made.pipeline_version_reference.pipeline_version_id]
    package = package.get("pipeline_spec", package)
    executors = [
        one["container"]["image"] for one in package["deploymentSpec"]["executors"].values() if "container" in one
    ]
    assert len(executors) > 9
    assert all(re.fullmatch(r"registry\.example/team/mixtune-[a-z]+:1\.2\.3", image) for image in executors)
    assert images_in(package) == Images(prefix="registry.example/team/", tag="1.2.3")
    again = json.loads(mixtune("submit", "--host", server.url, "--json", "--run-key", "k", *images).stdout)
    assert again == printed | {"found": True}


def test_upload_says_whether_it_was_new(server: KfpServer) -> None:
    for words in ("uploaded", "already uploaded"):
        result = mixtune("upload", "--host", server.url)
        assert result.exit_code == 0, result.output
        assert words in result.stdout
    step = mixtune("upload", "--host", server.url, "--step", "evaluate")
    assert "mixtune-evaluate, version profile cpu, " in step.stdout


def test_wrong_usage_is_status_2(server: KfpServer) -> None:
    for arguments in (
        ("submit", "--host", server.url, "--wait", "--timeout", "soon"),
        ("submit", "--host", server.url, "--set", "mixed.lambda=1"),
        ("rerun", "x", "--host", server.url),
        ("rerun", "runs/none", "--from", "mixed", "--host", server.url),
        ("rerun", "x", "--from", "mixed", "--only", "mixed", "--host", server.url),
    ):
        result = mixtune(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.startswith("mixtune: ")
    assert not server.store.runs


def test_help_loads_no_client() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from mixtune.pipelines.cli import app\n"
        "assert CliRunner().invoke(app, ['submit', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'kfp', 'kfp_server_api', 'kubernetes', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
