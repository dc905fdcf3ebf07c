"""Forgetting by source: by file, folder, data set or package of the pretraining text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..shared.value_text import value_text
from .statistics import Bootstrap

SHOWN = 12
"""Maximum number of sources in a table or a figure. With more, the rest are combined."""
WITH_INTERVAL = 100
"""Maximum number of sources, largest first, with an interval. The others have values only."""


@dataclass(frozen=True)
class Source:
    """A source of held-out documents.

    Attributes:
        places: (n,) indices of its documents.
        num_bytes: total bytes of its documents.
    """

    name: str
    places: np.ndarray
    num_bytes: int


def group(names: Sequence[str], num_bytes: np.ndarray) -> list[Source]:
    """Groups (N,) documents by source, sorted by bytes, largest first, then by name.

    More files than tables show are grouped by folder. The folder that all have in common is left out of the names.
    """
    places: dict[str, list[int]] = {}
    for number, name in enumerate(_short(names)):
        places.setdefault(name, []).append(number)
    found = [Source(name, np.array(at), round(float(num_bytes[at].sum()))) for name, at in places.items()]
    return sorted(found, key=lambda one: (-one.num_bytes, one.name))


def _short(names: Sequence[str]) -> Sequence[str]:
    """Returns names of files below the folder that all have in common; of many files, the first folder in it."""
    if not all("/" in name for name in names):
        return names
    folders = [name.split("/")[:-1] for name in names]
    levels = enumerate(zip(*folders, strict=False))
    common = next((depth for depth, level in levels if len(set(level)) > 1), min(map(len, folders)))
    if len(set(names)) <= SHOWN:
        return ["/".join(name.split("/")[common:]) for name in names]
    inside = [folder[common : common + 1] or folder[common - 1 :] for folder in folders]
    return [part[0] for part in inside]


def forgetting_by_source(
    sources: Sequence[Source],
    nats: np.ndarray,
    nats_before: np.ndarray,
    num_bytes: np.ndarray,
    draw: Bootstrap,
    groups: np.ndarray | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Returns the ΔBPB of each source, paired by document, as `Bootstrap.forgetting` computes it for all documents.

    Args:
        sources: result of `group`.
        nats: (N,) loss of each document under the candidate.
        nats_before: (N,) loss of each document under the pretrained model.
        num_bytes: (N,) UTF-8 bytes.
        groups: (N,) number of the group of each document.

    Returns:
        By source `{value, low, high, documents}`, where `low` and `high` are None without an interval: a single document
        cannot be resampled. Also the same for all documents of the sources that tables do not show; None if they show all.
        Sources with 0 bytes of text are left out.
    """

    def measured(places: np.ndarray, with_interval: bool) -> dict[str, Any]:
        rise, size = nats[places] - nats_before[places], num_bytes[places]
        if not with_interval or len(places) == 1:
            value = draw.bits_per_byte(rise.sum(keepdims=True), size.sum(keepdims=True)).value
            return {"value": value, "low": None, "high": None, "documents": len(places)}
        within = None if groups is None else np.unique(groups[places], return_inverse=True)[1]
        return {**draw.bits_per_byte(rise, size, within).to_json(), "documents": len(places)}

    found = {
        one.name: measured(one.places, number < WITH_INTERVAL) for number, one in enumerate(sources) if one.num_bytes
    }
    rest = [one for one in sources[SHOWN - 1 :] if one.num_bytes] if len(sources) > SHOWN else []
    if not rest:
        return found, None
    return found, {**measured(np.concatenate([one.places for one in rest]), True), "sources": len(rest)}


def shown(names: Sequence[str]) -> Sequence[str]:
    """Returns the sources that tables and figures show individually."""
    return names if len(names) <= SHOWN else names[: SHOWN - 1]


def worst(by_source: dict[str, dict[str, Any]]) -> str | None:
    """Returns the source with the most forgetting, preferably one with an interval; None if there is only one source."""
    if len(by_source) < 2:
        return None
    measured = {name: one for name, one in by_source.items() if one["low"] is not None} or by_source
    return max(measured, key=lambda name: measured[name]["value"])


def worst_sentence(candidate: str, by_source: dict[str, dict[str, Any]]) -> str | None:
    """Names the source with the most forgetting of a candidate."""
    name = worst(by_source)
    if name is None:
        return None
    one = by_source[name]
    if one["value"] <= 0:
        return f"{candidate} forgets on none of the {len(by_source)} sources"
    documents = "one document, so without an interval" if one["documents"] == 1 else f"{one['documents']} documents"
    return f"{candidate} forgets most on {name}: {value_text(one, digits=2)} bits per byte ({documents})"
