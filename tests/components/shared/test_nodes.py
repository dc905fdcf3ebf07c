"""The nodes of a TrainJob: exit statuses, and a true training whose nodes are processes here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mixtune.components.shared.artifacts import read_jsonl, write_json
from mixtune.components.shared.checkpoints.store import CHECKPOINT_DIR
from mixtune.components.shared.nodes import launcher, node
from mixtune.components.shared.nodes.exchange import hashes_of
from mixtune.components.shared.nodes.manifest import POD_NAMESPACE, TRAINJOB
from mixtune.components.shared.nodes.trainjobs import Pace
from mixtune.components.shared.running import processes
from tests.mlflow_server import free_port
from tests.trainer_server import Frame, TrainerServer, as_recorded, pod, running

from .several import PROCESSES, Steps, mixed_at
from .test_trainjobs import COMPILED

RECORD = "import sys; open(sys.argv[-1] + '/asked', 'w').write(' '.join(sys.argv[1:-3])); "
"""In place of torchrun: it leaves its options in the folder."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a TrainJob, seen from its first node, with one input."""
    for name, value in {
        "PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "16", "PET_MASTER_ADDR": "job-node-0-0.job",
        "PET_MASTER_PORT": "29500", PROCESSES: "4",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "input" / "files").mkdir(parents=True)
    (tmp_path / "input" / "files" / "weights").write_text("w")
    write_json(tmp_path / "input" / "files.json", hashes_of(tmp_path / "input" / "files"))
    job = tmp_path / "job"
    artifacts = {
        "start": {"path": str(tmp_path / "input" / "files")},
        "model": {"path": str(job / "outputs" / "model")},
    }
    write_json(job / "order.json", {"artifacts": artifacts})
    return job


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> int:
    monkeypatch.setattr(processes, "TORCHRUN", RECORD + program)
    return node.run_node(folder)


WRITE = (
    "import pathlib; made = pathlib.Path(sys.argv[-1], 'outputs/model'); made.mkdir(parents=True); (made / 'w').touch()"
)


def test_torchrun_is_told_where_the_others_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "outputs" / "model").mkdir(parents=True)
    (folder / "outputs" / "model" / "of another attempt").touch()
    write_json(folder / "raised-1.json", {"kind": "failed", "problems": ["of another attempt"]})
    assert run(folder, monkeypatch, WRITE) == 0
    assert (folder / "asked").read_text() == (
        "--nnodes=2 --node-rank=0 --nproc-per-node=4 --master-addr=job-node-0-0.job --master-port=29500"
    )
    assert json.loads((folder / "results.json").read_text()).keys() == {"model/w"}
    assert not list(folder.glob("raised-*"))
    # The pods were lost after the end, and all nodes start again.
    (folder / "asked").unlink()
    assert run(folder, monkeypatch, "sys.exit(1)") == 0
    assert not (folder / "asked").exists()


def test_only_the_first_node_writes_results(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NODE_RANK", "1")
    (folder / "outputs").mkdir()
    assert run(folder, monkeypatch, "") == 0
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize(
    ("kinds", "status"), [(["refused"], 2), (["failed"], 1), (["failed", "refused"], 2), ([], node.LOST)]
)
def test_exit_status_of_a_node(kinds: list[str], status: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = {f"raised-{rank}.json": json.dumps({"kind": kind, "problems": ["one"]}) for rank, kind in enumerate(kinds)}
    write = f"[open(sys.argv[-1] + '/' + name, 'w').write(text) for name, text in {raised!r}.items()]"
    assert run(folder, monkeypatch, f"{write}; sys.exit(1)") == status
    assert not (folder / "results.json").exists()
    (folder / "asked").unlink()
    again = run(folder, monkeypatch, "sys.exit(1)")
    assert again == (2 if status == 2 else node.LOST)
    assert (folder / "asked").exists() == (status != 2), "what was refused is refused at once"


def test_an_input_that_changed_on_the_volume_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "input" / "files" / "weights").write_text("x")
    assert run(folder, monkeypatch, WRITE) == 1
    (record,) = folder.glob("raised-*.json")
    assert "files/weights: is not what was copied there; run again" in json.loads(record.read_text())["problems"][0]
    assert not (folder / "asked").exists()
    assert not (folder.parent / "input").exists()


def test_the_runtime_restarts_nodes_for_lost_ones_only() -> None:
    """The exit statuses that end a TrainJob in k8s/ are those of an error on record."""
    manifest = Path(__file__).parents[3] / "k8s/components/trainer/runtime.yaml"
    runtime = next(yaml.safe_load_all(manifest.read_text()))
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "node", "operator": "In", "values": [1, 2]}
    assert node.LOST not in rule["onExitCodes"]["values"]
    assert (spec["backoffLimit"], spec["template"]["spec"]["restartPolicy"]) == (0, "Never")
    policy = runtime["spec"]["template"]["spec"]["failurePolicy"]
    assert policy["rules"] == [
        {"name": "onRecord", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert policy["maxRestarts"] > 0


class LocalTrainer:
    """Runs the nodes of TrainJobs as processes here, and starts all of them again after the loss of one, as a JobSet does."""

    def __init__(self, server: TrainerServer, kill_after_checkpoint_in: Path | None = None) -> None:
        self._server, self._kill_in = server, kill_after_checkpoint_in
        self.statuses: list[list[int]] = []
        self.output = ""

    def __call__(self, job: dict[str, Any]) -> None:
        threading.Thread(target=self._run, args=(job,), daemon=True).start()

    def _run(self, job: dict[str, Any]) -> None:
        while not self.statuses or (any(self.statuses[-1]) and len(self.statuses) < 3):
            started = [self._start(job, rank, port) for port in [free_port()] for rank in (0, 1)]
            if self._kill_in is not None and not self.statuses:
                while not list(self._kill_in.glob("*/step-*/manifest.json")):
                    time.sleep(0.02)
                lost = psutil.Process(started[1].pid)
                for process in [*lost.children(recursive=True), lost]:
                    process.kill()
            self.output += "".join(one.communicate()[0] for one in started)
            self.statuses.append([one.returncode for one in started])
        self._server.frames = [as_recorded("refused" if any(self.statuses[-1]) else "evicted")]

    def _start(self, job: dict[str, Any], rank: int, port: int) -> subprocess.Popen[str]:
        trainer = job["spec"]["trainer"]
        env = {one["name"]: one["value"] for one in trainer["env"]} | {
            "PET_NNODES": str(trainer["numNodes"]), "PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, *trainer["command"][1:]]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MIXTUNE_", "KUBE"))}
        return subprocess.Popen(
            command, env=inherited | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip


@pytest.mark.slow
def test_two_nodes_of_which_one_is_lost_give_the_losses_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(tmp_path, "classification")
    options: dict[str, Any] = {"steps": 40, "checkpoint_steps": 2, "learning_rate": 1e-3}
    monkeypatch.setenv(PROCESSES, "1")
    steps.run("mixed", "alone", mixed_at(0.3), **options)
    volume = tmp_path / "volume"
    compiled = json.loads(json.dumps(COMPILED))
    compiled["spec"]["trainer"]["env"] = [{"name": CHECKPOINT_DIR, "value": str(volume)}]
    for name, value in {
        TRAINJOB: json.dumps(compiled), CHECKPOINT_DIR: str(volume), "MIXTUNE_RUN_ID": "run-1", POD_NAMESPACE: "ns",
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "PACE", Pace(look=0.1, settle=1.0))
    lost = pod("a-1", 1, phase="Failed", reason="Evicted")
    with TrainerServer(Frame({}, running()), Frame({}, [lost])) as server:
        server.write_kubeconfig(tmp_path / "kubeconfig")
        trainer = LocalTrainer(server, kill_after_checkpoint_in=volume)
        server.on_create = trainer
        steps.run("mixed", "model", mixed_at(0.3), **options)
    first, last = trainer.statuses
    assert first == [node.LOST, -9]
    assert last == [0, 0]
    assert "goes on from the checkpoint of step" in trainer.output
    curves = [list(read_jsonl(tmp_path / name / "training.jsonl")) for name in ("model", "alone")]
    found, wanted = ([entry for entry in curve if "loss" in entry] for curve in curves)
    assert wanted
    for left, right in zip(found, wanted, strict=True):
        for column in ("loss", "loss_pretrain", "loss_finetune"):
            assert left[column] == pytest.approx(right[column], rel=1e-4), (left["step"], column)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        path.name for path in (tmp_path / "alone").iterdir()
    }
