"""Reports targets that make training or evaluation meaningless, and counts them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from ..shared.data.prepared import Split
from ..shared.data.problems import Problems
from ..shared.task_kinds import TASK_KINDS, Target
from .config import FinetuneData
from .rows import Gathered, Rows

SHOWN_LABELS = 5
LARGEST_MEAN = 10.0
"""Mean of the numbers up to which a regression head learns about as fast as with 0."""
SPREADS = (0.1, 10.0)
"""Standard deviations between which it learns about as fast as with 1."""
_WHOLE_NUMBER = re.compile("[+-]?[0-9]{1,18}")


def check_targets(stream: FinetuneData, gathered: Gathered, problems: Problems) -> None:
    """Checks the targets of all splits. Adds the label names and the counts to `gathered`."""
    count_targets(stream, gathered, gathered.splits)
    check = _CHECKS[TASK_KINDS[stream.task].target]
    if check is not None:
        check(stream, gathered, problems)


def count_targets(stream: FinetuneData, gathered: Gathered, splits: Mapping[Split, np.ndarray]) -> None:
    """Notes the targets of some of the rows of each split, for the reports."""
    rows, notes, target = gathered.rows, gathered.notes, TASK_KINDS[stream.task].target
    if target in ("label", "labels"):
        notes["labels"] = {name: dict(sorted(rows.label_counts(inside).items())) for name, inside in splits.items()}
    if target == "labels":
        without = [place for place, labels in enumerate(rows.label_sets) if not labels]
        notes["unlabelled"] = {
            name: int(np.isin(rows.labels[inside], without).sum()) for name, inside in splits.items()
        }
    if target == "number":
        numbers = {name: rows.numbers[inside] for name, inside in splits.items() if len(inside)}
        notes["target_mean"] = {name: float(found.mean()) for name, found in numbers.items()}
        notes["target_std"] = {name: float(found.std()) for name, found in numbers.items()}
    if target == "answers":
        notes["unanswerable"] = {name: int((rows.answers[inside] == 0).sum()) for name, inside in splits.items()}


def lost_labels(stream: FinetuneData, gathered: Gathered) -> list[str]:
    """Returns a sentence if labels have lost all of their training examples since the splits were made."""
    trained = gathered.notes["labels"]["train"] if "labels" in gathered.notes else {}
    lost = [repr(label) for label in gathered.labels or [] if label not in trained]
    more = f" and {len(lost) - SHOWN_LABELS} more" if len(lost) > SHOWN_LABELS else ""
    named = f"{', '.join(lost[:SHOWN_LABELS])}{more}"
    why = "by the weights of the sources or for model.max_length; change these, or give more examples"
    return [f"{_label_column(stream)}: no training example is left of {named}, {why}"] if lost else []


def _check_label(stream: FinetuneData, gathered: Gathered, problems: Problems) -> None:
    _count_labels(stream, gathered, True, problems)


def _check_labels(stream: FinetuneData, gathered: Gathered, problems: Problems) -> None:
    _count_labels(stream, gathered, False, problems)


def _count_labels(stream: FinetuneData, gathered: Gathered, single: bool, problems: Problems) -> None:
    gathered.labels = _checked_labels(_label_column(stream), gathered.rows, gathered.splits, single, problems)
    _count_case_labels(gathered)


def _count_case_labels(gathered: Gathered) -> None:
    """Counts examples with a label that is also spelled in another case, and more often so."""
    rows = gathered.rows
    counts = rows.label_counts(np.concatenate(list(gathered.splits.values())))
    spellings: dict[str, list[str]] = {}
    for label in sorted(counts, key=lambda label: (-counts[label], label)):
        spellings.setdefault(label.casefold(), []).append(label)
    rarer = {label for same in spellings.values() for label in same[1:]}
    named = [" and ".join(map(repr, same)) for same in spellings.values() if len(same) > 1]
    more = [f"{len(named) - SHOWN_LABELS} more"] if len(named) > SHOWN_LABELS else []
    detail = ", ".join([*named[:SHOWN_LABELS], *more])
    with_rarer = [place for place, labels in enumerate(rows.label_sets) if not rarer.isdisjoint(labels)]
    for split, inside in gathered.splits.items():
        found = np.isin(rows.labels[inside], with_rarer)
        rows.tally(gathered.tallies, "case_labels", split, inside, found, detail)


def _check_numbers(stream: FinetuneData, gathered: Gathered, problems: Problems) -> None:
    notes, train = gathered.notes, gathered.splits["train"]
    numbers = gathered.rows.numbers[train]
    if len(train) and len(np.unique(numbers.astype(np.float32))) == 1:  # float32, as in training
        problems.add(
            f"{_label_column(stream)}: every training example has the number {numbers[0]:g}; at least two numbers are needed"
        )
    if len(train):
        mean, spread = notes["target_mean"]["train"], notes["target_std"]["train"]
        detail = f"mean {mean:,.4g}, standard deviation {spread:,.4g}"
        far = np.full(len(train), is_far(mean, spread))
        gathered.rows.tally(gathered.tallies, "far_numbers", "train", train, far, detail)


def is_far(mean: float, spread: float) -> bool:
    """Tells whether numbers are far from a mean of 0 or a standard deviation of 1, so that a head learns them slowly.

    A new head predicts numbers near zero, and the heads of causal models have no bias that could be set to the mean.
    """
    return abs(mean) > LARGEST_MEAN or not SPREADS[0] <= spread <= SPREADS[1]


def _check_answers(stream: FinetuneData, gathered: Gathered, problems: Problems) -> None:
    train, notes = gathered.splits["train"], gathered.notes
    if len(train) and notes["unanswerable"]["train"] == len(train):
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


def _checked_labels(
    column: str, rows: Rows, splits: Mapping[Split, np.ndarray], single: bool, problems: Problems
) -> list[str]:
    """Returns all labels, sorted as text, or as numbers if all are whole numbers.

    Args:
        column: name of the column, for messages.
        single: whether each example has exactly one label.
    """
    everything = np.concatenate(list(splits.values()))
    counts: Counter[str] = rows.label_counts(everything)
    # Index n of classes 0, 1, ... is then class n, also of more than ten.
    whole_numbers = all(_WHOLE_NUMBER.fullmatch(label) for label in counts)
    labels = sorted(counts, key=lambda label: (int(label) if whole_numbers else 0, label))
    if not labels and len(everything):
        problems.add(f"{column}: no example has any label; at least one label is needed")
    if single and len(labels) == 1:
        problems.add(f"{column}: every example has the label {labels[0]!r}; at least two labels are needed")
    once = sorted(label for label, count in counts.items() if count == 1) if single else []
    if once:
        places = np.array([rows.having(label, everything)[0] for label in once[:SHOWN_LABELS]])
        named = [
            f"{label!r} ({item.row.where})" for label, item in zip(once[:SHOWN_LABELS], rows.items(places), strict=True)
        ]
        more = f" and {len(once) - SHOWN_LABELS} more" if len(once) > SHOWN_LABELS else ""
        problems.add(
            f"{column}: occurring once only: {', '.join(named)}{more}; a label needs at least two examples. "
            "Add some, or remove these"
        )
    trained = set(rows.label_counts(splits["train"]))
    for name in ("dev", "test"):
        unknown = sorted(set(rows.label_counts(splits[name])) - trained - set(once))
        if unknown and len(splits["train"]):
            named = [repr(label) for label in unknown[:SHOWN_LABELS]]
            more = f" and {len(unknown) - SHOWN_LABELS} more" if len(unknown) > SHOWN_LABELS else ""
            problems.add(f"{column}: in {name} but never in train: {', '.join(named)}{more}; add training examples")
    return labels
