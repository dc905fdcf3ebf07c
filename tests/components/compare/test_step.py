"""The step over whole evaluations: what it decides, writes and puts out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mixtune.components.shared.artifacts import read_json
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.tracker import Tracker
from tests.stores import new_store

from .made import (
    INTERPOLATED,
    LABELS,
    MIXED,
    STRONGER,
    Made,
    compare,
    write_all,
)


def test_the_report_has_what_version_1_asks_for(tmp_path: Path) -> None:
    done = compare(tmp_path, write_all(tmp_path, STRONGER, MIXED, alphas=(INTERPOLATED,)))
    report = done.report
    assert report["schema_version"] == 1
    assert (report["name"], report["seed"], report["interval"]) == ("trial", 3, 0.95)
    assert (report["selected"], done.passed, report["gate"]["passed"]) == ("mixed-0.5", True, True)
    assert (report["task"]["kind"], report["task"]["metric"], report["task"]["split"]) == (
        "classification",
        "accuracy",
        "test",
    )
    assert (report["task"]["examples"], report["forgetting"]["documents"]) == (300, 60)
    assert report["forgetting"]["unit"] == "bits per byte"
    ids = [row["id"] for row in report["candidates"]]
    assert ids == ["pretrained", "finetuned", "mixed-0.3", "mixed-0.5", "interpolated-0.5"]
    for row in report["candidates"]:
        for name in ("bpb", "delta_bpb"):
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
        assert {"start", "lambda", "realised_lambda", "params", "pareto", "tokens", "seconds"} <= set(row)
    assert done.row("pretrained")["task_score"] is None
    assert done.row("pretrained")["delta_bpb"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert done.row("finetuned")["task_score_vs_finetuned"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert done.row("mixed-0.3")["lambda"] == 0.3
    assert done.row("mixed-0.5")["tokens"] == {"pretrain": 100_000, "finetune": 200_000, "total": 300_000}
    assert done.row("mixed-0.5")["mlflow_run"] == "run-of-mixed-0.5"
    share = done.row("mixed-0.5")["forgetting_share"]
    expected = done.row("mixed-0.5")["delta_bpb"]["value"] / done.row("finetuned")["delta_bpb"]["value"]
    assert share == pytest.approx(expected)
    assert report["headline"] == (
        f"mixed, λ = 0.5: accuracy {done.row('mixed-0.5')['task_score']['value']:.2f} "
        f"[{done.row('mixed-0.5')['task_score']['low']:.2f}, {done.row('mixed-0.5')['task_score']['high']:.2f}], "
        f"{done.row('mixed-0.5')['task_score_vs_finetuned']['value']:+.2f} on fine-tuning alone, "
        f"with {100 * share:.0f} % of its forgetting"
    )


def test_what_is_put_out(tmp_path: Path) -> None:
    done = compare(tmp_path, write_all(tmp_path, MIXED, alphas=(INTERPOLATED,)))
    row = done.row("mixed-0.3")
    # What is not needed points to something small that is there, since it is fetched all the same.
    assert done.uris == {"selected_uri": "/models/mixed-0.3", "other_uri": str(done.folder)}
    assert read_json(done.folder / "models.json", "models") == {
        name: f"/models/{name}" for name in ("pretrained", "finetuned", "mixed-0.3")
    }
    assert done.context.facts["gate_reasons"] == "; ".join(done.report["gate"]["reasons"])
    assert {name: done.context.facts[name] for name in ("selected", "gate")} == {
        "selected": "mixed-0.3",
        "gate": "passed",
    }
    metrics = done.artifacts["metrics"].metadata
    assert metrics["gate_passed"] == 1.0
    assert metrics["delta_bpb_high"] == row["delta_bpb"]["high"]
    page, twin = (Path(done.artifacts[name].path) for name in ("report", "summary"))
    assert page.read_bytes() == (done.folder / "report.html").read_bytes()
    assert twin.read_bytes() == (done.folder / "report.md").read_bytes()


def test_an_interpolated_winner_is_put_out_as_its_two_ends(tmp_path: Path) -> None:
    winner = replace(INTERPOLATED, right=0.7)
    done = compare(tmp_path, write_all(tmp_path, MIXED, alphas=(winner,)))
    assert done.uris == {"selected_uri": "/models/pretrained", "other_uri": "/models/finetuned"}
    assert done.report["headline"].startswith("interpolated, α = 0.5: accuracy ")


def test_equal_inputs_give_equal_outputs(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED, alphas=(INTERPOLATED,))
    first, second = compare(tmp_path / "one", inputs), compare(tmp_path / "two", inputs)
    for file in first.folder.iterdir():
        assert file.read_bytes() == (second.folder / file.name).read_bytes()
    assert first.uris["selected_uri"] == second.uris["selected_uri"]


def test_the_choice_is_made_on_dev(tmp_path: Path) -> None:
    """Swapping dev and test swaps what the decision is made on."""
    inputs = write_all(tmp_path, MIXED, STRONGER)
    before = compare(tmp_path / "before", inputs, min_task_score=0.6)
    for artifact in [inputs["pretrained"], inputs["finetuned"], *inputs["mixed"]]:
        for candidate in Path(artifact.path).iterdir():
            for what in ("documents", "examples"):
                dev, test = (candidate / f"{split}.{what}.jsonl" for split in ("dev", "test"))
                if dev.is_file():
                    dev.rename(candidate / "aside")
                    test.rename(dev)
                    (candidate / "aside").rename(test)
    after = compare(tmp_path / "after", inputs, min_task_score=0.6)
    for name in ("mixed-0.3", "finetuned"):
        assert before.row(name)["delta_bpb"] == after.row(name)["dev"]["delta_bpb"]
        assert before.row(name)["dev"]["task_score"] == after.row(name)["task_score"]
    score = before.row("mixed-0.5")["dev"]["task_score"]["value"]
    assert f"its accuracy is {score:.3f}; at least 0.6 is asked for" in before.report["gate"]["reasons"]


def test_outside_the_gate_nothing_passes_and_the_nearest_is_named(tmp_path: Path) -> None:
    done = compare(tmp_path, write_all(tmp_path, MIXED, STRONGER, alphas=(INTERPOLATED,)), min_task_score=0.99)
    assert done.passed is False
    assert done.report["gate"]["passed"] is False
    assert done.report["selected"] in ("mixed-0.3", "mixed-0.5")
    assert all(reason.startswith(done.report["selected"]) for reason in done.report["gate"]["reasons"])
    assert "at least 0.99 is asked for" in done.report["gate"]["reasons"][0]
    assert done.uris["selected_uri"] == f"/models/{done.report['selected']}"
    assert done.context.facts["gate"] == "not met"
    assert "Gate not met" in (done.folder / "report.html").read_text()
    assert "**Gate: not met**" in (done.folder / "report.md").read_text()


def test_an_identical_model_differs_by_exactly_nothing(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    twin = tmp_path / "mixed-0.3"
    for file in (tmp_path / "finetuned" / "finetuned").iterdir():
        (twin / "mixed-0.3" / file.name).write_bytes(file.read_bytes())
    done = compare(tmp_path, inputs)
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert done.row("mixed-0.3")["task_score_vs_finetuned"] == nothing
    assert done.row("mixed-0.3")["delta_bpb"] == done.row("finetuned")["delta_bpb"]
    assert done.passed is False  # it forgets all that fine-tuning alone does


def test_finetuning_that_does_not_forget(tmp_path: Path) -> None:
    careful = Made("finetuned", "finetuned", forgets=0.0, right=0.55, mix_weight=0.0)
    same = Made("mixed-0.3", "mixed", forgets=0.0, right=0.56, mix_weight=0.3)
    done = compare(tmp_path, write_all(tmp_path, same, finetuned=careful))
    assert done.passed
    assert done.row("mixed-0.3")["forgetting_share"] is None
    assert "does not measurably forget" in done.report["headline"]


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_constant_predictions(tmp_path: Path, metric: str) -> None:
    constant = replace(MIXED, predict=lambda index, reference: LABELS[0])
    done = compare(tmp_path, write_all(tmp_path, constant, metric=metric))
    score = done.row("mixed-0.3")["task_score"]
    assert score["low"] <= score["value"] <= score["high"] < 0.4
    assert done.report["task"]["metric"] == metric
    assert not all(item["passed"] for item in done.report["gate"]["checks"]["mixed-0.3"])


def test_one_document_and_one_example(tmp_path: Path) -> None:
    done = compare(tmp_path, write_all(tmp_path, MIXED, documents=1, examples=1))
    for row in done.report["candidates"]:
        for value in (row["bpb"], row["delta_bpb"], row["task_score"] or row["bpb"]):
            assert value["low"] == value["value"] == value["high"]


def test_scores_without_contaminated_examples(tmp_path: Path) -> None:
    known = replace(MIXED, predict=lambda index, reference: reference if index % 50 == 0 else LABELS[0])
    done = compare(tmp_path, write_all(tmp_path, known))
    assert done.report["contamination"]["test"] == {"examples": 300, "contaminated": 6}
    row = done.row("mixed-0.3")
    assert row["task_score_clean"]["value"] < row["task_score"]["value"]
    page = (done.folder / "report.html").read_text()
    assert "6 of 300 on test" in page


def test_everything_goes_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = new_store(tmp_path / "mlflow" / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = Tracker.open("compare", "compare", "a-pipeline-run")
    done = compare(tmp_path, write_all(tmp_path, MIXED), Context("compare", tracker, "a-pipeline-run", quiet=True))
    tracker.close("FINISHED", {})
    client = connect(uri)
    own, parent = client.get_run(tracker.run_id), client.get_run(tracker.parent_id)
    for run in (own, parent):
        assert run.data.tags["mixtune.selected"] == "mixed-0.3"
        assert run.data.tags["mixtune.gate"] == "passed"
        assert "accuracy" in run.data.tags["mixtune.gate_reasons"]
    row = done.row("mixed-0.3")
    assert own.data.metrics["delta_bpb"] == pytest.approx(row["delta_bpb"]["value"])
    assert own.data.metrics["finetuned.test.task_score"] > 0
    assert parent.data.metrics["selected.task_score"] == pytest.approx(row["task_score"]["value"])
    files = {file.path for file in client.list_artifacts(tracker.run_id, "report")}
    assert {
        "report/report.html",
        "report/report.md",
        "report/report.json",
        "report/pareto.svg",
        "report/pareto.png",
    } <= files
    assert "report/report.html" in {file.path for file in client.list_artifacts(tracker.parent_id, "report")}
    assert {one.dataset.name for one in own.inputs.dataset_inputs} == {"pretrain-heldout", "finetune-heldout"}
    assert tracker.run_id and tracker.parent_id  # noqa: PT018
    assert tracker.run_id not in (done.folder / "report.json").read_text()
    assert tracker.parent_id in (done.folder / "report.html").read_text()


def test_compare_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.components.compare.made import MIXED, compare, write_all\n"
        f"folder = Path({str(tmp_path)!r})\ncompare(folder, write_all(folder, MIXED))\n"
        "print([name for name in ('torch', 'transformers', 'mlflow', 'matplotlib.pyplot') if name in sys.modules])\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
