"""KL(pretrained ‖ candidate) on the task's inputs: its values, and whether it ranks the candidates as their forgetting does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..shared.metrics import spearman
from .evaluations import Candidate
from .statistics import Bootstrap

LEAST_CANDIDATES = 4
"""Candidates that a rank correlation needs."""


def kl_from_pretrained(one: Candidate, draw: Bootstrap) -> dict[str, float] | None:
    """Returns Σ KL / Σ tokens over the inputs that were read, in nats per token, with its interval; None if not measured."""
    nats, tokens = (np.array([row[name] for row in one.divergence], np.float64) for name in ("nats", "tokens"))
    return draw.per_token(nats, tokens).to_json() if len(tokens) else None


def summary(candidates: Sequence[Candidate], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns what was read, and the rank correlation of the divergence with forgetting; None if nothing was measured.

    Args:
        rows: the candidates in report.json.
    """
    read = next((one.divergence for one in candidates if one.divergence), None)
    if read is None:
        return None
    pairs = [
        (row["kl_from_pretrained"]["value"], row["delta_bpb"]["value"])
        for row in rows
        if row["kl_from_pretrained"] is not None
    ]
    found = None
    if len(pairs) >= LEAST_CANDIDATES:
        divergences, forgetting = (np.array(values) for values in zip(*pairs, strict=True))
        found = float(spearman(divergences, forgetting)(np.ones((1, len(pairs))))[0])
    return {
        "unit": "nats per token",
        "split": "dev",
        "examples": len(read),
        "tokens": int(sum(row["tokens"] for row in read)),
        "candidates": len(pairs),
        "rank_correlation": found,
    }


def sentence(found: Mapping[str, Any]) -> str:
    """Says what was read and how the divergence ranks the candidates."""
    text = (
        f"KL(pretrained ‖ candidate) at {found['tokens']:,} tokens of the inputs of {found['examples']:,} dev examples, in "
        f"{found['unit']}; no pretraining text is needed to measure it."
    )
    if found["rank_correlation"] is None:
        return text
    return (
        f"{text} Over the {found['candidates']} candidates, its rank correlation (Spearman) with forgetting is "
        f"{found['rank_correlation']:+.2f}."
    )
