"""k8s/e2e.sh against recordings of a real cluster: it finds the pods of a step, and each of its checks can fail.

kubectl is the real one and talks to a small API server that has the recorded pods. What cannot run here is stood in for by
programs on the PATH: `mixtune`, whose answers a scenario sets, `curl`, and kubectl's `rollout` and `port-forward`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from .manifests import K8S, Manifest, build, containers, pod_specs
from .recorded_pods import NODE_NAME, RUN_ID, node_id, node_names, pod, pods_of, recorded
from .tools import kubectl, shellcheck

SCRIPT = K8S / "e2e.sh"
FIRST, CACHED, REFUSED = (
    json.loads((K8S.parent / "tests" / "recordings" / f"run-{name}.json").read_text())["run_id"]
    for name in ("succeeded", "cached", "bad-data")
)
ALONE = "0b7f5c7e-0000-4000-8000-000000000000"
Pods = list[dict[str, Any]]


class Cluster(ThreadingHTTPServer):
    """An API server that can list pods by label, and read the secret of MLflow."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pods: Pods = []
        self.secret: dict[str, str] | None = None


class _Handler(BaseHTTPRequestHandler):
    server: Cluster

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        folder = "/api/v1/namespaces/kubeflow"
        if url.path == "/api":
            self._answer({"kind": "APIVersions", "versions": ["v1"]})
        elif url.path == "/apis":
            self._answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": []})
        elif url.path == "/api/v1":
            kinds = [
                {"name": f"{kind.lower()}s", "singularName": kind.lower(), "namespaced": True, "kind": kind,
                 "verbs": ["get", "list"]}
                for kind in ("Pod", "Secret")
            ]  # fmt: skip
            self._answer({"kind": "APIResourceList", "groupVersion": "v1", "resources": kinds})
        elif url.path == f"{folder}/pods":
            key, _, value = parse_qs(url.query)["labelSelector"][0].partition("=")
            chosen = [one for one in self.server.pods if one["metadata"]["labels"].get(key) == value]
            self._answer({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": chosen})
        elif url.path == f"{folder}/secrets/mixtune-mlflow" and self.server.secret is not None:
            metadata = {"name": "mixtune-mlflow", "namespace": "kubeflow"}
            self._answer({"kind": "Secret", "apiVersion": "v1", "metadata": metadata, "data": self.server.secret})
        else:
            self._answer({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "not found"}, 404)

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


# The command's answers by what it is called for: exit status and standard output.
MIXTUNE = """#!{python}
import json, os, sys
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(words) + "\\n")
key = words[words.index("--run-key") + 1].lstrip("e2-0123456789") if "--run-key" in words else ""
name = words[0] + (" " + key if key else "")
if "--run-key" in words and "--wait" not in words:
    name += " again"
uploaded = sum(1 for line in open(os.environ["CALLS"]) if json.loads(line)[0] == "upload")
if name == "upload" and uploaded > 1:
    name += " again"
status, text = json.load(open(os.environ["ANSWERS"]))[name]
if "--summary" in words:
    open(words[words.index("--summary") + 1], "w").write("# Result")
print(text)
sys.exit(status)
"""
KUBECTL = """#!/bin/sh
for word; do
    case $word in
        rollout) exit 0 ;;
        port-forward) exec sleep 60 ;;
    esac
done
exec {kubectl} --server "$SERVER" "$@"
"""
CURL = "#!/bin/sh\nfor url; do :; done\ncase $url in $AWAY*) exit 7 ;; esac\n"


def result(run_id: str, verdict: str = "gate passed: mixed-0.3", **more: object) -> str:
    return json.dumps({"run_id": run_id, "verdict": verdict} | more)


def good_answers() -> dict[str, list[Any]]:
    """What mixtune answers where all is well."""
    return {
        "check": [0, "ok"],
        "upload": [0, "mixtune 1: uploaded"],
        "upload again": [0, "mixtune 1: already uploaded"],
        "submit": [0, result(FIRST)],
        "submit again": [0, result(FIRST, found=True)],
        "rerun from": [3, result(CACHED, "gate not met")],
        "rerun only": [0, result(ALONE, "the step succeeded")],
        "submit gate": [3, result(FIRST, "gate not met")],
        "submit refused": [2, result(REFUSED, "refused")],
    }


def good_pods() -> Pods:
    """The pods of three runs: all executed, all but `evaluate` and `compare` cached, one task alone.

    The recording of the first run ends before its last steps, and in the second `evaluate` came from the cache: their nodes are
    added in the form of the recorded ones.
    """
    first, cached = "mixtune-4l89s(0).root(0).exit-handler-1", "mixtune-jmcr2(0).root(0).exit-handler-1"
    return [
        *pods_of("run-succeeded"),
        pod(FIRST, f"{first}(0).compare(0).executor(0)"),
        pod(FIRST, f"{first}.onExit(0).finish(0).executor(0)"),
        *pods_of("run-cached"),
        pod(CACHED, f"{cached}(0).evaluate-2(0).executor(0)"),
        pod(ALONE, "mixtune-evaluate-x7k2p(0).root(0).evaluate-driver(0)"),
        pod(ALONE, "mixtune-evaluate-x7k2p(0).root(0).evaluate(0).executor(0)"),
    ]


class Script:
    """k8s/e2e.sh with what it needs.

    Args:
        folder: for the programs and what they write.
        cluster: what kubectl talks to.
    """

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.answers = good_answers()
        self.away = "nothing"
        cluster.pods = good_pods()
        cluster.secret = {
            "MLFLOW_TRACKING_USERNAME": "bWl4dHVuZS1zdGVwcw==",
            "MLFLOW_TRACKING_PASSWORD": "bWFkZS11cA==",
        }
        programs = {
            "mixtune": MIXTUNE.format(python=sys.executable),
            "kubectl": KUBECTL.format(kubectl=kubectl()),
            "curl": CURL,
        }
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def run(self, part: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs the whole script, or a line of shell that uses its functions."""
        (self.folder / "answers").write_text(json.dumps(self.answers))
        environment = {
            "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "CALLS": str(self.folder / "calls"),
            "ANSWERS": str(self.folder / "answers"),
            "SERVER": f"http://127.0.0.1:{self.cluster.server_port}",
            "AWAY": self.away,
        }
        command = (
            ["bash", str(SCRIPT)] if part is None else ["bash", "-c", f"source {SCRIPT}; sleep() {{ :; }}; {part}"]
        )
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    def calls(self) -> list[list[str]]:
        """What mixtune was called with."""
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    with Cluster() as cluster:
        threading.Thread(target=cluster.serve_forever, daemon=True).start()
        yield Script(tmp_path, cluster)
        cluster.shutdown()


def test_bash_and_shellcheck_have_nothing_to_say() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    done = subprocess.run([shellcheck(), SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_pods_that_are_found_are_the_recorded_ones() -> None:
    for one in recorded():
        workflow, name = (
            one["metadata"]["labels"]["workflows.argoproj.io/workflow"],
            one["metadata"]["annotations"][NODE_NAME],
        )
        assert one["metadata"]["annotations"]["workflows.argoproj.io/node-id"] == node_id(workflow, name)
        assert one["metadata"]["name"].endswith(node_id("", name))
    known = {
        one["metadata"]["annotations"][NODE_NAME] for one in recorded() if one["metadata"]["labels"][RUN_ID] == FIRST
    }
    assert known <= set(node_names("run-succeeded"))


def test_the_pod_of_pretrain_is_found_and_missed(script: Script) -> None:
    done = script.run(
        f"nodes {FIRST} | executed pretrain; expect_executed {FIRST} plan prepare pretrain finetune mixed evaluate"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mixtune-4l89s(0).root(0).exit-handler-1(0).pretrain(0).executor(0)\n"
    script.cluster.pods = recorded()
    assert script.run(f"expect_executed {FIRST} plan mixed").returncode == 0
    for run in (FIRST, REFUSED):
        done = script.run(f"expect_executed {run} plan pretrain")
        assert done.returncode == 1
        assert done.stderr == f"e2e.sh: FAILED: run {run}: no pod executed pretrain\n"


def test_a_task_from_the_cache_is_told_by_its_missing_pod(script: Script) -> None:
    assert any(".pretrain-driver(" in name for name in node_names("run-cached"))
    done = script.run(
        f"expect_cached {CACHED} prepare pretrain finetune mixed; expect_executed {CACHED} plan compare register finish"
    )
    assert done.returncode == 0, done.stderr
    done = script.run(f"expect_cached {FIRST} pretrain")
    assert done.returncode == 1
    assert "pretrain should come from the cache" in done.stderr


@pytest.mark.parametrize("check", ["expect_executed", "expect_cached"])
def test_a_run_without_any_pod_passes_no_check(script: Script, check: str) -> None:
    done = script.run(f"{check} no-such-run pretrain; echo went on")
    assert done.returncode != 0
    assert "no pod has the label pipeline/runid=no-such-run" in done.stderr
    assert "went on" not in done.stdout


@pytest.mark.parametrize("check", ["expect_executed", "expect_cached"])
def test_a_cluster_that_does_not_answer_passes_no_check(script: Script, check: str) -> None:
    done = script.run(f"SERVER=http://127.0.0.1:1; {check} {CACHED} pretrain; echo went on")
    assert done.returncode != 0
    assert f"kubectl cannot list the pods of run {CACHED}" in done.stderr
    assert "went on" not in done.stdout


def test_all_of_it_passes_where_all_is_well(script: Script) -> None:
    done = script.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All checks passed" in done.stdout
    calls = script.calls()
    assert [one[0] for one in calls] == [
        "check",
        "upload",
        "upload",
        "submit",
        "submit",
        "rerun",
        "rerun",
        "submit",
        "submit",
    ]
    assert "gate.min_task_score=0.99" in calls[-2]
    assert all("placement.cpu=200m" in one for one in calls if one[0] != "rerun")
    assert "made-up" not in done.stdout + done.stderr


def without(pods: Pods, run: str, part: str) -> Pods:
    return [
        one
        for one in pods
        if one["metadata"]["labels"][RUN_ID] != run or part not in one["metadata"]["annotations"][NODE_NAME]
    ]


WRONG_ANSWERS = [
    ("check", [2, ""], "exit status 2, expected 0: mixtune check"),
    ("upload", [4, ""], "exit status 4, expected 0: mixtune upload"),
    ("upload again", [0, "mixtune 2: uploaded"], "the second upload made a version"),
    ("submit", [1, result(FIRST)], "exit status 1, expected 0 3: mixtune submit"),
    ("submit", [0, result(FIRST, "failed: KFP says COMPLETE")], "its verdict in MLflow is 'failed: KFP says COMPLETE'"),
    ("submit again", [0, result(CACHED, found=True)], f"the run with the same key is '{CACHED}'"),
    ("submit again", [0, result(FIRST, found=False)], "found is 'False', expected 'True'"),
    ("rerun from", [1, result(CACHED)], "exit status 1, expected 0 3: mixtune rerun"),
    ("rerun from", [0, result(FIRST)], "prepare should come from the cache"),
    ("rerun only", [1, result(ALONE)], "exit status 1, expected 0: mixtune rerun"),
    ("rerun only", [0, result(CACHED)], "compare should come from the cache"),
    ("submit gate", [0, result(FIRST)], "exit status 0, expected 3: mixtune submit"),
    ("submit gate", [3, result(FIRST, "failed: KFP says COMPLETE")], "its verdict in MLflow is"),
    ("submit refused", [1, result(REFUSED)], "exit status 1, expected 2: mixtune submit"),
]


@pytest.mark.parametrize(
    ("call", "answer", "sentence"), WRONG_ANSWERS, ids=[f"{one[0]}-{one[2][:20]}" for one in WRONG_ANSWERS]
)
def test_a_wrong_answer_of_mixtune_fails(script: Script, call: str, answer: list[Any], sentence: str) -> None:
    script.answers[call] = answer
    done = script.run()
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "All checks passed" not in done.stdout


@pytest.mark.parametrize("step", ["prepare", "pretrain", "evaluate", "finish"])
def test_a_step_that_did_not_run_fails(script: Script, step: str) -> None:
    pods = script.cluster.pods
    for number in ("", "-2", "-3", "-4"):
        pods = without(pods, FIRST, f".{step}{number}(0).executor(")
    script.cluster.pods = pods
    done = script.run()
    assert done.returncode == 1
    assert f"run {FIRST}: no pod executed {step}" in done.stderr


@pytest.mark.parametrize(
    ("run", "added", "removed", "sentence"),
    [
        (CACHED, ".pretrain(0).executor(0)", "nothing", "pretrain should come from the cache"),
        (CACHED, ".mixed(0).executor(1)", "nothing", "mixed should come from the cache"),
        (CACHED, "", ".evaluate-2(0).executor(", "no pod executed evaluate"),
        (CACHED, "", "mixtune-", f"no pod has the label pipeline/runid={CACHED}"),
        (ALONE, "", ".evaluate(0).executor(", "no pod executed evaluate"),
        (ALONE, ".finetune(0).executor(0)", "nothing", "finetune should come from the cache"),
    ],
)
def test_a_rerun_that_ran_the_wrong_steps_fails(
    script: Script, run: str, added: str, removed: str, sentence: str
) -> None:
    pods = without(script.cluster.pods, run, removed)
    script.cluster.pods = [*pods, pod(run, f"mixtune-jmcr2(0).root(0).exit-handler-1(0){added}")] if added else pods
    done = script.run()
    assert done.returncode == 1
    assert sentence in done.stderr


@pytest.mark.parametrize("address", ["http://127.0.0.1:8888", "http://127.0.0.1:5000"])
def test_a_server_that_does_not_answer_fails(script: Script, address: str) -> None:
    script.away = address
    done = script.run("main")
    assert done.returncode == 1
    assert f"e2e.sh: FAILED: {address}" in done.stderr
    assert not (script.folder / "calls").exists()


@pytest.mark.parametrize("secret", [None, {"MLFLOW_TRACKING_USERNAME": "YQ=="}])
def test_a_missing_account_fails(script: Script, secret: dict[str, str] | None) -> None:
    script.cluster.secret = secret
    done = script.run()
    assert done.returncode == 1
    assert "e2e.sh: FAILED: the secret mixtune-mlflow" in done.stderr
    assert not (script.folder / "calls").exists()


# What else requests CPU on a kind node, in millicores. KFP 2.17: API server 250, persistence agent 120, MySQL 100, Argo 100,
# SeaweedFS 64, visualization 30, UI 10, and 10 each of three pods by their init containers. kubeadm and kind: API server 250,
# controller manager 200, scheduler 100, etcd 100, CoreDNS twice 100, network 100.
KFP_CPU = 250 + 120 + 100 + 100 + 64 + 30 + 10 + 3 * 10
KUBERNETES_CPU = 250 + 200 + 100 + 100 + 2 * 100 + 100
NODE_CPU = 2000
DRIVER_CPU = 100


def millicores(quantity: str) -> int:
    return int(quantity[:-1]) if quantity.endswith("m") else round(float(quantity) * 1000)


def requested(container: Manifest) -> int:
    return millicores(container["resources"]["requests"]["cpu"])


def test_a_whole_run_fits_on_a_node_of_two_cores() -> None:
    servers = 0
    for one, template in pod_specs(build("overlays/local")):
        if one["kind"] != "CronJob":
            spec = template["spec"]
            together = sum(requested(container) for container in spec["containers"])
            servers += max(together, *(requested(container) for container in containers(template)))
    assert servers
    (task,) = re.findall(r"^CPU=\$\{CPU:-(.*)\}$", SCRIPT.read_text(), re.MULTILINE)
    free = NODE_CPU - KFP_CPU - KUBERNETES_CPU - servers
    assert millicores(task) <= free
    assert free >= DRIVER_CPU
