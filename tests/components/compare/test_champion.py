"""What the registered model in use, and the model that the user brought, change in a comparison; and a gate that fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.compare.config import Gate
from mixtune.components.compare.selection import Decision, Measured, decide
from mixtune.components.compare.statistics import Value
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.errors import GateNotMetError
from mixtune.components.shared.outcome import load_outcome
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.runtime import launch
from mixtune.components.shared.tracking.connection import connect
from tests.stores import new_store

from .made import BASE, CHAMPION, FINETUNED, INTERPOLATED, MIXED, PRETRAINED, Made, Outcome, compare, write_all
from .made import write_evaluation as write

NOTHING = {"value": 0.0, "low": 0.0, "high": 0.0}


def with_champion(folder: Path, *mixed: Made, champion: Made = CHAMPION, **gate: Any) -> Outcome:
    inputs = write_all(folder, *(mixed or (MIXED,)), alphas=(INTERPOLATED,))
    inputs["mixed"] += [write(folder / one.id, [one]) for one in (BASE, champion)]
    return compare(folder, inputs, **gate)


def texts(done: Outcome) -> str:
    return "".join((done.folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))


def test_base_and_champion_stand_in_the_table_and_are_never_selected(tmp_path: Path) -> None:
    done = with_champion(tmp_path, champion=replace(CHAMPION, right=0.66))
    ids = [row["id"] for row in done.report["candidates"]]
    assert ids == ["base", "pretrained", "finetuned", "mixed-0.3", "interpolated-0.5", "champion"]
    assert set(done.report["gate"]["checks"]) == {"finetuned", "mixed-0.3", "interpolated-0.5"}
    assert done.report["selected"] == "mixed-0.3"
    assert done.row("base")["task_score"] is None
    assert done.row("base")["delta_bpb"]["value"] > 0
    drawn = (done.folder / "pareto.svg").read_text(encoding="utf-8")
    assert "base, no score" in drawn
    assert ">champion<" in drawn
    assert "against the champion" in texts(done)


def test_differences_to_the_champion_are_paired(tmp_path: Path) -> None:
    done = with_champion(tmp_path)
    ours, champion = done.row("mixed-0.3"), done.row("champion")
    score = ours["task_score_vs_champion"]
    assert score["value"] == pytest.approx(ours["task_score"]["value"] - champion["task_score"]["value"])
    assert (score["examples"], ours["delta_bpb_vs_champion"]["documents"]) == (300, 60)
    rise = ours["delta_bpb_vs_champion"]
    assert rise["value"] == pytest.approx(ours["delta_bpb"]["value"] - champion["delta_bpb"]["value"])
    # Paired, so closer than the two intervals by themselves.
    widths = [one["high"] - one["low"] for one in (score, ours["task_score"], champion["task_score"])]
    assert widths[0] < widths[1] + widths[2]
    assert champion["task_score_vs_champion"] == {**NOTHING, "examples": 300}
    assert champion["delta_bpb_vs_champion"] == {**NOTHING, "documents": 60}
    assert done.row("base")["task_score_vs_champion"] is None
    assert done.row("pretrained")["task_score_vs_champion"] is None
    assert ours["task_score_vs_pretrained"] is None


def test_a_model_that_equals_the_champion_differs_by_exactly_nothing(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    inputs["mixed"].append(write(tmp_path / "champion", [CHAMPION]))
    for file in (tmp_path / "champion" / "champion").iterdir():
        (tmp_path / "mixed-0.3" / "mixed-0.3" / file.name).write_bytes(file.read_bytes())
    done = compare(tmp_path, inputs, max_score_drop_vs_champion=0)
    row = done.row("mixed-0.3")
    assert row["task_score_vs_champion"] == {**NOTHING, "examples": 300}
    assert row["delta_bpb_vs_champion"] == {**NOTHING, "documents": 60}
    assert done.passed
    assert "exactly as good as the champion" in done.report["headline"]


def test_the_score_against_pretrained_where_that_has_one(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    inputs["pretrained"] = write(tmp_path / "scored", [replace(PRETRAINED, right=0.1)])
    done = compare(tmp_path, inputs)
    row, before = done.row("mixed-0.3"), done.row("pretrained")
    found = row["task_score_vs_pretrained"]
    assert found["value"] == pytest.approx(row["task_score"]["value"] - before["task_score"]["value"])
    assert found["examples"] == 300
    assert before["task_score_vs_pretrained"] == {**NOTHING, "examples": 300}
    assert "against pretrained" in texts(done)
    assert all(sample["pretrained"]["prediction"] for sample in done.report["samples"])
    assert "<dt>pretrained</dt>" in texts(done)


def test_what_is_worse_than_the_champion_may_not_ship(tmp_path: Path) -> None:
    better = replace(CHAMPION, right=0.8)
    done = with_champion(tmp_path, champion=better)
    assert not done.passed
    assert "against the champion is -0." in done.report["gate"]["reasons"][0]
    assert "the lower end is not above -0.02" in done.report["gate"]["reasons"][0]
    assert with_champion(tmp_path / "lenient", champion=better, max_score_drop_vs_champion=1).passed


def test_a_champion_without_a_score_is_held_against_nothing(tmp_path: Path) -> None:
    done = with_champion(tmp_path, champion=replace(CHAMPION, right=None))
    assert done.passed
    assert not any("champion" in item["name"] for item in done.report["gate"]["checks"]["mixed-0.3"])
    assert done.row("mixed-0.3")["delta_bpb_vs_champion"]["documents"] == 60


def around(value: float) -> Value:
    return Value(value, value - 0.01, value + 0.01)


def measured(name: str, kind: str, score: float, forgets: float, champion: float | None = None) -> Measured:
    against = None if champion is None else around(score - champion)
    return Measured(name, kind, around(score), around(score - 0.6), around(forgets), against)


def choose(rows: list[Measured], gate: Gate) -> Decision:
    return decide(rows, gate, "accuracy", lambda one, other: around(0.0))


def test_the_limit_against_the_champion_is_that_against_finetuned_unless_said_otherwise() -> None:
    rows = [measured("finetuned", "finetuned", 0.6, 1.0, 0.62), measured("a", "mixed", 0.6, 0.1, 0.62)]
    champion = measured("champion", "champion", 0.62, 0.3, 0.62)
    assert choose(rows, Gate()).passed
    found = choose([*rows, champion], Gate())
    assert [(item.name, item.passed) for item in found.checks["a"]] == [
        ("max_score_drop", True), ("max_score_drop_vs_champion", False), ("max_forgetting_share", True),
    ]  # fmt: skip
    assert choose([*rows, champion], Gate(max_score_drop_vs_champion=0.05)).passed
    assert choose([*rows, champion], Gate(max_score_drop=0.05)).passed


def test_which_class_is_taken_for_which(tmp_path: Path) -> None:
    done = compare(tmp_path, write_all(tmp_path, MIXED))
    found = done.report["confusion"]
    assert found["candidate"] == "mixed-0.3"
    assert sum(map(sum, found["counts"])) == 300
    right = sum(counts[i] for i, counts in enumerate(found["counts"]))
    assert right / 300 == pytest.approx(done.row("mixed-0.3")["task_score"]["value"])
    many = replace(MIXED, predict=lambda i, reference: reference if i % 9 else f"class {i}")
    done = compare(tmp_path / "many", write_all(tmp_path / "many", many))
    assert done.report["confusion"]["pairs"][0]["examples"] == 1
    assert done.report["confusion"]["others"] == 300 // 9 + 1 - 15
    assert "Most frequent confusions" in texts(done)
    assert compare(tmp_path / "r", write_all(tmp_path / "r", MIXED, kind="regression", metric="pearson")).report[
        "confusion"
    ] is None  # fmt: skip


def test_costs_are_summed_without_what_another_run_trained(tmp_path: Path) -> None:
    costs = with_champion(tmp_path).report["costs"]
    assert costs["seconds"] == pytest.approx(4 * 31.5)
    assert costs["evaluate_seconds"] == pytest.approx(6 * 4.2)
    assert costs["devices"] == ["cpu, bf16"]
    assert costs["tokens_per_second"] == costs["tokens"]["total"] / costs["seconds"]
    assert costs["peak_memory_bytes"] is None
    assert costs["tokens"]["total"] == costs["tokens"]["pretrain"] + costs["tokens"]["finetune"]


def test_a_gate_that_fails_the_run_does_so_when_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write_all(tmp_path, MIXED)
    with pytest.raises(
        GateNotMetError, match=r"^the gate is not met, and gate.on_miss is fail: mixed-0.3: its accuracy"
    ):
        compare(tmp_path, inputs, Context.for_tests(), min_task_score=0.99, on_miss="fail")
    assert json.loads((tmp_path / "out" / "comparison" / "report.json").read_text())["gate"]["passed"] is False
    assert compare(tmp_path / "met", inputs, on_miss="fail").passed
    assert compare(tmp_path / "skip", inputs, min_task_score=0.99).passed is False

    uri = new_store(tmp_path / "mlflow" / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MIXTUNE_RUN_ID", "a-run")
    monkeypatch.setenv("MIXTUNE_OUTCOME_DIR", str(tmp_path / "outcomes"))
    names = ("report", "summary", "metrics", "comparison")
    artifacts: dict[str, Any] = {**inputs, **{name: Artifact(str(tmp_path / "kfp" / name)) for name in names}}
    config = {"name": "trial", "seed": 3, "gate": {"resamples": 200, "min_task_score": 0.99, "on_miss": "fail"}}
    files = {name: str(tmp_path / "kfp" / name) for name in ("selected_uri", "other_uri")}
    with pytest.raises(SystemExit) as ended:
        launch("compare", json.dumps(config), artifacts, **files)
    assert ended.value.code == 3
    left = load_outcome(tmp_path / "outcomes", "compare")
    assert left is not None
    assert (left.kind, left.facts["gate"], len(left.sentences)) == ("gate_not_met", "not met", 1)
    assert (Path(left.artifacts["comparison"]) / "report.html").is_file()
    client = connect(uri)
    run = client.get_run(left.mlflow_run)
    assert run.info.status == "FAILED"
    assert run.data.tags["mixtune.gate"] == "not met"
    assert "report/report.html" in {file.path for file in client.list_artifacts(left.mlflow_run, "report")}


def test_equal_candidates_tie_and_the_first_is_taken(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED, replace(MIXED, id="mixed-0.4", mix_weight=0.4), finetuned=FINETUNED)
    for file in (tmp_path / "mixed-0.3" / "mixed-0.3").iterdir():
        (tmp_path / "mixed-0.4" / "mixed-0.4" / file.name).write_bytes(file.read_bytes())
    done = compare(tmp_path, inputs)
    assert done.report["selected"] == "mixed-0.3"
    assert done.row("mixed-0.3")["pareto"] is done.row("mixed-0.4")["pareto"] is True
    assert done.row("mixed-0.3")["task_score_vs_finetuned"] == done.row("mixed-0.4")["task_score_vs_finetuned"]
