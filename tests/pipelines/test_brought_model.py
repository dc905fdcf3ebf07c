"""A model that the user brings: used as it is, trained further, and measured with tasks of lm-evaluation-harness."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from tests.components.evaluate.harness_made import write_tasks
from tests.conftest import sentences

from .project import ALWAYS, Project


@pytest.fixture(scope="module")
def brought(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a model of its own and a regression task."""
    project = Project(tmp_path_factory.mktemp("brought"))
    shutil.copytree(finished.output / "models" / "pretrained", project.folder / "mine", symlinks=False)
    rows = [{"text": text, "label": round(text.count("the") / 4, 3)} for text in sentences(160, seed=3)]
    project.write("numbers.jsonl", rows)
    options = {"source": "numbers.jsonl", "task": "regression", "dev_fraction": 0.2, "test_fraction": 0.2}
    project.config["data"]["finetune"] = options
    project.config["model"] = {"base": "./mine", "max_length": 64}
    project.config["pretrain"]["steps"] = 0
    project.config["gate"]["max_score_drop"] = 2
    return project


def test_it_is_used_as_it_is(brought: Project) -> None:
    brought.config["evaluate"]["champion"] = "models:/tiny@candidate"
    status, ran, printed = brought.run()
    assert status == 0, printed
    assert "pretrain" in ran
    mine, used = (
        folder / "model.safetensors" for folder in (brought.folder / "mine", brought.output / "models" / "pretrained")
    )
    assert mine.read_bytes() == used.read_bytes()
    assert used.is_symlink(), "linked, not copied"
    assert "champion" not in {row["id"] for row in brought.report()["candidates"]}, "the alias is new"
    # The cached model names the place of weights that are not copied, so a model in another place is another model.
    (brought.folder / "below").mkdir()
    (brought.folder / "mine").rename(brought.folder / "below" / "mine")
    brought.config["model"]["base"] = "./below/mine"
    brought.config["mixed"]["lambdas"] = [0.6]
    del brought.config["evaluate"]["champion"]
    status, ran, printed = brought.run()
    assert status == 0, printed
    assert {"pretrain", "mixed-0.6"} <= ran
    assert used.read_bytes() == (brought.folder / "below" / "mine" / "model.safetensors").read_bytes()


def test_trained_further_it_is_a_candidate_and_all_are_measured_with_tasks_of_ones_own(
    brought: Project, tmp_path: Path
) -> None:
    tasks = write_tasks(tmp_path / "tasks", examples=20)
    shutil.rmtree(brought.output / "mlflow", ignore_errors=True)  # only what this run records is looked for
    brought.config["model"]["base"] = str(next(brought.folder.rglob("mine")))
    brought.config["pretrain"]["steps"] = 5
    brought.config["mixed"]["lambdas"] = [0.3]
    asked = {"tasks": ["tiny_choice", "tiny_cloze"], "tasks_folder": str(tasks)}
    brought.config["evaluate"] |= {"lm_eval": asked, "interpolate_mixed": True}
    status, _, printed = brought.run()
    assert status == 0, printed
    rows = {row["id"]: row for row in brought.report()["candidates"]}
    interpolated = {"interpolated-0.5", "interpolated-0.5-mixed-0.3"}
    assert set(rows) == {"base", "pretrained", "finetuned", "mixed-0.3"} | interpolated
    assert rows["base"]["kind"] == "base"
    assert rows["base"]["delta_bpb"]["value"] != 0, "what pretraining further has changed"
    assert rows["interpolated-0.5-mixed-0.3"]["delta_bpb"] != rows["interpolated-0.5"]["delta_bpb"]
    assert not (brought.output / "models" / "base").exists()
    for name, row in rows.items():
        acc, _, perplexity, _ = row["lm_eval"]
        assert 0 <= acc["value"] <= 1
        assert 1 < perplexity["value"] < math.inf
        assert (acc["vs_pretrained"] is None) == (name == "pretrained")
    assert len({row["lm_eval"][2]["value"] for row in rows.values()}) == len(rows)

    client = brought.client()
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
    status, ran, printed = brought.run()
    assert status == 0, printed
    evaluations = {"evaluate pretrained", "evaluate finetuned", "evaluate mixed-0.3", "evaluate interpolated"}
    assert ran == ALWAYS | evaluations | {"register"}
    assert brought.report()["lm_eval"]["columns"][0]["examples"] == 21
