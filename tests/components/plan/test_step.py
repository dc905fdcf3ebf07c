"""`plan`: every problem at once, parts for the steps, fingerprints that notice changed content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.config import load, parameters
from mixtune.components.plan.config import PlanStep
from mixtune.components.plan.step import run
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.tracker import Tracker
from tests.components.shared.tiny import tiny_model, tiny_tokenizer

PARTS = (
    "prepare_pretrain",
    "prepare_finetune",
    "pretrain",
    "finetune",
    "evaluate",
    "evaluate_pretrained",
    "interpolate",
    "compare",
    "register",
)


def plan(folder: Path, champion: str | None = None, **changed: Any) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Runs the step as KFP would, with parameters, and returns the candidates and the parts."""
    values = {
        "model": {"base": "scratch"},
        "data": {
            "pretrain": {"source": str(folder / "text.jsonl")},
            "finetune": {"source": str(folder / "labels.jsonl")},
        },
        "pretrain": {"steps": 2},
        "evaluate": {"champion": champion},
    }
    given = parameters(load(values)) | changed
    files = {name: str(folder / "out" / name) for name in PARTS}
    items = run(PlanStep(configuration=given), context=Context.for_tests(), outputs=files)
    return items, {name: json.loads(Path(file).read_text()) for name, file in files.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "labels.jsonl").write_text('{"text": "one", "label": "a"}\n{"text": "two", "label": "b"}\n')
    return tmp_path


def test_what_is_measured_beside_pretrained_is_no_part_of_the_other_evaluations(folder: Path) -> None:
    (folder / "used").mkdir()
    (folder / "used" / "mixtune.json").write_text("{}")
    _, parts = plan(folder, champion=str(folder / "used"))
    assert parts["evaluate_pretrained"]["references"]["champion"] == str(folder / "used")
    assert parts["evaluate_pretrained"]["references"]["base"] is None, "a model from scratch has none"
    assert parts["evaluate"]["references"] == plan(folder)[1]["evaluate_pretrained"]["references"]
    before = parts["evaluate_pretrained"]["references"]["fingerprint"]
    (folder / "used" / "mixtune.json").write_text('{"changed": 1}')
    assert plan(folder, champion=str(folder / "used"))[1]["evaluate_pretrained"]["references"]["fingerprint"] != before


@pytest.mark.parametrize(
    ("champion", "problem"),
    [
        ("nowhere", "nowhere is no folder with a model made by mixtune"),
        ("models:/name", "models:/name must look like models:/name@alias or models:/name/3"),
        ("models:/name@alias", "is models:/name@alias, but MLFLOW_TRACKING_URI is not set"),
    ],
)
def test_a_model_in_use_that_cannot_be_found_is_refused(folder: Path, champion: str, problem: str) -> None:
    with pytest.raises(RefusedError, match=f"evaluate.champion: .*{problem}"):
        plan(folder, champion=champion)


def test_each_lambda_is_a_candidate_with_all_that_its_tasks_read(folder: Path) -> None:
    items, parts = plan(folder, mixed_lambdas=[0.25, 1.0])
    assert [json.loads(item["candidate"])["id"] for item in items] == ["mixed-0.25", "mixed-1"]
    assert all(set(item) == {"candidate", "mixed", "evaluate"} for item in items)
    assert json.loads(items[0]["evaluate"]) == parts["evaluate"]
    assert "lambdas" not in json.loads(items[0]["mixed"])["mixed"]


def test_problems_of_the_configuration_and_of_the_sources_come_at_once(folder: Path) -> None:
    with pytest.raises(RefusedError) as refused:
        plan(folder, mixed_lambdas=[2.0], gate_options='{"rul": 1}', seed=-1)
    assert len(refused.value.problems) == 3
    (folder / "text.jsonl").unlink()
    with pytest.raises(RefusedError) as refused:
        plan(folder, base_model=str(folder / "nowhere"))
    assert len(refused.value.problems) == 2
    assert not (folder / "out").exists()


def test_content_changed_in_place_changes_that_streams_part_alone(folder: Path) -> None:
    _, before = plan(folder)
    (folder / "labels.jsonl").write_text('{"text": "one", "label": "a"}\n{"text": "three", "label": "b"}\n')
    _, after = plan(folder)
    assert {name for name in PARTS if before[name] != after[name]} == {"prepare_finetune"}


def test_a_cluster_run_without_a_tracking_server_is_refused(folder: Path) -> None:
    values = {
        "model": {"base": "scratch"},
        "data": {
            name: {"source": str(folder / f"{file}.jsonl")}
            for name, file in (("pretrain", "text"), ("finetune", "labels"))
        },
        "pretrain": {"steps": 2},
    }
    context = Context("plan", Tracker.off(), run_id="a-run", quiet=True)
    with pytest.raises(RefusedError, match="MLFLOW_TRACKING_URI"):
        run(PlanStep(configuration=parameters(load(values))), context=context, outputs={})


GPU = {"gpus": "2", "gpu_node_selector": {"pool": "gpu"}, "gpu_tolerations": [{"key": "gpu", "operator": "Exists"}],
       "gpu_affinity": {"with": "GPU"}, "cpu_affinity": {"without": "GPU"}}  # fmt: skip
NO_GPU = {"pretrain_gpus": "0", "pretrain_node_selector": "{}", "pretrain_tolerations": "[]"}


@pytest.mark.parametrize(("steps", "gpu"), [(5, GPU), (5, None), (0, GPU)])
def test_pretrain_asks_for_a_gpu_only_where_it_trains(folder: Path, steps: int, gpu: dict[str, Any] | None) -> None:
    tiny_model().save(folder / "base", tiny_tokenizer())
    values = {
        "model": {"base": str(folder / "base"), "max_length": 32},
        "data": {
            "pretrain": {"source": str(folder / "text.jsonl")},
            "finetune": {"source": str(folder / "labels.jsonl")},
        },
        "pretrain": {"steps": steps},
    }
    files = {name: str(folder / "place" / name) for name in (*NO_GPU, "pretrain_affinity")}
    run(
        PlanStep(configuration=parameters(load(values))),
        context=Context.for_tests(),
        outputs=files,
        gpu=gpu,
    )
    found = {name: Path(file).read_text() for name, file in files.items()}
    if steps and gpu:
        assert found["pretrain_gpus"] == "2"
        assert json.loads(found["pretrain_node_selector"]) == GPU["gpu_node_selector"]
        assert json.loads(found["pretrain_tolerations"]) == GPU["gpu_tolerations"]
        assert json.loads(found["pretrain_affinity"]) == GPU["gpu_affinity"]
    else:
        assert json.loads(found.pop("pretrain_affinity")) == (GPU["cpu_affinity"] if gpu else {})
        assert found == NO_GPU


def test_schedules_budgets_and_controls_are_candidates_too(folder: Path) -> None:
    options = {
        "lambda_schedules": [{"shape": "linear", "values": [0.5, 0.1]}],
        "forgetting_budgets": [0.05],
        "controls": {
            "pooled": True,
            "more_pretraining": True,
            "lora_ranks": [4],
            "kl_weights": [0.1],
            "l2sp_weights": [1],
        },
    }
    items, _ = plan(folder, mixed_lambdas=[0.3], mixed_options=json.dumps(options))
    found = [json.loads(item["candidate"]) for item in items]
    assert [one["id"] for one in found] == [
        "mixed-0.3", "mixed-linear-0.5-0.1", "mixed-budget-0.05", "mixed-pooled", "mixed-1", "mixed-0-lora-4", "mixed-0-kl-0.1",
        "mixed-0-l2sp-1",
    ]  # fmt: skip
    assert all(one["name"] for one in found)


def test_little_text_per_step_is_in_the_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Context, "say", lambda context, line: said.append(line))
    plan(folder)
    assert "mixed.replay_share: a step reads about 24 tokens of pretraining text" in said[0]
