"""`plan`: every problem at once, parts for the steps, fingerprints that notice changed content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.config import load
from mixtune.components.form import ADVANCED, PLACEMENT, parameters
from mixtune.components.plan.config import PlanStep
from mixtune.components.plan.step import run
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.context import COMPILED, NODES, Context
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
    given = parameters(load(values))
    given[ADVANCED] |= changed.pop(ADVANCED, {})
    files = {name: str(folder / "out" / name) for name in PARTS}
    items = run(PlanStep(form=given | changed), context=Context.for_tests(), outputs=files)
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
    items, parts = plan(folder, mix_lambdas=[0.25, 1.0])
    assert [json.loads(item["candidate"])["id"] for item in items] == ["mixed-0.25", "mixed-1"]
    assert all(set(item) == {"candidate", "mixed", "evaluate"} for item in items)
    assert json.loads(items[0]["evaluate"]) == parts["evaluate"]
    assert "lambdas" not in json.loads(items[0]["mixed"])["mixed"]


def test_what_is_compiled_in_reaches_the_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(plan(folder)[0][0]["mixed"])["mixed"]["start"] == "pretrained"
    monkeypatch.setenv(COMPILED, '{"mixed": {"start": "finetuned"}}')
    assert json.loads(plan(folder)[0][0]["mixed"])["mixed"]["start"] == "finetuned"


def test_problems_of_the_configuration_and_of_the_sources_come_at_once(folder: Path) -> None:
    with pytest.raises(RefusedError) as refused:
        plan(folder, mix_lambdas=[2.0], advanced={"gate": {"rul": 1}, "mixed": {"steps": 3}}, seed=-1)
    assert sorted(one.split(":")[0] for one in refused.value.problems) == [
        "advanced.mixed.steps", "gate.rul", "mixed.lambdas.0", "seed",
    ]  # fmt: skip
    (folder / "text.jsonl").unlink()
    with pytest.raises(RefusedError) as refused:
        plan(folder, model_base=str(folder / "nowhere"))
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
        run(PlanStep(form=parameters(load(values))), context=context, outputs={})


PROFILE = {"gpus": 0, "gpu_type": "nvidia.com/gpu", "node_selector": {"pool": "gpu"},
           "tolerations": [{"key": "gpu", "operator": "Exists"}], "affinity": {"with": "GPU"}}  # fmt: skip
OTHER = {"without": "GPU"}


@pytest.fixture
def base(folder: Path) -> str:
    tiny_model().save(folder / "base", tiny_tokenizer())
    return str(folder / "base")


def place(folder: Path, base: str, steps: int, **placement: Any) -> dict[str, str]:
    """What plan puts out about the placement."""
    values = {
        "model": {"base": base, "max_length": 32},
        "data": {
            "pretrain": {"source": str(folder / "text.jsonl")},
            "finetune": {"source": str(folder / "labels.jsonl")},
        },
        "pretrain": {"steps": steps},
    }
    names = [*PROFILE, *(f"pretrain_{name}" for name in PROFILE if name != "gpu_type")]
    files = {name: str(folder / "place" / name) for name in names}
    form = parameters(load(values)) | {PLACEMENT: placement}
    run(PlanStep(form=form), context=Context.for_tests(), outputs=files)
    return {name: Path(file).read_text() for name, file in files.items()}


@pytest.mark.parametrize("steps", [0, 5])
def test_gpu_tasks_are_placed_as_the_profile_and_the_form_say(
    folder: Path, base: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NODES, json.dumps({"gpu": PROFILE, "other": OTHER}))
    found = place(folder, base, steps, gpus=2.0, node_selector={"pool": "a100"})  # KFP makes whole numbers floats
    assert (found["gpus"], found["gpu_type"]) == ("2", "nvidia.com/gpu")
    assert json.loads(found["node_selector"]) == {"pool": "a100"}
    assert json.loads(found["tolerations"]) == PROFILE["tolerations"]
    assert json.loads(found["affinity"]) == PROFILE["affinity"]
    of_pretrain = {name.removeprefix("pretrain_"): text for name, text in found.items() if name.startswith("pretrain_")}
    if steps:
        assert of_pretrain == {name: found[name] for name in of_pretrain}
    else:  # with nothing to train it asks for no GPU and stays off the nodes that have one
        assert json.loads(of_pretrain.pop("affinity")) == OTHER
        assert of_pretrain == {"gpus": "0", "node_selector": "{}", "tolerations": "[]"}


def test_on_one_machine_nothing_is_placed(folder: Path, base: str) -> None:
    found = place(folder, base, 5)
    assert (found["gpus"], found["pretrain_gpus"], found["node_selector"]) == ("0", "0", "{}")


def test_a_wrong_placement_is_told_with_everything_else(
    folder: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NODES, json.dumps({"gpu": PROFILE, "other": OTHER}))
    (folder / "text.jsonl").unlink()
    with pytest.raises(RefusedError) as refused:
        place(folder, base, 5, gpus=1.5, gpu=1)
    assert sorted(refused.value.problems)[0].startswith("data.pretrain.source: ")
    assert sorted(one.split(",")[0] for one in refused.value.problems)[1:] == [
        "placement.gpu: there is no such option; did you mean gpus?",
        "placement.gpus: must be a whole number",
    ]


def test_schedules_budgets_and_controls_are_candidates_too(folder: Path) -> None:
    options = {
        "lambda_schedules": [{"shape": "linear", "values": [0.5, 0.1]}],
        "controls": {
            "pooled": True,
            "more_pretraining": True,
            "lora_ranks": [4],
            "lora_budgets": [0.05],
            "kl_weights": [0.1],
            "l2sp_weights": [1],
            "osf_shares": [0.5],
            "generated_lambdas": [0.2],
            "sampled_lambdas": [0.3],
        },
    }
    (folder / "text.jsonl").write_text("".join(f'{{"text": "text {number}"}}\n' for number in range(40)))
    items, _ = plan(folder, mix_lambdas=[0.3], mix_forgetting_budgets=[0.05], advanced={"mixed": options})
    found = [json.loads(item["candidate"]) for item in items]
    assert [one["id"] for one in found] == [
        "mixed-0.3", "mixed-linear-0.5-0.1", "mixed-budget-0.05", "mixed-pooled", "mixed-1", "mixed-budget-0.05-lora-4",
        "mixed-0-lora-4", "mixed-0-kl-0.1", "mixed-0-l2sp-1", "mixed-0-osf-0.5", "mixed-0.2-generated", "mixed-0.3-sampled",
    ]  # fmt: skip
    assert all(one["name"] for one in found)


def test_little_text_per_step_is_in_the_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Context, "say", lambda context, line: said.append(line))
    plan(folder)
    assert "mixed.replay_share: a step reads about 24 tokens of pretraining text" in said[0]
