"""The model card of a registered model, from the report: description, scores, forgetting, data and settings."""

from __future__ import annotations

from typing import Any

from ..shared.task_kinds import TASK_KINDS
from ..shared.value_text import lambda_of, value_text

SHOWN_LABELS = 30


def model_card(report: dict[str, Any], candidate: dict[str, Any], name: str) -> str:
    """Renders the model card.

    Args:
        report: content of report.json.
        candidate: row of the registered candidate in the report.
        name: name of the registered model.
    """
    task, forgetting, tokens = report["task"], report["forgetting"], candidate["tokens"]
    weight = "" if (found := lambda_of(candidate)) is None else f", λ = {found:g}"
    trained = f"{candidate['steps']:,} steps, {candidate['seconds']:,.0f} s on {candidate['device']}, {candidate['precision']}"
    rows = {
        "candidate": f"{candidate['id']} ({candidate['kind']}{weight})",
        "base model": candidate["base"] or "–",
        "task": task["kind"],
        "labels": _some_labels(task["labels"] or []),
        f"{task['metric']}, test": f"{value_text(candidate['task_score'], signed=False)}, {task['examples']:,} examples",
        "against fine-tuning alone": value_text(candidate["task_score_vs_finetuned"]),
        "forgetting, bits per byte": f"{value_text(candidate['delta_bpb'])}, {forgetting['documents']:,} documents",
        "bits per byte": value_text(candidate["bpb"], signed=False),
        "gate": f"{'passed' if report['gate']['passed'] else 'not met'}: {'; '.join(report['gate']['reasons'])}",
        "training": f"{trained}; {tokens['pretrain']:,} pretraining and {tokens['finetune']:,} fine-tuning tokens",
        **{f"{stream} data": f"`{digest}`" for stream, digest in (candidate.get("data") or {}).items()},
    }
    lines = [f"# {name}", "", report["headline"], "", "| | |", "|---|---|"]
    lines += [f"| {what} | {_cell(text)} |" for what, text in rows.items()]
    load = "mlflow.transformers.load_model(uri)"
    if TASK_KINDS[task["kind"]].pipeline is None:
        load = 'mlflow.transformers.load_model(uri, return_type="components")'
    lines += [
        "",
        f"Intervals are of {100 * report['interval']:g} %, by a paired bootstrap over the held-out documents or examples. "
        "Forgetting is the rise of the loss on held-out pretraining text over the pretrained model. The choice was made on "
        "the dev split, the numbers are from the test split.",
        "",
        f"The model is in Hugging Face format (safetensors), with the language model and the task head: `{load}`. "
        "`mlflow.pyfunc.load_model(uri).predict(rows)` predicts what was scored.",
    ]
    return "\n".join(lines) + "\n"


def _some_labels(labels: list[str]) -> str:
    more = [f"and {len(labels) - SHOWN_LABELS:,} more, which config.json lists"] if len(labels) > SHOWN_LABELS else []
    return ", ".join([*labels[:SHOWN_LABELS], *more]) or "–"


def _cell(text: str) -> str:
    """Escapes text for a table cell."""
    return " ".join(text.replace("|", "\\|").split())
