"""What the report says and draws, by task and by candidate."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mixtune.components.shared.artifacts import read_jsonl

from .made import FINETUNED, INTERPOLATED, MIXED, PRETRAINED, STRONGER, Made, compare, write_all, write_evaluation


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
        limited = replace(limited, budget=budget + shift, tried=[(0.1, 0.25), (0.4, 0.19)])
        done = compare(folder, write_all(folder, limited))
        found = done.row("mixed-budget")["forgetting_budget"]
        assert found["kept"] is kept
        assert found["measured"] == done.row("mixed-budget")["dev"]["delta_bpb"]
        sentence = (
            f"mixed-budget: asked for at most {budget + shift:.3f} bits per byte, "
            f"forgets {found['measured']['value']:.3f} on dev, {found['used']:.0%} of it: {verdict}"
            "; λ = 0.4, found in 2 trainings"
        )
        assert found["used"] == pytest.approx(found["measured"]["value"] / found["budget"])
        assert found["tried"] == [{"lambda": 0.1, "forgetting": 0.25}, {"lambda": 0.4, "forgetting": 0.19}]
        drawn = (done.folder / "budget.svg").read_text(encoding="utf-8")
        assert "mixed-budget: 0.250 at 0.1, 0.190 at 0.4" in drawn
        assert sentence in (done.folder / "report.html").read_text(encoding="utf-8")
        assert f"- {sentence}\n" in (done.folder / "report.md").read_text(encoding="utf-8")
        assert done.row("finetuned")["forgetting_budget"] is None


def test_a_sample_of_the_examples_is_said_to_be_one(tmp_path: Path) -> None:
    done = compare(tmp_path, write_all(tmp_path, MIXED, in_split=4000))
    assert (done.report["task"]["examples"], done.report["task"]["examples_in_split"]) == (300, 4000)
    for file in ("report.md", "report.html"):
        assert "a sample of 300 of 4,000 labelled examples" in (done.folder / file).read_text()


@pytest.mark.parametrize(
    ("likelihood", "said"),
    [("causal", "those before it"), ("fixed-mask pseudo-likelihood", "every token is masked and predicted once")],
)
def test_what_the_loss_on_text_is_is_said(tmp_path: Path, likelihood: str, said: str) -> None:
    done = compare(tmp_path, write_all(tmp_path, MIXED, likelihood=likelihood))
    assert done.report["forgetting"]["likelihood"] == likelihood
    for name in ("report.html", "report.md"):
        assert said in (done.folder / name).read_text(encoding="utf-8")
