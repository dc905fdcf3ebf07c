"""The whole DAG by KFP's local runner, on real files: results, cache isolation, refusals, failures, interruption."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mixtune.components.shared.outcome import load_outcomes
from mixtune.pipelines.run_folder import claim
from tests.conftest import sentences
from tests.pipelines.project import Project

pytestmark = pytest.mark.slow

ALWAYS = {"plan", "compare", "finish"}


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


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    return Project(tmp_path)


def pipeline_runs(project: Project) -> list[Any]:
    """The parent runs, newest first."""
    client = project.client()
    experiment = client.get_experiment_by_name("mixtune").experiment_id
    order = ["attributes.start_time DESC"]
    return list(client.search_runs([experiment], "tags.`mixtune.step` = 'pipeline'", order_by=order))


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
    classify = pipeline("text-classification", model=str(project.output / "models" / "mixed-0.3"))
    answers = classify([row["text"] for row in rows], truncation=True)
    assert [answer["label"] for answer in answers] == [row["prediction"] for row in rows]
    for answer, row in zip(answers, rows, strict=True):
        assert answer["score"] == pytest.approx(max(row["probabilities"]), abs=1e-4)


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
    newest = pipeline_runs(project)[0]
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
    parent = pipeline_runs(project)[0]
    assert parent.info.status == "FAILED"
    assert parent.data.tags["mixtune.verdict"].startswith("failed: compare: the gate is not met")
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
    assert "pretrain" not in ran
    newest = pipeline_runs(project)[0]
    assert newest.info.status == "FAILED"
    assert "not finite" in newest.data.tags["mixtune.verdict"]


def test_interrupted_is_130_and_goes_on_from_there(fresh: Project) -> None:
    (fresh.folder / "config.yaml").write_text(yaml.safe_dump(fresh.config), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "mixtune.pipelines.cli", "run", "config.yaml"], cwd=fresh.folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    deadline = time.monotonic() + 120
    outcomes = fresh.output / ".mixtune" / "outcomes"
    while not list(outcomes.glob("*/prepare-finetune.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "goes on from there" in errors
    status, ran, _ = fresh.run()
    assert status == 0
    assert "prepare pretrain" not in ran
    statuses = [run.info.status for run in pipeline_runs(fresh)]
    assert statuses == ["FINISHED", "KILLED"], "newest first"


def test_killed_for_good_leaves_no_process_and_a_folder_to_go_on_in(fresh: Project) -> None:
    (fresh.folder / "config.yaml").write_text(yaml.safe_dump(fresh.config), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "mixtune.pipelines.cli", "run", "config.yaml"],
        cwd=fresh.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((fresh.output / "logs").glob("*/plan.log")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()

    def alive() -> bool:
        lines = (" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]))
        return any(str(fresh.folder) in line for line in lines)

    while alive():
        assert time.monotonic() < deadline, "the runner or a step lives on"
        time.sleep(0.2)
    claim(fresh.output, "tiny").release()


def test_generation_runs_end_to_end(fresh: Project) -> None:
    rows = [{"prompt": f"{text} =>", "completion": f" {text.split()[0]}"} for text in sentences(160, seed=3)]
    fresh.write("pairs.jsonl", rows)
    options = {"source": "pairs.jsonl", "task": "generation", "dev_fraction": 0.2, "test_fraction": 0.2}
    fresh.config["data"]["finetune"] = options
    fresh.config["evaluate"]["max_new_tokens"] = 8
    status, _, printed = fresh.run()
    assert status == 0, printed
    report = fresh.report()
    assert report["task"]["metric"] == "exact_match"
    assert all(one["task_score"] is not None for one in report["candidates"])
    version = fresh.client().get_model_version_by_alias("tiny", "candidate")
    assert version.tags["mixtune.kind"] in {"mixed", "finetuned", "interpolated"}


def _labelled(project: Project, task: str) -> None:
    """Examples of a task that a few steps can begin to learn."""
    texts = sentences(160, seed=3)
    rows: list[dict[str, Any]]
    if task == "regression":
        rows = [{"text": text, "label": round(text.count("the") / 4, 3)} for text in texts]
    else:
        rows = [{"question": "which animal?", "context": text, "answers": _animal(text)} for text in texts]
    project.write("task.jsonl", rows)
    options = {"source": "task.jsonl", "task": task, "dev_fraction": 0.2, "test_fraction": 0.2}
    project.config["data"]["finetune"] = options


def _animal(text: str) -> str:
    return next((word for word in text.split() if word in {"cat", "dog", "bird"}), "")


def test_an_encoder_with_a_masked_lm_runs_end_to_end(fresh: Project) -> None:
    import transformers

    _labelled(fresh, "question_answering")
    fresh.config["model"]["objective"] = "masked_lm"
    fresh.config["mixed"]["lambdas"] = [0.3]
    status, _, printed = fresh.run()
    assert status == 0, printed
    report = fresh.report()
    assert report["forgetting"]["likelihood"] == "fixed-mask pseudo-likelihood"
    selected = fresh.output / "models" / "selected"
    for name in ("AutoModelForQuestionAnswering", "AutoModelForMaskedLM"):
        _, found = getattr(transformers, name).from_pretrained(selected, output_loading_info=True)
        assert not found["missing_keys"]
    fill = transformers.pipeline("fill-mask", model=str(selected))
    assert len(fill("the <|mask|> sees the dog")) == 5


def test_schedules_budgets_and_every_control_are_candidates(fresh: Project) -> None:
    _labelled(fresh, "regression")
    fresh.config["mixed"] |= {
        "steps": 6,
        "lambdas": [0.3],
        "lambda_schedules": [{"shape": "cosine", "values": [0.6, 0.1]}],
        "forgetting_budgets": [0.5],
        "controls": {
            "pooled": True, "more_pretraining": True, "lora_ranks": [2], "kl_weights": [0.1], "l2sp_weights": [0.1],
        },
    }  # fmt: skip
    fresh.config["gate"]["max_score_drop"] = 5
    status, _, printed = fresh.run()
    assert status == 0, printed
    rows = {one["id"]: one for one in fresh.report()["candidates"]}
    wanted = ["0.3", "cosine-0.6-0.1", "budget-0.5", "pooled", "1", "0-lora-2", "0-kl-0.1", "0-l2sp-0.1"]
    assert {f"mixed-{name}" for name in wanted} <= set(rows)
    assert rows["mixed-1"]["realised_lambda"] == 1
    assert rows["mixed-1"]["tokens"]["finetune"] == 0
    same = [sum(rows[f"mixed-{name}"]["tokens"][stream] for stream in ("pretrain", "finetune")) for name in wanted[:5]]
    assert max(same) < 1.2 * min(same), "candidates that read text read the same number of tokens"
    assert rows["mixed-pooled"]["lambda"] is None
    assert 0.1 < rows["mixed-cosine-0.6-0.1"]["realised_lambda"] < 0.6
    assert rows["mixed-budget-0.5"]["forgetting_budget"]["kept"] is True
    for name in wanted:
        assert (fresh.output / "models" / f"mixed-{name}" / "model.safetensors").is_file()


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


REFUSED: list[tuple[str, Callable[[Project], object], str]] = [
    ("missing file", lambda p: (p.folder / "text.jsonl").unlink(), "text.jsonl"),
    ("missing column", lambda p: p.config["data"]["finetune"].update(label_column="klass"), "klass"),
    ("lambda above one", lambda p: p.config["mixed"].update(lambdas=[1.5]), "mixed.lambdas.0"),
    ("unknown key", lambda p: p.config.update(mixd={}), "mixd"),
    ("wrong type", lambda p: p.config["pretrain"].update(steps="many"), "pretrain.steps"),
    ("no model", lambda p: p.config["model"].update(base="./nowhere"), "nowhere"),
    ("empty file", lambda p: (p.folder / "labels.jsonl").write_text(""), "labels.jsonl"),
]


@pytest.mark.parametrize(("spoil", "word"), [(one[1], one[2]) for one in REFUSED], ids=[one[0] for one in REFUSED])
def test_refused_before_anything_runs_and_nothing_is_written(
    fresh: Project, spoil: Callable[[Project], object], word: str
) -> None:
    spoil(fresh)
    done = fresh.mixtune("run", "config.yaml")
    assert done.returncode == 2, done.stderr
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (fresh.folder / "runs").exists()


def test_bad_data_is_refused_with_all_problems_of_its_stream(fresh: Project) -> None:
    rows: list[dict[str, Any]] = [
        {"text": text, "label": "a" if i % 2 else "b"} for i, text in enumerate(sentences(40))
    ]
    rows[5] = {"text": "once only here", "label": "once"}
    rows[7]["text"] = "   "
    rows[9]["label"] = None
    fresh.write("labels.jsonl", rows)
    done = fresh.mixtune("run", "config.yaml")
    assert done.returncode == 2
    assert not {"pretrain", "finetune"} & fresh.ran(), "nothing is trained on data that is refused"
    for word in ("once", "line 8", "line 10"):
        assert word in done.stderr, word
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_no_run_is_left_alone(fresh: Project) -> None:
    fresh.output.mkdir(parents=True)
    (fresh.output / "thesis.txt").write_text("years of work")
    done = fresh.mixtune("run", "config.yaml")
    assert done.returncode == 2
    assert "is no mixtune run" in done.stderr
    assert [path.name for path in fresh.output.iterdir()] == ["thesis.txt"]


def test_an_unreachable_tracking_server_is_status_4(fresh: Project) -> None:
    fresh.config["tracking"] = {"uri": "http://127.0.0.1:9"}
    done = fresh.mixtune("run", "config.yaml")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "no MLflow server answers at http://127.0.0.1:9" in done.stderr


def test_a_password_in_the_configuration_is_refused_and_not_shown(fresh: Project) -> None:
    fresh.config["tracking"] = {"uri": "http://someone:secret@127.0.0.1:9"}
    done = fresh.mixtune("run", "config.yaml")
    assert done.returncode == 2
    assert "MLFLOW_TRACKING_PASSWORD" in done.stderr
    assert "secret" not in done.stdout + done.stderr
    assert not (fresh.folder / "runs").exists()


def test_two_runs_in_one_folder_do_not_mix(fresh: Project) -> None:
    lock = claim(fresh.output, "tiny")
    try:
        done = fresh.mixtune("run", "config.yaml")
    finally:
        lock.release()
    assert done.returncode == 2
    assert "another run is using" in done.stderr
