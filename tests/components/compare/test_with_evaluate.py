"""What `evaluate` writes is what `compare` reads: real small models, every task kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtune.components.evaluate.config import LmEvalStep
from mixtune.components.shared.artifacts import Artifact, read_jsonl, write_jsonl
from mixtune.components.shared.config import Task
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.context import Context

from ..evaluate import made as measured
from ..evaluate.harness_made import TASKS, write_tasks
from .made import Outcome, compare


def whole_run(
    folder: Path, task: Task, metric: str, architecture: str = "llama", context: Context | None = None, **how: Any
) -> Outcome:
    """Evaluates four small models on the same held-out data and compares them."""
    labels = measured.LABELS if task in ("classification", "multi_label") else None
    labelled = measured.write_labelled(folder / "labelled", task)
    models = {
        name: measured.write_model(
            folder / name,
            name,
            name.split("-")[0],  # type: ignore[arg-type]
            None if name == "pretrained" else labels,
            seed,
            architecture,
            task,
        )
        for seed, name in enumerate(("pretrained", "finetuned", "mixed-0.3"))
    }

    def evaluation(name: str, model: Artifact, **options: Any) -> Artifact:
        text = folder / name / "text"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.symlink_to(folder / "text")
        _, path = measured.evaluate(folder / name, model, labelled, metric=metric, **options, **how)
        return Artifact(str(path))

    measured.write_text(folder / "text", with_ends=architecture == "bert")
    inputs: dict[str, Any] = {
        "pretrained": evaluation("of-pretrained", models["pretrained"]),
        "finetuned": evaluation("of-finetuned", models["finetuned"]),
        "mixed": [evaluation("of-mixed", models["mixed-0.3"])],
        "interpolated": evaluation(
            "of-interpolated", models["pretrained"], other=models["finetuned"], interpolation_alphas=[0.5]
        ),
    }
    return compare(folder, inputs, context)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_classification(tmp_path: Path, metric: str) -> None:
    done = whole_run(tmp_path, "classification", metric)
    assert [row["id"] for row in done.report["candidates"]] == [
        "pretrained",
        "finetuned",
        "mixed-0.3",
        "interpolated-0.5",
    ]
    assert done.row("pretrained")["task_score"] is None
    for name in ("finetuned", "mixed-0.3", "interpolated-0.5"):
        row = done.row(name)
        # The split's own metric, computed by scikit-learn, and the value that the bootstrap is drawn around.
        assert row["task_score"]["value"] == pytest.approx(row[metric])
        matrix = np.array(row["confusion_matrix"])
        assert matrix.shape == (3, 3)
        assert matrix.sum() == 11
        assert matrix.trace() / 11 == pytest.approx(row["accuracy"])
        assert 0 <= row["calibration_error"] <= 1
        assert row["dev"]["calibration_error"] != row["calibration_error"]
    assert done.row("interpolated-0.5")["params"] == {"alpha": 0.5}
    assert done.row("pretrained")["confusion_matrix"] is None
    assert "calibration_error" not in done.row("pretrained")
    assert done.report["task"]["signatures"] is None
    assert done.report["contamination"]["test"] == {"examples": 11, "contaminated": 1}
    assert set(done.report["data"]) == {"pretrain", "finetune"}


@pytest.mark.parametrize("metric", ["exact_match", "token_f1", "rouge_l", "bleu", "chrf"])
def test_generation(tmp_path: Path, metric: str) -> None:
    done = whole_run(tmp_path, "generation", metric)
    for row in done.report["candidates"]:
        assert row["task_score"]["value"] == pytest.approx(row[metric])
        assert row["completion_nats_per_token"] > 0
        assert row["task_score"]["low"] <= row["task_score"]["value"] <= row["task_score"]["high"]
    assert done.row("finetuned")["chrf"] > 0
    assert "tok:13a" in done.report["task"]["signatures"]["bleu"]
    assert set(done.report["task"]["signatures"]) == {"rouge", "bleu", "chrf"}


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("multi_label", "micro_f1"),
        ("multi_label", "macro_f1"),
        ("regression", "pearson"),
        ("regression", "spearman"),
        ("question_answering", "exact_match"),
        ("question_answering", "token_f1"),
    ],
)
def test_encoders(tmp_path: Path, task: Task, metric: str) -> None:
    done = whole_run(tmp_path, task, metric, "bert")
    assert done.report["forgetting"]["likelihood"] == "fixed-mask pseudo-likelihood"
    for name in ("finetuned", "mixed-0.3", "interpolated-0.5"):
        row = done.row(name)
        for at in (row, row["dev"]):
            assert at["task_score"]["value"] == pytest.approx(at[metric])
    assert done.report["task"]["examples"] == 11
    assert done.report["contamination"]["test"] == {"examples": 11, "contaminated": 1}
    if task == "regression":
        assert 0 < done.row("finetuned")["mae"] <= done.row("finetuned")["rmse"]
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert "every token is masked and predicted once" in page


def test_tasks_of_the_harness_before_and_after(tmp_path: Path) -> None:
    tasks = LmEvalStep(tasks=[*TASKS, "tiny_group"], tasks_folder=str(write_tasks(tmp_path / "tasks", examples=30)))
    done = whole_run(tmp_path, "classification", "accuracy", lm_eval=tasks)
    columns = done.report["lm_eval"]["columns"]
    assert [column["name"] for column in columns] == [
        "tiny_choice, acc",
        "tiny_choice, acc_norm",
        "tiny_answer, exact_match",
        "tiny_cloze, perplexity",
        "tiny_cloze, acc",
        "tiny_group, acc",
    ]
    assert [column["examples"] for column in columns] == [30, 30, 30, 30, 30, 60]
    before, after = ({one["task"]: one for one in done.row(name)["lm_eval"]} for name in ("pretrained", "finetuned"))
    assert {one["vs_pretrained"] for one in before.values()} == {None}
    paired = after["tiny_group"]["vs_pretrained"]
    assert paired["value"] == pytest.approx(after["tiny_group"]["value"] - before["tiny_group"]["value"])
    rows = [
        {
            row["task"]: row["values"]
            for row in read_jsonl(tmp_path / f"of-{name}" / "evaluation" / name / "lm_eval.jsonl")
        }
        for name in ("finetuned", "pretrained")
    ]
    of_each = np.subtract(*(row["tiny_group"] for row in rows))
    assert paired["stderr"] == pytest.approx(of_each.std(ddof=1) / np.sqrt(60))
    assert paired["stderr"] > 0
    page, summary = ((done.folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    shown = f"{after['tiny_group']['value']:.3f} ±\N{NO-BREAK SPACE}{after['tiny_group']['stderr']:.3f}"
    against = f"{paired['value']:+.3f} ±\N{NO-BREAK SPACE}{paired['stderr']:.3f}"
    assert f"<td>{shown}<small>{against}</small></td>" in page
    assert f"| {shown} ({against}) |" in summary
    assert "tiny_group: 60 examples" in page
    assert "(lower is better)" in page


def test_candidates_that_were_measured_on_other_tasks_are_refused(tmp_path: Path) -> None:
    folder = str(write_tasks(tmp_path / "tasks"))
    whole_run(tmp_path, "classification", "accuracy", lm_eval=LmEvalStep(tasks=["tiny_cloze"], tasks_folder=folder))
    file = tmp_path / "of-mixed" / "evaluation" / "mixed-0.3" / "lm_eval.jsonl"
    write_jsonl(file, [row | {"digest": "another"} for row in read_jsonl(file)])
    artifacts = {
        name: Artifact(str(tmp_path / f"of-{name}" / "evaluation"))
        for name in ("pretrained", "finetuned", "interpolated")
    }
    with pytest.raises(RefusedError, match=r"mixed-0\.3: was measured on other tasks or examples"):
        compare(tmp_path, {**artifacts, "mixed": [Artifact(str(file.parents[1]))]})


def test_capabilities_are_in_the_report_and_in_the_gate(tmp_path: Path) -> None:
    whole_run(tmp_path, "classification", "accuracy", capabilities=True, max_length=64)
    artifacts = {
        name: Artifact(str(tmp_path / f"of-{name}" / "evaluation"))
        for name in ("pretrained", "finetuned", "interpolated")
    }
    mixed = [Artifact(str(tmp_path / "of-mixed" / "evaluation"))]
    done = compare(tmp_path, {**artifacts, "mixed": mixed}, max_capability_drop=0.0)
    columns = done.report["lm_eval"]["columns"]
    assert [column["metric_name"] for column in columns] == ["capabilities.arithmetic.accuracy"]
    checks = done.report["gate"]["checks"]["mixed-0.3"]
    (limit,) = (item for item in checks if item["name"] == "max_capability_drop")
    change = done.row("mixed-0.3")["lm_eval"][0]["vs_pretrained"]["value"]
    assert limit["passed"] == (change >= 0)
    assert f"{change:+.3f}" in limit["sentence"]
    assert "The gate accepts a drop of at most 0 on each." in (done.folder / "report.md").read_text()
