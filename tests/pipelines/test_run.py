"""The whole DAG by KFP's local runner, on real files: results, cache isolation, failures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtune.components.shared.outcome import load_outcomes
from tests.pipelines.project import ALWAYS, Project


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, str]:
    """One finished run; tests that go on from it work on a copy of nothing: they leave it finished too."""
    project = Project(tmp_path_factory.mktemp("project"))
    with tempfile.TemporaryDirectory() as temporary:
        project.environment["TMPDIR"] = temporary
        status, ran, printed = project.run()
        assert status == 0, printed
        assert list(Path(temporary).iterdir()) == []  # what KFP and torch put there is gone
    project.environment.clear()
    assert ran == ALWAYS | {
        "prepare pretrain", "prepare finetune", "pretrain", "finetune", "mixed-0.3", "evaluate mixed-0.3",
        "evaluate pretrained", "evaluate finetuned", "evaluate interpolated", "register",
    }  # fmt: skip
    return project, printed


def test_the_command_prints_the_candidates_and_where_everything_is(first: tuple[Project, str]) -> None:
    _, printed = first
    for word in (
        "mixed-0.3",
        "finetuned",
        "interpolated-0.5",
        "← selected",
        "gate passed",
        "report.html",
        "models",
        "MLflow",
    ):
        assert word in printed
    assert "Traceback" not in printed


def test_the_output_folder_is_as_the_design_has_it(first: tuple[Project, str]) -> None:
    project, _ = first
    assert {"config.yaml", "report", "models", "mlflow"} <= {path.name for path in project.output.iterdir()}
    assert {"report.html", "report.md", "report.json"} <= {path.name for path in (project.output / "report").iterdir()}
    models = {path.name for path in (project.output / "models").iterdir()}
    assert {"pretrained", "finetuned", "mixed-0.3"} <= models
    assert (project.output / "models" / "selected" / "model.safetensors").is_file()
    assert yaml.safe_load((project.output / "config.yaml").read_text())["mixed"]["lambdas"] == [0.3]


def test_the_report_has_the_fields_of_the_contract(first: tuple[Project, str]) -> None:
    report = first[0].report()
    assert report["schema_version"] == 1
    assert {"name", "seed", "interval", "selected", "gate", "task", "forgetting", "candidates"} <= set(report)
    assert {"kind", "metric", "higher_is_better", "split", "examples"} <= set(report["task"])
    assert {"unit", "split", "documents", "sources"} <= set(report["forgetting"])
    by_id = {one["id"]: one for one in report["candidates"]}
    assert set(by_id) == {"pretrained", "finetuned", "mixed-0.3", "interpolated-0.5"}
    for one in by_id.values():
        assert {
            "id", "kind", "start", "lambda", "realised_lambda", "params", "task_score", "task_score_vs_finetuned",
            "bpb", "delta_bpb", "pareto", "tokens", "seconds",
        } <= set(one)  # fmt: skip
        assert one["bpb"]["low"] <= one["bpb"]["value"] <= one["bpb"]["high"]
    assert by_id["pretrained"]["task_score"] is None
    assert by_id["mixed-0.3"]["lambda"] == 0.3
    assert by_id["mixed-0.3"]["realised_lambda"] == pytest.approx(0.3)
    assert by_id["finetuned"]["tokens"]["pretrain"] == 0
    assert by_id["pretrained"]["delta_bpb"]["value"] == 0


def test_models_load_with_plain_transformers(first: tuple[Project, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

    models = first[0].output / "models"
    AutoModelForCausalLM.from_pretrained(models / "pretrained")
    AutoModelForCausalLM.from_pretrained(models / "mixed-0.3")
    AutoModelForSequenceClassification.from_pretrained(models / "mixed-0.3")
    answer = pipeline("text-classification", model=str(models / "mixed-0.3"))("a lovely bright film")
    assert answer[0]["label"] in {"good", "bad"}


def test_the_shipped_classifier_answers_as_it_was_measured(first: tuple[Project, str]) -> None:
    from transformers import pipeline

    project, _ = first
    outcomes = {one.title: one for one in load_outcomes(next((project.output / ".mixtune" / "outcomes").iterdir()))}
    folder = Path(outcomes["evaluate mixed-0.3"].artifacts["evaluation"]) / "mixed-0.3"
    rows = [json.loads(line) for line in (folder / "test.examples.jsonl").read_text().splitlines()]
    classify: Any = pipeline("text-classification", model=str(project.output / "models" / "mixed-0.3"))
    labels = [classify.model.config.id2label[number] for number in range(2)]
    for answers, row in zip(classify([row["text"] for row in rows], truncation=True, top_k=None), rows, strict=True):
        scores = {answer["label"]: answer["score"] for answer in answers}
        assert [scores[label] for label in labels] == pytest.approx(row["probabilities"], abs=1e-4)
        assert scores[row["prediction"]] >= 0.5 - 1e-4


def test_mlflow_has_one_parent_and_a_nested_run_for_each_step(first: tuple[Project, str]) -> None:
    client = first[0].client()
    experiment = client.get_experiment_by_name("mixtune")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    first_parent = min(parents, key=lambda run: run.info.start_time)
    assert first_parent.info.status == "FINISHED"
    assert first_parent.data.tags["mixtune.verdict"].startswith("gate passed")
    assert first_parent.data.params["mixed.lambdas"] == "[0.3]"
    nested = {
        run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == first_parent.info.run_id
    }
    assert {"plan", "pretrain", "mixed-0.3", "evaluate mixed-0.3", "compare", "register", "finish"} <= set(nested)
    assert all(run.info.status == "FINISHED" for run in nested.values())
    mixed = nested["mixed-0.3"]
    for metric in ("loss_pretrain", "loss_finetune", "realised_mix_weight", "learning_rate", "tokens_pretrain"):
        assert len(client.get_metric_history(mixed.info.run_id, metric)) == 2, metric
    assert {one.dataset.name for one in mixed.inputs.dataset_inputs} == {"pretrain stream", "finetune stream"}
    reports = {one.path for one in client.list_artifacts(first_parent.info.run_id, "report")}
    assert {"report/report.html", "report/report.json"} <= reports
    assert client.list_artifacts(nested["prepare finetune"].info.run_id)


def test_the_selected_model_is_registered_once_and_loads(first: tuple[Project, str]) -> None:
    project, _ = first
    client = project.client()
    version = client.get_model_version_by_alias("tiny", "candidate")
    assert version.tags["mixtune.candidate"] == project.report()["selected"]
    code = (
        "import mlflow, sys\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "pipe = mlflow.transformers.load_model('models:/tiny@candidate')\n"
        "print(pipe('a lovely bright film')[0]['label'])\n"
    )
    uri = f"sqlite:///{project.output / 'mlflow' / 'mlflow.db'}"
    done = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=False)
    assert done.stdout.strip() in {"good", "bad"}, done.stderr


def test_the_same_again_trains_nothing_and_links_to_what_was_made(first: tuple[Project, str]) -> None:
    project, _ = first
    before = project.report()
    status, ran, printed = project.run()
    assert status == 0
    assert ran == ALWAYS | {"register"}
    assert printed.count("from the cache") == 9
    after = project.report()
    assert after["candidates"] == before["candidates"]
    assert len(project.client().search_model_versions("name = 'tiny'")) == 1
    newest = project.pipeline_runs()[0]
    assert newest.info.status == "FINISHED"
    assert {f"mixtune.cached.{one}" for one in ("pretrain", "finetune", "mixed-0.3", "evaluate.mixed-0.3")} <= set(
        newest.data.tags
    )
    assert len(list((project.output / "history").iterdir())) >= 1


def test_another_lambda_trains_that_one_alone(first: tuple[Project, str]) -> None:
    project, _ = first
    status, ran, _ = project.run("--set", "mixed.lambdas=[0.3, 0.6]")
    assert status == 0
    assert ran - {"register"} == ALWAYS | {"mixed-0.6", "evaluate mixed-0.6"}


def test_a_gate_that_is_not_met_is_status_3_and_registers_nothing(first: tuple[Project, str]) -> None:
    project, _ = first
    status, ran, printed = project.run("--set", "gate.min_task_score=1.1")
    assert status == 3
    assert ran == ALWAYS
    assert "gate not met" in printed
    assert project.report()["gate"]["passed"] is False
    assert project.report()["gate"]["reasons"]


def test_a_gate_that_fails_the_run_is_status_3_with_the_report_in_its_place(first: tuple[Project, str]) -> None:
    project, _ = first
    status, ran, printed = project.run("--set", "gate.min_task_score=1.1", "--set", "gate.on_miss=fail")
    assert status == 3, printed
    assert ran == ALWAYS
    assert printed.count("the gate is not met, and gate.on_miss is fail: ") == 1
    assert "Traceback" not in printed
    assert project.report()["gate"]["options"]["on_miss"] == "fail"
    parent = project.pipeline_runs()[0]
    assert parent.info.status == "FAILED"
    assert parent.data.tags["mixtune.verdict"].startswith("gate not met: ")
    files = {file.path for file in project.client().list_artifacts(parent.info.run_id, "report")}
    assert "report/report.json" in files


def test_an_interpolated_winner_is_written_out_and_registered(first: tuple[Project, str]) -> None:
    project, _ = first
    options: tuple[str, ...] = ("--set", "evaluate.interpolation_alphas=[0.05]", "--set", "gate.rule=least_forgetting")
    # A learning rate that ruins the mixed model leaves the interpolated one as the one that forgets least.
    options += ("--set", "mixed.learning_rate=0.3", "--set", "tracking.registered_model=blend")
    status, _, printed = project.run(*options)
    assert status == 0, printed
    assert project.report()["selected"] == "interpolated-0.05"
    assert (project.output / "models" / "selected" / "model.safetensors").is_file()
    version = project.client().get_model_version_by_alias("blend", "candidate")
    assert version.tags["mixtune.candidate"] == "interpolated-0.05"


def test_changed_labels_never_rerun_pretraining(fresh: Project, first: tuple[Project, str]) -> None:
    project, _ = first
    project.write_labels(180)
    try:
        status, ran, _ = project.run()
    finally:
        project.write_labels(200)
    assert status == 0
    assert {"prepare finetune", "finetune", "mixed-0.3"} <= ran
    assert not {"prepare pretrain", "pretrain"} & ran


def test_a_failing_candidate_ends_in_a_sentence_and_the_next_run_goes_on(first: tuple[Project, str]) -> None:
    project, _ = first
    status, ran, printed = project.run("--set", "mixed.learning_rate=1.0e+30", "--set", "mixed.max_grad_norm=1.0e+30")
    assert status == 1
    assert "Traceback" not in printed
    assert "mixed-0.3: step" in printed
    assert "not finite" in printed
    assert "its log is" in printed
    assert "finished steps are kept; run the same command again to continue" in printed
    assert "pretrain" not in ran
    newest = project.pipeline_runs()[0]
    assert newest.info.status == "FAILED"
    assert "not finite" in newest.data.tags["mixtune.verdict"]


def test_a_brought_model_is_used_as_it_is(first: tuple[Project, str], fresh: Project) -> None:
    project, _ = first
    shutil.copytree(project.output / "models" / "pretrained", fresh.folder / "mine", symlinks=False)
    fresh.config["model"] = {"base": "./mine", "max_length": 64}
    fresh.config["pretrain"] = {"steps": 0}
    status, ran, printed = fresh.run()
    assert status == 0, printed
    assert "pretrain" in ran
    mine, brought = (
        folder / "model.safetensors" for folder in (fresh.folder / "mine", fresh.output / "models" / "pretrained")
    )
    assert mine.read_bytes() == brought.read_bytes()
    assert brought.is_symlink(), "linked, not copied"


def test_the_base_model_and_the_model_in_use_are_candidates(first: tuple[Project, str], fresh: Project) -> None:
    project, _ = first
    shutil.copytree(project.output / "models" / "pretrained", fresh.folder / "mine")
    fresh.config["model"] = {"base": "./mine", "max_length": 64}
    fresh.config["pretrain"]["steps"] = 5
    fresh.config["evaluate"] |= {"champion": "models:/tiny@candidate", "interpolate_mixed": True}
    status, _, printed = fresh.run()
    assert status == 0, printed
    rows = {row["id"]: row for row in fresh.report()["candidates"]}
    assert rows["base"]["kind"] == "base"
    assert rows["base"]["delta_bpb"]["value"] != 0, "what pretraining further has changed"
    assert "champion" not in rows, "the alias is new"
    assert rows["interpolated-0.5-mixed-0.3"]["delta_bpb"] != rows["interpolated-0.5"]["delta_bpb"]
    assert not (fresh.output / "models" / "base").exists()
    status, ran, printed = fresh.run()
    assert status == 0, printed
    assert "evaluate pretrained" in ran
    assert "pretrain" not in ran
    champion = {row["id"]: row for row in fresh.report()["candidates"]}["champion"]
    selected = {row["id"]: row for row in fresh.report()["candidates"]}[fresh.report()["selected"]]
    assert champion["task_score"] == selected["task_score"], "it is the model that the first run registered"
    assert champion["delta_bpb"] == selected["delta_bpb"]
