"""Measures models on the held-out splits of both streams: loss per document, prediction per example."""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..shared.artifacts import ArtifactLike, ModelCard, write_json, write_jsonl
from ..shared.config import Objective, Task
from ..shared.data.prepared import DataManifest, Documents, Split
from ..shared.errors import MixtuneError, RefusedError
from ..shared.measures import HARNESS_FILE
from ..shared.model.bf16_on_cpu import fast_bf16
from ..shared.model.masking import special_ids
from ..shared.model.mixed_model import MixedModel
from ..shared.model.packing import Segment
from ..shared.model.precision import pick_precision
from ..shared.running.context import Context, Progress
from .config import EvaluateStep
from .examples import example_row, from_head
from .generation import generate
from .harness import Harness
from .likelihood import (
    batches,
    document_segments,
    example_segments,
    head_logits,
    losses,
    masked_segments,
    unpacked,
)
from .references import references
from .scores import calibration_error, confusion_matrix, split_scores
from .subject import Subject
from .texts import Overlap
from .windows import mask_passes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "mixtune-evaluation/1"
SPLITS: tuple[Split, ...] = ("dev", "test")
LIKELIHOODS: dict[Objective, str] = {"causal_lm": "causal", "masked_lm": "fixed-mask pseudo-likelihood"}
"""What the loss on text is, by what the model was pretrained for."""


@dataclass(frozen=True)
class Held:
    """The held-out data of both streams."""

    text: DataManifest
    labelled: DataManifest
    text_folder: str
    labelled_folder: str

    @property
    def task(self) -> Task:
        """What the labelled examples are for."""
        assert self.labelled.task is not None
        return self.labelled.task

    @property
    def with_head(self) -> bool:
        """Whether the task has a head of its own."""
        return self.task != "generation"

    @cached_property
    def overlap(self) -> Overlap:
        """What measures written answers against the references of both splits."""
        held = (Documents(self.labelled_folder, split).records() for split in SPLITS)
        return Overlap(record["completion"].strip() for records in held for record in records)


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
    """Measures one model or, with `other`, each interpolation of two.

    Args:
        model: the model; with `other`, the pretrained end of the interpolation.
        other: the fine-tuned end; without any α nothing is measured, and the evaluation holds no candidate.
        pretrained: the pretrained end, where α is given without `other`: the model and its interpolations are measured.
        pretrain_heldout: data folder with dev and test of the pretraining stream.
        finetune_heldout: likewise of the fine-tuning stream.
        evaluation: output, evaluation folder.
        metrics: output, the numbers to see in the KFP UI.
        classification: output, the confusion matrix to see there, on test; of several candidates that of the first.

    Raises:
        RefusedError: where model and data do not fit together.
        MixtuneError: where the loss of a document is not finite; names the documents.
    """
    held = Held(
        DataManifest.load(pretrain_heldout.path),
        DataManifest.load(finetune_heldout.path),
        pretrain_heldout.path,
        finetune_heldout.path,
    )
    folder = Path(evaluation.path)
    (folder / "evaluation.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    entries, not_finite = [], []
    likelihood = None
    harness = Harness(config.lm_eval, config.batch_size) if config.lm_eval else None
    for subject in itertools.chain(
        _subjects(config, model, other, pretrained), references(config.references, model, context)
    ):
        _check(subject.card, held)
        measured = _measure(subject, config, held, folder / subject.card.id, context, harness)
        if measured is None:
            continue
        entry, bad, objective = measured
        entries.append(entry)
        not_finite += bad
        likelihood = LIKELIHOODS[objective]
        context.say(f"{subject.card.id}: {_words(entry)}")
    write_json(
        folder / "evaluation.json",
        {
            "format": FORMAT,
            "likelihood": likelihood,
            "task": {
                "kind": held.labelled.task,
                "metric": config.metric,
                "higher_is_better": True,
                "labels": held.labelled.labels,
                **({} if held.with_head else {"signatures": held.overlap.signatures()}),
            },
            "candidates": entries,
            "data": {
                "pretrain": _described(held.text, held.text_folder),
                "finetune": _described(held.labelled, held.labelled_folder),
            },
            "not_finite": not_finite,
        },
    )
    _track(entries, held, evaluation, metrics, context)
    _show_confusion(entries, held.labelled.labels or [], classification)
    if not_finite:
        named = [
            f"{one['candidate']}: the loss of {one['what']} {one['id']} ({one['split']}) is not finite"
            for one in not_finite
        ]
        for sentence in named:
            context.say(sentence)
        raise MixtuneError(*named)


def _subjects(
    config: EvaluateStep, model: ArtifactLike, other: ArtifactLike | None, pretrained: ArtifactLike | None
) -> Iterator[Subject]:
    """The model and its interpolations with the pretrained one; where `other` is given, the interpolations of the two alone."""
    start, end = (model, other) if other is not None else (pretrained, model)
    if other is None:
        yield Subject(ModelCard.load(model.path), model.path, model.uri)
    if not config.interpolation_alphas:
        return
    if start is None:
        raise RefusedError("pretrained: is required where interpolation_alphas are given without other")
    tuned = ModelCard.load(end.path)
    for alpha in config.interpolation_alphas:
        of_mixed = tuned.kind == "mixed"
        changes = {
            "id": f"interpolated-{alpha:g}" + (f"-{tuned.id}" if of_mixed else ""),
            "kind": "interpolated",
            "start": ModelCard.load(start.path).id,
            "name": f"interpolated, α = {alpha:g}, of {tuned.id}" if of_mixed else "",
            "mix_weight": None,
            "forgetting_budget": None,
            "realised_mix_weight": None,
            "params": {"alpha": alpha},
            "steps": 0,
            "tokens": {},
            "seconds": 0.0,
        }
        yield Subject(tuned.model_copy(update=changes), start.path, start.uri, end.path, end.uri, alpha)


def _check(card: ModelCard, held: Held) -> None:
    """Refuses data that the model was not made for."""
    problems = []
    if card.has_task_head and held.with_head and card.labels != held.labelled.labels:
        problems.append(
            f"{card.id}: was trained on the labels {card.labels}, the held-out data has {held.labelled.labels}; prepare again"
        )
    for name, manifest in (("pretrain_heldout", held.text), ("finetune_heldout", held.labelled)):
        missing = [split for split in SPLITS if split not in manifest.splits]
        if missing:
            problems.append(f"{name}: has no split {' and '.join(missing)}")
    if problems:
        raise RefusedError(*problems)


def _check_model(
    card: ModelCard, model: MixedModel, words: PreTrainedTokenizerBase, held: Held, with_harness: bool
) -> None:
    """Refuses a model that cannot be measured on this data."""
    problems = []
    size = model.config.get_text_config().vocab_size
    if max(held.text.vocabulary_size, held.labelled.vocabulary_size) > size:
        problems.append(f"{card.id}: has {size} words, the held-out data was made with more; prepare it again")
    if card.has_task_head and held.with_head and model.kind != held.task:
        made_for = f"made for {model.kind}" if model.kind else "without a task head"
        problems.append(f"{card.id}: is {made_for}, the held-out data is for {held.task}; prepare and train again")
    if model.objective == "masked_lm":
        if with_harness:
            problems.append(
                f"evaluate.lm_eval.tasks: {card.id} is a masked language model, for which lm-evaluation-harness has no tasks; "
                "leave them out"
            )
        if words.mask_token_id is None:
            problems.append(
                f"{card.id}: is a masked language model, but its tokenizer has no mask token, without which its loss on text "
                "cannot be measured; use the tokenizer that it was pretrained with"
            )
        if not held.with_head:
            problems.append(
                f"{card.id}: is a masked language model, which writes no answers; choose another task or model"
            )
    if problems:
        raise RefusedError(*problems)


@dataclass(frozen=True)
class _Bench:
    """One loaded candidate and what it is measured with."""

    subject: Subject
    model: MixedModel
    words: PreTrainedTokenizerBase
    config: EvaluateStep
    held: Held
    context: Context

    def documents(self, split: Split) -> list[dict[str, Any]]:
        """The loss of each held-out document; null where it is not finite."""
        documents = Documents(self.held.text_folder, split)
        count = min(len(documents), self.config.max_documents or len(documents))
        if self.model.objective == "masked_lm":
            passes, mask_id = mask_passes(self.config.mask_probability), int(self.words.mask_token_id)
            never = special_ids(self.words)
            segments = masked_segments(documents, count, self.config.max_length, passes, mask_id, never)
        else:
            segments = document_segments(documents, count, self.config.max_length)
        nats, tokens = self._losses(segments, count, f"{split} documents")
        return [
            {
                "id": record["id"],
                "source": record["source"],
                "bytes": record["bytes"],
                "tokens": int(tokens[index]),
                "nats": _finite(nats[index]),
            }
            for index, record in enumerate(documents.records()[:count])
        ]

    def labelled(self, split: Split) -> list[dict[str, Any]]:
        """What the task head predicts for each example, and its score."""
        examples = Documents(self.held.labelled_folder, split)
        segments = example_segments(examples, with_head=True)
        work = batches(segments, self.config.max_length, self.config.batch_size)
        with self._progress(len(work), f"{split} examples") as progress:
            logits = head_logits(self.model, work, self._pad_id, progress)
            bad = [key for key, values in logits.items() if not np.isfinite(values).all()]
            again = unpacked(segments, bad, self.config.batch_size)
            logits |= head_logits(self.model, again, self._pad_id, progress)
        return from_head(self.held.task, self.config.metric, self.held.labelled.labels or [], examples, logits)

    def answered(self, split: Split) -> list[dict[str, Any]]:
        """The model's answer to each prompt, its score, and the loss of the reference."""
        examples = Documents(self.held.labelled_folder, split)
        size = self.config.batch_size
        nats, tokens = self._losses(example_segments(examples, with_head=False), len(examples), f"{split} examples")
        prompts = [np.asarray(examples.tokens(i))[: int(examples.supervised_from[i])] for i in range(len(examples))]
        with self._progress(-(-len(prompts) // size), f"{split} answers") as progress:
            longest = self.config.max_new_tokens or 1
            answers = generate(self.model, self.words, prompts, longest, size, progress)
        rows = []
        for index, (record, answer) in enumerate(zip(examples.records(), answers, strict=True)):
            reference = record["completion"].strip()
            scores = {} if answer is None else self.held.overlap.of_example(answer, reference)
            row = example_row(record, "generation", self.config.metric, reference, answer, scores)
            rows.append({**row, **scores, "tokens": int(tokens[index]), "nats": _finite(nats[index])})
        return rows

    def _losses(self, segments: list[Segment], count: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        work = batches(segments, self.config.max_length, self.config.batch_size)
        with self._progress(len(work), what) as progress:
            nats, tokens = losses(self.model, work, count, self._pad_id, progress)
            bad = np.flatnonzero(~np.isfinite(nats))
            again = unpacked(segments, bad.tolist(), self.config.batch_size)
            nats[bad] = losses(self.model, again, count, self._pad_id, progress)[0][bad]
        return nats, tokens

    def _progress(self, total: int, what: str) -> Progress:
        name = f"{self.subject.card.id} {what}" if self.subject.alpha is not None else what
        return self.context.progress(total, "batches", name)

    @property
    def _pad_id(self) -> int:
        return int(self.words.pad_token_id)


def _measure(
    subject: Subject, config: EvaluateStep, held: Held, folder: Path, context: Context, harness: Harness | None
) -> tuple[dict[str, Any], list[dict[str, str]], Objective] | None:
    """Measures one candidate.

    Returns:
        Its entry in evaluation.json, the documents whose loss is not finite, and what the model was pretrained for; None where
        it is a base model without a trained language-model head, of which there is no loss.
    """
    started = time.monotonic()
    model, words = subject.load(config.precision), subject.words()
    if subject.card.kind == "base" and model.new_weights:
        context.say(f"base: has no trained language-model head ({model.new_weights[0]} is missing), so it has no loss")
        return None
    _check_model(subject.card, model, words, held, harness is not None)
    bench = _Bench(subject, model, words, config, held, context)
    shutil.rmtree(folder, ignore_errors=True)
    splits: dict[str, dict[str, Any]] = {}
    not_finite: list[dict[str, str]] = []
    # A generation task needs no head of its own, so that the pretrained model can be scored on it.
    with_task = subject.card.has_task_head or not held.with_head
    with fast_bf16([model.lm], model.device, pick_precision(config.precision), backward=False):
        for split in SPLITS:
            documents = bench.documents(split)
            write_jsonl(folder / f"{split}.documents.jsonl", documents)
            splits[split] = _forgetting_summary(documents)
            not_finite += _not_finite(subject, split, "document", documents, "nats")
            if with_task and held.labelled.splits[split].documents:
                rows = bench.labelled(split) if held.with_head else bench.answered(split)
                write_jsonl(folder / f"{split}.examples.jsonl", rows)
                not_finite += _not_finite(
                    subject, split, "example", rows, "prediction", *([] if held.with_head else ["nats"])
                )
                splits[split] |= _task_summary(rows, held, config.metric)
            else:
                splits[split] |= {"task_score": None, "examples": 0}
        asked = harness.measure(model, words, context, f"{subject.card.id} lm_eval") if harness else []
    if asked:
        write_jsonl(folder / HARNESS_FILE, (row.model_dump(mode="json") for row in asked))
    curve = Path(subject.folder) / "training.jsonl"
    if subject.alpha is None and curve.is_file():
        shutil.copyfile(curve, folder / "training.jsonl")
    entry = {
        **subject.card.model_dump(mode="json"),
        "model_uri": subject.model_uri,
        "other_uri": subject.other_uri,
        "alpha": subject.alpha,
        "splits": splits,
        "lm_eval": {row.metric_name: {"value": row.value, "stderr": row.stderr} for row in asked},
        "evaluate_seconds": round(time.monotonic() - started, 2),
        "evaluate_run": context.tracker.run_id,
    }
    return entry, not_finite, model.objective


def _not_finite(
    subject: Subject, split: Split, what: str, rows: list[dict[str, Any]], *keys: str
) -> list[dict[str, str]]:
    """Names the documents or examples of which there is no number."""
    named = {"candidate": subject.card.id, "split": split, "what": what}
    return [{**named, "id": row["id"]} for row in rows if any(row[key] is None for key in keys)]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _forgetting_summary(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of sums over the documents; null where a loss is not finite."""
    finite = documents and all(row["nats"] is not None for row in documents)
    nats = sum(row["nats"] for row in documents) if finite else None
    num_bytes, tokens = (sum(row[name] for row in documents) for name in ("bytes", "tokens"))
    return {
        "bpb": nats / (math.log(2) * num_bytes) if nats is not None and num_bytes else None,
        "nats_per_token": nats / tokens if nats is not None and tokens else None,
        "documents": len(documents),
        "tokens": tokens,
        "bytes": num_bytes,
    }


def _task_summary(rows: list[dict[str, Any]], held: Held, metric: str) -> dict[str, Any]:
    references, predictions = ([row[name] for row in rows] for name in ("reference", "prediction"))
    labels = held.labelled.labels or []
    scores = split_scores(held.task, references, predictions, labels)
    if not held.with_head:
        scores |= held.overlap.of_split(rows)
    summary: dict[str, Any] = {"task_score": scores[metric], "examples": len(rows), **scores}
    if held.task == "classification":
        known = None not in predictions
        summary["confusion_matrix"] = confusion_matrix(references, predictions, labels) if known else None
        right = [row["reference"] == row["prediction"] for row in rows]
        summary["calibration_error"] = (
            calibration_error([max(row["probabilities"]) for row in rows], right) if known else None
        )
    if not held.with_head:
        nats, tokens = [row["nats"] for row in rows], sum(row["tokens"] for row in rows)
        summary["completion_nats_per_token"] = sum(nats) / tokens if tokens and None not in nats else None
    return summary


def _described(manifest: DataManifest, folder: str) -> dict[str, Any]:
    """What the report tells of held-out data."""
    splits = {split: manifest.splits[split].model_dump(mode="json") for split in SPLITS}
    if manifest.task == "question_answering":
        for split in SPLITS:  # of the windows over a long context, each is a document
            splits[split]["examples"] = len({record["id"] for record in Documents(folder, split).records()})
    return {"digest": manifest.digest, "source": manifest.source, "splits": splits}


def _words(entry: dict[str, Any]) -> str:
    test = entry["splits"]["test"]
    bpb, score = test["bpb"], test["task_score"]
    parts = ["loss not finite" if bpb is None else f"{bpb:.3f} bits per byte on {test['documents']:,} test documents"]
    if score is not None:
        parts.append(f"task score {score:.3f} on {test['examples']:,} test examples")
    return ", ".join(parts)


def _show_confusion(entries: list[dict[str, Any]], labels: list[str], classification: ArtifactLike) -> None:
    """What KFP's `ClassificationMetrics.log_confusion_matrix` writes; the artifact at hand need not be one of KFP's."""
    matrix = entries[0]["splits"]["test"].get("confusion_matrix") if entries else None
    if matrix is not None:
        classification.metadata["confusionMatrix"] = {
            "annotationSpecs": [{"displayName": label} for label in labels],
            "rows": [{"row": row} for row in matrix],
        }


def _track(
    entries: list[dict[str, Any]], held: Held, evaluation: ArtifactLike, metrics: ArtifactLike, context: Context
) -> None:
    """Numbers beside the artifacts and in MLflow."""
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
        numbers[f"{prefix}evaluate_seconds"] = entry["evaluate_seconds"]
    context.tracker.log_metrics(numbers)
    if entries:
        context.tracker.set_tags({"mixtune.candidate": " ".join(entry["id"] for entry in entries)})
    for name, manifest in (("pretrain-heldout", held.text), ("finetune-heldout", held.labelled)):
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
