"""What to try next: rules over the content of `report.json`, each of which gives one sentence or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..shared.value_text import value_text

Report = Mapping[str, Any]
Row = Mapping[str, Any]

STUCK_SHARE = 0.2
"""A task loss has hardly moved if it fell by less than this share of the fall in fine-tuning alone."""
LEARNED_SHARE = 0.05
"""Fine-tuning alone has learned the task if its loss fell by at least this share."""
PULLED_FAR = 0.9
"""α of the pull back to a budget, below which much of the training is undone."""
USED_SHARE = 0.5
"""A forgetting budget was hardly used if forgetting on dev is below this share of it."""


def advice(report: Report) -> list[str]:
    """Returns a sentence for each rule that applies, the most important first."""
    return [sentence for rule in RULES if (sentence := rule(report)) is not None]


def task_hardly_learned(report: Report) -> str | None:
    """Finds mixed candidates whose task loss hardly moved while that of fine-tuning alone fell."""
    alone = _finetuned(report)["losses"]["finetune"]
    if alone is None or _fall(alone) < LEARNED_SHARE * abs(alone["first"]):
        return None
    stuck = [
        row
        for row in _mixed(report)
        if not row["stopped"]
        and _is_worse(row)
        and (loss := row["losses"]["finetune"])
        and _fall(loss) < STUCK_SHARE * _fall(alone)
    ]
    if not stuck:
        return None
    worst = min(stuck, key=lambda row: _fall(row["losses"]["finetune"]))
    loss, shares = worst["losses"]["finetune"], worst["gradients"]
    of_step = f" {100 * shares['share_pretrain']:.0f} % of its steps came from the pretraining text." if shares else ""
    if all(row["delta_bpb"]["high"] < 0 for row in stuck):
        remedy = "The text is still being learned and takes the steps over: pretrain longer first (pretrain.steps), or lower λ."
    elif worst["params"].get("scale") == "gradient":
        remedy = "Train longer (mixed.steps), or lower λ."
    else:
        remedy = "Train longer (mixed.steps), lower λ, or set mixed.scale: gradient."
    return (
        f"The task was hardly learned by {_names(stuck)}: the task loss of {worst['id']} went from {loss['first']:.3f} to "
        f"{loss['last']:.3f}, that of fine-tuning alone to {alone['last']:.3f}.{of_step} {remedy}"
    )


def budget_broken(report: Report) -> str | None:
    """Finds forgetting budgets that were not kept."""
    broken = [row for row in _budgets(report) if not row["forgetting_budget"]["kept"]]
    if not broken:
        return None
    return (
        f"A forgetting budget was not kept: {_told(broken)} on dev. It is kept on control text: give more of that "
        "(data.pretrain.control_fraction, or more pretraining text), allow more trainings (mixed.budget.max_trainings), or ask "
        "for less (mixed.forgetting_budgets)."
    )


def budget_pulled_back(report: Report) -> str | None:
    """Finds trainings that forgot much more than their budget, so that their weights were pulled back far."""
    far = [row for row in _budgets(report) if (row["forgetting_budget"]["pull_back"] or 1) < PULLED_FAR]
    if not far:
        return None
    return (
        f"The training of {_names(far)} forgot more than its budget, and its weights were pulled back a long way toward "
        "pretrained, which costs task score. Allow more trainings or a larger λ (mixed.budget.max_trainings, "
        "mixed.budget.max_lambda), read more text per step (mixed.replay_share), or lower mixed.learning_rate."
    )


def budget_hardly_used(report: Report) -> str | None:
    """Finds forgetting budgets that were hardly used, although the task score is below that of fine-tuning alone."""
    alone = _finetuned(report)["dev"]["delta_bpb"]["value"]
    unused = []
    for row in _budgets(report):
        budget, score = row["forgetting_budget"], row["dev"]["task_score_vs_finetuned"]
        below = score is not None and score["value"] < 0
        if below and alone > budget["budget"] and budget["measured"]["value"] < USED_SHARE * budget["budget"]:
            unused.append(row)
    if not unused:
        return None
    return (
        f"A forgetting budget was hardly used: {_told(unused)} on dev, with a lower score than fine-tuning alone. Allow more "
        "trainings (mixed.budget.max_trainings), or give more control text (data.pretrain.control_fraction)."
    )


def nothing_is_forgotten(report: Report) -> str | None:
    """Says that fine-tuning alone does not forget."""
    forgets = _finetuned(report)["delta_bpb"]
    if forgets["low"] > 0:
        return None
    return (
        f"Fine-tuning alone does not measurably forget ({value_text(forgets)} bits per byte), so mixing has nothing to prevent "
        "here: take the fine-tuned model, or measure forgetting on text that matters more to you (data.pretrain)."
    )


def text_still_learned(report: Report) -> str | None:
    """Says that all mixed candidates are better on the pretraining text than the pretrained model."""
    mixed = _mixed(report)
    if not mixed or any(row["delta_bpb"]["high"] >= 0 for row in mixed):
        return None
    more = next((row for row in report["candidates"] if row["kind"] == "mixed" and row["lambda"] == 1), None)
    compare = (
        f"compare with {more['id']}, which is more pretraining alone"
        if more is not None
        else "set mixed.controls.more_pretraining, which shows what more pretraining alone gives"
    )
    least = max(mixed, key=lambda row: row["delta_bpb"]["value"])
    return (
        f"Every mixed candidate forgets less than nothing ({least['id']}: {value_text(least['delta_bpb'])} bits per byte): the "
        f"pretraining text is still being learned. Pretrain longer (pretrain.steps), or {compare}."
    )


def interpolation_suffices(report: Report) -> str | None:
    """Finds an interpolated candidate for each mixed one that is no worse in score and forgetting."""
    mixed = [row for row in _mixed(report) if row["task_score"] is not None]
    straight = [row for row in report["candidates"] if row["kind"] == "interpolated" and row["task_score"] is not None]
    better = [next((one for one in straight if _no_worse(one, row)), None) for row in mixed]
    if not mixed or None in better:
        return None
    found = {one["id"]: one for one in better if one is not None}
    return (
        f"Interpolation is no worse than training here: {_names(list(found.values()))} against every mixed candidate, in score "
        "and forgetting. It costs no training: try more values of evaluate.interpolation_alphas, or auto."
    )


def margin_too_fine(report: Report) -> str | None:
    """Says that the dev split cannot tell a drop as small as the gate's margin."""
    power = report["gate"]["power"]
    if power is None or power["needed"] <= power["examples"]:
        return None
    return (
        f"The gate's margin is finer than the dev split can tell: the score difference of {power['candidate']} to fine-tuning "
        f"alone is known to ± {power['half_width']:.3f}, and gate.max_score_drop is {power['margin']:g}. Hold out about "
        f"{power['needed']:,} examples instead of {power['examples']:,}, or widen the margin."
    )


RULES: tuple[Callable[[Report], str | None], ...] = (
    task_hardly_learned,
    budget_broken,
    budget_pulled_back,
    budget_hardly_used,
    nothing_is_forgotten,
    text_still_learned,
    interpolation_suffices,
    margin_too_fine,
)
"""All rules, the most important first."""


def _finetuned(report: Report) -> Row:
    row: Row = next(row for row in report["candidates"] if row["kind"] == "finetuned")
    return row


def _mixed(report: Report) -> list[Row]:
    """Returns the candidates that were trained on both streams, without those of further seeds."""
    return [
        row
        for row in report["candidates"]
        if row["kind"] == "mixed"
        and row["tokens"]["pretrain"]
        and row["tokens"]["finetune"]
        and row["params"].get("candidate", {}).get("seed") is None
    ]


def _budgets(report: Report) -> list[Row]:
    return [row for row in _mixed(report) if row["forgetting_budget"]]


def _told(rows: list[Row]) -> str:
    """Says of candidates with a budget how much of it they use."""
    budgets = [(row["id"], row["forgetting_budget"]) for row in rows]
    return "; ".join(
        f"{name} forgets {one['measured']['value']:.3f} of {one['budget']:g} bits per byte" for name, one in budgets
    )


def _fall(loss: Mapping[str, float]) -> float:
    return loss["first"] - loss["last"]


def _is_worse(row: Row) -> bool:
    """Tells whether a candidate's score is measurably below that of fine-tuning alone."""
    return row["task_score_vs_finetuned"] is not None and row["task_score_vs_finetuned"]["high"] < 0


def _no_worse(one: Row, other: Row) -> bool:
    return bool(
        one["task_score"]["value"] >= other["task_score"]["value"]
        and one["delta_bpb"]["value"] <= other["delta_bpb"]["value"]
    )


def _names(rows: list[Row]) -> str:
    return ", ".join(row["id"] for row in rows)
