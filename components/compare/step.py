"""Compares all candidates: values with intervals, selection, gate verdict, report. Does not import torch."""

from __future__ import annotations

from pathlib import Path

from ..shared.artifacts import ArtifactLike, write_json
from ..shared.errors import GateNotMetError
from ..shared.running.context import Context
from .config import CompareStep
from .evaluations import load_evaluations
from .report.harness import differences
from .report.report import pictures, render_html, render_markdown
from .results import Comparison, compare
from .scores import Scores

TRAINED_HERE = ("pretrained", "finetuned", "mixed")
"""Kinds with model folders from this run. Interpolated candidates have none; base and champion were made elsewhere."""


def run(
    config: CompareStep,
    *,
    context: Context,
    pretrained: ArtifactLike,
    finetuned: ArtifactLike,
    interpolated: ArtifactLike,
    mixed: list[ArtifactLike],
    report: ArtifactLike,
    summary: ArtifactLike,
    metrics: ArtifactLike,
    comparison: ArtifactLike,
    selected_uri: str,
    other_uri: str,
) -> bool:
    """Selects a candidate and applies the gate, both on dev, and reports results on test.

    Args:
        pretrained: evaluation folder; likewise `finetuned`, `interpolated` and each of `mixed`.
        report: output, the HTML page.
        summary: output, the Markdown summary.
        metrics: output, the selected candidate's metrics.
        comparison: output, folder with report.html, report.md, report.json, the figures as SVG and PNG, and models.json
            (location of each candidate's model).
        selected_uri: file for the URI of the selected model; for an interpolated candidate, of the pretrained model.
        other_uri: file for the URI of the fine-tuned model if an interpolated candidate is selected. Otherwise it contains the
            URI of the small comparison folder, since an importer must import something.

    Returns:
        Whether the selected candidate meets the gate.

    Raises:
        RefusedError: if the evaluations cannot be compared.
        MixtuneError: if a loss is not finite.
        GateNotMetError: if no candidate meets the gate and `gate.on_miss` is `fail`; all outputs are written then.
    """
    evaluations = load_evaluations([pretrained, finetuned, *mixed, interpolated])
    context.say(f"comparing {len(evaluations.candidates)} candidates")
    result = compare(config, evaluations, context)
    files = _write(result, config, context, report, summary, comparison)
    _point_to_selected(result, comparison, selected_uri, other_uri)
    numbers = _numbers(result)
    metrics.metadata.update(numbers)
    _track(result, numbers, files, context)
    context.say(result.report["headline"])
    context.say(f"gate {_verdict(result)}: " + "; ".join(result.decision.reasons))
    if not result.decision.passed and config.gate.on_miss == "fail":
        raise GateNotMetError(f"the gate is not met, and gate.on_miss is fail: {'; '.join(result.decision.reasons)}")
    return result.decision.passed


def _write(
    result: Comparison,
    config: CompareStep,
    context: Context,
    report: ArtifactLike,
    summary: ArtifactLike,
    comparison: ArtifactLike,
) -> list[Path]:
    """Writes the comparison folder, report.json last, and the two artifacts for the KFP UI."""
    folder = Path(comparison.path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").unlink(missing_ok=True)
    drawn = pictures(result, config.gate)
    texts = {
        "report.html": render_html(result, drawn, context),
        "report.md": render_markdown(result, context),
        **{f"{name}.svg": picture.svg for name, picture in drawn.items()},
    }
    for name, picture in drawn.items():
        (folder / f"{name}.png").write_bytes(picture.png)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for artifact, name in ((report, "report.html"), (summary, "report.md")):
        Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
        Path(artifact.path).write_text(texts[name], encoding="utf-8")
    entries = [one.entry for one in result.evaluations.candidates]
    write_json(folder / "models.json", {entry.id: entry.model_uri for entry in entries if entry.kind in TRAINED_HERE})
    write_json(folder / "report.json", result.report)
    return [folder / name for name in (*texts, *(f"{name}.png" for name in drawn), "report.json")]


def _point_to_selected(result: Comparison, comparison: ArtifactLike, selected_uri: str, other_uri: str) -> None:
    """Writes only URIs, so that `register` fetches the selected model only (two models for an interpolated candidate).

    The URIs are parameters for an importer: KFP's launcher fails on an output artifact with a URI in another run's folder,
    which is the case for cached models.
    """
    entry = result.selected.entry
    for file, uri in ((selected_uri, entry.model_uri), (other_uri, entry.other_uri or comparison.uri)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(uri, encoding="utf-8")


def _verdict(result: Comparison) -> str:
    return "passed" if result.decision.passed else "not met"


def _numbers(result: Comparison) -> dict[str, float]:
    """Returns the selected candidate's metrics on test."""
    scores: Scores = result.scores[result.selected.id]["test"]
    values = {
        "task_score": scores.task_score,
        "task_score_vs_finetuned": scores.task_score_vs_finetuned,
        "bpb": scores.bpb,
        "delta_bpb": scores.delta_bpb,
    }
    numbers = {"gate_passed": float(result.decision.passed)}
    for name, value in values.items():
        if value is not None:
            numbers |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    return numbers


def _track(result: Comparison, numbers: dict[str, float], files: list[Path], context: Context) -> None:
    tracker = context.tracker
    tags = {
        "mixtune.selected": result.decision.selected,
        "mixtune.gate": _verdict(result),
        "mixtune.gate_reasons": "; ".join(result.decision.reasons),
        "mixtune.headline": result.report["headline"],
    }
    context.facts |= {name: tags[f"mixtune.{name}"] for name in ("selected", "gate", "gate_reasons")}
    tracker.set_tags(tags)
    tracker.set_tags(tags, parent=True)
    of_all: dict[str, float | None] = {}
    for name, by_split in result.scores.items():
        for split, scores in by_split.items():
            of_all |= {f"{name}.{split}.delta_bpb": scores.delta_bpb.value, f"{name}.{split}.bpb": scores.bpb.value}
            of_all[f"{name}.{split}.task_score"] = scores.task_score.value if scores.task_score else None
    tracker.log_metrics({**numbers, **of_all, **differences(result.report)})
    tracker.log_parent_metrics({f"selected.{name}": value for name, value in numbers.items()})
    for file in files:
        tracker.log_artifact(file, "report")
        if file.name.startswith("report."):
            tracker.log_artifact(file, "report", parent=True)
    tracker.link({title: run for row in result.report["candidates"] for title, run in row["mlflow_runs"].items()})
    for stream, data in result.evaluations.data.items():
        tracker.log_input(f"{stream}-heldout", data["digest"], data["source"], "evaluation")
