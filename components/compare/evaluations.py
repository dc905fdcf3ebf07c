"""Reads evaluation folders and checks that their contents are comparable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ..shared import task_kinds
from ..shared.artifacts import ArtifactLike, ModelCard, read_json, read_jsonl
from ..shared.data.records import GROUP
from ..shared.data.source_names import source_of
from ..shared.data.tallies import Tally
from ..shared.errors import MixtuneError, RefusedError
from ..shared.measures import HARNESS_FILE, KL_FILE, Measure
from .statistics import clusters

FORMAT = "mixtune-evaluation/1"
SPLITS = ("dev", "test")
KINDS = ("base", "pretrained", "finetuned", "mixed", "interpolated", "champion")
SHOWN_IDS = 3


class EvaluatedTask(BaseModel):
    """The task on which all candidates were evaluated."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: task_kinds.Task
    metric: str
    higher_is_better: bool = True
    labels: list[str] | None = None
    signatures: dict[str, str] | None = None
    """Generation: the exact settings of ROUGE, BLEU and chrF."""


class Entry(ModelCard):
    """A candidate in `evaluation.json`: its model card, the location of its weights, and the run that evaluated it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_uri: str
    other_uri: str | None = None
    """Interpolated candidates: URI of the fine-tuned model; `model_uri` is that of the pretrained model."""
    alpha: float | None = None
    splits: dict[str, dict[str, Any]]
    evaluate_seconds: float = 0.0
    evaluate_run: str | None = None


@dataclass(frozen=True)
class Measurements:
    """The measurements of a candidate on one split: N documents, M examples, in the same order for all candidates.

    Attributes:
        documents: document ids.
        nats: (N,) loss of each document, summed over its tokens.
        tokens: (N,) scored tokens.
        num_bytes: (N,) UTF-8 bytes.
        examples: rows written by `evaluate`; None if the model has no trained head.
        trivial: trivial answers to the same examples; only `finetuned` has them.
        trivial_name: description of the trivial answers, such as `the most frequent label`.
        sources: origin of each document: file, data set or package, without the line number.
        groups: (N,) number of the group of each document, such as its author; None if the data names no groups.
    """

    documents: list[str]
    nats: np.ndarray
    tokens: np.ndarray
    num_bytes: np.ndarray
    examples: list[dict[str, Any]] | None
    sources: list[str] = field(default_factory=list)
    groups: np.ndarray | None = None
    trivial: list[dict[str, Any]] | None = None
    trivial_name: str = ""


@dataclass(frozen=True)
class Candidate:
    """A candidate with all its measurements."""

    entry: Entry
    splits: dict[str, Measurements]
    curve: list[dict[str, Any]]
    harness: list[Measure] = field(default_factory=list)
    """Results on tasks of lm-evaluation-harness, if any are configured."""
    divergence: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `KL_FILE`; empty if the divergence was not measured."""

    @property
    def id(self) -> str:
        """Returns the id of the candidate, its name in the report."""
        return self.entry.id


@dataclass(frozen=True)
class Evaluations:
    """All candidates of a run, in the order of the report: pretrained, finetuned, mixed by λ, interpolated by α."""

    task: EvaluatedTask
    data: dict[str, Any]
    candidates: list[Candidate]
    likelihood: str
    """The type of the loss on text: `causal`, or a pseudo-likelihood for masked language models."""
    tallies: dict[str, list[Tally]]
    """What was lost or changed in each stream on the way from its sources."""

    def of_kind(self, kind: str) -> Candidate:
        """Returns the candidate of a kind that occurs once."""
        return next(one for one in self.candidates if one.entry.kind == kind)

    def champion(self) -> Candidate | None:
        """Returns the registered model in use, if it was evaluated."""
        return next((one for one in self.candidates if one.entry.kind == "champion"), None)


def load_evaluations(artifacts: Sequence[ArtifactLike]) -> Evaluations:
    """Reads all evaluations of a run.

    Raises:
        RefusedError: if folders are no evaluations, or if candidates were measured on different data; names all of them.
        MixtuneError: if losses are not finite; names all such documents.
    """
    problems: list[str] = []
    read: list[tuple[Path, dict[str, Any]]] = []
    for artifact in artifacts:
        try:
            read.append((Path(artifact.path), _manifest(Path(artifact.path))))
        except RefusedError as error:
            problems += error.problems
    if problems:
        raise RefusedError(*problems)
    _refuse_not_finite([found for _, manifest in read for found in manifest.get("not_finite", [])])
    first_folder, first = read[0]
    for folder, manifest in read[1:]:
        problems += [
            f"{folder}: was measured on another {what} than {first_folder} ({manifest[what]} instead of {first[what]})"
            for what in ("task", "data")
            if manifest[what] != first[what]
        ]
    # An evaluation without candidates (no α is configured) has no likelihood.
    likelihoods = {manifest["likelihood"]: folder for folder, manifest in reversed(read) if manifest["likelihood"]}
    if len(likelihoods) > 1:
        named = "; ".join(f"{likelihood} in {folder}" for likelihood, folder in sorted(likelihoods.items()))
        problems.append(f"the losses on text are not the same measure ({named}), so they cannot be compared")
    candidates: list[Candidate] = []
    for folder, manifest in read:
        for row in manifest["candidates"]:
            embedded = manifest["data"].get("pretrain", {}).get("source") == "embedded"
            try:
                candidates.append(_candidate(folder, Entry.model_validate(row), embedded))
            except (OSError, ValueError, KeyError) as error:
                what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                problems.append(f"{folder}: the evaluation of {row.get('id', 'a candidate')} cannot be read ({what})")
    candidates.sort(key=_place)
    problems += _not_once(candidates)
    if problems:
        raise RefusedError(*problems)
    _refuse_not_finite(
        {"candidate": one.id, "split": split, "what": "document", "id": measured.documents[number]}
        for one in candidates
        for split, measured in one.splits.items()
        for number in np.flatnonzero(~np.isfinite(measured.nats))
    )
    reference = next(one for one in candidates if one.entry.kind == "pretrained")
    problems += [problem for split in SPLITS for problem in _nothing_there(reference, split)]
    with_task = next(one for one in candidates if one.entry.kind == "finetuned")
    aligned = [_align(one, reference, with_task, problems) for one in candidates]
    if problems:
        raise RefusedError(*problems)
    tallies = {stream: [Tally.model_validate(row) for row in rows] for stream, rows in first["tallies"].items()}
    task = EvaluatedTask.model_validate(first["task"])
    return Evaluations(task, first["data"], aligned, next(iter(likelihoods)), tallies)


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / "evaluation.json", "an evaluation made by mixtune")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RefusedError(f"{folder}: evaluation.json is not of the format {FORMAT}, so it is not an evaluation")
    missing = [name for name in ("task", "candidates", "data", "tallies", "likelihood") if name not in manifest]
    if not missing and "text_digest" not in manifest["data"].get("pretrain", {}).get("splits", {}).get("test", {}):
        missing = ["text_digest"]
    if not missing and manifest["candidates"] and not manifest["likelihood"]:
        missing = ["likelihood"]
    if missing:
        raise RefusedError(f"{folder}: evaluation.json has no {', '.join(missing)}; evaluate again")
    return manifest


def _candidate(folder: Path, entry: Entry, embedded: bool) -> Candidate:
    own = folder / entry.id
    curve, harness, divergence = own / "training.jsonl", own / HARNESS_FILE, own / KL_FILE
    return Candidate(
        entry=entry,
        splits={split: _measurements(own, split, embedded, entry) for split in SPLITS},
        curve=list(read_jsonl(curve)) if curve.is_file() else [],
        harness=[Measure.model_validate(row) for row in read_jsonl(harness)] if harness.is_file() else [],
        divergence=list(read_jsonl(divergence)) if divergence.is_file() else [],
    )


def _measurements(folder: Path, split: str, embedded: bool, entry: Entry) -> Measurements:
    documents = list(read_jsonl(folder / f"{split}.documents.jsonl"))
    examples, trivial = folder / f"{split}.examples.jsonl", folder / f"{split}.trivial.jsonl"
    return Measurements(
        documents=[row["id"] for row in documents],
        nats=np.array([math.nan if row["nats"] is None else row["nats"] for row in documents], np.float64),
        tokens=np.array([row["tokens"] for row in documents], np.float64),
        num_bytes=np.array([row["bytes"] for row in documents], np.float64),
        examples=list(read_jsonl(examples)) if examples.is_file() else None,
        sources=[source_of(row.get("source"), embedded) for row in documents],
        groups=clusters([row.get(GROUP) for row in documents]),
        trivial=list(read_jsonl(trivial)) if trivial.is_file() else None,
        trivial_name=(entry.splits.get(split, {}).get("trivial") or {}).get("name", ""),
    )


def _place(one: Candidate) -> tuple[int, float, float, str]:
    """Returns the sort key: by kind; mixed candidates by λ, configured or else realised; interpolated candidates by α."""
    entry = one.entry
    weight = entry.mix_weight if entry.mix_weight is not None else entry.realised_mix_weight
    return KINDS.index(entry.kind), weight or 0.0, entry.alpha or 0.0, one.id


def _not_once(candidates: list[Candidate]) -> list[str]:
    names = [one.id for one in candidates]
    problems = [
        f"{name}: was evaluated {names.count(name)} times" for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    for kind in ("pretrained", "finetuned"):
        count = sum(one.entry.kind == kind for one in candidates)
        if count != 1:
            problems.append(f"one candidate of the kind {kind} is needed to compare with, found {count}")
    return problems


def _refuse_not_finite(found: Any) -> None:
    named = [
        f"{one['candidate']}: the loss of {one['what']} {one['id']} ({one['split']}) is not finite" for one in found
    ]
    if named:
        raise MixtuneError(*named)


def _nothing_there(reference: Candidate, split: str) -> list[str]:
    measured = reference.splits[split]
    if not measured.documents:
        return [f"the split {split} of the pretraining stream holds no documents, so forgetting cannot be measured"]
    if measured.num_bytes.sum() <= 0:
        return [f"the documents of the split {split} of the pretraining stream hold no text"]
    return []


def _align(one: Candidate, documents_of: Candidate, examples_of: Candidate, problems: list[str]) -> Candidate:
    """Returns the candidate with documents and examples in the reference's order. Reports what cannot be paired."""
    splits = {}
    for split, measured in one.splits.items():
        truth = documents_of.splits[split]
        order = _order(
            f"{one.id}: on {split}", "documents", measured.documents, truth.documents, documents_of.id, problems
        )
        if order is None:
            continue
        num_bytes = measured.num_bytes[order]
        other = [truth.documents[i] for i in np.flatnonzero(num_bytes != truth.num_bytes)]
        if other:
            problems.append(f"{one.id}: on {split}, {_some(other)} differ in length from those of {documents_of.id}")
        examples = measured.examples
        wanted = examples_of.splits[split].examples
        if not wanted:
            if one is examples_of:
                problems.append(f"{one.id}: the split {split} of the fine-tuning stream holds no scored examples")
            examples = None
        elif examples is not None:
            ids, wanted_ids = [row["id"] for row in examples], [row["id"] for row in wanted]
            places = _order(f"{one.id}: on {split}", "examples", ids, wanted_ids, examples_of.id, problems)
            examples = [examples[place] for place in places] if places is not None else None
        splits[split] = replace(
            measured,
            documents=truth.documents,
            nats=measured.nats[order],
            tokens=measured.tokens[order],
            num_bytes=num_bytes,
            examples=examples,
            sources=truth.sources,
            groups=truth.groups,
        )
    return replace(one, splits=splits)


def _order(
    who: str, what: str, ids: list[str], wanted: list[str], reference: str, problems: list[str]
) -> list[int] | None:
    """Returns the index of each wanted id in `ids`. If the ids differ, reports a problem and returns None."""
    if ids == wanted:
        return list(range(len(ids)))
    there, asked = set(ids), set(wanted)
    missing = [name for name in wanted if name not in there]
    new = [name for name in ids if name not in asked]
    if missing or new or len(ids) != len(wanted):
        parts = [f"{_some(missing)} missing"] if missing else []
        parts += [f"{_some(new)} not measured there"] if new else []
        parts = parts or [f"{len(ids)} {what} instead of {len(wanted)}"]
        problems.append(f"{who}, other {what} were measured than for {reference}: {'; '.join(parts)}")
        return None
    place = {name: number for number, name in enumerate(ids)}
    return [place[name] for name in wanted]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN_IDS])
    return shown if len(names) <= SHOWN_IDS else f"{shown} and {len(names) - SHOWN_IDS} more"
