"""Why tasks wait, were killed or failed: read from Kubernetes, from KFP's logs, or a command to look with."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp_server_api as kfp_api
import pytest
from typer.testing import CliRunner, Result

from mixtune.components.form import parameters
from mixtune.pipelines.cli import app
from mixtune.pipelines.cluster import progress, waiting
from mixtune.pipelines.cluster.failures import from_argo, last_words
from mixtune.pipelines.configuration import read_config

from .kfp_server import KfpServer
from .kubernetes_server import KubernetesServer
from .recordings import as_of, recorded, recorded_run, workflow

PLATFORM = "9bc77cb5-563a-4a00-957c-a72ea3205ccd"
BAD_DATA = "0762bf15-5129-4db5-831a-97eccf181af8"
NO_BUCKET = "wait: Error (exit code 64): failed to put file: The specified bucket does not exist"
UNSCHEDULABLE = "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint(s)."


@pytest.fixture
def server() -> Iterator[KfpServer]:
    with KfpServer() as running:
        yield running


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    with KubernetesServer() as running:
        running.write_kubeconfig(tmp_path / "kubeconfig")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield running


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MLFLOW_TRACKING_URI", "KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.01)


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return parameters(read_config(None, ["mixed.lambdas=[0.1,0.3]", "mixed.forgetting_budgets=[]"]))


def wait(server: KfpServer, run: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["wait", run, "--host", server.url, *options], prog_name="mixtune")


def lines(result: Result) -> list[str]:
    """The lines of progress, with single spaces."""
    return [" ".join(line.split()) for line in result.stdout.splitlines() if line.startswith("  ")]


def problems(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("mixtune: ")]


def argo_nodes(run: kfp_api.V2beta1Run, messages: dict[str, str]) -> list[dict[str, Any]]:
    """The nodes that KFP's details were made of, with the messages that KFP leaves out."""
    phases = {"SUCCEEDED": "Succeeded", "FAILED": "Failed", "RUNNING": "Running", "PENDING": "Pending"}
    return [
        {
            "displayName": one.display_name,
            "phase": phases.get(one.state, "Omitted"),
            "message": messages.get(one.display_name),
            "startedAt": one.start_time.isoformat(),
            "finishedAt": one.end_time.isoformat() if one.end_time.year > 1 else None,
            "children": [child.pod_name for child in one.child_tasks or []],
        }
        for one in run.run_details.task_details
    ]


def pending(run: kfp_api.V2beta1Run, **status: Any) -> dict[str, Any]:
    """The pod of the step that never started in the recording, created just now."""
    return {
        "metadata": {
            "name": "mixtune-evaluate-bh2nj-metadata-0-1-retry-system-container-impl-2960795668",
            "creationTimestamp": datetime.datetime.now(datetime.UTC).isoformat(),
            "labels": {"pipeline/runid": run.run_id},
            "annotations": {
                "workflows.argoproj.io/node-name": "mixtune-evaluate-bh2nj(0).root(0).evaluate(0).executor(0)"
            },
        },
        "spec": status.pop("spec", {"containers": []}),
        "status": {"phase": "Pending", **status},
    }


def unschedulable(message: str) -> list[dict[str, Any]]:
    return [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}]


def waiting_for(reason: str, message: str) -> dict[str, Any]:
    """The status of a pod whose container does not start."""
    container = {
        "name": "main", "image": "registry/mixtune-evaluate:1", "imageID": "", "ready": False, "restartCount": 0,
        "state": {"waiting": {"reason": reason, "message": message}},
    }  # fmt: skip
    return {
        "conditions": [{"type": "PodScheduled", "status": "True"}],
        "containerStatuses": [container],
    }


@pytest.mark.parametrize("compressed", [False, True])
def test_a_platform_error_is_the_sentence_of_the_node_that_failed_first(
    compressed: bool, server: KfpServer, cluster: KubernetesServer, values: dict[str, Any]
) -> None:
    messages = {f"root-driver({number})": NO_BUCKET for number in range(3)} | {"root-driver": "No more retries left"}
    nodes = argo_nodes(recorded_run("platform-failure"), messages | {"root-driver": NO_BUCKET})
    cluster.workflows = [workflow(nodes, PLATFORM, compressed)]
    result = wait(server, server.replay("platform-failure", parameters=values))
    assert result.exit_code == 1
    assert problems(result) == [
        "mixtune: the run: could not be started: failed to put file: The specified bucket does not exist"
    ]
    assert lines(result) == []


def test_without_kubernetes_a_driver_is_explained_by_its_log(server: KfpServer, values: dict[str, Any]) -> None:
    server.logs["mixtune-vsptf-system-dag-driver-1425526560"] = (
        'time=2026-11-26T11:00:47.0Z level=INFO msg="capturing logs" argo=true\n'
        "I1126 11:00:46.221203      29 env.go:31] cannot find launcher configmap\n"
        "F1126 11:00:47.331203      29 main.go:80] KFP driver: driver.RootDAG(...) failed: no route to ml-metadata\n"
    )
    result = wait(server, server.replay("platform-failure", parameters=values))
    assert problems(result) == [
        "mixtune: the run: could not be started: KFP driver: driver.RootDAG(...) failed: no route to ml-metadata"
    ]


def test_where_nothing_can_be_read_it_is_said_where_to_look(server: KfpServer, values: dict[str, Any]) -> None:
    result = wait(server, server.replay("platform-failure", parameters=values))
    assert problems(result) == [
        f"mixtune: the run: failed; see its log: {server.url}/#/runs/details/{PLATFORM} or "
        f"`kubectl describe pods --namespace kubeflow --selector pipeline/runid={PLATFORM}`"
    ]


def test_a_step_is_explained_by_its_own_sentence_in_the_log(server: KfpServer, values: dict[str, Any]) -> None:
    server.logs["mixtune-sfcjw-metadata-0-1-system-container-impl-3676484945"] = (
        "[KFP Executor 2026-11-26 11:34:15,124 INFO]: Looking for component `plan`\n"
        "plan: data.finetune.source: there is no file labels.jsonl\n"
        "I1126 11:34:19.123456      31 launcher_v2.go:177] publish success.\n"
        "F1126 11:34:19.223456      31 main.go:56] failed to execute component: exit status 1\n"
    )
    result = wait(server, server.replay("bad-data", parameters=values))
    assert problems(result) == ["mixtune: plan: data.finetune.source: there is no file labels.jsonl"]


def test_what_a_step_wrote_as_its_last_words_comes_first(
    server: KfpServer, cluster: KubernetesServer, values: dict[str, Any]
) -> None:
    pods = [one for one in recorded("pods") if one["metadata"]["labels"]["pipeline/runid"] == BAD_DATA]
    for pod in pods:
        for status in pod["status"]["containerStatuses"]:
            if (ended := status["state"]["terminated"])["exitCode"]:
                ended["message"] = "data.finetune.source: there is no file labels.jsonl"
            status |= {"image": "mixtune-plan", "imageID": "", "ready": False}
    cluster.workflows = [workflow(recorded("workflow-sfcjw")["nodes"], BAD_DATA)]
    cluster.pods = pods
    result = wait(server, server.replay("bad-data", parameters=values))
    assert problems(result) == ["mixtune: plan: data.finetune.source: there is no file labels.jsonl"]
    for pod in pods:
        for status in pod["status"]["containerStatuses"]:
            status["state"]["terminated"].pop("message", None)
    cluster.logs["mixtune-sfcjw-metadata-0-1-system-container-impl-3676484945"] = "plan: from the log\n"
    result = wait(server, server.replay("bad-data", parameters=values))
    assert problems(result) == ["mixtune: plan: from the log"]


def test_why_a_task_does_not_start_is_told_once_and_when_it_changes(
    server: KfpServer, cluster: KubernetesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = server.replay("pending-then-stopped", parameters={"config": "{}"}, moments=["11:51:00"] * 9)
    pod = recorded_run("pending-then-stopped")
    queue = {"schedulingGates": [{"name": "kueue.x-k8s.io/admission"}], "containers": []}
    states = [
        pending(pod, spec=queue), pending(pod, spec=queue),
        pending(pod, conditions=unschedulable(UNSCHEDULABLE)), pending(pod, conditions=unschedulable(UNSCHEDULABLE)),
        pending(pod, conditions=unschedulable("0/3 nodes are available: 3 Insufficient cpu.")),
        pending(pod, **waiting_for("ErrImagePull", "not found")),
        pending(pod, **waiting_for("ImagePullBackOff", "Back-off pulling image")),
        pending(pod, **waiting_for("CreateContainerConfigError", 'secret "mixtune-mlflow" not found')),
    ]  # fmt: skip
    answer = cluster.answer

    def one_state_at_each_look(path: str, query: dict[str, str], headers: Any) -> tuple[int, Any]:
        if path.endswith("/pods"):
            cluster.pods = [states.pop(0)] if states else []
        return answer(path, query, headers)

    monkeypatch.setattr(cluster, "answer", one_state_at_each_look)
    result = wait(server, run)
    assert lines(result) == [
        "evaluate mixed-0.3 pending: waits in the Kueue queue",
        f"evaluate mixed-0.3 pending: its pod cannot be scheduled: {UNSCHEDULABLE}",
        "evaluate mixed-0.3 pending: its pod cannot be scheduled: 0/3 nodes are available: 3 Insufficient cpu.",
        "evaluate mixed-0.3 pending: its image registry/mixtune-evaluate:1 cannot be pulled: not found",
        'evaluate mixed-0.3 pending: its container cannot be started: secret "mixtune-mlflow" not found',
        "evaluate mixed-0.3 stopped 1112 s",
    ]
    assert result.exit_code == 130


def test_a_pod_in_the_queue_is_told_with_the_words_of_its_workload(
    server: KfpServer, cluster: KubernetesServer, values: dict[str, Any]
) -> None:
    cluster.pods, cluster.workloads = recorded("kueue-pods"), recorded("kueue-workloads")
    for pod in cluster.pods:
        pod["spec"]["containers"] = []  # left out of the recording
    run = server.add_run(kfp_api.V2beta1Run(experiment_id="e", display_name="queued"))
    del server.store.runs[run.run_id]
    run.run_id, run.runtime_config = (
        "49bfb150-b0c0-4edc-bb1f-0cd261e0e4dd",
        kfp_api.V2beta1RuntimeConfig(parameters=values),
    )
    server.store.runs[run.run_id], server.store.scripts[run.run_id] = run, ["RUNNING", "RUNNING", "FAILED"]
    result = wait(server, run.run_id)
    (line,) = lines(result)
    assert line.startswith(
        "evaluate interpolated pending: waits in the Kueue queue mixtune: couldn't assign flavors to pod set main: "
        "insufficient quota for cpu in flavor mixtune-gpu"
    )


def test_what_hinders_a_volume_is_read_from_events(
    server: KfpServer, cluster: KubernetesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = pending(recorded_run("pending-then-stopped"), **waiting_for("ContainerCreating", ""))
    pod["metadata"]["creationTimestamp"] = "2026-11-26T11:50:42Z"
    cluster.pods = [pod]
    event = {"involvedObject": {"name": pod["metadata"]["name"]}, "metadata": {"name": "e"}, "type": "Warning",
             "reason": "FailedMount", "message": 'configmap "x" not found'}  # fmt: skip
    cluster.events = [{**event, "involvedObject": {"name": "another"}, "message": "not this"}, event]
    run = server.replay("pending-then-stopped", parameters={"config": "{}"}, moments=["11:51:00"])
    assert lines(wait(server, run))[0] == 'evaluate mixed-0.3 pending: FailedMount: configmap "x" not found'


def test_a_quota_is_told_in_argos_words(server: KfpServer, cluster: KubernetesServer) -> None:
    """No pod exists then."""
    said = 'pods "mixtune-evaluate-bh2nj-2960795668" is forbidden: exceeded quota: team, requested: cpu=2'
    run = server.replay("pending-then-stopped", parameters={"config": "{}"}, moments=["11:51:00"])
    nodes = argo_nodes(as_of(recorded_run("pending-then-stopped"), "11:51:00"), {"executor(0)": said})
    cluster.workflows = [workflow(nodes, run)]
    assert lines(wait(server, run))[0] == f"evaluate mixed-0.3 pending: {said}"


def test_a_killed_attempt_is_told_while_the_task_is_tried_again(
    server: KfpServer, cluster: KubernetesServer, values: dict[str, Any]
) -> None:
    pod = next(one for one in recorded("pods") if "iterations(1:1)" in json.dumps(one))
    main = pod["status"]["containerStatuses"][0]
    main |= {"image": "mixtune-mixed", "imageID": "", "ready": False}
    main["state"]["terminated"] |= {"reason": "OOMKilled", "exitCode": 137}
    pod["status"] |= {"phase": "Failed", "containerStatuses": [main]}
    limits = {"name": "main", "resources": {"limits": {"memory": "2Gi"}}}
    pod["spec"] = {"containers": [limits]}
    cluster.pods = [pod]
    run = server.replay("succeeded", parameters=values, moments=["11:14:00", "11:14:10"])
    told = [line for line in lines(wait(server, run)) if "killed" in line]
    assert told == [
        "mixed-0.3 was killed because it ran out of memory (limit 2Gi); raise placement.memory or placement.gpu_memory"
    ]


def test_pending_too_long_ends_the_wait_with_a_status_of_its_own(server: KfpServer, cluster: KubernetesServer) -> None:
    run = server.replay("pending-then-stopped", parameters={"config": "{}"}, moments=["11:51:00"] * 3)
    pod = pending(recorded_run("pending-then-stopped"), conditions=unschedulable(UNSCHEDULABLE))
    cluster.pods = [pod]
    assert wait(server, run, "--pending-timeout", "1h").exit_code == 130
    server.replay("pending-then-stopped", parameters={"config": "{}"}, moments=["11:51:00"] * 3)
    pod["metadata"]["creationTimestamp"] = "2026-11-26T11:50:42Z"
    result = wait(server, run, "--pending-timeout", "15m", "--json")
    assert result.exit_code == 5
    printed = json.loads(result.stdout)
    assert (printed["outcome"], printed["exit_status"]) == ("pending", 5)
    assert printed["verdict"] == "a task was pending for longer than --pending-timeout; the run continues"
    (sentence,) = printed["problems"]
    assert sentence.startswith("evaluate mixed-0.3: has been pending for ")
    assert (
        f"its pod cannot be scheduled: {UNSCHEDULABLE}; the run continues; wait for it with `mixtune wait {run}"
        in sentence
    )
    assert server.count("POST", "") == 0
    assert wait(server, run, "--pending-timeout", "soon").exit_code == 2


@pytest.mark.parametrize("named", [True, False])
def test_without_rights_the_command_to_look_with_is_told(
    named: bool, server: KfpServer, cluster: KubernetesServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.forbidden = "pods|workflows"
    if not named:
        monkeypatch.setenv("KUBECONFIG", "/nowhere")
    run = server.replay("pending-then-stopped", parameters={"config": "{}"}, moments=["11:51:00"] * 3)
    command = f"kubectl describe pods --namespace kubeflow --selector pipeline/runid={run}"
    result = wait(server, run)
    assert lines(result) == [
        f"evaluate mixed-0.3 pending; see why: {command}",
        "evaluate mixed-0.3 stopped 1112 s",
    ]
    server.replay("pending-then-stopped", parameters={"config": "{}"}, moments=["11:51:00"] * 3)
    result = wait(server, run, "--pending-timeout", "15m")
    assert result.exit_code == 5
    assert f"see why: {command}; the run continues" in problems(result)[0]


def test_what_kfp_called_pending_before_other_tasks_ended_is_not_believed(
    server: KfpServer, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large workflow KFP updates the nodes no longer."""
    monkeypatch.setattr(progress, "PENDING_SECONDS", 0.0)
    frozen = recorded_run("succeeded")
    executors = [one for one in frozen.run_details.task_details if one.display_name == "executor(0)"]
    for one in executors:
        one.state = "PENDING" if one.state == "RUNNING" else one.state
    frozen.state = "RUNNING"
    run = server.replay("succeeded", parameters=values)
    server.store.scripts[run].insert(0, frozen)
    result = wait(server, run, "--pending-timeout", "15m")
    assert result.exit_code == 4  # no verdict here
    assert not any("pending" in line for line in lines(result))


def test_a_cluster_that_does_not_answer_is_told_once(
    server: KfpServer, cluster: KubernetesServer, values: dict[str, Any]
) -> None:
    cluster.broken = "pods|workflows"
    run = server.replay("cached", parameters=values, moments=["11:26:30"] * 3)
    result = wait(server, run)
    told = [line for line in result.stdout.splitlines() if "Kubernetes API" in line]
    assert told == ["the Kubernetes API does not answer (status 503), so the reasons of pending tasks are not shown"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (NO_BUCKET, "failed to put file: The specified bucket does not exist"),
        ("main: Error (exit code 1)", ""),
        ("Error (exit code 1)", ""),
        ("main: Error (exit code 1): data.finetune: is empty", "data.finetune: is empty"),
        ("OOMKilled (exit code 137)", "was killed because it ran out of memory; raise placement.memory or "
         "placement.gpu_memory"),
        ("pod deleted", "pod deleted"),
        ("", ""),
    ],
)  # fmt: skip
def test_argos_messages(message: str, reason: str) -> None:
    assert from_argo(message) == reason


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        (
            "mixed-0.3: 10/20 steps\nTraceback\nKeyError: 'x'\nF1126 11:34:19.2  31 main.go:56] exit status 1",
            "KeyError: 'x'",
        ),
        ("plan: first\nplan: second\nF1126 11:34:19.2  31 main.go:56] exit status 1", "first; second"),
        ("plan: 10/20 steps, 3 s left\nplan: data: is empty\n", "data: is empty"),
        ("plan: 10/20 steps, 1,203 tokens/s, 3 s left\nF1126 11:34:19.2  31 main.go:56] signal: killed", ""),
        ("plan texts: 10/20 texts, 3 s left", ""),
    ],
)
def test_the_last_words_of_a_log(log: str, words: str) -> None:
    assert last_words(log, "plan") == words
