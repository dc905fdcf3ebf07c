"""The whole DAG by KFP's local runner, on real files: results, cache isolation, failures."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtune.components.shared.outcome import load_outcomes
from tests.pipelines.conftest import PRINTED
from tests.pipelines.project import ALWAYS, Project, plain


def test_a_first_run_runs_every_step(finished: Project) -> None:
    assert finished.ran() == ALWAYS | {
        "prepare pretrain", "prepare finetune", "pretrain", "finetune", "mixed-0.3", "evaluate mixed-0.3",
        "evaluate pretrained", "evaluate finetuned", "evaluate interpolated", "register",
    }  # fmt: skip


def test_the_command_prints_the_candidates_and_where_everything_is(finished: Project) -> None:
    printed = (finished.folder / PRINTED).read_text(encoding="utf-8")
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


def test_the_output_folder_is_as_the_design_has_it(finished: Project) -> None:
    assert {"config.yaml", "report", "models", "mlflow"} <= {path.name for path in finished.output.iterdir()}
    assert {"report.html", "report.md", "report.json"} <= {path.name for path in (finished.output / "report").iterdir()}
    models = {path.name for path in (finished.output / "models").iterdir()}
    assert {"pretrained", "finetuned", "mixed-0.3"} <= models
    assert (finished.output / "models" / "selected" / "model.safetensors").is_file()
    assert yaml.safe_load((finished.output / "config.yaml").read_text())["mixed"]["lambdas"] == [0.3]


def test_the_data_reports_are_in_the_output_folder(finished: Project) -> None:
    pages = {file.name: file.read_text(encoding="utf-8") for file in (finished.output / "data").iterdir()}
    assert set(pages) == {"pretrain.html", "finetune.html"}
    made = {
        file.read_text(encoding="utf-8") for file in finished.output.glob(".mixtune/artifacts/*/prepare*/data_report")
    }
    assert set(pages.values()) == made


def test_the_predictions_of_every_candidate_are_in_the_output_folder(finished: Project) -> None:
    report = finished.report()
    scores = {row["id"]: row["task_score"] for row in report["candidates"] if row["task_score"]}
    files = {file.stem: file for file in (finished.output / "predictions").iterdir()}
    assert set(files) == set(scores)
    for candidate, file in files.items():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert {"id", "text", "reference", "prediction", "score"} <= set(rows[0])
        assert sum(row["score"] for row in rows) / len(rows) == pytest.approx(scores[candidate]["value"])


def test_the_report_has_the_fields_of_the_contract(finished: Project) -> None:
    report = finished.report()
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
    assert by_id["pretrained"]["watch"] is None
    assert [by_id[name]["watch"]["measurements"] for name in ("finetuned", "mixed-0.3")] == [4, 31]
    assert (finished.output / "report" / "watch-forgetting.svg").is_file()


def test_models_load_with_plain_transformers(finished: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

    models = finished.output / "models"
    AutoModelForCausalLM.from_pretrained(models / "pretrained")
    AutoModelForCausalLM.from_pretrained(models / "mixed-0.3")
    AutoModelForSequenceClassification.from_pretrained(models / "mixed-0.3")
    answer = pipeline("text-classification", model=str(models / "mixed-0.3"))("a lovely bright film")
    assert answer[0]["label"] in {"good", "bad"}


def check_answers(project: Project, candidate: str) -> None:
    """Checks that plain transformers answers with a published model as it was measured."""
    from transformers import pipeline

    run = sorted((project.output / ".mixtune" / "outcomes").iterdir())[0]
    title = "evaluate interpolated" if candidate.startswith("interpolated") else f"evaluate {candidate}"
    folder = Path({one.title: one for one in load_outcomes(run)}[title].artifacts["evaluation"]) / candidate
    rows = [json.loads(line) for line in (folder / "test.examples.jsonl").read_text().splitlines()]
    classify: Any = pipeline("text-classification", model=str(project.output / "models" / candidate))
    labels = [classify.model.config.id2label[number] for number in range(2)]
    for answers, row in zip(classify([row["text"] for row in rows], truncation=True, top_k=None), rows, strict=True):
        scores = {answer["label"]: answer["score"] for answer in answers}
        assert [scores[label] for label in labels] == pytest.approx(row["probabilities"], abs=1e-4)
        assert scores[row["prediction"]] >= 0.5 - 1e-4


def test_the_shipped_classifier_answers_as_it_was_measured(finished: Project) -> None:
    check_answers(finished, "mixed-0.3")
    assert not (finished.output / "models" / "interpolated-0.5").exists()


def test_mlflow_has_one_parent_and_a_nested_run_for_each_step(finished: Project) -> None:
    client = finished.client()
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
        assert len(client.get_metric_history(mixed.info.run_id, metric)) == 12, metric
    for metric in ("watch_forgetting", "watch_loss_finetune"):
        assert len(client.get_metric_history(mixed.info.run_id, metric)) == 31, metric
    assert {one.dataset.name for one in mixed.inputs.dataset_inputs} == {"pretrain stream", "finetune stream"}
    reports = {one.path for one in client.list_artifacts(first_parent.info.run_id, "report")}
    assert {"report/report.html", "report/report.json"} <= reports
    assert client.list_artifacts(nested["prepare finetune"].info.run_id)


def test_the_selected_model_is_registered_once_and_loads(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    client = finished.client()
    version = client.get_model_version_by_alias("tiny", "candidate")
    assert version.tags["mixtune.candidate"] == finished.report()["selected"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished.output / 'mlflow' / 'mlflow.db'}")
    classify: Any = mlflow.transformers.load_model("models:/tiny@candidate")
    assert classify("a lovely bright film")[0]["label"] in {"good", "bad"}


def test_a_run_again_from_a_step_then_moved_all_from_the_cache_then_single_steps(
    copied: Project, finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    before = copied.report()
    done = copied.mixtune("rerun", "runs/tiny", "--from", "mixed")
    assert done.returncode == 0, done.stderr
    assert copied.ran() == {"plan", "mixed-0.3", "evaluate mixed-0.3", "compare", "register", "finish"}
    again = copied.report()
    assert plain(again["candidates"]) == plain(before["candidates"])

    places = [str(finished.output), str(copied.output)]
    copied.output = copied.output.rename(tmp_path / "runs" / "über's dort")
    options = ("--output", str(copied.output), "--set", "run.keep_interpolated=true")
    status, ran, printed = copied.run(*options)
    assert status == 0, printed
    assert ran == ALWAYS | {"register"}, "no step reads what was asked for, so all is in the cache again"
    assert printed.count("from the cache") == 9
    assert copied.report()["candidates"] == again["candidates"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [copied.output.name]
    records = [path for path in (copied.output / ".mixtune").rglob("*.json") if path.name != "executor_output.json"]
    assert not [path for path in records for place in places if place in path.read_text(encoding="utf-8")]
    with contextlib.closing(sqlite3.connect(copied.output / "mlflow" / "mlflow.db")) as store:
        assert not [line for line in store.iterdump() for place in places if place in line]
    assert len(copied.client().search_model_versions("name = 'tiny'")) == 1
    newest = copied.pipeline_runs()[0]
    assert newest.info.status == "FINISHED"
    assert {f"mixtune.cached.{one}" for one in ("pretrain", "finetune", "mixed-0.3", "evaluate.mixed-0.3")} <= set(
        newest.data.tags
    )
    assert len(list((copied.output / "history").iterdir())) == 2
    check_answers(copied, "interpolated-0.5")

    status, _, printed = copied.run(*options)
    assert status == 0, printed
    assert f"nothing has changed since run {newest.info.run_name.removeprefix('tiny ')}" in printed
    assert "← selected" in printed
    assert copied.pipeline_runs()[0].info.run_id == newest.info.run_id

    copied.output = copied.output.rename(tmp_path / "runs" / "again")
    done = copied.mixtune("rerun", str(copied.output), "--only", "evaluate interpolated")
    assert done.returncode == 0, done.stderr
    (made,) = (copied.output / "only").glob("evaluate-interpolated-*")
    assert (made / "evaluation" / "evaluation.json").is_file()
    done = copied.mixtune("rerun", str(copied.output), "--only", "mixed", "--set", "mixed.learning_rate=0.001")
    assert done.returncode == 0, done.stderr
    (made,) = (copied.output / "only").glob("mixed-0.3-*")
    assert (made / "model" / "model.safetensors").is_file()
    assert json.loads((made / "model" / "mixtune.json").read_text())["params"]["learning_rate"] == 0.001
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copied.output / 'mlflow' / 'mlflow.db'}")
    found = mlflow.artifacts.download_artifacts("models:/tiny@candidate")
    assert Path(found).is_relative_to(copied.output)
    classify: Any = mlflow.transformers.load_model("models:/tiny@candidate")
    assert classify("a lovely bright film")[0]["label"] in {"good", "bad"}

    copied.output = copied.output.rename(tmp_path / "runs" / "third")
    done = copied.mixtune("sync", str(copied.output))
    assert (done.returncode, done.stderr) == (0, "")
    experiment = copied.client().get_experiment_by_name("mixtune")
    assert experiment.artifact_location == str(copied.output / "mlflow" / "artifacts")


def test_another_lambda_and_the_model_in_use_run_alone_and_a_gate_that_is_not_met_registers_nothing(
    copied: Project,
) -> None:
    before = copied.report()
    versions = [one.version for one in copied.client().search_model_versions("name = 'tiny'")]
    copied.config["mixed"]["lambdas"] = [0.3, 0.6]
    copied.config["evaluate"]["champion"] = "models:/tiny@candidate"
    copied.environment["PYTHONIOENCODING"] = "ascii"  # a terminal that cannot show λ, for the command and its steps
    status, ran, printed = copied.run("--set", "gate.min_task_score=1.1")
    assert status == 3
    assert "lambda" in printed
    assert ran == ALWAYS | {"mixed-0.6", "evaluate mixed-0.6", "evaluate pretrained"}
    assert "gate not met" in printed
    report = copied.report()
    assert report["gate"]["passed"] is False
    assert report["gate"]["reasons"]
    assert [one.version for one in copied.client().search_model_versions("name = 'tiny'")] == versions
    rows = {row["id"]: row for row in report["candidates"]}
    registered = {row["id"]: row for row in before["candidates"]}[before["selected"]]
    for measure in ("task_score", "bpb", "delta_bpb"):
        assert rows["champion"][measure] == registered[measure], "it is the model that the first run registered"


def test_a_gate_that_fails_the_run_is_status_3_with_the_report_in_its_place(copied: Project) -> None:
    status, ran, printed = copied.run("--set", "gate.min_task_score=1.1", "--set", "gate.on_miss=fail")
    assert status == 3, printed
    assert ran == ALWAYS
    assert printed.count("the gate is not met, and gate.on_miss is fail: ") == 1
    assert "Traceback" not in printed
    assert copied.report()["gate"]["options"]["on_miss"] == "fail"
    parent = copied.pipeline_runs()[0]
    assert parent.info.status == "FAILED"
    assert parent.data.tags["mixtune.verdict"].startswith("gate not met: ")
    files = {file.path for file in copied.client().list_artifacts(parent.info.run_id, "report")}
    assert "report/report.json" in files


def test_changed_labels_never_rerun_pretraining_and_an_interpolated_winner_is_written_out_and_registered(
    copied: Project,
) -> None:
    copied.write_labels(180)
    options: tuple[str, ...] = ("--set", "evaluate.interpolation_alphas=[0.05]", "--set", "gate.rule=least_forgetting")
    # A learning rate that ruins the mixed model leaves the interpolated one as the one that forgets least.
    options += ("--set", "mixed.learning_rate=1", "--set", "mixed.steps=12")
    status, ran, printed = copied.run(*options, "--set", "tracking.registered_model=blend")
    assert status == 0, printed
    assert {"prepare finetune", "finetune", "mixed-0.3"} <= ran
    assert not {"prepare pretrain", "pretrain"} & ran
    assert copied.report()["selected"] == "interpolated-0.05"
    assert (copied.output / "models" / "selected" / "model.safetensors").is_file()
    version = copied.client().get_model_version_by_alias("blend", "candidate")
    assert version.tags["mixtune.candidate"] == "interpolated-0.05"


def test_a_failing_candidate_ends_in_a_sentence_and_the_next_run_goes_on(copied: Project) -> None:
    status, ran, printed = copied.run("--set", "mixed.learning_rate=1", "--set", "mixed.weight_decay=100")
    assert status == 1
    assert "Traceback" not in printed
    assert "mixed-0.3: step" in printed
    assert "not finite" in printed
    assert "its log is" in printed
    assert "finished steps are kept; run the same command again to continue" in printed
    assert "pretrain" not in ran
    newest = copied.pipeline_runs()[0]
    assert newest.info.status == "FAILED"
    assert "not finite" in newest.data.tags["mixtune.verdict"]
