"""Each rule of the advice: where it gives a sentence, and where it gives none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.compare import advice as rules
from mixtune.components.compare.advice import RULES, advice
from mixtune.components.compare.curves import gradients, losses

from .made import CURVE, MIXED, compare, write_all

Row = dict[str, Any]


def value(middle: float, half: float = 0.01) -> Row:
    return {"value": middle, "low": middle - half, "high": middle + half}


def loss(first: float, last: float) -> Row:
    return {"first": first, "last": last}


def row(name: str, kind: str, score: float, forgets: float, task: Row | None, **more: Any) -> Row:
    """A candidate as `report.json` has it, with what the rules read."""
    at = {"task_score": value(score), "task_score_vs_finetuned": value(score - 0.8), "delta_bpb": value(forgets)}
    return {
        "id": name, "kind": kind, "lambda": None, **at, "dev": at, "params": {}, "forgetting_budget": None,
        "losses": {"pretrain": None, "finetune": task}, "gradients": None, "tokens": {"pretrain": 10, "finetune": 10},
        "stopped": None,
    } | more  # fmt: skip


def budget(accepted: float, measured: float, kept: bool = True, pull_back: float = 1.0) -> Row:
    return {"budget": accepted, "measured": value(measured), "kept": kept, "pull_back": pull_back, "sentence": ""}


POWER = {"candidate": "mixed-0.3", "margin": 0.005, "half_width": 0.01, "examples": 960}


def report(*candidates: Row, finetuned: Row | None = None, needed: int | None = None) -> Row:
    """By default fine-tuning alone scores 0.8, forgets 0.2, and halves its loss."""
    alone = finetuned or row("finetuned", "finetuned", 0.8, 0.2, loss(0.7, 0.3))
    alone = alone | {"task_score_vs_finetuned": value(0, 0), "tokens": {"pretrain": 0, "finetune": 10}}
    return {
        "selected": candidates[0]["id"] if candidates else "finetuned",
        "candidates": [row("pretrained", "pretrained", 0, 0, None) | {"task_score": None}, alone, *candidates],
        "gate": {"power": needed and {**POWER, "needed": needed}},
    }


GOOD = row("mixed-0.3", "mixed", 0.8, 0.02, loss(0.7, 0.3))
STUCK = row("mixed-0.3", "mixed", 0.52, 0.0, loss(0.693, 0.69), gradients={"share_pretrain": 0.97})
TIGHT = row("mixed-budget-0.05", "mixed", 0.75, 0.01, loss(0.7, 0.3), forgetting_budget=budget(0.05, 0.01))
LOOSE = row("mixed-budget-0.05", "mixed", 0.8, 0.09, loss(0.7, 0.3), forgetting_budget=budget(0.05, 0.09, False))
LEARNING = row("mixed-0.1", "mixed", 0.8, -0.1, loss(0.7, 0.3))
MORE = row("mixed-1", "mixed", 0, -0.2, None) | {"lambda": 1.0, "tokens": {"pretrain": 10, "finetune": 0}}
STRAIGHT = row("interpolated-0.5", "interpolated", 0.81, 0.01, None)
NOT_FORGETTING = row("finetuned", "finetuned", 0.8, 0.001, loss(0.7, 0.3))
NOT_LEARNING = row("finetuned", "finetuned", 0.52, 0.1, loss(0.693, 0.69))

CASES: dict[str, tuple[Any, Row, str | None]] = {
    "stuck": (
        rules.task_hardly_learned,
        report(STUCK),
        "The task was hardly learned by mixed-0.3: the task loss of mixed-0.3 went from 0.693 to 0.690, that of fine-tuning "
        "alone to 0.300. 97 % of its steps came from the pretraining text. Train longer (mixed.steps), lower λ, or set "
        "mixed.scale: gradient.",
    ),
    "stuck at the scale already": (
        rules.task_hardly_learned,
        report(STUCK | {"params": {"scale": "gradient"}}),
        "Train longer (mixed.steps), or lower λ.",
    ),
    "stuck where the text is still learned": (
        rules.task_hardly_learned,
        report(STUCK | {"delta_bpb": value(-1.1)}),
        "pretrain longer first (pretrain.steps), or lower λ.",
    ),
    "stopped early": (rules.task_hardly_learned, report(STUCK | {"stopped": {"step": 40}}), None),
    "learned": (rules.task_hardly_learned, report(GOOD), None),
    "fine-tuning learned nothing either": (rules.task_hardly_learned, report(STUCK, finetuned=NOT_LEARNING), None),
    "not worse": (rules.task_hardly_learned, report(STUCK | {"task_score_vs_finetuned": value(0)}), None),
    "a further seed": (
        rules.task_hardly_learned,
        report(STUCK | {"params": {"candidate": {"seed": 2}}}),
        None,
    ),
    "broken": (
        rules.budget_broken,
        report(LOOSE),
        "A forgetting budget was not kept: mixed-budget-0.05 forgets 0.090 of 0.05 bits per byte on dev.",
    ),
    "pulled back": (
        rules.budget_pulled_back,
        report(TIGHT | {"forgetting_budget": budget(0.05, 0.04, pull_back=0.7)}),
        "The training of mixed-budget-0.05 forgot more than its budget, and its weights were pulled back a long way",
    ),
    "hardly pulled back": (
        rules.budget_pulled_back,
        report(TIGHT | {"forgetting_budget": budget(0.05, 0.04, pull_back=0.97)}),
        None,
    ),
    "kept": (rules.budget_broken, report(TIGHT), None),
    "unused": (
        rules.budget_hardly_used,
        report(TIGHT),
        "A forgetting budget was hardly used: mixed-budget-0.05 forgets 0.010 of 0.05 bits per byte on dev",
    ),
    "unused at no cost": (rules.budget_hardly_used, report(TIGHT | {"dev": GOOD["dev"]}), None),
    "nothing to use it for": (rules.budget_hardly_used, report(TIGHT, finetuned=NOT_FORGETTING), None),
    "fine-tuning does not forget": (
        rules.nothing_is_forgotten,
        report(GOOD, finetuned=NOT_FORGETTING),
        "Fine-tuning alone does not measurably forget (+0.001 [-0.009, +0.011] bits per byte)",
    ),
    "fine-tuning forgets": (rules.nothing_is_forgotten, report(GOOD), None),
    "still learning": (
        rules.text_still_learned,
        report(LEARNING),
        "Pretrain longer (pretrain.steps), or set mixed.controls.more_pretraining",
    ),
    "still learning, with the control": (rules.text_still_learned, report(LEARNING, MORE), "or compare with mixed-1"),
    "one forgets": (rules.text_still_learned, report(LEARNING, GOOD), None),
    "no mixed candidate": (rules.text_still_learned, report(), None),
    "interpolation": (
        rules.interpolation_suffices,
        report(GOOD, STRAIGHT),
        "Interpolation is no worse than training here: interpolated-0.5 against every mixed candidate",
    ),
    "one is better": (rules.interpolation_suffices, report(GOOD, LEARNING, STRAIGHT), None),
    "nothing interpolated": (rules.interpolation_suffices, report(GOOD), None),
    "too fine": (
        rules.margin_too_fine,
        report(GOOD, needed=3900),
        "known to ± 0.010, and gate.max_score_drop is 0.005. Hold out about 3,900 examples instead of 960",
    ),
    "wide enough": (rules.margin_too_fine, report(GOOD, needed=900), None),
    "no drop accepted": (rules.margin_too_fine, report(GOOD), None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rule_says_what_to_try_or_nothing(case: str) -> None:
    rule, given, wanted = CASES[case]
    found = rule(given)
    assert (found is None) if wanted is None else found is not None and wanted in found
    assert (found in advice(given)) == (found is not None)


def test_every_rule_has_both_cases() -> None:
    fires, silent = ({rule for rule, _, wanted in CASES.values() if (wanted is None) is none} for none in (False, True))
    assert fires == silent == set(RULES)


def test_advice_and_gradients_are_in_the_report(tmp_path: Path) -> None:
    pulls: dict[str, Any] = {
        "grad_norm_pretrain": 2.5,
        "grad_norm_finetune": 0.25,
        "grad_cosine": -0.3,
        "norm_share_pretrain": 0.9,
        "step_share_pretrain": 1.02,
    }
    curve = [entry | (pulls if entry["step"] != 20 else {}) for entry in CURVE]
    done = compare(tmp_path, write_all(tmp_path, replace(MIXED, curve=curve)), max_score_drop=0.01)
    (sentence,) = done.report["advice"]
    assert "margin is finer" in sentence
    texts = [(done.folder / f"report.{ending}").read_text(encoding="utf-8") for ending in ("html", "md")]
    for text in texts:
        assert text.index("What to try next") < text.index("margin is finer than the dev split")
        assert "102 %" in text
    assert "against each other" in texts[0]
    assert (done.folder / "tug-of-war.png").is_file()
    assert done.row("mixed-0.3")["gradients"] == pytest.approx(
        {
            "norm_pretrain": 2.5,
            "norm_finetune": 0.25,
            "cosine": -0.3,
            "norm_share_pretrain": 0.9,
            "share_pretrain": 1.02,
            "measurements": 2,
        }
    )
    assert done.row("finetuned")["gradients"] is None


def test_the_last_loss_is_a_mean_over_the_last_fifth() -> None:
    curve = [
        {"step": step, "loss_finetune": 1.0 if step < 8 else step / 10, "loss_pretrain": None} for step in range(10)
    ]
    assert losses(curve) == {"pretrain": None, "finetune": pytest.approx({"first": 1.0, "last": 0.85})}
    assert losses([]) == {"pretrain": None, "finetune": None}
    assert gradients(curve) is None
