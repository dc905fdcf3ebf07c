"""The step over whole evaluations: what it decides, writes, puts out and refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mixtune.components.shared.artifacts import Artifact, read_json, read_jsonl, write_json
from mixtune.components.shared.errors import MixtuneError, RefusedError
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.tracker import Tracker
from tests.stores import new_store

from .made import (
    FINETUNED,
    INTERPOLATED,
    LABELS,
    MIXED,
    PRETRAINED,
    STRONGER,
    Made,
    compare,
    write_all,
    write_evaluation,
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


def test_documents_in_another_order_are_paired_by_id(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    before = compare(tmp_path / "before", inputs)
    for file in (tmp_path / "mixed-0.3" / "mixed-0.3").glob("*.jsonl"):
        file.write_text("".join(sorted(file.read_text().splitlines(keepends=True), reverse=True)))
    assert compare(tmp_path / "after", inputs).row("mixed-0.3") == before.row("mixed-0.3")


def test_other_documents_are_refused_and_named(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED, STRONGER)
    documents = tmp_path / "mixed-0.3" / "mixed-0.3" / "dev.documents.jsonl"
    documents.write_text(documents.read_text().replace("dev-d7", "elsewhere"))
    examples = tmp_path / "mixed-0.5" / "mixed-0.5" / "test.examples.jsonl"
    examples.write_text("".join(examples.read_text().splitlines(keepends=True)[2:]))
    with pytest.raises(RefusedError) as refused:
        compare(tmp_path, inputs)
    assert refused.value.problems == [
        "mixed-0.3: on dev, other documents were measured than for pretrained: dev-d7 missing; elsewhere not measured there",
        "mixed-0.5: on test, other examples were measured than for finetuned: test-e0, test-e1 missing",
    ]
    assert not (tmp_path / "out" / "comparison").exists()


def test_a_loss_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    documents = tmp_path / "mixed-0.3" / "mixed-0.3" / "test.documents.jsonl"
    rows = [json.loads(line) for line in documents.read_text().splitlines()]
    rows[4]["nats"] = None
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(MixtuneError, match=r"^mixed-0.3: the loss of document test-d4 \(test\) is not finite$"):
        compare(tmp_path, inputs)


def test_what_evaluate_found_not_finite_is_named(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    path = tmp_path / "mixed-0.3" / "evaluation.json"
    named = [{"candidate": "mixed-0.3", "split": "dev", "what": "example", "id": "dev-e2"}]
    write_json(path, {**read_json(path, "an evaluation"), "not_finite": named})
    with pytest.raises(MixtuneError, match=r"^mixed-0.3: the loss of example dev-e2 \(dev\) is not finite$"):
        compare(tmp_path, inputs)


def test_folders_that_are_no_evaluation_are_all_named(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "other" / "evaluation.json", {"format": "mixtune-model/1"})
    inputs["mixed"] = [Artifact(str(tmp_path / "empty")), Artifact(str(tmp_path / "other"))]
    with pytest.raises(RefusedError) as refused:
        compare(tmp_path, inputs)
    assert refused.value.problems == [
        f"{tmp_path / 'empty'}: has no evaluation.json, so it is not an evaluation made by mixtune",
        f"{tmp_path / 'other'}: evaluation.json is not of the format mixtune-evaluation/1, so it is not an evaluation",
    ]


def test_evaluations_of_other_data_are_refused(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    path = tmp_path / "mixed-0.3" / "evaluation.json"
    manifest = read_json(path, "an evaluation")
    manifest["task"]["metric"] = "macro_f1"
    write_json(path, manifest)
    with pytest.raises(RefusedError, match="was measured on another task than"):
        compare(tmp_path, inputs)


def test_a_candidate_evaluated_twice_is_refused(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    inputs["mixed"].append(write_evaluation(tmp_path / "again", [MIXED]))
    with pytest.raises(RefusedError, match=r"mixed-0\.3: was evaluated 2 times"):
        compare(tmp_path, inputs)


def test_an_evaluation_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the split dev of the pretraining stream holds no documents"):
        compare(tmp_path / "text", write_all(tmp_path / "text", MIXED, documents=0))
    with pytest.raises(RefusedError, match="the split test of the fine-tuning stream holds no scored examples"):
        compare(tmp_path / "task", write_all(tmp_path / "task", MIXED, examples=0))


def test_generation_where_pretrained_has_a_score(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    inputs["pretrained"] = write_evaluation(tmp_path / "scored", [replace(PRETRAINED, right=0.1)])
    done = compare(tmp_path, inputs)
    row = done.row("pretrained")
    assert row["task_score"]["value"] < 0.3
    assert row["task_score_vs_finetuned"]["high"] < 0
    assert row["pareto"] is True


@pytest.mark.parametrize(
    ("kind", "metric", "named"),
    [
        ("multi_label", "micro_f1", "micro-F1"),
        ("multi_label", "macro_f1", "macro-F1"),
        ("regression", "pearson", "Pearson correlation"),
        ("regression", "spearman", "Spearman correlation"),
        ("question_answering", "exact_match", "exact match"),
    ],
)
def test_every_task_is_compared_by_its_metric(tmp_path: Path, kind: str, metric: str, named: str) -> None:
    better = replace(MIXED, right=0.8)
    finetuned = replace(FINETUNED, right=0.7)  # with fewer right, predicting all labels for every text would be better
    done = compare(tmp_path, write_all(tmp_path, better, finetuned=finetuned, kind=kind, metric=metric))
    assert done.passed
    assert named in done.report["headline"]
    better_row, baseline = done.row("mixed-0.3"), done.row("finetuned")
    expected = better_row["task_score"]["value"] - baseline["task_score"]["value"]
    assert better_row["task_score_vs_finetuned"]["value"] == pytest.approx(expected)
    assert better_row["task_score_vs_finetuned"]["low"] > 0
    assert baseline["task_score_vs_finetuned"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert better_row["task_score"]["low"] < better_row["task_score"]["value"] < better_row["task_score"]["high"]
    assert done.report["task"]["examples"] == 300


def test_a_run_in_which_nothing_was_learned(tmp_path: Path) -> None:
    constant = replace(FINETUNED, predict=lambda index, reference: "yes")
    better = replace(MIXED, right=0.8)
    done = compare(tmp_path, write_all(tmp_path, better, finetuned=constant))
    assert not done.passed
    assert done.report["headline"].startswith("Nothing was learned, so the gate is not met; nearest comes")
    trivial = done.report["task"]["trivial"]["test"]
    assert trivial["name"] == "the most frequent label"
    shares = Counter(
        row["reference"] for row in read_jsonl(tmp_path / "finetuned" / "finetuned" / "test.examples.jsonl")
    )
    assert trivial["task_score"] == max(shares.values()) / shares.total()
    assert done.row("mixed-0.3")["task_score_vs_trivial"]["low"] > 0
    for name in ("report.html", "report.md"):
        text = (done.folder / name).read_text(encoding="utf-8")
        assert f"the most frequent label scores {trivial['task_score']:.3f}" in text
        assert "nothing was learned: the accuracy of fine-tuning alone against the most frequent label is" in text
    assert compare(tmp_path, write_all(tmp_path, better, finetuned=constant), beat_trivial=False).passed


def test_labels_numbers_and_answers_are_shown_as_a_person_reads_them(tmp_path: Path) -> None:
    pages = {}
    for kind, metric in (("multi_label", "micro_f1"), ("regression", "pearson"), ("question_answering", "exact_match")):
        done = compare(tmp_path / kind, write_all(tmp_path / kind, MIXED, kind=kind, metric=metric))
        pages[kind] = (done.folder / "report.html").read_text(encoding="utf-8")
        shown = [sample[who] for sample in done.report["samples"] for who in ("selected", "finetuned")]
        assert len(shown) == 12
    assert re.search(r"<dd>(kfp|mlflow|pandas), \w+", pages["multi_label"])
    assert "no label" in pages["multi_label"]
    assert re.search(r"<dd>-?\d\.\d{1,3}</dd>", pages["regression"])
    assert re.search(r"<dd>-?\d\.\d+ <span class=\"faint\">\(off by \d\.\d+\)", pages["regression"])
    assert re.search(r"<dd>answer \d / an answer</dd>", pages["question_answering"])
    assert "no answer" in pages["question_answering"]
    # The data table counts examples, not the windows over their contexts.
    assert "<td>300<small>" in pages["question_answering"]
    assert "<td>900<small>" not in pages["question_answering"]
    assert not re.search(r"\[&#39;", "".join(pages.values()))


def test_equal_predictions_of_numbers_differ_by_exactly_nothing(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED, kind="regression", metric="pearson")
    for split in ("dev", "test"):
        twin = tmp_path / "mixed-0.3" / "mixed-0.3" / f"{split}.examples.jsonl"
        twin.write_bytes((tmp_path / "finetuned" / "finetuned" / f"{split}.examples.jsonl").read_bytes())
    done = compare(tmp_path, inputs)
    assert done.row("mixed-0.3")["task_score_vs_finetuned"] == {"value": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_constant_numbers_have_a_score_of_zero(tmp_path: Path, metric: str) -> None:
    constant = replace(MIXED, predict=lambda index, reference: 0.1)
    done = compare(tmp_path, write_all(tmp_path, constant, kind="regression", metric=metric))
    assert done.row("mixed-0.3")["task_score"] == {"value": 0.0, "low": 0.0, "high": 0.0}


SCHEDULED = Made(
    "mixed-linear", "mixed", forgets=0.3, right=0.6, realised=0.4, name="mixed, λ from 0.8 to 0",
    curve=[{"step": step, "loss_pretrain": 3.0, "loss_finetune": 2.0, "mix_weight": 0.8 - step / 50} for step in (10, 20, 40)],
)  # fmt: skip
POOLED = Made(
    "mixed-pooled", "mixed", forgets=0.3, right=0.6, realised=0.2, name="pooled mixing",
    curve=[{"step": step, "loss_pretrain": 3.0, "loss_finetune": 2.0, "mix_weight": None} for step in (10, 20)],
)  # fmt: skip
LORA = Made("mixed-0.3-lora", "mixed", forgets=0.3, right=0.6, mix_weight=0.3, name="mixed, λ = 0.3, LoRA")


def test_candidates_without_one_lambda_stand_where_their_realised_one_does(tmp_path: Path) -> None:
    constant = replace(
        MIXED,
        curve=[{"step": step, "loss_pretrain": 3.0, "loss_finetune": 2.0, "mix_weight": 0.3} for step in (10, 40)],
    )
    done = compare(tmp_path, write_all(tmp_path, SCHEDULED, LORA, POOLED, constant, alphas=(INTERPOLATED,)))
    rows = done.report["candidates"]
    assert [row["id"] for row in rows] == [
        "pretrained", "finetuned", "mixed-pooled", "mixed-0.3", "mixed-0.3-lora", "mixed-linear", "interpolated-0.5",
    ]  # fmt: skip
    assert [row["name"] for row in rows] == [
        "pretrained", "fine-tuning alone", "pooled mixing", "mixed, λ = 0.3", "mixed, λ = 0.3, LoRA",
        "mixed, λ from 0.8 to 0", "interpolated, α = 0.5",
    ]  # fmt: skip
    assert done.row("mixed-linear")["lambda"] is None
    assert all(row["forgetting_budget"] is None for row in rows)
    page = (done.folder / "report.html").read_text(encoding="utf-8")
    assert "mixed, λ from 0.8 to 0" in page
    assert '–<small class="name">realised 0.400</small>' in page
    assert "| – (realised 0.400) |" in (done.folder / "report.md").read_text(encoding="utf-8")
    # λ is drawn for those that noted it, constant ones beside the one that varies.
    drawn = (done.folder / "mix-weight.svg").read_text(encoding="utf-8")
    assert "λ over the training" in page
    assert "mixed-0.3 ends at 0.300, mixed-linear ends at 0.000" in drawn
    assert "mixed-pooled" not in drawn
    assert "Forgetting budgets" not in page


def test_lambda_is_not_drawn_where_it_stays(tmp_path: Path) -> None:
    steady = [
        {"step": step, "loss_pretrain": 3.0, "loss_finetune": 2.0, "mix_weight": weight}
        for step, weight in ((10, 0.3), (20, 0.1 + 0.2))
    ]
    done = compare(tmp_path, write_all(tmp_path, replace(MIXED, curve=steady), POOLED))
    assert not (done.folder / "mix-weight.svg").exists()
    assert "λ over the training" not in (done.folder / "report.html").read_text(encoding="utf-8")


def test_a_watched_training_is_drawn_and_one_that_was_stopped_is_named(tmp_path: Path) -> None:
    curve = [
        {"step": step, "watch_forgetting": step / 100, "watch_loss_finetune": 2 - step / 100, "watch_seconds": 0.1}
        for step in (0, 10, 20)
    ]
    curve += [{"step": 20, "loss_pretrain": 3.0, "loss_finetune": 2.0, "mix_weight": 0.3}]
    stopped = {"step": 20, "planned_steps": 40, "limit": 0.05, "forgetting": [0.1, 0.2]}
    done = compare(tmp_path, write_all(tmp_path, replace(MIXED, curve=curve, stopped=stopped), STRONGER))
    row = done.row("mixed-0.3")
    assert row["watch"] == {
        "forgetting": 0.2, "loss_finetune": 1.8, "measurements": 3, "seconds": pytest.approx(0.3),
        "training_share": pytest.approx(0.3 / 31.5),
    }  # fmt: skip
    assert {name: row["stopped"][name] for name in stopped} == stopped
    assert (done.row("finetuned")["watch"], done.row("finetuned")["stopped"]) == (None, None)
    page, text = ((done.folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    for shown in (page, text):
        assert "mixed-0.3: training was stopped early, after step 20 of 40" in shown
        assert "in 2 measurements in a row and did not fall (0.100, 0.200)" in shown
        assert "Watching the trainings took 0.3 s of it, at most 1.0 % of the training of a candidate." in shown
    assert "Forgetting over the training, on the watched text" in page
    assert "mixed-0.3 ends at 0.200" in (done.folder / "watch-forgetting.svg").read_text(encoding="utf-8")
    assert "mixed-0.3 ends at 1.800" in (done.folder / "watch-finetune.svg").read_text(encoding="utf-8")


def test_a_forgetting_budget_is_held_against_what_is_forgotten_on_dev(tmp_path: Path) -> None:
    forgets = compare(tmp_path / "before", write_all(tmp_path / "before", MIXED)).row("mixed-0.3")["dev"]["delta_bpb"]
    value = forgets["value"]
    for budget, kept, verdict in (
        (value + 0.01, True, "kept"),
        (value / 1.05, True, "kept, within the tolerance"),
        (value / 1.2, False, "not kept"),
    ):
        folder = tmp_path / verdict
        limited = replace(MIXED, id="mixed-budget", mix_weight=None, realised=0.4, budget=budget, name="a budget")
        # What is drawn for a candidate hangs on its id.
        same = compare(folder / "first", write_all(folder / "first", limited)).row("mixed-budget")
        shift = same["dev"]["delta_bpb"]["value"] - value
        curve = [
            {"step": step, "mix_weight": 0.1, "forgetting": share * 0.2, "forgetting_budget": 0.2}
            for step, share in ((10, 0.5), (20, 0.75))
        ]
        limited = replace(limited, budget=budget + shift, curve=curve)
        done = compare(folder, write_all(folder, limited))
        found = done.row("mixed-budget")["forgetting_budget"]
        assert found["kept"] is kept
        assert found["measured"] == done.row("mixed-budget")["dev"]["delta_bpb"]
        sentence = (
            f"mixed-budget: asked for at most {budget + shift:.3f} bits per byte, "
            f"forgets {found['measured']['value']:.3f} on dev, {found['used']:.0%} of it: {verdict}"
        )
        assert found["used"] == pytest.approx(found["measured"]["value"] / found["budget"])
        assert "mixed-budget ends at 0.750" in (done.folder / "budget.svg").read_text(encoding="utf-8")
        assert sentence in (done.folder / "report.html").read_text(encoding="utf-8")
        assert f"- {sentence}\n" in (done.folder / "report.md").read_text(encoding="utf-8")
        assert done.row("finetuned")["forgetting_budget"] is None


@pytest.mark.parametrize(
    ("likelihood", "said"),
    [("causal", "those before it"), ("fixed-mask pseudo-likelihood", "every token is masked and predicted once")],
)
def test_what_the_loss_on_text_is_is_said(tmp_path: Path, likelihood: str, said: str) -> None:
    done = compare(tmp_path, write_all(tmp_path, MIXED, likelihood=likelihood))
    assert done.report["forgetting"]["likelihood"] == likelihood
    for name in ("report.html", "report.md"):
        assert said in (done.folder / name).read_text(encoding="utf-8")


def test_different_likelihoods_are_not_compared(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    inputs["pretrained"] = write_evaluation(
        tmp_path / "masked", [PRETRAINED], likelihood="fixed-mask pseudo-likelihood"
    )
    with pytest.raises(RefusedError, match=r"not the same measure \(causal in .*; fixed-mask .* in .*masked\)"):
        compare(tmp_path, inputs)


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
