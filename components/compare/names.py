"""Names of metrics and candidates for people, for the report and the command."""

from __future__ import annotations

from .evaluations import Entry


def metric_name(metric: str) -> str:
    """Returns the name of a metric in plain English."""
    return {
        "macro_f1": "macro-F1",
        "micro_f1": "micro-F1",
        "token_f1": "token F1",
        "exact_match": "exact match",
        "rouge_l": "ROUGE-L",
        "bleu": "BLEU",
        "chrf": "chrF",
        "pearson": "Pearson correlation",
        "spearman": "Spearman correlation",
        "mae": "mean absolute error",
        "rmse": "root mean squared error",
        "rouge_1": "ROUGE-1",
        "rouge_2": "ROUGE-2",
        "calibration_error": "calibration error",
        "nats_per_token": "nats per token",
        "completion_nats_per_token": "nats per token of the references",
    }.get(metric, metric)


def candidate_name(entry: Entry) -> str:
    """Names a candidate in plain English, such as `mixed, λ = 0.3`."""
    if entry.name:
        return entry.name
    if entry.kind == "mixed" and entry.mix_weight is not None:
        return f"mixed, λ = {entry.mix_weight:g}"
    if entry.kind == "interpolated":
        return f"interpolated, α = {entry.alpha:g}"
    names = {
        "finetuned": "fine-tuning alone",
        "base": "base model",
        "champion": "champion, the registered model in use",
    }
    return names.get(entry.kind, entry.id)
