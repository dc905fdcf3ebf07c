"""What `evaluate` writes is what `compare` reads: real small models, every task kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.config import Task

from ..evaluate import made as measured
from .made import Outcome, compare


def whole_run(folder: Path, task: Task, metric: str, architecture: str = "llama") -> Outcome:
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
        _, path = measured.evaluate(folder / name, model, labelled, metric=metric, **options)
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
    return compare(folder, inputs)


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
