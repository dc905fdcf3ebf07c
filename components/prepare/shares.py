"""Cuts the sources of a stream to the shares of tokens that their weights ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def kept_by_weight(sources: np.ndarray, tokens: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Returns which of N documents are kept so that sources have the shares of their weights, up to one document each.

    The source that is scarcest by its weight is kept whole. Of the others the first documents are kept, at least one of each.

    Args:
        sources: (N,) number of each document's source.
        tokens: (N,) tokens of each document.
        weights: weight of each source.

    Returns:
        Whether each document is kept, (N,).
    """
    there = np.bincount(sources, weights=tokens, minlength=len(weights))
    present = there > 0
    asked = np.asarray(weights, np.float64)
    scale = (there[present] / asked[present]).min(initial=np.inf)
    kept = np.zeros(len(sources), bool)
    for number in np.flatnonzero(present):
        own = np.flatnonzero(sources == number)
        ends = np.cumsum(tokens[own])
        # The document in which the quota ends is kept if more than half of it is inside.
        inside = ends - tokens[own] / 2 <= scale * asked[number]
        inside[0] = True
        kept[own[inside]] = True
    return kept


def shares(
    names: Sequence[str],
    weights: Sequence[float] | None,
    sources: np.ndarray,
    tokens: np.ndarray,
    kept: np.ndarray,
) -> list[dict[str, Any]]:
    """Describes the sources of a split, for the data report.

    Args:
        names: name of each source.
        weights: weight of each source; None if they have none.
        sources: (N,) number of each document's source.
        tokens: (N,) tokens of each document.
        kept: (N,) whether each document is kept.

    Returns:
        For each source its name, the asked share (None without weights), the realised share of the tokens, and the numbers of
        documents and tokens that are kept and left out.
    """
    total = int(tokens[kept].sum()) or 1
    rows = []
    for number, name in enumerate(names):
        own = sources == number
        used, rest = own & kept, own & ~kept
        rows.append(
            {
                "source": name,
                "asked": None if weights is None else weights[number] / sum(weights),
                "share": int(tokens[used].sum()) / total,
                **{"documents": int(used.sum()), "tokens": int(tokens[used].sum())},
                **{"left_out_documents": int(rest.sum()), "left_out_tokens": int(tokens[rest].sum())},
            }
        )
    return rows


def percent(row: Mapping[str, Any], name: str) -> str:
    """Formats a share of a row of `shares`."""
    return "" if row[name] is None else f"{100 * row[name]:.1f} %"
