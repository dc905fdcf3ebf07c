"""Several processes for one step: the weights of one process, and everything else written once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtune.components.finetune.config import Finetune, FinetuneStep
from mixtune.components.mixed.config import MixedCandidate
from mixtune.components.pretrain.config import Pretrain, PretrainStep
from mixtune.components.shared.artifacts import Artifact, ModelCard, read_json, read_jsonl
from mixtune.components.shared.checkpoints.store import CHECKPOINT_DIR
from mixtune.components.shared.config import Model
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.outcome import Outcome, load_outcomes
from mixtune.components.shared.running import processes as distributed
from mixtune.components.shared.running.processes import num_processes
from mixtune.components.shared.training import budget_search
from tests.stores import new_store

from . import compared, pair
from .compared import assert_same_movement
from .several import CASES, OWN_OPTIONS, PROCESSES, QUICK, Steps, mixed_at
from .tiny import mixture, tiny_tokenizer

BY_DESCENT = compared.__name__
"""The module that runs the two processes, and the command under torchrun, by plain gradient descent."""


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The queue of two processes that descend by the gradient alone."""
    folder = tmp_path_factory.mktemp("queue")
    with pair.pair(folder, BY_DESCENT):
        yield folder


@pytest.fixture(scope="module")
def queue_of_four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The queue of four such processes."""
    folder = tmp_path_factory.mktemp("queue")
    with pair.pair(folder, BY_DESCENT, processes=4):
        yield folder


@pytest.fixture
def two(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives what a step runs in several processes to two that have started."""
    monkeypatch.setattr(distributed, "TORCHRUN", pair.ASK)
    monkeypatch.setenv(pair.QUEUE, str(queue))


@pytest.fixture
def four(queue_of_four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for four."""
    monkeypatch.setattr(distributed, "TORCHRUN", pair.ASK)
    monkeypatch.setenv(pair.QUEUE, str(queue_of_four))


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the model, and of adapters that are not merged."""
    files = sorted(folder.glob("*model.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


@pytest.mark.numeric
@pytest.mark.usefixtures("two", "plain_descent")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_two_processes_give_the_weights_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    assert_the_same_from(tmp_path, monkeypatch, case, {"ddp": 2, "fsdp": 2})


@pytest.mark.usefixtures("two")
def test_two_processes_generate_replay_text_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(tmp_path, "classification")
    monkeypatch.setenv(PROCESSES, "2")
    steps.run("mixed", "model", mixed_at(0.3, generated_tokens=3000))
    card = ModelCard.load(tmp_path / "model")
    written = list(read_jsonl(tmp_path / "model" / "generated.jsonl"))
    assert card.generation is not None
    assert card.generation.documents == len(written) == len({row["id"] for row in written})
    assert 3000 <= card.generation.tokens < 3000 + 2 * 32 * 32
    half = len(written) // 2
    assert [row["text"] for row in written[:half]] != [row["text"] for row in written[half : 2 * half]]
    assert card.tokens["pretrain"] > 0


def cut_off_in_two(steps: Steps, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Trains undisturbed in one process, then in two that shard and are cut off after step 4."""
    monkeypatch.setenv(compared.ADAMW, "1")
    monkeypatch.setenv(PROCESSES, "1")
    steps.run("mixed", "whole", mixed_at(0.3), **options)
    monkeypatch.setenv(CHECKPOINT_DIR, str(steps.folder / "checkpoints"))
    monkeypatch.setenv(PROCESSES, "2")
    monkeypatch.setenv(compared.CUT_OFF_AFTER, "4")
    with pytest.raises(SystemExit):
        steps.run("mixed", "cut", mixed_at(0.3), **options, parallelism="fsdp")
    monkeypatch.delenv(compared.CUT_OFF_AFTER)
    parts = {file.name for file in steps.folder.glob("checkpoints/*/step-00000004-*/*.safetensors")}
    assert len(parts) == 2, "one file of each process"


def assert_resumed(made: Steps, monkeypatch: pytest.MonkeyPatch, way: str, count: int, **options: Any) -> None:
    """Resumes a copy of the checkpoints and compares the curve with that of the undisturbed training."""
    copied = shutil.copytree(made.folder / "checkpoints", made.folder / f"checkpoints-{way}-{count}")
    monkeypatch.setenv(CHECKPOINT_DIR, str(copied))
    monkeypatch.setenv(PROCESSES, str(count))
    monkeypatch.setenv("MIXTUNE_RUN_ID", f"{way}-{count}")
    name = f"resumed-{way}-{count}"
    made.run("mixed", name, mixed_at(0.3), **options, parallelism=way)
    (finished,) = copied.glob("*/finished.json")
    assert read_json(finished, "note")["run"] == f"{way}-{count}", "it resumed the checkpoints of the two"
    found, wanted = (list(read_jsonl(made.folder / folder / "training.jsonl")) for folder in (name, "whole"))
    for left, right in zip(found, wanted, strict=True):
        for column in left.keys() & {
            "loss",
            "loss_pretrain",
            "loss_finetune",
            "watch_forgetting",
            "watch_loss_finetune",
        }:
            assert left[column] == pytest.approx(right[column], rel=1e-5, abs=1e-7), (way, count, column)


RESUMED: dict[str, Any] = {"steps": 6, "checkpoint_steps": 2, "log_every_steps": 3, "learning_rate": 1e-3}


@pytest.mark.numeric
@pytest.mark.usefixtures("two", "plain_descent")
def test_one_or_two_processes_resume_the_checkpoint_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(tmp_path, "classification")
    cut_off_in_two(steps, monkeypatch, RESUMED)
    for way, count in {"fsdp": 2, "ddp": 1}.items():
        assert_resumed(steps, monkeypatch, way, count, **RESUMED)


@pytest.mark.usefixtures("two")
def test_what_prevents_a_sharded_checkpoint_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(tmp_path, "classification")
    monkeypatch.setenv(PROCESSES, "2")
    monkeypatch.setenv(CHECKPOINT_DIR, str(tmp_path / "checkpoints"))
    monkeypatch.setenv("MIXTUNE_OUTCOME_DIR", str(tmp_path / "outcomes"))
    monkeypatch.setenv(compared.NO_SPACE_IN, "1")
    with pytest.raises(SystemExit):
        steps.run("mixed", "model", mixed_at(0.3), **RESUMED, parallelism="fsdp")
    (outcome,) = load_outcomes(tmp_path / "outcomes")
    (sentence,) = outcome.sentences
    assert sentence.startswith("checkpoints: the one of step 2 could not be written to ")
    assert "(No space left on device)" in sentence
    assert not list(tmp_path.glob("checkpoints/*/step-*"))
    assert not list(tmp_path.glob("checkpoints/*/aside-*"))


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.usefixtures("two", "plain_descent")
def test_four_processes_resume_the_checkpoint_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue_of_four: Path
) -> None:
    steps = Steps(tmp_path, "classification")
    cut_off_in_two(steps, monkeypatch, RESUMED)
    monkeypatch.setenv(pair.QUEUE, str(queue_of_four))
    assert_resumed(steps, monkeypatch, "fsdp", 4, **RESUMED)


@pytest.mark.numeric
@pytest.mark.usefixtures("two", "plain_descent")
def test_sharded_training_in_bf16_updates_weights_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(tmp_path, "generation")
    steps.run("mixed", "start", mixed_at(0.3), learning_rate=1e-30)
    small: dict[str, Any] = {"precision": "bf16", "learning_rate": 1e-4, "parallelism": "fsdp"}
    for name, count in {"one": "1", "several": "2"}.items():
        monkeypatch.setenv(PROCESSES, count)
        steps.run("mixed", name, mixed_at(0.3), **small)
    start, one, several = (weights_in(tmp_path / name) for name in ("start", "one", "several"))
    # These movements are far below what bf16 can add to a weight.
    assert_same_movement(several, one, start, tolerance=0.05)


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.usefixtures("four", "plain_descent")
@pytest.mark.parametrize("case", CASES)
def test_four_processes_give_the_weights_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    assert_the_same_from(tmp_path, monkeypatch, case, {"fsdp": 4})


def assert_the_same_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, ways: dict[str, int]) -> None:
    """Compares trainings in several processes with one in one.

    Args:
        ways: numbers of processes by `parallelism`.
    """
    objective, task, step, candidate = CASES[case]
    monkeypatch.setattr(budget_search, "LEAST_LIMIT", compared.LEAST_LIMIT)
    steps = Steps(tmp_path, task, objective)
    if case.endswith("experts"):
        # Stored in bf16, in which sharded trainings load it, part by part.
        mixture().to(torch.bfloat16).save(tmp_path / "pretrained", tiny_tokenizer())
    steps.run(step, "start", candidate, learning_rate=1e-30)
    options = OWN_OPTIONS.get(case, {})
    found = {}
    for way, count in {"one": 1, **ways}.items():
        monkeypatch.setenv(PROCESSES, str(count))
        monkeypatch.setenv("MIXTUNE_OUTCOME_DIR", str(tmp_path / f"outcomes-{way}"))
        given: dict[str, Any] = {} if way == "one" else {"parallelism": way}
        found[way] = steps.run(step, f"model-{way}", candidate, **options, **given)
    assert not case.endswith("budget") or (ModelCard.load(tmp_path / "model-one").pull_back or 1) < 1
    for way in ways:
        assert_the_same(tmp_path, found["one"], found[way], way)


def assert_the_same(tmp_path: Path, alone: dict[str, Artifact], together: dict[str, Artifact], way: str) -> None:
    start, one, several = (weights_in(tmp_path / name) for name in ("start", "model-one", f"model-{way}"))
    assert_same_movement(several, one, start)
    torch.testing.assert_close(several, one, rtol=0, atol=1e-5)
    curves = [list(read_jsonl(tmp_path / f"model-{name}" / "training.jsonl")) for name in ("one", way)]
    for left, right in zip(*curves, strict=True):
        assert left.keys() == right.keys()
        measured = {column for column in left if left[column] is not None}
        assert measured == {column for column in right if right[column] is not None}
        for column in measured - {"tokens_per_second", "padding_share", "watch_seconds"}:
            assert right[column] == pytest.approx(left[column], rel=1e-4, abs=1e-5), column
    cards = [ModelCard.load(tmp_path / f"model-{name}") for name in ("one", way)]
    assert cards[0].tokens == cards[1].tokens
    assert cards[0].pull_back == pytest.approx(cards[1].pull_back, abs=1e-4)
    assert together["model"].metadata == alone["model"].metadata
    assert together["metrics"].metadata.keys() == alone["metrics"].metadata.keys()
    written = read_json(tmp_path / f"model-{way}-metrics.json", "metrics")
    assert written == together["metrics"].metadata
    (outcome,) = load_outcomes(tmp_path / f"outcomes-{way}")
    assert outcome.kind == "done"


MIXTUNE = ("--no-python", str(Path(sys.executable).parent / "mixtune"))


def torchrun(
    steps: Steps,
    step: str,
    name: str,
    candidate: MixedCandidate | None,
    program: tuple[str, ...] = MIXTUNE,
    **environment: str,
) -> Any:
    """The step's command under torchrun, as in a pod with several GPUs."""
    config, artifacts, parameters = steps.order(step, name, candidate)
    words = [f"--config={config}"]
    words += [f"--artifact={key}={path}" for key, path in artifacts.items()]
    words += [f"--parameter={key}={value}" for key, value in parameters.items()]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(pair.ROOT), **environment}
    command = [*pair.TORCHRUN, "--nproc-per-node=2", *program, "step", step, *words]
    return subprocess.run(
        command,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.numeric
@pytest.mark.usefixtures("plain_descent")
def test_under_torchrun_a_step_is_run_once_by_all_processes(tmp_path: Path) -> None:
    steps = Steps(tmp_path, "classification")
    steps.run("mixed", "start", mixed_at(0.3), learning_rate=1e-30)
    steps.run("mixed", "alone", mixed_at(0.3))
    database = new_store(tmp_path / "mlflow.db")
    done = torchrun(
        steps, "mixed", "together", mixed_at(0.3), ("-m", BY_DESCENT), MLFLOW_TRACKING_URI=database, MIXTUNE_PROCESSES="2",
        MIXTUNE_RUN_ID="run-1", MIXTUNE_OUTCOME_DIR=str(tmp_path / "outcomes"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start, one, two = (weights_in(tmp_path / name) for name in ("start", "alone", "together"))
    assert_same_movement(two, one, start)
    assert done.stdout.count("saved after 3 steps") == 1
    (outcome,) = load_outcomes(tmp_path / "outcomes")
    assert_each_metric_once(database, outcome, tmp_path / "together")


def assert_each_metric_once(database: str, outcome: Outcome, model: Path) -> None:
    """One run of the step, below one run of the pipeline; what the curve says, step by step."""
    from mlflow import MlflowClient

    client = MlflowClient(database)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert sorted(run.data.tags["mixtune.step"] for run in runs) == ["mixed", "pipeline"]
    (run,) = [one for one in runs if one.data.tags["mixtune.step"] == "mixed"]
    assert (run.info.run_id, run.info.status) == (outcome.mlflow_run, "FINISHED")
    curve = list(read_jsonl(model / "training.jsonl"))
    for column in (
        "loss",
        "loss_pretrain",
        "realised_mix_weight",
        "grad_norm",
        "watch_forgetting",
        "watch_loss_finetune",
    ):
        history = client.get_metric_history(run.info.run_id, column)
        assert [(entry.step, entry.value) for entry in history] == [
            (one["step"], pytest.approx(one[column])) for one in curve if column in one
        ]
    assert len(client.get_metric_history(run.info.run_id, "final_loss")) == 1
    assert run.data.params["mixed.batch_size"] == "5"
    assert len(run.inputs.dataset_inputs) == 2
    assert ModelCard.load(model).mlflow_runs == {"mixed-0.3": run.info.run_id}


@pytest.mark.usefixtures("two")
def test_mlflow_gets_each_metric_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(tmp_path, "classification")
    database = new_store(tmp_path / "mlflow.db")
    for name, value in {
        PROCESSES: "2", "MLFLOW_TRACKING_URI": database, "MIXTUNE_RUN_ID": "run-1",
        "MIXTUNE_OUTCOME_DIR": str(tmp_path / "outcomes"), "MIXTUNE_PROGRESS_FILE": str(tmp_path / "progress.jsonl"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    steps.run("mixed", "model", mixed_at(0.3))
    (outcome,) = load_outcomes(tmp_path / "outcomes")
    assert_each_metric_once(database, outcome, tmp_path / "model")
    notes = list(read_jsonl(tmp_path / "progress.jsonl"))
    progress = [(note["done"], note["total"]) for note in notes if "done" in note]
    assert progress == sorted(progress)
    # Where a step takes long, the end is told twice: before and after its losses are known.
    assert progress[-1] == (3, 3)
    assert progress.count((0, 3)) == 1, "one process tells it"


def test_what_a_process_refuses_comes_out_as_the_plain_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = Steps(tmp_path, "classification")
    monkeypatch.setenv(PROCESSES, "2")
    monkeypatch.setenv("MIXTUNE_OUTCOME_DIR", str(tmp_path / "outcomes"))
    for file in (tmp_path / "labels" / "train").glob("*.npy"):
        file.unlink()
    with pytest.raises(SystemExit) as ended:
        steps.run("finetune", "model")
    assert ended.value.code == 2
    (outcome,) = load_outcomes(tmp_path / "outcomes")
    wanted = f"{tmp_path / 'labels' / 'train'}: holds no prepared documents"
    assert (outcome.kind, outcome.sentences) == ("refused", [wanted])
    said = capfd.readouterr().err
    assert said.splitlines()[-1] == f"finetune: {wanted}"
    assert "Traceback (most recent call last)" not in said


@pytest.mark.slow
def test_what_a_process_refuses_under_torchrun_comes_out_as_the_plain_sentence(tmp_path: Path) -> None:
    steps = Steps(tmp_path, "classification")
    for file in (tmp_path / "labels" / "train").glob("*.npy"):
        file.unlink()
    done = torchrun(steps, "finetune", "model", None)
    assert done.returncode != 0
    assert f"finetune: {tmp_path / 'labels' / 'train'}: holds no prepared documents" in done.stderr


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_what_is_not_finite_is_explained_by_several_processes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallelism: str
) -> None:
    steps = Steps(tmp_path, "classification")
    file = tmp_path / "pretrained" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    monkeypatch.setenv(PROCESSES, "2")
    monkeypatch.setenv("MIXTUNE_OUTCOME_DIR", str(tmp_path / "outcomes"))
    with pytest.raises(SystemExit) as ended:
        steps.run("finetune", "model", parallelism=parallelism)
    assert ended.value.code == 1
    (outcome,) = load_outcomes(tmp_path / "outcomes")
    assert outcome.kind == "failed"
    assert outcome.sentences[0].startswith("step 1: the loss of the fine-tuning stream (all its documents: ")
    assert not (tmp_path / "model" / "mixtune.json").exists()


FINETUNE = FinetuneStep(seed=0, max_length=32, finetune=Finetune(steps=2))


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5", "", "²"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(PROCESSES, given)
    with pytest.raises(RefusedError, match=f"MIXTUNE_PROCESSES: must be a whole number above 0, found {given}"):
        num_processes("finetune", FINETUNE)


def test_only_what_trains_is_run_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROCESSES, "3")
    untrained = PretrainStep(
        seed=0, model=Model(base="scratch"), pretrain=Pretrain(steps=0), fingerprint="x"
    )  # fmt: skip
    assert num_processes("finetune", FINETUNE) == 3
    assert num_processes("pretrain", untrained) == 1
    assert num_processes("pretrain", untrained.model_copy(update={"pretrain": Pretrain(epochs=1)})) == 3
    assert num_processes("evaluate", FINETUNE) == 1
    monkeypatch.setenv("RANK", "0")  # torchrun has started the processes already
    assert num_processes("finetune", FINETUNE) == 1
