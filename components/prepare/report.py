"""The data report: one HTML file that needs nothing else, to be looked at before any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..shared.data import DataManifest, Document, Split

SAMPLES = 5
SAMPLE_CHARACTERS = 600


@dataclass(frozen=True)
class Bar:
    """One bar of a chart.

    Attributes:
        share: length, in percent of the longest.
        counts: one number for each column that stands beside it.
    """

    name: str
    share: float
    counts: list[int]


def render(
    manifest: DataManifest, documents: Mapping[Split, Sequence[Document]], decode: Callable[[list[int]], str]
) -> str:
    """The report as HTML.

    Args:
        manifest: a manifest that holds all splits.
        documents: what is in them.
        decode: from token ids to text, to show what the model gets to see.
    """
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    splits = list(documents)
    labels: Mapping[str, Mapping[str, int]] = manifest.notes.get("labels", {})
    return environment.get_template("report.html.j2").render(
        manifest=manifest,
        title=f"{'Pretraining' if manifest.stream == 'pretrain' else 'Fine-tuning'} data",
        unit="documents" if manifest.stream == "pretrain" else "examples",
        splits=splits,
        lengths=_lengths(
            {split: [len(document.tokens) for document in documents[split]] for split in splits},
            longest=None if manifest.stream == "pretrain" else manifest.max_length,
        ),
        labels=_bars({label: [labels[split].get(label, 0) for split in splits] for label in manifest.labels or []}),
        changes=_changes(manifest.notes),
        samples={split: [_sample(item, decode) for item in documents[split][:SAMPLES]] for split in splits},
    )


def _lengths(lengths: Mapping[Split, Sequence[int]], longest: int | None) -> list[Bar]:
    """Histogram of the lengths in tokens: even bins up to `longest`, or bins that double where there is no such end."""
    found = [length for inside in lengths.values() for length in inside]
    if longest is not None:
        edges = sorted({round(longest * part / 8) for part in range(1, 9)})
    else:
        last = max(5, (max(found) - 1).bit_length())
        edges = [2**power for power in range(5, last + 1)]
    bins: dict[str, list[int]] = {}
    low = 1
    for high in edges:
        bins[f"{low:,} to {high:,}"] = [sum(low <= length <= high for length in inside) for inside in lengths.values()]
        low = high + 1
    return _bars(bins)


def _bars(counts: Mapping[str, list[int]]) -> list[Bar]:
    longest = max((sum(row) for row in counts.values()), default=0) or 1
    return [Bar(name, round(100 * sum(row) / longest, 2), row) for name, row in counts.items()]


_PLAIN = {
    "read": "records read",
    "duplicates_removed": "removed: the same text (case and white space aside) stood there before",
    "contradictory_labels": "of these, with another label than the first",
    "also_held_out_removed_from_source": "removed from the training data: also in the held-out data",
    "also_held_out_removed_from_dev_source": "removed from dev: also in test",
    "not_drawn": "left out by max_documents",
    "shortened": "shortened to the longest sequence",
    "dropped": "dropped: the completion alone is too long",
    "contaminated": "contaminated: text that also occurs in training text, marked and kept",
}


def _changes(notes: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, words in _PLAIN.items():
        value = notes.get(name)
        if isinstance(value, Mapping):
            rows.append((words, ", ".join(f"{split} {count:,}" for split, count in value.items())))
        elif value or name in ("read", "duplicates_removed"):
            rows.append((words, f"{value or 0:,}"))
    return rows


def _sample(document: Document, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    record = document.record
    values = [(role, _clipped(record[role])) for role in ("text", "prompt", "completion", "label") if role in record]
    seen = decode([int(token) for token in document.tokens])
    return {
        "source": record["source"],
        "tokens": len(document.tokens),
        "contaminated": record.get("contaminated", False),
        "values": values,
        "seen": _clipped(seen),
    }


def _clipped(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " …"
