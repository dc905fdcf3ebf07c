"""Creates the three splits of a stream from its sources: reads, removes duplicates, splits, and checks the data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..shared.config import EMBEDDED
from ..shared.data.prepared import Split
from ..shared.data.problems import Problems
from ..shared.data.readers import Reading
from ..shared.data.records import Row
from ..shared.data.sources import named_sources, read
from ..shared.data.tallies import Part, Tallies, warnings
from ..shared.task_kinds import TASK_KINDS, Target
from .config import FinetuneData, PretrainData
from .splitting import HeldOut, cut, draw, exact, fold, shuffled

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
MAX_CONTROL_DOCUMENTS = 1000
"""More do not make the measured forgetting of a training noticeably more precise."""
FOLDED = "case and white space aside; duplicates: exact keeps those that differ in them"
REMOVED = ("duplicates", "contradictory", "held_out_too")
"""Kinds of tallies that can be the cause of a problem with the labels or the splits."""
OPTIONS: tuple[Part, ...] = ("test_source", "dev_source", "source")
"""Options of the sources, in the order in which they keep a text that stands in several."""
SHOWN_LABELS = 5
_WHOLE_NUMBER = re.compile("[+-]?[0-9]{1,18}")


@dataclass(frozen=True)
class Item:
    """A document or an example.

    Attributes:
        key: digest of its text, see `duplicates`; unique in a stream.
        row: the row as read.
    """

    key: str
    row: Row

    @property
    def labels(self) -> tuple[str, ...]:
        """Returns its label, or its labels in multi-label."""
        values = self.row.values
        return (values["label"],) if "label" in values else self.row.labels

    @property
    def target(self) -> Any:
        """Returns its target, to be compared with another's."""
        return self.labels, self.row.number, self.row.answers

    @property
    def text(self) -> str:
        """Returns the whole text; of two texts, such as prompt and completion, both."""
        return "\n".join(text for role, text in self.row.values.items() if role != "label")

    @property
    def shared(self) -> str | None:
        """Returns the text that examples share and that must stand in one split: a context or a prompt."""
        return self.row.values.get("context", self.row.values.get("prompt"))


@dataclass
class Gathered:
    """A stream's splits.

    Attributes:
        splits: documents or examples of each split, in an order that depends on the seed.
        labels: classification and multi-label: all label names, in the order of their indices.
        notes: numbers of rows that were read and removed.
        tallies: counts of what was lost or changed.
    """

    splits: dict[Split, list[Item]]
    labels: list[str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    tallies: Tallies = field(default_factory=Tallies)


def gather(stream: PretrainData | FinetuneData, seed: int, problems: Problems) -> Gathered:
    """Reads all sources of a stream, removes duplicates and creates the splits.

    A text in several sources is kept in the split where it is evaluated: test before dev, dev before train.

    Args:
        stream: configuration of the stream.
        seed: seed of the splits and of `max_documents`.
        problems: collects all problems. The result is only valid if there are none.
    """
    counts: Counter[str] = Counter(read=0)
    tallies = Tallies(embedded=stream.source == EMBEDDED)
    by_option: dict[Part, list[Item]] = {}
    whole = True
    for option, source in named_sources(stream):
        before = len(problems)
        reading = Reading(stream.columns, option, stream.tsv_quotes, problems, tallies)
        rows = list(read(source, reading))
        if not rows:
            whole = False
            if len(problems) == before:
                problems.add(f"{option}: {source} holds no records")
        counts["read"] += len(rows)
        by_option[reading.part] = _unique(rows, stream.exact_duplicates, reading)
    if not whole:
        return Gathered({name: [] for name in SPLITS})

    taken: set[str] = set()
    for part in OPTIONS:
        if part in by_option:
            for item in by_option[part] if taken else []:
                tallies.add("held_out_too", part, item.row.where, item.key in taken)
            by_option[part] = [item for item in by_option[part] if item.key not in taken]
            taken.update(item.key for item in by_option[part])

    before = len(problems)
    items = by_option["source"]
    if stream.max_documents is not None and len(items) > stream.max_documents:
        drawn = draw([item.key for item in items], stream.max_documents, seed)
        counts["not_drawn"] = len(items) - len(drawn)
        items = [item for item in items if item.key in drawn]

    splits = _cut(stream, items, by_option, seed, problems)
    splits = {name: shuffled(inside, seed, key=lambda item: item.key) for name, inside in splits.items()}
    if isinstance(stream, PretrainData):
        splits = _with_control(splits, stream.control_fraction)
    gathered = Gathered(splits, notes=dict(counts), tallies=tallies)
    if isinstance(stream, FinetuneData):
        check = _CHECKS[TASK_KINDS[stream.task].target]
        if check is not None:
            check(stream, gathered, problems)
    if len(problems) > before:
        name = stream.section.rsplit(".", 1)[-1]
        for sentence in warnings((row for row in tallies.table() if row.kind in REMOVED), name):
            problems.add(sentence)
    return gathered


def _with_control(splits: dict[Split, list[Item]], fraction: float) -> dict[Split, list[Item]]:
    """Takes the control split from the training split. Without enough documents for one there is none."""
    train = splits["train"]  # shuffled, so that every prefix is a random sample
    size = min(int(fraction * len(train)), MAX_CONTROL_DOCUMENTS)
    control: dict[Split, list[Item]] = {"control": train[:size]} if size else {}
    return {"train": train[size:], **control, "dev": splits["dev"], "test": splits["test"]}


def _unique(rows: list[Row], only_exact: bool, reading: Reading) -> list[Item]:
    """Keeps the first row of each text. A second label for the same text is contradictory, so it is removed too."""
    kept: dict[str, Item] = {}
    digest, detail = (exact, "") if only_exact else (fold, FOLDED)
    for row in rows:
        key = digest(*(text for role, text in row.values.items() if role != "label"))
        item = Item(key, row)
        first = kept.setdefault(key, item)
        reading.tallies.add("duplicates", reading.part, row.where, first is not item, detail=detail)
        reading.tallies.add("contradictory", reading.part, row.where, first.target != item.target)
    return list(kept.values())


def _cut(
    stream: PretrainData | FinetuneData,
    items: list[Item],
    by_option: dict[Part, list[Item]],
    seed: int,
    problems: Problems,
) -> dict[Split, list[Item]]:
    fractions: dict[HeldOut, float] = {}
    if stream.dev_source is None:
        fractions["dev"] = stream.dev_fraction
    if stream.test_source is None:
        fractions["test"] = stream.test_fraction
    splits: dict[Split, list[Item]] = {"train": [], "dev": by_option.get("dev_source", [])}
    splits["test"] = by_option.get("test_source", [])
    unit_of = _units(items)
    units = {unit_of[item.key]: group for item, group in zip(items, _groups(items), strict=True)}
    place = cut(list(units), list(units.values()), fractions, seed)
    if place is None:
        names = " and ".join(["train", *(name for name in SPLITS if name in fractions)])
        labelled = ", and each label one in train" if any(units.values()) else ""
        what = "context" if "context" in stream.columns else "prompt"
        shared = f" (different {what}s: a {what} stands in one split)" if len(units) < len(items) else ""
        problems.add(
            f"{stream.section}.source: {len(units)} left after removing duplicates{shared}, too few for {names} to get "
            f"one each{labelled}; give more, or name {stream.section}.dev_source and {stream.section}.test_source"
        )
        return splits
    for item in items:
        splits[place[unit_of[item.key]]].append(item)
    for name, inside in splits.items():
        if not inside:
            problems.add(
                f"{stream.section}: the split {name} is empty after removing what also stands in another; give more"
            )
    return splits


def _units(items: list[Item]) -> dict[str, str]:
    """Assigns each item, by its key, to a unit that is not divided: the smallest key of those that share a text."""
    smallest: dict[str, str] = {}
    units = {item.key: item.key if item.shared is None else fold(item.shared) for item in items}
    for key, unit in units.items():
        smallest[unit] = min(key, smallest.get(unit, key))
    return {key: smallest[unit] for key, unit in units.items()}


def _groups(items: list[Item]) -> list[str]:
    """Assigns each item to a group for splitting, so that every label has a group, of which one item is kept for training.

    An item's group is its label, or the rarest of its labels. If a label is nowhere the rarest, one item gets its own group.
    """
    counts = Counter(label for item in items for label in item.labels)
    groups = {item.key: min(item.labels, key=lambda label: (counts[label], label), default="") for item in items}
    for label in sorted(set(counts) - set(groups.values())):
        chosen = min(item.key for item in items if label in item.labels)
        groups[chosen] = chosen
    return [groups[item.key] for item in items]


def _check_label(stream: FinetuneData, gathered: Gathered, problems: Problems) -> None:
    _count_labels(stream, gathered, True, problems)


def _check_labels(stream: FinetuneData, gathered: Gathered, problems: Problems) -> None:
    _count_labels(stream, gathered, False, problems)
    gathered.notes["unlabelled"] = {
        name: sum(not item.labels for item in inside) for name, inside in gathered.splits.items()
    }


def _count_labels(stream: FinetuneData, gathered: Gathered, single: bool, problems: Problems) -> None:
    gathered.labels = _checked_labels(_label_column(stream), gathered.splits, single, problems)
    gathered.notes["labels"] = {
        name: dict(sorted(Counter(label for item in inside for label in item.labels).items()))
        for name, inside in gathered.splits.items()
    }
    _count_case_labels(gathered)


def _count_case_labels(gathered: Gathered) -> None:
    """Counts examples with a label that is also spelled in another case, and more often so."""
    counts = Counter(label for inside in gathered.splits.values() for item in inside for label in item.labels)
    spellings: dict[str, list[str]] = {}
    for label in sorted(counts, key=lambda label: (-counts[label], label)):
        spellings.setdefault(label.casefold(), []).append(label)
    rarer = {label for same in spellings.values() for label in same[1:]}
    named = [" and ".join(map(repr, same)) for same in spellings.values() if len(same) > 1]
    more = [f"{len(named) - SHOWN_LABELS} more"] if len(named) > SHOWN_LABELS else []
    detail = ", ".join([*named[:SHOWN_LABELS], *more])
    for split, inside in gathered.splits.items():
        for item in inside:
            found = not rarer.isdisjoint(item.labels)
            gathered.tallies.add("case_labels", split, item.row.where, found, detail=detail)


def _check_numbers(stream: FinetuneData, gathered: Gathered, problems: Problems) -> None:
    splits, notes = gathered.splits, gathered.notes
    numbers = {name: np.array([item.row.number for item in inside], float) for name, inside in splits.items()}
    if splits["train"] and len(np.unique(numbers["train"].astype(np.float32))) == 1:  # float32, as in training
        problems.add(
            f"{_label_column(stream)}: every training example has the number {numbers['train'][0]:g}; at least two numbers are "
            "needed"
        )
    notes["target_mean"] = {name: float(found.mean()) for name, found in numbers.items() if len(found)}
    notes["target_std"] = {name: float(found.std()) for name, found in numbers.items() if len(found)}


def _check_answers(stream: FinetuneData, gathered: Gathered, problems: Problems) -> None:
    train, notes = gathered.splits["train"], gathered.notes
    notes["unanswerable"] = {
        name: sum(not item.row.answers for item in inside) for name, inside in gathered.splits.items()
    }
    if train and notes["unanswerable"]["train"] == len(train):
        problems.add(
            f"{stream.section}.answers_column ({stream.answers_column}): no training example has an answer; add some"
        )


def _label_column(stream: FinetuneData) -> str:
    return f"{stream.section}.label_column ({stream.label_column})"


_CHECKS: dict[Target, Callable[[FinetuneData, Gathered, Problems], None] | None] = {
    "label": _check_label,
    "labels": _check_labels,
    "number": _check_numbers,
    "answers": _check_answers,
    "text": None,
}
"""Functions that report data that makes training or evaluation meaningless, and count the targets."""


def _checked_labels(column: str, splits: dict[Split, list[Item]], single: bool, problems: Problems) -> list[str]:
    """Returns all labels, sorted as text, or as numbers if all are whole numbers.

    Args:
        column: name of the column, for messages.
        single: whether each example has exactly one label.
    """
    counts = Counter(label for inside in splits.values() for item in inside for label in item.labels)
    # Index n of classes 0, 1, ... is then class n, also of more than ten.
    whole_numbers = all(_WHOLE_NUMBER.fullmatch(label) for label in counts)
    labels = sorted(counts, key=lambda label: (int(label) if whole_numbers else 0, label))
    if not labels and any(splits.values()):
        problems.add(f"{column}: no example has any label; at least one label is needed")
    if single and len(labels) == 1:
        problems.add(f"{column}: every example has the label {labels[0]!r}; at least two labels are needed")
    once: dict[str, str] = {}
    if single:
        items = [item for inside in splits.values() for item in inside]
        once = {item.labels[0]: item.row.where for item in items if counts[item.labels[0]] == 1}
    if once:
        named = [f"{label!r} ({where})" for label, where in sorted(once.items())[:SHOWN_LABELS]]
        more = f" and {len(once) - SHOWN_LABELS} more" if len(once) > SHOWN_LABELS else ""
        problems.add(
            f"{column}: occurring once only: {', '.join(named)}{more}; a label needs at least two examples. "
            "Add some, or remove these"
        )
    trained = {label for item in splits["train"] for label in item.labels}
    for name in ("dev", "test"):
        unknown = sorted({label for item in splits[name] for label in item.labels} - trained - set(once))
        if unknown and splits["train"]:
            named = [repr(label) for label in unknown[:SHOWN_LABELS]]
            more = f" and {len(unknown) - SHOWN_LABELS} more" if len(unknown) > SHOWN_LABELS else ""
            problems.add(f"{column}: in {name} but never in train: {', '.join(named)}{more}; add training examples")
    return labels
