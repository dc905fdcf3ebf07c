"""Summaries of one split: sums over its documents, scores of its examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..shared.task_kinds import TASK_KINDS
from .held_out import HeldOut
from .sampling import TextSample
from .scores import calibration_error, confusion_matrix, split_scores


def document_rows(
    texts: Sequence[Mapping[str, Any]], sample: TextSample, nats: np.ndarray, tokens: np.ndarray
) -> list[dict[str, Any]]:
    """Returns rows of <split>.documents.jsonl, one for each drawn document, with the estimated sums over all of it.

    Args:
        texts: rows of all documents of the split, as `HeldOut.text_rows` returns them.
        sample: the units that were read.
        nats: (D,) loss of each unit.
        tokens: (D,) scored tokens of each unit.
    """
    drawn, place = np.unique(sample.document, return_inverse=True)
    sums = [np.bincount(place, values / sample.probability, len(drawn)) for values in (nats, tokens, sample.num_bytes)]
    return [
        {
            **texts[index],
            "bytes": _whole(num_bytes),
            "tokens": _whole(count),
            "nats": float(loss) if math.isfinite(loss) else None,
        }
        for index, loss, count, num_bytes in zip(drawn.tolist(), *(column.tolist() for column in sums), strict=True)
    ]


def _whole(value: float) -> float:
    """Returns a sum without its rounding error, as an integer if it is one."""
    rounded = round(value, 6)
    return int(rounded) if rounded.is_integer() else rounded


def summarize_documents(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns ratios of sums over the documents; None if a loss is not finite."""
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


def summarize_examples(rows: list[dict[str, Any]], held_out: HeldOut, metric: str) -> dict[str, Any]:
    """Returns the scores of the examples; None if a prediction or a loss is not finite."""
    references, predictions = ([row[name] for row in rows] for name in ("reference", "prediction"))
    labels = held_out.labelled.labels or []
    scores = split_scores(held_out.task, rows)
    summary: dict[str, Any] = {"task_score": scores[metric], "examples": len(rows), **scores}
    if TASK_KINDS[held_out.task].target == "label":
        known = None not in predictions
        summary["confusion_matrix"] = confusion_matrix(references, predictions, labels) if known else None
        right = [row["reference"] == row["prediction"] for row in rows]
        summary["calibration_error"] = (
            calibration_error([max(row["probabilities"]) for row in rows], right) if known else None
        )
    if not held_out.with_head:
        nats, tokens = [row["nats"] for row in rows], sum(row["tokens"] for row in rows)
        summary["completion_nats_per_token"] = sum(nats) / tokens if tokens and None not in nats else None
    return summary
