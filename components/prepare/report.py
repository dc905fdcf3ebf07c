"""The data report: one self-contained HTML file to inspect the data before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ..shared.data.prepared import DataManifest, Documents, Split
from ..shared.data.tallies import KINDS, table_lines
from ..shared.task_kinds import TASK_KINDS
from .rows import Item
from .shares import percent

SAMPLES = 5
SAMPLE_CHARACTERS = 600
SAMPLE_TOKENS = 4 * SAMPLE_CHARACTERS
"""A character of any language has at most four tokens, each a byte."""
BINS = 10
QUANTILES = {"lowest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "highest": 1.0}
ROLES = ("text", "prompt", "completion", "question", "context", "answers", "label", "labels")
STREAMS = {"finetune": "training examples", "pretrain": "pretraining text"}


@dataclass(frozen=True)
class Bar:
    """One bar of a chart.

    Attributes:
        share: length, in percent of the longest bar.
        counts: one number for each column next to the bar.
    """

    name: str
    share: float
    counts: list[int]


@dataclass(frozen=True)
class SeenPart:
    """A part of a document, decoded.

    Attributes:
        learned: whether the loss covers it.
    """

    text: str
    learned: bool


def render(
    manifest: DataManifest,
    documents: Mapping[Split, Documents],
    decode: Callable[[list[int]], str],
    removed: Mapping[str, Sequence[Item]],
) -> str:
    """Renders the report as HTML.

    Args:
        manifest: manifest with all splits.
        documents: documents of the splits.
        decode: converts token ids to text, to show the model's input.
        removed: the first of the removed records, by kind of tally.
    """
    splits = list(documents)
    numbers: dict[Split, np.ndarray] = {}
    if "target_mean" in manifest.notes:
        numbers = {split: documents[split].targets[:, 0].astype(np.float64) for split in splits}
    return _template().render(
        manifest=manifest,
        title=f"{'Pretraining' if manifest.stream == 'pretrain' else 'Fine-tuning'} data",
        unit=TASK_KINDS[manifest.task].document if manifest.task else "documents",
        splits=splits,
        lengths=_lengths(
            {split: np.diff(documents[split].offsets) for split in splits},
            longest=None if manifest.stream == "pretrain" else manifest.max_length,
        ),
        labels=_labels(manifest, splits),
        numbers=_numbers(numbers) if numbers else [],
        quantiles={split: [f"{value:.4g}" for value in _quantiles(found)] for split, found in numbers.items()},
        quantile_names=list(QUANTILES),
        answers=_answers(manifest.notes, splits) if "windows" in manifest.notes else [],
        shares=_shares(manifest.notes.get("shares", {})),
        changes=_changes(manifest.notes),
        tallies=table_lines(manifest.tallies),
        removed=[
            (KINDS[kind], [(item.row.where, _clipped(item.text)) for item in items]) for kind, items in removed.items()
        ],
        samples={
            split: [_sample(documents[split], *shown, manifest, decode) for shown in _shown(documents[split])]
            for split in splits
        },
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2")


def _labels(manifest: DataManifest, splits: Sequence[Split]) -> list[Bar]:
    """Returns the frequency of each label; in multi-label also the number of examples without a label."""
    counts: Mapping[str, Mapping[str, int]] = manifest.notes.get("labels", {})
    rows = [(label, [counts[split].get(label, 0) for split in splits]) for label in manifest.labels or []]
    if "unlabelled" in manifest.notes:
        rows.append(("(no label)", [manifest.notes["unlabelled"][split] for split in splits]))
    return _bars(rows)


def _numbers(numbers: Mapping[Split, np.ndarray]) -> list[Bar]:
    """Returns a histogram of the target numbers, with even bins."""
    edges = np.histogram_bin_edges(np.concatenate(list(numbers.values())), BINS)
    rows = np.array([np.histogram(inside, edges)[0] for inside in numbers.values()]).T
    names = [f"{low:.4g} to {high:.4g}" for low, high in pairwise(edges)]
    return _bars([(name, row.tolist()) for name, row in zip(names, rows, strict=True)])


def _quantiles(numbers: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(numbers, list(QUANTILES.values()))]


def _answers(notes: Mapping[str, Any], splits: Sequence[Split]) -> list[tuple[str, int, int, str]]:
    """Returns for each split the numbers of examples, of unanswerable ones, and of windows that contain a whole answer."""
    rows: list[tuple[str, int, int, str]] = []
    for split in splits:
        windows, having = notes["windows"][split], notes["windows_with_answer"][split]
        share = f"{having:,} of {windows:,} ({having / windows:.0%})"
        rows.append((split, notes["examples"][split], notes["unanswerable"][split], share))
    return rows


def _lengths(lengths: Mapping[Split, np.ndarray], longest: int | None) -> list[Bar]:
    """Returns a histogram of the lengths in tokens: even bins up to `longest`, or doubling bins if there is no maximum."""
    if longest is not None:
        edges = sorted({round(longest * part / 8) for part in range(1, 9)})
    else:
        most = max(int(inside.max(initial=1)) for inside in lengths.values())
        edges = [2**power for power in range(5, max(5, (most - 1).bit_length()) + 1)]
    bins: dict[str, list[int]] = {}
    low = 1
    for high in edges:
        bins[f"{low:,} to {high:,}"] = [
            int(np.count_nonzero((low <= inside) & (inside <= high))) for inside in lengths.values()
        ]
        low = high + 1
    return _bars(list(bins.items()))


def _bars(rows: Sequence[tuple[str, list[int]]]) -> list[Bar]:
    longest = max((sum(row) for _, row in rows), default=0) or 1
    return [Bar(name, round(100 * sum(row) / longest, 2), row) for name, row in rows]


def _shares(of_splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, str]]:
    """Returns for each source and split its asked and its realised share of the tokens."""
    return [
        {
            "source": row["source"],
            "split": split,
            "asked": percent(row, "asked"),
            "share": percent(row, "share"),
            "tokens": f"{row['tokens']:,}",
            "left_out": f"{row['left_out_tokens']:,} tokens" if row["left_out_tokens"] else "",
        }
        for split, rows in of_splits.items()
        for row in rows
    ]


_PLAIN = {
    "read": "records read",
    "not_drawn": "left out by max_documents",
    "turns": "turns of the assistant that are learned",
    "turns_apart": "of these, in a sequence of their own, since the chat template shows them in another way later",
    "contaminated": "contaminated: text that also occurs in training text, marked and kept",
    "contaminated_by_finetune": "of these, in the training examples of this stream",
    "contaminated_by_pretrain": "of these, in the training text of the pretraining stream",
}


def _changes(notes: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, words in _PLAIN.items():
        value = notes.get(name)
        if isinstance(value, Mapping):
            rows.append((words, ", ".join(f"{split} {count:,}" for split, count in value.items())))
        elif value:
            rows.append((words, f"{value:,}"))
    return rows


def _shown(documents: Documents) -> list[tuple[dict[str, Any], int]]:
    """Returns the records and numbers of the first documents; of several windows over a context, one with the answer."""
    shown: dict[str, tuple[dict[str, Any], int]] = {}
    for number, record in enumerate(documents.iter_records()):
        first = shown.setdefault(record["id"], (record, number))
        if documents.targets[number].any() and not documents.targets[first[1]].any():
            shown[record["id"]] = (record, number)
        if len(shown) > SAMPLES:
            break
    return list(shown.values())[:SAMPLES]


def _sample(
    documents: Documents,
    record: Mapping[str, Any],
    number: int,
    manifest: DataManifest,
    decode: Callable[[list[int]], str],
) -> dict[str, Any]:
    tokens = documents.tokens(number)
    values = [(role, _clipped(_words(record[role]))) for role in ROLES if role in record]
    if "offsets" in record:  # a window over a context
        first, last = (int(place) for place in documents.targets[number])
        words = decode(tokens[first : last + 1].tolist())
        found = f"tokens {first} to {last}: {words}" if last else "none: the first token"
        values.append(("answer in this window", _clipped(found)))
    return {
        "source": record["source"],
        "tokens": len(tokens),
        "contaminated": [STREAMS[stream] for stream in record.get("contaminated_by", [])],
        "values": values,
        "seen": [
            SeenPart(_clipped(decode(tokens[low : min(high, low + SAMPLE_TOKENS)].tolist())), learned)
            for low, high, learned in _parts(documents, number, manifest)
        ],
    }


def _parts(documents: Documents, number: int, manifest: DataManifest) -> list[tuple[int, int, bool]]:
    """Divides a document into what is learned, such as each turn of the assistant, and what is only read.

    Of pretraining text all is learned, and with a task head nothing: both are shown as one part that is not marked.

    Returns:
        First token, end, and whether the part is learned.
    """
    start, end = documents.offsets[number : number + 2].tolist()
    learned = documents.supervised(start, end)
    if learned is None and (manifest.task is None or TASK_KINDS[manifest.task].head is not None):
        return [(0, end - start, False)]
    mask = np.zeros(end - start, bool)
    if learned is None:
        mask[int(documents.supervised_from[number]) :] = True
    else:
        mask[learned] = True
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    return [(low, high, bool(mask[low])) for low, high in pairwise(borders)]


def _words(value: str | float | list[str]) -> str:
    if isinstance(value, list):
        return " · ".join(value) or "(none)"
    return value if isinstance(value, str) else f"{value:g}"


def _clipped(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " …"
