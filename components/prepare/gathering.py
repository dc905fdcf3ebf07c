"""Creates the three splits of a stream from its sources: reads, removes duplicates, splits, and checks the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.config import EMBEDDED
from ..shared.data.prepared import Split
from ..shared.data.problems import Problems
from ..shared.data.tallies import Part, Tallies, warnings
from .config import FinetuneData, PretrainData
from .near_duplicates import near_duplicates
from .reading import Portion, PortionRead, join, read_portion
from .rows import Gathered, Item, Rows
from .splitting import DEV, TEST, TRAIN, HeldOut, cut, draw, first_of_each, numbers_of, shuffled
from .target_checks import check_targets
from .text_filters import REASONS

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
MAX_CONTROL_DOCUMENTS = 1000
"""More do not make the measured forgetting of a training noticeably more precise."""
FOLDED = "case and white space aside; duplicates: exact keeps those that differ in them"
REMOVED = (*REASONS, "duplicates", "contradictory", "held_out_too", "near_duplicates")
"""Kinds of tallies of removed rows, which can be the cause of a problem with the labels or the splits."""
OPTIONS: tuple[Part, ...] = ("test_source", "dev_source", "source")
"""Options of the sources, in the order in which they keep a text that stands in several."""


def gather(
    stream: PretrainData | FinetuneData,
    seed: int,
    problems: Problems,
    folder: Path,
    portions: Sequence[PortionRead] = (),
) -> Gathered:
    """Reads all sources of a stream, unless others have, removes duplicates and creates the splits.

    A text in several sources is kept in the split where it is evaluated: test before dev, dev before train.

    Args:
        stream: configuration of the stream.
        seed: seed of the splits and of `max_documents`.
        problems: collects all problems. The result is only valid if there are none.
        folder: folder for the rows that are read here.
        portions: the portions of the stream, if others have read them.
    """
    tallies = Tallies(embedded=stream.source == EMBEDDED)
    portions = portions or [read_portion(stream, Portion.whole(stream), folder / "portion")]
    rows, by_option = join(stream, portions, problems, tallies)
    notes: dict[str, Any] = {"read": len(rows)}
    if all(map(len, by_option.values())):
        by_option["source"] = _filter(stream, rows, by_option["source"], tallies, problems)
    if not all(map(len, by_option.values())):
        return Gathered(rows, {name: np.empty(0, np.int64) for name in SPLITS})
    detail = "" if stream.exact_duplicates else FOLDED
    for part, numbers in by_option.items():
        by_option[part] = _unique(rows, part, numbers, tallies, detail)
    _keep_in_one(rows, by_option, tallies)
    if stream.near_duplicates is not None:
        _remove_near_duplicates(rows, by_option, stream.near_duplicates, tallies)

    before = len(problems)
    numbers = by_option["source"]
    if stream.max_documents is not None and len(numbers) > stream.max_documents:
        notes["not_drawn"] = len(numbers) - stream.max_documents
        numbers = numbers[draw(rows.keys[numbers], stream.max_documents, seed)]

    splits = _cut(stream, rows, numbers, by_option, seed, problems)
    splits = {name: inside[shuffled(rows.keys[inside], seed)] for name, inside in splits.items()}
    if isinstance(stream, PretrainData):
        splits = _with_control(splits, stream.control_fraction)
    gathered = Gathered(rows, splits, notes=notes, tallies=tallies)
    if isinstance(stream, FinetuneData):
        check_targets(stream, gathered, problems)
    if len(problems) > before:
        name = stream.section.rsplit(".", 1)[-1]
        for sentence in warnings((row for row in tallies.table() if row.kind in REMOVED), name):
            problems.add(sentence)
    return gathered


def removed_items(gathered: Gathered) -> dict[str, list[Item]]:
    """Returns the first of the removed rows, by kind of tally."""
    first = {kind: gathered.rows.affected.get(kind) for kind in REMOVED}
    return {kind: list(gathered.rows.items(np.array(numbers))) for kind, numbers in first.items() if numbers}


def _with_control(splits: dict[Split, np.ndarray], fraction: float) -> dict[Split, np.ndarray]:
    """Takes the control split from the training split. Without enough documents for one there is none."""
    train = splits["train"]  # shuffled, so that every prefix is a random sample
    size = min(int(fraction * len(train)), MAX_CONTROL_DOCUMENTS)
    control: dict[Split, np.ndarray] = {"control": train[:size]} if size else {}
    return {"train": train[size:], **control, "dev": splits["dev"], "test": splits["test"]}


def _filter(
    stream: PretrainData | FinetuneData, rows: Rows, numbers: np.ndarray, tallies: Tallies, problems: Problems
) -> np.ndarray:
    """Removes rows that are too short, too long or repetitive."""
    limits = {"min_characters": "too_short", "max_characters": "too_long", "max_repetition": "repetitive"}
    asked = [option for option in limits if getattr(stream, option) is not None]
    for option in asked:
        kind = limits[option]
        found = rows.reasons[numbers] == REASONS.index(kind) + 1
        rows.tally(tallies, kind, "source", numbers, found, f"{option}: {getattr(stream, option)}")
    kept = numbers[rows.reasons[numbers] == 0]
    if not len(kept):
        problems.add(f"{stream.section}.source: nothing is left by {' and '.join(asked)}; change them")
    return kept


def _unique(rows: Rows, part: Part, numbers: np.ndarray, tallies: Tallies, detail: str) -> np.ndarray:
    """Keeps the first row of each text. A second label for the same text is contradictory, so it is removed too."""
    first = numbers[first_of_each(rows.keys[numbers])]
    rows.tally(tallies, "duplicates", part, numbers, first != numbers, detail)
    rows.tally(tallies, "contradictory", part, numbers, rows.targets[first] != rows.targets[numbers])
    return numbers[first == numbers]


def _keep_in_one(rows: Rows, by_option: dict[Part, np.ndarray], tallies: Tallies) -> None:
    """Removes rows whose text stands in held-out data too."""
    taken = np.empty(0, np.uint64)
    for part in OPTIONS:
        if part in by_option:
            keys = numbers_of(rows.keys[by_option[part]])
            there = np.isin(keys, taken)
            if len(taken):
                rows.tally(tallies, "held_out_too", part, by_option[part], there)
            by_option[part] = by_option[part][~there]
            taken = np.concatenate([taken, keys])


def _remove_near_duplicates(rows: Rows, by_option: dict[Part, np.ndarray], similarity: float, tallies: Tallies) -> None:
    """Removes rows that are near-duplicates of others; those of held-out sources are kept rather than those of `source`."""
    parts = [part for part in OPTIONS if part in by_option]
    numbers = np.concatenate([by_option[part] for part in parts])
    texts = (item.text for item in rows.items(numbers))
    similar_to = np.array([-1 if one is None else one for one in near_duplicates(texts, similarity)], np.int64)
    found = similar_to >= 0
    example = np.flatnonzero(found)[:1]
    detail = ""
    if len(example):
        one, other = rows.items(numbers[[example[0], similar_to[example[0]]]])
        detail = f"such as {one.row.where}, which is like {other.row.where}"
    for part in parts:
        own = np.isin(numbers, by_option[part])
        rows.tally(tallies, "near_duplicates", part, numbers[own], found[own], detail)
        by_option[part] = np.sort(numbers[own & ~found])


def _cut(
    stream: PretrainData | FinetuneData,
    rows: Rows,
    numbers: np.ndarray,
    by_option: dict[Part, np.ndarray],
    seed: int,
    problems: Problems,
) -> dict[Split, np.ndarray]:
    fractions: dict[HeldOut, float] = {}
    if stream.dev_source is None:
        fractions["dev"] = stream.dev_fraction
    if stream.test_source is None:
        fractions["test"] = stream.test_fraction
    none = np.empty(0, np.int64)
    given: dict[Split, np.ndarray] = {"dev": by_option.get("dev_source", none)}
    given["test"] = by_option.get("test_source", none)
    unit, of_unit = _units(rows, numbers)
    groups: list[str] = [""] * len(of_unit)
    for place, group in zip(unit.tolist(), _groups(rows, numbers), strict=True):
        groups[place] = group
    split = cut(rows.keys[of_unit], groups, fractions, seed)
    if split is None:
        names = " and ".join(["train", *(name for name in SPLITS if name in fractions)])
        labelled = ", and each label one in train" if any(groups) else ""
        what = stream.group_column or ("context" if "context" in stream.columns else "prompt")
        shared = f" (different {what}s: a {what} stands in one split)" if len(of_unit) < len(numbers) else ""
        problems.add(
            f"{stream.section}.source: {len(of_unit)} left after removing duplicates{shared}, too few for {names} to get "
            f"one each{labelled}; give more, or name {stream.section}.dev_source and {stream.section}.test_source"
        )
        return {"train": none, **given}
    of_row = split[unit]
    splits: dict[Split, np.ndarray] = {"train": numbers[of_row == TRAIN]}
    for name, number in (("dev", DEV), ("test", TEST)):
        splits[name] = np.concatenate([given[name], numbers[of_row == number]])  # type: ignore[index]
    for name, inside in splits.items():
        if not len(inside):
            problems.add(
                f"{stream.section}: the split {name} is empty after removing what also stands in another; give more"
            )
    return splits


def _units(rows: Rows, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Assigns each of N rows to one of U units that are not divided: those that share a text.

    Returns:
        The unit of each row, (N,), and for each unit the row with the smallest key, (U,).
    """
    _, unit = np.unique(numbers_of(rows.units[numbers]), return_inverse=True)
    if rows.groups is not None:
        unit = _connected(unit, np.unique(numbers_of(rows.groups[numbers]), return_inverse=True)[1])
    order = np.lexsort((numbers_of(rows.keys[numbers]), unit))
    _, first = np.unique(unit[order], return_index=True)
    return unit, numbers[order[first]]


def _connected(units: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Joins units and groups that share a row, directly or through others. Returns the number of each row's part, (N,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = int(units.max(initial=-1)) + int(groups.max(initial=-1)) + 2
    edges = coo_array((np.ones(len(units), bool), (units, groups + int(units.max(initial=-1)) + 1)), shape=(size, size))
    _, part = connected_components(edges, directed=False)
    return np.unique(part[units], return_inverse=True)[1]


def _groups(rows: Rows, numbers: np.ndarray) -> list[str]:
    """Assigns each row to a group for splitting, so that every label has a group, of which one row is kept for training.

    A row's group is its label, or the rarest of its labels. If a label is nowhere the rarest, one row gets its own group.
    """
    counts: Counter[str] = rows.label_counts(numbers)
    of_set = [min(labels, key=lambda label: (counts[label], label), default="") for labels in rows.label_sets]
    groups = [of_set[place] for place in rows.labels[numbers].tolist()]
    for label in sorted(set(counts) - set(groups)):
        having = np.flatnonzero(np.isin(numbers, rows.having(label, numbers)))
        chosen = having[np.argmin(numbers_of(rows.keys[numbers[having]]))]
        groups[chosen] = rows.keys[numbers[chosen]].tobytes().hex()
    return groups
