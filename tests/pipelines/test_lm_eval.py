"""Tasks of lm-evaluation-harness in a whole run: in the report, in MLflow, and in what runs again when they change."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from tests.components.evaluate.harness_made import write_tasks

from .project import ALWAYS, Project


def test_a_run_with_tasks_of_ones_own(copied: Project, tmp_path: Path) -> None:
    project = copied
    shutil.rmtree(project.output / "mlflow")  # only what this run records is looked for
    tasks = write_tasks(tmp_path / "tasks", examples=20)
    asked = {"tasks": ["tiny_choice", "tiny_cloze"], "tasks_folder": "tasks"}
    project.config["evaluate"] |= {"lm_eval": asked, "interpolate_mixed": True}
    evaluations = {"evaluate pretrained", "evaluate finetuned", "evaluate mixed-0.3", "evaluate interpolated"}
    status, ran, printed = project.run()
    assert status == 0, printed
    assert ran == ALWAYS | evaluations | {"register"}
    rows = {row["id"]: row for row in project.report()["candidates"]}
    assert set(rows) == {"pretrained", "finetuned", "mixed-0.3", "interpolated-0.5", "interpolated-0.5-mixed-0.3"}
    for name, row in rows.items():
        acc, _, perplexity, _ = row["lm_eval"]
        assert 0 <= acc["value"] <= 1
        assert 1 < perplexity["value"] < math.inf
        assert (acc["vs_pretrained"] is None) == (name == "pretrained")
    assert len({row["lm_eval"][2]["value"] for row in rows.values()}) == len(rows)

    client = project.client()
    (experiment,) = [one for one in client.search_experiments() if one.name != "Default"]
    metrics = {run.info.run_name: run.data.metrics for run in client.search_runs([experiment.experiment_id])}
    for name in ("pretrained", "finetuned", "mixed-0.3"):
        found = metrics[f"evaluate {name}"]
        assert found["lm_eval.tiny_cloze.perplexity"] == pytest.approx(rows[name]["lm_eval"][2]["value"])
        assert found["lm_eval.tiny_choice.acc.stderr"] == pytest.approx(rows[name]["lm_eval"][0]["stderr"])
    difference = rows["mixed-0.3"]["lm_eval"][2]["vs_pretrained"]["value"]
    assert metrics["compare"]["mixed-0.3.lm_eval.tiny_cloze.perplexity.vs_pretrained"] == pytest.approx(difference)

    with (tasks / "asked.jsonl").open("a", encoding="utf-8") as file:
        file.write((tasks / "solved.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n")
    status, ran, printed = project.run()
    assert status == 0, printed
    assert ran == ALWAYS | evaluations | {"register"}
    assert project.report()["lm_eval"]["columns"][0]["examples"] == 21
