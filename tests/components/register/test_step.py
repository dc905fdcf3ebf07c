"""`register` against a real MLflow store: one version for one model, whatever is registered it answers as measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixtune.components.register import step
from mixtune.components.register.config import RegisterStep
from mixtune.components.register.step import run
from mixtune.components.shared.artifacts import Artifact, ModelCard, write_json
from mixtune.components.shared.errors import UnreachableError
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.registry import fetch
from mixtune.components.shared.tracking.tracker import Tracker
from tests.components.stages import Stages
from tests.mlflow_server import MlflowServer, rejecting_proxy
from tests.stores import new_store

from .made import write_report


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))
    stages = Stages(tmp_path)
    stages.pretrain()
    stages.finetune()
    return stages


def register(stages: Stages, kind: str, run_id: str, headline: str = "") -> Context:
    report = write_report(stages.folder / "comparison", kind, "classification", ["no", "yes"])
    if headline:
        write_json(stages.folder / "comparison" / "report.json", report | {"headline": headline})
    context = Context("register", Tracker.open("register", "register", run_id), run_id, quiet=True)
    run(
        RegisterStep(registered_model="tiny", alias="candidate", max_length=16), context=context,
        selected=stages.artifact("pretrained" if kind == "interpolated" else "finetuned"),
        other=Artifact(str(stages.folder / ("finetuned" if kind == "interpolated" else "comparison"))),
        comparison=stages.artifact("comparison"), model=stages.artifact("registered"),
    )  # fmt: skip
    return context


def test_the_same_model_twice_is_one_version_and_another_is_another(stages: Stages, tmp_path: Path) -> None:
    client = connect(new_store(tmp_path / "mlflow.db"))
    for run_id in ("run-1", "run-2"):
        assert register(stages, "finetuned", run_id).facts["registered"] == "tiny version 1, alias candidate"
    context = register(stages, "interpolated", "run-3")
    assert context.facts["registered"] == "tiny version 2, alias candidate"
    assert (stages.folder / "registered" / "model.safetensors").is_file()
    assert client.get_model_version_by_alias("tiny", "candidate").tags["mixtune.kind"] == "interpolated"
    assert client.get_model_version("tiny", "1").tags["mixtune.kfp_run"] == "run-2"


def test_text_that_mlflow_does_not_take_costs_no_model(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = MlflowServer(tmp_path / "server")
    server.start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    try:
        with rejecting_proxy(server.uri) as uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            monkeypatch.setenv("MIXTUNE_GIT_COMMIT", "λ")
            assert register(stages, "finetuned", "run-1", headline="λ = 0.3").facts["registered"]
        version = connect(server.uri).get_model_version("tiny", "1")
    finally:
        server.kill()
    assert version.description.startswith("# tiny\n\nlambda = 0.3\n")
    assert version.tags["mixtune.git_commit"] == "lambda"
    assert version.tags["mixtune.kind"] == "finetuned"


def test_a_version_is_the_whole_model_with_its_card(stages: Stages, tmp_path: Path) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    client = connect(uri)
    register(stages, "finetuned", "run-1")
    place = fetch(client, "models:/tiny/1", tmp_path / "fetched")
    assert ModelCard.load(place).id == "finetuned"
    # Also the language model's head, which a pipeline for classification has no use for.
    ours, theirs = load_model(stages.folder / "finetuned"), load_model(place)
    others = dict(theirs.named_parameters())
    assert all(torch.equal(weight, others[name]) for name, weight in ours.named_parameters())
    version = client.get_model_version("tiny", "1")
    assert version.tags["mixtune.report"] == f"runs:/{version.tags['mixtune.mlflow_run']}/report/report.html"
    card = version.description
    assert card.startswith("# tiny\n\nfinetuned: as good as it gets\n")
    assert "| accuracy, test | 0.900 [0.800, 1.000], 10 examples |" in card
    assert "passed: it is good \\| and cheap" in card
    assert (place.parent / "README.md").read_text() == card


def test_the_logged_model_has_its_metrics_data_and_run(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "NAMESPACE", tmp_path / "namespace")
    (tmp_path / "namespace").write_text("team\n")
    monkeypatch.setenv("MIXTUNE_RUN_NAME", "try-λ")
    register(stages, "finetuned", "run-1")
    client = connect(new_store(tmp_path / "mlflow.db"))
    run = client.get_run(client.get_model_version("tiny", "1").run_id)
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.status, model.source_run_id) == ("READY", run.info.run_id)
    assert {name: value for name, value in model.tags.items() if name.startswith("model_source_")} == {
        "model_source_kind": "kfp", "model_source_class": "pipelinerun", "model_source_group": "team",
        "model_source_id": "run-1", "model_source_name": "try-λ",
    }  # fmt: skip
    assert model.tags["mixtune.candidate"] == "finetuned"
    assert {(one.key, one.value, one.dataset_name, one.dataset_digest) for one in model.metrics} == {
        *(("test." + name, 0.9, "finetune-heldout", "f" * 36) for name in ("task_score", "task_score_vs_finetuned")),
        *(("test." + name, 0.9, "pretrain-heldout", "p" * 36) for name in ("bpb", "delta_bpb")),
    }
    assert {(one.dataset.name, one.dataset.source) for one in run.inputs.dataset_inputs} == {
        ("pretrain-heldout", "pretrain.jsonl"), ("finetune-heldout", "finetune.jsonl")
    }  # fmt: skip


LARGE = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.components.register.test_step import grow, register
from tests.components.stages import Stages
stages = Stages(Path({folder!r}))
register(stages, "finetuned", "run-0")  # imports all, before the limit
from transformers import AutoModelForSequenceClassification as Auto
Auto.from_pretrained(stages.folder / "finetuned")
size = grow(stages.folder / "finetuned")
in_use = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (in_use + size // 2,) * 2)
print(register(stages, "finetuned", "run-1").facts["registered"])
try:
    Auto.from_pretrained(stages.folder / "finetuned")
except (MemoryError, RuntimeError, OSError) as error:
    print("cannot be loaded", error)
"""
ROWS = 12_000_000


def grow(folder: Path) -> int:
    """Gives a model as many words as make it large, in a sparse file; its size in bytes."""
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"vocab_size": ROWS})
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    body = len(content) - length
    for name, tensor in header.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            width = tensor["shape"][1]
            tensor |= {"shape": [ROWS, width], "data_offsets": [body, body + ROWS * width * 4]}
            body += ROWS * width * 4
    # Offsets must cover the file without gaps, so what stood at the old places is named, too.
    covered = sorted(tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__")
    ends = 0
    for start, end in covered:
        if start > ends:
            header[f"unused.{ends}"] = {"dtype": "U8", "shape": [start - ends], "data_offsets": [ends, start]}
        ends = end
    text = json.dumps(header).encode()
    with file.open("wb") as to:
        to.write(len(text).to_bytes(8, "little") + text + content[length:])
        to.truncate(8 + len(text) + body)
    return file.stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_a_model_larger_than_the_memory_is_registered(stages: Stages, tmp_path: Path) -> None:
    code = LARGE.format(root=str(Path(__file__).parents[3]), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    registered, loaded = done.stdout.splitlines()[-2:]
    assert registered == "tiny version 2, alias candidate", done.stderr
    assert loaded.startswith("cannot be loaded"), done.stderr


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from mlflow import MlflowClient
sys.path.insert(0, {root!r})
from tests.components.register.test_step import register
from tests.components.stages import Stages
def killed(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(MlflowClient, {call!r}, killed)
stages = Stages(Path({folder!r}))
register(stages, "finetuned", "run-1")
"""


@pytest.mark.parametrize("call", ["create_model_version", "set_registered_model_alias"])
def test_killed_at_any_point_the_next_attempt_makes_or_finds_the_one_version(
    stages: Stages, tmp_path: Path, call: str
) -> None:
    code = KILLED_AT.format(root=str(Path(__file__).parents[3]), call=call, folder=str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    client = connect(new_store(tmp_path / "mlflow.db"))
    (made,) = client.search_model_versions("name = 'tiny'") or [None]
    assert (made is None) == (call == "create_model_version")
    assert made is None or made.tags["mixtune.digest"]
    assert register(stages, "finetuned", "run-1").facts["registered"] == "tiny version 1, alias candidate"
    (version,) = client.search_model_versions("name = 'tiny'")
    assert version.tags["mixtune.digest"]
    assert version.tags["mixtune.candidate"] == "finetuned"


def test_registering_where_the_server_went_away_is_unreachable_or_said_in_a_sentence(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = MlflowServer(tmp_path / "server")
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    opened = Tracker.open

    def open_and_kill(*arguments: str) -> Tracker:
        tracker = opened(*arguments)
        server.kill()
        return tracker

    monkeypatch.setattr(Tracker, "open", open_and_kill)
    with pytest.raises(UnreachableError) as unreachable:
        register(stages, "finetuned", "run-1")
    assert f"no MLflow server answers at {server.uri}" in unreachable.value.problems[0]
    monkeypatch.setenv("MIXTUNE_TRACKING_OFFLINE", "1")
    context = register(stages, "finetuned", "run-2")
    assert "registered" not in context.facts
    assert context.facts["not_registered"].startswith("nothing was registered: MLflow does not answer")
    server.start()
    monkeypatch.setattr(Tracker, "open", opened)
    assert register(stages, "finetuned", "run-3").facts["registered"] == "tiny version 1, alias candidate"
    server.kill()
