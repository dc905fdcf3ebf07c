"""Evaluates models on the held-out splits of both streams: loss per document, prediction per example."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..shared.artifacts import ArtifactLike, ModelCard, Utilisation, write_json
from ..shared.config import Objective
from ..shared.data.prepared import DataManifest
from ..shared.data.tallies import log_lines
from ..shared.errors import MixtuneError, RefusedError
from ..shared.model.device import pick_device
from ..shared.model.loading import Interpolation
from ..shared.running.context import Context
from .alphas import find_alpha
from .checks import check_data
from .config import EvaluateStep
from .divergence import Divergence
from .harness import Harness
from .held_out import HeldOut, describe_stream
from .measuring import measure
from .references import references
from .subject import Subject

FORMAT = "mixtune-evaluation/1"
LIKELIHOODS: dict[Objective, str] = {"causal_lm": "causal", "masked_lm": "fixed-mask pseudo-likelihood"}
"""The type of the loss on text, by the model's training objective."""


def run(
    config: EvaluateStep,
    *,
    context: Context,
    model: ArtifactLike,
    other: ArtifactLike | None,
    pretrained: ArtifactLike | None = None,
    pretrain_heldout: ArtifactLike,
    finetune_heldout: ArtifactLike,
    evaluation: ArtifactLike,
    metrics: ArtifactLike,
    classification: ArtifactLike,
) -> None:
    """Evaluates one model or, with `other`, each interpolation of two models.

    Args:
        model: the model; with `other`, the pretrained end of the interpolation.
        other: the fine-tuned end. Without any α, nothing is evaluated and the evaluation contains no candidate.
        pretrained: the pretrained model, from which the divergence of `model` is measured. If α is given without `other`, the
            interpolations of the two are evaluated, too. Not needed if `model` is the pretrained model.
        pretrain_heldout: data folder with dev and test of the pretraining stream.
        finetune_heldout: data folder with dev and test of the fine-tuning stream.
        evaluation: output, evaluation folder.
        metrics: output, metrics for the KFP UI.
        classification: output, confusion matrix on test for the KFP UI; of several candidates, that of the first.

    Raises:
        RefusedError: if model and data are incompatible.
        MixtuneError: if the loss of documents is not finite; names the documents.
    """
    held_out = HeldOut(
        DataManifest.load(pretrain_heldout.path),
        DataManifest.load(finetune_heldout.path),
        pretrain_heldout.path,
        finetune_heldout.path,
        config.max_examples,
    )
    folder = Path(evaluation.path)
    (folder / "evaluation.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    entries, not_finite = [], []
    likelihood = None
    harness = Harness(config.lm_eval, config.batch_size) if config.lm_eval else None
    before = pretrained if pretrained is not None else model
    compares = ModelCard.load(before.path).kind == "pretrained"
    divergence = functools.cache(lambda: Divergence(before.path, config, held_out, context))
    for subject in itertools.chain(
        _subjects(config, model, other, pretrained, held_out, context), references(config.references, model, context)
    ):
        check_data(subject.card, held_out)
        # The pretrained model is read before the candidate is loaded.
        from_pretrained = divergence() if subject.card.kind != "pretrained" and compares else None
        measured = measure(subject, config, held_out, folder / subject.card.id, context, harness, from_pretrained)
        if measured is None:
            continue
        entry, bad, objective = measured
        entries.append(entry)
        not_finite += bad
        likelihood = LIKELIHOODS[objective]
        context.say(f"{subject.card.id}: {_words(entry)}")
    tallies = held_out.tallies(config.max_new_tokens)
    for line in [line for stream, rows in tallies.items() for line in log_lines(rows, stream)]:
        context.say(line)
    write_json(
        folder / "evaluation.json",
        {
            "format": FORMAT,
            "likelihood": likelihood,
            "task": {
                "kind": held_out.labelled.task,
                "metric": config.metric,
                "higher_is_better": True,
                "labels": held_out.labelled.labels,
                **({} if held_out.with_head else {"signatures": held_out.overlap.signatures()}),
            },
            "candidates": entries,
            "data": {
                "pretrain": describe_stream(held_out.text, held_out.text_folder),
                "finetune": describe_stream(held_out.labelled, held_out.labelled_folder),
            },
            "tallies": {stream: [row.model_dump(mode="json") for row in rows] for stream, rows in tallies.items()},
            "not_finite": not_finite,
        },
    )
    _track(entries, held_out, evaluation, metrics, context)
    _show_confusion(entries, held_out.labelled.labels or [], classification)
    if not_finite:
        named = [
            f"{one['candidate']}: the loss of {one['what']} {one['id']} ({one['split']}) is not finite"
            for one in not_finite
        ]
        for sentence in named:
            context.say(sentence)
        raise MixtuneError(*named)


def _subjects(
    config: EvaluateStep,
    model: ArtifactLike,
    other: ArtifactLike | None,
    pretrained: ArtifactLike | None,
    held_out: HeldOut,
    context: Context,
) -> Iterator[Subject]:
    """Yields the model and its interpolations with the pretrained model; with `other`, only the interpolations of the two."""
    start, end = (model, other) if other is not None else (pretrained, model)
    if other is None:
        yield Subject(ModelCard.load(model.path), model.path, model.uri)
    if not config.interpolation_alphas and config.alpha_search is None:
        return
    if start is None:
        raise RefusedError("pretrained: is required where interpolation_alphas are given without other")
    between = functools.partial(
        _interpolated,
        start,
        end,
        functools.cache(functools.partial(Interpolation, start.path, end.path, pick_device())),
    )
    alphas = config.interpolation_alphas
    if config.alpha_search is not None:
        check_data(between(1.0).card, held_out)
        found = find_alpha(between, config.alpha_search, config, held_out, context)
        alphas = [] if found is None else [found]
    yield from map(between, alphas)


def _interpolated(start: ArtifactLike, end: ArtifactLike, ends: Callable[[], Interpolation], alpha: float) -> Subject:
    tuned = ModelCard.load(end.path)
    of_mixed = tuned.kind == "mixed"
    changes: dict[str, Any] = {
        "id": f"interpolated-{alpha:g}" + (f"-{tuned.id}" if of_mixed else ""),
        "kind": "interpolated",
        "start": ModelCard.load(start.path).id,
        "name": f"interpolated, α = {alpha:g}, of {tuned.id}" if of_mixed else "",
        "mix_weight": None,
        "forgetting_budget": None,
        "pull_back": None,
        "tried": [],
        "stopped": None,
        "realised_mix_weight": None,
        "params": {"alpha": alpha},
        "steps": 0,
        "tokens": {},
        "seconds": 0.0,
        "utilisation": Utilisation(),
    }
    card = tuned.model_copy(update=changes)
    return Subject(card, start.path, start.uri, end.path, end.uri, alpha, ends=ends)


def _words(entry: dict[str, Any]) -> str:
    test = entry["splits"]["test"]
    bpb, score = test["bpb"], test["task_score"]
    parts = ["loss not finite" if bpb is None else f"{bpb:.3f} bits per byte on {test['documents']:,} test documents"]
    if score is not None:
        parts.append(f"task score {score:.3f} on {test['examples']:,} test examples")
    return ", ".join(parts)


def _show_confusion(entries: list[dict[str, Any]], labels: list[str], classification: ArtifactLike) -> None:
    """Writes what KFP's `ClassificationMetrics.log_confusion_matrix` writes, since the artifact may not be one of KFP's."""
    matrix = entries[0]["splits"]["test"].get("confusion_matrix") if entries else None
    if matrix is not None:
        classification.metadata["confusionMatrix"] = {
            "annotationSpecs": [{"displayName": label} for label in labels],
            "rows": [{"row": row} for row in matrix],
        }


def _track(
    entries: list[dict[str, Any]], held_out: HeldOut, evaluation: ArtifactLike, metrics: ArtifactLike, context: Context
) -> None:
    """Writes metrics to the artifacts and to MLflow."""
    numbers: dict[str, float] = {}
    for entry in entries:
        prefix = f"{entry['id']}." if entry["kind"] in ("interpolated", "base", "champion") else ""
        for split, values in entry["splits"].items():
            for name, value in values.items():
                if isinstance(value, int | float):
                    numbers[f"{prefix}{split}.{name}"] = float(value)
        for name, found in entry["lm_eval"].items():
            given = {name: found["value"], f"{name}.stderr": found["stderr"]}
            numbers |= {f"{prefix}{key}": value for key, value in given.items() if value is not None}
        if entry["kl_from_pretrained"] is not None:
            numbers[f"{prefix}kl_from_pretrained"] = entry["kl_from_pretrained"]
        numbers[f"{prefix}evaluate_seconds"] = entry["evaluate_seconds"]
    context.tracker.log_metrics(numbers)
    if entries:
        context.tracker.set_tags({"mixtune.candidate": " ".join(entry["id"] for entry in entries)})
    for name, manifest in (("pretrain-heldout", held_out.text), ("finetune-heldout", held_out.labelled)):
        context.tracker.log_input(name, manifest.digest, manifest.source, "evaluation")
    metrics.metadata.update({name: value for name, value in numbers.items() if name.endswith((".bpb", ".task_score"))})
    evaluation.metadata.update(
        {
            "candidates": [entry["id"] for entry in entries],
            "bpb": {entry["id"]: entry["splits"]["test"]["bpb"] for entry in entries},
            "task_score": {entry["id"]: entry["splits"]["test"]["task_score"] for entry in entries},
            "mlflow_run": context.tracker.run_id or "",
        }
    )
