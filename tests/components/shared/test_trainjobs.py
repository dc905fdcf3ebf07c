"""The life of a TrainJob, as its launcher sees it, against a server that plays a Trainer, with recorded answers and faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.finetune.config import Finetune, FinetuneStep
from mixtune.components.shared.artifacts import Artifact, write_json
from mixtune.components.shared.checkpoints.clearing import clear_finished
from mixtune.components.shared.nodes import exchange, launcher
from mixtune.components.shared.nodes.exchange import seal_results
from mixtune.components.shared.nodes.manifest import POD_NAME, POD_NAMESPACE, TRAINJOB, patched, variable_of
from mixtune.components.shared.nodes.trainjobs import Pace
from mixtune.components.shared.outcome import load_outcomes
from mixtune.components.shared.runtime import launch
from tests.trainer_server import Fault, Frame, TrainerServer, as_recorded, pod, recorded, refused_pods, running

CONFIG = FinetuneStep(seed=0, max_length=32, finetune=Finetune(steps=2)).to_json()
COMPILED = {
    "labels": {"kueue.x-k8s.io/queue-name": "team"},
    "spec": {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "mixtune"},
        "trainer": {
            "image": "mixtune-finetune:0.1.0", "numNodes": 2, "env": [],
            "resourcesPerNode": {"limits": {"cpu": "2", "memory": "8Gi"}},
        },
        "runtimePatches": patched({"labels": {"app.kubernetes.io/part-of": "mixtune"}}, {"volumes": []}),
    },
}  # fmt: skip
COMPLETE = as_recorded("complete")
ROOT = Path(__file__).parents[3]
FAST = Pace(look=0.01, first=0.01, longest=0.02, patience=0.5, settle=0.1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The launching pod: its environment, its inputs, and a volume."""
    for name, value in {
        "KUBECONFIG": str(tmp_path / "kubeconfig"), "MIXTUNE_RUN_ID": "run-1",
        "MIXTUNE_CHECKPOINT_DIR": str(tmp_path / "volume"), "MIXTUNE_OUTCOME_DIR": str(tmp_path / "outcomes"),
        POD_NAMESPACE: "ns", POD_NAME: "launching",
        TRAINJOB: json.dumps(COMPILED), variable_of("gpus"): "4", variable_of("gpu_type"): "nvidia.com/gpu",
        variable_of("node_selector"): '{"pool": "a100"}', variable_of("tolerations"): '[{"operator": "Exists"}]',
        variable_of("affinity"): "{}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "PACE", FAST)
    for name in ("start", "data"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text(name)
    (tmp_path / "volume").mkdir()
    return tmp_path


def cluster(here: Path, *frames: Frame, **options: Any) -> TrainerServer:
    server = TrainerServer(*frames, **options)
    server.write_kubeconfig(here / "kubeconfig")
    return server


def step(here: Path) -> dict[str, Artifact]:
    """Runs the step as KFP does."""
    names = ("start", "data", "model", "metrics")
    artifacts = {name: Artifact(str(here / name), uri=f"s3://bucket/{name}") for name in names}
    launch("finetune", CONFIG, artifacts)
    return artifacts


def folder_of(job: dict[str, Any]) -> Path:
    return Path(job["spec"]["trainer"]["command"][-1])


def trained(job: dict[str, Any]) -> None:
    """What the nodes leave on the volume."""
    folder = folder_of(job)
    order = json.loads((folder / "order.json").read_text())
    assert (Path(order["artifacts"]["start"]["path"]) / "sub" / "file").read_text() == "start"
    model = Path(order["artifacts"]["model"]["path"])
    model.mkdir(parents=True)
    (model / "weights").write_text("trained")
    write_json(folder / "done.json", {"metadata": {"model": {"candidate": "finetuned"}}, "facts": {"a": "b"}})
    seal_results(folder)


def raised(job: dict[str, Any], kind: str, rank: int = 1) -> None:
    write_json(folder_of(job) / f"raised-{rank}.json", {"kind": kind, "problems": ["data: one sentence"]})


def ended(here: Path) -> tuple[Any, list[str]]:
    """Runs the step to its failure; returns exit status and sentences."""
    with pytest.raises(SystemExit) as error:
        step(here)
    (outcome,) = load_outcomes(here / "outcomes")
    return error.value.code, outcome.sentences


def test_a_training_from_its_creation_to_its_results(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [Frame(), as_recorded("suspended"), as_recorded("unschedulable"), Frame({}, running()), COMPLETE]
    with cluster(here, *frames, on_create=trained) as server:
        server.logs["a-0"] = ["2026-11-26T12:00:01.12Z first", "2026-11-26T12:00:01.123Z second"]
        artifacts = step(here)
    job_name = server.created[0]
    assert server.created == server.deleted == [job_name]
    assert server.jobs == {}
    assert server.queries == [{"propagationPolicy": "Foreground"}]
    assert (here / "model" / "weights").read_text() == "trained"
    assert artifacts["model"].metadata["candidate"] == "finetuned"
    (outcome,) = load_outcomes(here / "outcomes")
    assert (outcome.kind, outcome.facts) == ("done", {"a": "b"})
    assert not list((here / "volume").glob("job-*"))
    assert not list((here / "volume").glob("partial-*"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"finetune: created the TrainJob {job_name} with 2 nodes in ns",
        f"finetune: the TrainJob {job_name}: waiting: 0 of 2 nodes run",
        f"finetune: the TrainJob {job_name}: waiting: is suspended; a queue admits it when there is room",
        f"finetune: the TrainJob {job_name}: waiting: 0 of 2 nodes run",
        "first",
        "second",
        f"finetune: the TrainJob {job_name}: running: 2 of 2 nodes run",
        f"finetune: the TrainJob {job_name}: complete: AllJobsCompleted: jobset completed successfully",
    ]


def test_the_trainjob_has_what_the_run_knows(here: Path) -> None:
    made: list[dict[str, Any]] = []

    def keep(job: dict[str, Any]) -> None:
        made.append(job)
        trained(job)

    with cluster(here, COMPLETE, on_create=keep):
        step(here)
    (job,) = made
    trainer = job["spec"]["trainer"]
    assert trainer["command"][:3] == ["python3", "-m", "mixtune.components.shared.nodes.node"]
    assert trainer["numProcPerNode"] == 4
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "4"}
    assert {one["name"]: one["value"] for one in trainer["env"]} == {"MIXTUNE_GPUS": "4", "MIXTUNE_RUN_ID": "run-1"}
    (replicated,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]["template"]["spec"]
    assert (spec["nodeSelector"], spec["tolerations"]) == ({"pool": "a100"}, [{"operator": "Exists"}])
    assert "affinity" not in spec
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team", "mixtune/run": "run-1"}
    (owner,) = job["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "w", "uid": "u"}
    # All that a real API server stored of a TrainJob has the same names.
    real = recorded("trainjob-complete")
    assert job.keys() - {"status"} <= real.keys()
    assert job["spec"].keys() - {"runtimePatches"} <= real["spec"].keys()
    assert job["spec"]["runtimeRef"].keys() == real["spec"]["runtimeRef"].keys()
    assert trainer.keys() - {"env", "numProcPerNode"} <= real["spec"]["trainer"].keys()


def test_a_refusal_is_refused_again_without_another_trainjob(here: Path) -> None:
    def refuse(job: dict[str, Any]) -> None:
        raised(job, "failed", rank=0)  # what another rank makes of it
        raised(job, "refused")

    with cluster(here, Frame({}, running()), as_recorded("refused", refused_pods()), on_create=refuse) as server:
        assert ended(here) == (2, ["data: one sentence"])
        assert server.deleted == server.created
        (here / "outcomes").rename(here / "of another pod")
        assert ended(here) == (2, ["data: one sentence"])
        assert len(server.created) == 1


def test_a_refusal_without_a_record_is_the_message_of_its_container(here: Path) -> None:
    with cluster(here, as_recorded("crash-loop", refused_pods())) as server:
        assert ended(here) == (2, ["finetune: one sentence"])
    assert server.deleted == server.created


def test_the_last_lines_of_the_node_that_failed_stand_in_the_log(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"terminated": {"exitCode": 3, "reason": "Error", "finishedAt": "2026-11-26T12:00:00Z"}}
    failed = [running()[0], pod("lost", 1, phase="Failed", containerStatuses=[{"state": state}])]
    frames = [Frame({}, failed), Frame({}, running("b")), as_recorded("refused")]
    with cluster(here, *frames, on_create=lambda job: raised(job, "failed")) as server:
        server.logs["lost"] = [f"2026-11-26T12:00:00Z line {number}" for number in range(40)]
        assert ended(here) == (1, ["data: one sentence"])
        printed = capsys.readouterr().out
        assert "finetune: node 1 ended with exit status 3\n  node 1: line 20\n" in printed
        assert printed.count("line 39") == 1
        # A retry starts anew: the failure of the first attempt is no refusal, and its record is gone.
        server.frames, server.on_create = [COMPLETE], trained
        step(here)
        assert len(server.created) == len(server.deleted) == 2


def test_an_end_without_any_record_names_the_node(here: Path) -> None:
    state = {"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-11-26T12:00:00Z"}}
    pods = [pod("p", 1, phase="Failed", containerStatuses=[{"state": state}])]
    with cluster(here, as_recorded("refused", pods)):
        status, (sentence,) = ended(here)
    assert status == 1
    assert (
        "failed: node 1 ran out of memory (OOMKilled), and its last lines stand above; ReachedMaxRestarts" in sentence
    )


def test_an_evicted_node_is_told_and_waited_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evicted = pod("a-1", 1, phase="Failed", reason="Evicted", message="The node was low on memory.")
    frames = [Frame({}, [running()[0], evicted]), Frame({}, running("b")), as_recorded("evicted")]
    with cluster(here, *frames, on_create=trained):
        step(here)
    assert "finetune: node 1 was removed (Evicted): The node was low on memory." in capsys.readouterr().out


def test_faults_of_the_api_are_waited_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with cluster(here, Frame({}, running()), COMPLETE, on_create=trained) as server:
        server.faults = [
            Fault("POST", "trainjobs", after=True),  # created, but its answer is lost: the next request conflicts
            Fault("GET", "trainjobs/", status=503, times=2),
            Fault("GET", "trainjobs/", status=401),
            Fault("GET", "pods$", status=429, headers={"Retry-After": "0"}),
            Fault("GET", "pods$"),
            Fault("DELETE", "trainjobs", after=True),
        ]
        step(here)
        assert not [one for one in server.faults if one.times]
    assert len(server.created) == 1
    assert server.jobs == {}
    printed = capsys.readouterr().out
    assert "the cluster does not answer (status 503); trying again" in printed
    assert "found the TrainJob" in printed


def test_a_cluster_that_is_away_leaves_the_trainjob_for_the_next_attempt(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster(here, Frame({}, running()), COMPLETE, on_create=trained) as server:
        server.faults = [Fault("GET", "pods$", status=500, times=1000)]
        status, (sentence,) = ended(here)
        assert status == 4
        assert "the TrainJob goes on, and a retry of this task finds it again" in sentence
        assert (len(server.created), server.deleted) == (1, [])
        server.faults = []
        step(here)  # it has ended meanwhile
    assert (here / "model" / "weights").read_text() == "trained"
    assert len(server.created) == len(server.deleted) == 1
    assert "finetune: found the TrainJob" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["before its inputs are copied", "while the request is answered", "while it runs"])
def test_a_launching_pod_that_is_killed_leaves_no_second_trainjob(where: str, here: Path) -> None:
    with cluster(here, Frame({}, running())) as server:
        reached = threading.Event()

        def train_and_wait(job: dict[str, Any], seconds: float) -> None:
            trained(job)
            reached.set()
            time.sleep(seconds)

        if where == "before its inputs are copied":
            server.faults = [Fault("GET", "trainjobs/", status=503, times=1000)]
            reached.set()
        elif where == "while the request is answered":
            server.on_create = lambda job: train_and_wait(job, 1.0)
        else:
            server.on_create = lambda job: train_and_wait(job, 0.0)
        code = f"import pathlib; from {__name__} import step; step(pathlib.Path({str(here)!r}))"
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as pod_process:
            while not reached.is_set() or not server.requests:
                time.sleep(0.02)
            pod_process.kill()
        killed_with = len(server.created)
        server.faults, server.frames, server.on_create = [], [COMPLETE], trained
        step(here)
    assert killed_with == (0 if where == "before its inputs are copied" else 1)
    assert len(server.created) == len(server.deleted) == 1
    assert (here / "model" / "weights").read_text() == "trained"


def test_a_trainjob_that_is_being_deleted_is_waited_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with cluster(here, as_recorded("refused"), on_create=lambda job: raised(job, "failed")) as server:
        server.keeps = 3
        assert ended(here)[0] == 1
        server.frames, server.on_create = [COMPLETE], trained
        step(here)
        assert len(server.created) == 2
    assert "an earlier attempt's TrainJob is being deleted" in capsys.readouterr().out


def test_a_trainjob_of_this_name_that_is_not_ours_is_left_alone(here: Path) -> None:
    with cluster(here, COMPLETE, on_create=trained) as server:
        step(here)
        name = server.created[0]
        server.jobs[name] = {"metadata": {"name": name, "annotations": {}}, "spec": {}}
        (outcome,) = (here / "outcomes").glob("*.json")
        outcome.unlink()
        status, (sentence,) = ended(here)
    assert status == 2
    assert f"the TrainJob {name} in ns is not of this task; delete it" in sentence
    assert name in server.jobs
    assert len(server.deleted) == 1


def test_somebody_who_deletes_the_trainjob_ends_the_task(here: Path) -> None:
    with cluster(here, Frame({}, running())) as server:
        server.on_create = lambda job: threading.Timer(0.1, server.jobs.clear).start()
        status, (sentence,) = ended(here)
    assert status == 1
    assert "was deleted while it ran; run again to go on" in sentence


def test_sigterm_deletes_the_trainjob(here: Path) -> None:
    with cluster(here, Frame({}, running())) as server:
        server.on_create = lambda job: threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert ended(here) == (143, ["ended by SIGTERM"])
    assert len(server.created) == 1
    assert server.deleted == server.created


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            Fault("POST", "trainjobs", 404),
            "Kubeflow Trainer is not installed in this cluster; apply k8s/components/trainer",
        ),
        (
            Fault("POST", "trainjobs", 403, message="User cannot create"),
            "the account of this pod may not create trainjobs.trainer.kubeflow.org in ns; apply k8s/components/trainer",
        ),
        (
            Fault("POST", "trainjobs", 403, message='admission webhook "v" denied the request: no such runtime'),
            'the cluster refuses the request to create trainjobs.trainer.kubeflow.org (403: admission webhook "v" denied',
        ),
        (Fault("POST", "trainjobs", 422, message="spec.x is invalid"), "(422: spec.x is invalid)"),
    ],
)
def test_what_the_cluster_refuses_is_told_at_once(fault: Fault, told: str, here: Path) -> None:
    with cluster(here) as server:
        server.faults = [fault]
        status, (sentence,) = ended(here)
    assert status == 2
    assert told in sentence


def test_an_older_trainer_that_drops_the_volumes_is_refused(here: Path) -> None:
    with cluster(here) as server:
        server.drops_patches = True
        status, (sentence,) = ended(here)
    assert status == 2
    assert "install Kubeflow Trainer 2.2 or newer" in sentence
    assert server.deleted == server.created


def corrupt(job: dict[str, Any]) -> None:
    trained(job)
    (folder_of(job) / "outputs/model/weights").write_text("tra1ned")


def partial(job: dict[str, Any]) -> None:
    trained(job)
    (folder_of(job) / "results.json").unlink()


def shortened(job: dict[str, Any]) -> None:
    trained(job)
    (folder_of(job) / "outputs/model/weights").write_text("t")


@pytest.mark.parametrize(
    ("leave", "told"),
    [
        (corrupt, "model/weights lacks its hash"),
        (partial, "results.json is missing"),
        (shortened, "outputs/model/weights"),
    ],
)
def test_nothing_partial_is_taken_for_a_result(leave: Any, told: str, here: Path) -> None:
    with cluster(here, COMPLETE, on_create=leave) as server:
        status, (sentence,) = ended(here)
        assert status == 1
        assert sentence.startswith("the results of the training are not whole (")
        assert told in sentence
        assert not (here / "model").exists()
        server.frames, server.on_create = [COMPLETE], trained
        step(here)
    assert (here / "model" / "weights").read_text() == "trained"


def test_results_that_are_seen_late_are_waited_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "PACE", Pace(look=0.01, first=0.01, patience=0.5, settle=20.0))
    with cluster(here, COMPLETE, on_create=lambda job: threading.Timer(0.3, trained, (job,)).start()):
        step(here)
    assert (here / "model" / "weights").read_text() == "trained"


def test_inputs_are_copied_once_in_a_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(here, COMPLETE, on_create=trained) as server:
        step(here)
        copies = {folder: folder.stat().st_mtime_ns for folder in (here / "volume").glob("input-*")}
        assert len(copies) == 2
        step(here)
        assert {folder: folder.stat().st_mtime_ns for folder in (here / "volume").glob("input-*")} == copies
        monkeypatch.setenv("MIXTUNE_RUN_ID", "run-2")
        step(here)
    assert server.created[0] == server.created[1] != server.created[2]
    assert len(list((here / "volume").glob("input-*"))) == 4


def test_a_run_that_has_succeeded_leaves_nothing_on_the_volume(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as killed:  # with SIGKILL, while it copies
        killed.setattr(exchange, "_copy", lambda *paths: os._exit(9))
        assert (
            os.waitstatus_to_exitcode(
                os.waitpid(forked(lambda: exchange.lay_in(here / "volume", "run-1", START)), 0)[1]
            )
            == 9
        )
    with cluster(here, COMPLETE, on_create=trained):
        step(here)
    assert clear_finished(str(here / "volume"), "run-2") == 0
    assert sorted(one.name.split("-")[0] for one in (here / "volume").iterdir()) == ["input", "input", "partial"]
    assert clear_finished(str(here / "volume"), "run-1") == 0, "no checkpoints"
    assert list((here / "volume").iterdir()) == []


def test_a_cluster_that_is_away_in_the_end_costs_no_results(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with cluster(here, COMPLETE, on_create=trained) as server:
        server.faults = [Fault("DELETE", "trainjobs", status=503, times=1000)]
        step(here)
    assert (here / "model" / "weights").read_text() == "trained"
    assert "the cluster does not answer since" in capsys.readouterr().out


START = Artifact("nowhere", uri="s3://bucket/start")


def forked(work: Any) -> int:
    """Does something in a process of its own and returns its id."""
    if pid := os.fork():
        return pid
    work()
    os._exit(0)


@pytest.fixture
def of_stopped_run(here: Path) -> Iterator[TrainerServer]:
    """A cluster in which the pods of two runs were stopped without a signal."""
    with cluster(here, Frame({}, running())) as server:
        for name, run in (("a", "run-1"), ("b", "run-1"), ("c", "run-2")):
            server.jobs[name] = {"metadata": {"name": name, "labels": {"mixtune/run": run}}, "spec": {}}
        yield server


def test_finish_deletes_what_a_stopped_run_has_left(of_stopped_run: TrainerServer) -> None:
    launch("finish", "{}", {}, state="FAILED", error="stopped")
    assert sorted(of_stopped_run.deleted) == ["a", "b"]


def test_finish_ends_well_where_the_cluster_refuses(
    of_stopped_run: TrainerServer, capsys: pytest.CaptureFixture[str]
) -> None:
    of_stopped_run.faults = [Fault("GET", "trainjobs$", 403, message="User cannot list")]
    launch("finish", "{}", {}, state="FAILED", error="stopped")
    assert "may not list trainjobs.trainer.kubeflow.org" in capsys.readouterr().out
