"""Where a step computes: a task that was placed with GPUs ends at once where torch finds fewer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mixtune.components.evaluate.config import EvaluateStep
from mixtune.components.evaluate.subject import Subject
from mixtune.components.finetune.config import Finetune, FinetuneStep
from mixtune.components.shared.artifacts import Artifact, ModelCard
from mixtune.components.shared.errors import MixtuneError, RefusedError
from mixtune.components.shared.model.device import GPUS, pick_device, requested_gpus, require_compiler
from mixtune.components.shared.outcome import load_outcomes
from mixtune.components.shared.running.processes import num_processes
from mixtune.components.shared.runtime import launch
from tests.components.evaluate.made import write_model
from tests.pipelines.test_compiled import COMPILED

from .tiny import tiny_model, write_data
from .trained import run, write_both

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which these tests ask for in vain")

FINETUNE = FinetuneStep(seed=0, max_length=32, finetune=Finetune(steps=2, batch_size=2)).to_json()
EVALUATE = EvaluateStep(max_length=32, batch_size=2, metric="exact_match", max_new_tokens=1, max_tokens=None).to_json()
SENTENCE = "the task asked for 1 GPU, but torch finds none; the usual causes are an image without CUDA"
CAUSES = ("image without CUDA", "driver on the node that is too old", "device plugin that is missing")


@pytest.fixture
def outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXTUNE_OUTCOME_DIR", str(tmp_path / "outcomes"))
    return tmp_path / "outcomes"


def artifacts(folder: Path, *names: str) -> dict[str, Any]:
    return {name: Artifact(str(folder / name)) for name in names}


@pytest.mark.parametrize(
    ("step", "config", "names"),
    [
        ("finetune", FINETUNE, ("start", "data", "model", "metrics")),
        ("evaluate", EVALUATE, ("model", "pretrain_heldout", "finetune_heldout", "evaluation", "metrics")),
    ],
)
def test_a_step_without_its_gpu_ends_before_it_reads_anything(
    tmp_path: Path,
    outcomes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    step: str,
    config: str,
    names: tuple[str, ...],
) -> None:
    monkeypatch.setenv(GPUS, "1")
    with pytest.raises(SystemExit) as ended:  # nothing of what it would read is there
        launch(step, config, artifacts(tmp_path, *names))
    assert ended.value.code == 1
    (outcome,) = load_outcomes(outcomes)
    assert outcome.kind == "failed"  # and not refused: a retry may come to a node that has one
    (sentence,) = outcome.sentences
    assert sentence.startswith(SENTENCE)
    assert all(cause in sentence for cause in CAUSES)
    printed = capfd.readouterr().err
    assert sentence in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("gpus", ["0", None])
def test_a_step_that_asked_for_none_trains_on_the_cpu(
    tmp_path: Path, outcomes: Path, monkeypatch: pytest.MonkeyPatch, gpus: str | None
) -> None:
    if gpus is None:
        monkeypatch.delenv(GPUS, raising=False)
    else:
        monkeypatch.setenv(GPUS, gpus)
    write_model(tmp_path / "start", "pretrained", "pretrained")
    write_data(tmp_path / "data", "finetune", "generation")
    launch("finetune", FINETUNE, artifacts(tmp_path, "start", "data", "model", "metrics"))
    assert ModelCard.load(tmp_path / "model").device == "cpu"
    (outcome,) = load_outcomes(outcomes)
    assert outcome.kind == "done"


def test_training_and_evaluation_ask_the_same_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does each process that torchrun starts, which calls these two."""
    folder = write_both(tmp_path, "generation")
    write_model(tmp_path / "model", "finetuned", "finetuned", task="generation")
    subject = Subject(ModelCard.load(tmp_path / "model"), str(tmp_path / "model"), "model")
    monkeypatch.setenv(GPUS, "1")
    with pytest.raises(MixtuneError, match=SENTENCE):
        run(folder, "generation")
    with pytest.raises(MixtuneError, match=SENTENCE):
        subject.load("float32")


@pytest.mark.parametrize(("available", "ends"), [(1, True), (2, False), (8, False)])
def test_fewer_gpus_than_asked_for_end_it_and_more_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, available: int, ends: bool
) -> None:
    # No machine that runs these tests has GPUs, so that torch's count is made up.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(GPUS, "2")
    if ends:
        with pytest.raises(MixtuneError, match="the task asked for 2 GPUs, but torch finds 1; the usual causes"):
            pick_device()
    else:
        assert pick_device().type == "cuda"
        assert num_processes("finetune", FinetuneStep.from_json(FINETUNE)) == 2
        monkeypatch.setenv(GPUS, "0")
        assert num_processes("finetune", FinetuneStep.from_json(FINETUNE)) == available


@pytest.mark.parametrize("given", ["", "-1", "one", "1.5"])
def test_a_count_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(GPUS, given)
    with pytest.raises(RefusedError, match=f"{GPUS}: must be a whole number, found {given or 'nothing'}"):
        requested_gpus()


def test_the_compiled_command_carries_the_count_to_the_step(tmp_path: Path) -> None:
    """The command of the compiled package, run here as KFP's launcher runs it: with its placeholders replaced."""
    package = next(yaml.safe_load_all((COMPILED / "mixtune.yaml").read_text(encoding="utf-8")))
    container = package["deploymentSpec"]["executors"]["exec-finetune"]["container"]
    given = {"config": FINETUNE, "pipelinechannel--plan-gpus": "1"}
    kinds = {"start": "Model", "data": "Dataset", "model": "Model", "metrics": "Metrics"}
    of = {
        name: {"artifacts": [{"name": name, "uri": str(tmp_path / name), "type": {"schemaTitle": f"system.{kind}"}}]}
        for name, kind in kinds.items()
    }
    executor_input = {
        "inputs": {"parameterValues": given, "artifacts": {name: of[name] for name in ("start", "data")}},
        "outputs": {
            "artifacts": {name: of[name] for name in ("model", "metrics")},
            "outputFile": str(tmp_path / "executor_output.json"),
        },
    }
    placeholders = {"{{$}}": json.dumps(executor_input)}
    placeholders |= {f"{{{{$.inputs.parameters['{name}']}}}}": value for name, value in given.items()}
    command = []
    for part in [*container["command"], *container["args"]]:
        for placeholder, value in placeholders.items():
            part = part.replace(placeholder, value)
        command.append(part)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MIXTUNE_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"finetune: {SENTENCE}" in done.stderr


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_what_cannot_be_compiled_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    (tmp_path / "bin").mkdir()
    if missing == "headers":
        compiler = tmp_path / "bin" / "g++"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    model = tiny_model("llama")
    before = model.state_dict()["lm.lm_head.weight"].clone()
    with pytest.raises(RefusedError, match=r"^compile: needs a C\+\+ compiler and Python's headers"):
        run(write_both(tmp_path, "generation"), "generation", model=model, compile=True)
    assert torch.equal(model.state_dict()["lm.lm_head.weight"], before)


def test_flex_attention_needs_a_compiler_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RefusedError, match=r"^attention: flex_attention: needs a C\+\+ compiler"):
        tiny_model("llama").set_attention("flex_attention")


def test_a_compiler_is_good_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    require_compiler("compile")


def test_each_process_of_a_training_has_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine with two GPUs is at hand; torch only tells how many there are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == torch.device("cuda", 1)
