"""From a stream's sources to its three splits: reading, removing duplicates, cutting, and all checks on the way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..shared.data import Split
from ..shared.readers import Problems, Row
from ..shared.sources import named_sources, read
from .config import FinetuneData, PretrainData
from .splitting import HeldOut, cut, draw, fold, shuffled

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
SHOWN_LABELS = 5


@dataclass(frozen=True)
class Item:
    """A document or an example.

    Attributes:
        key: digest of its text, case and white space aside; each stands once in a stream.
        row: what was read.
    """

    key: str
    row: Row

    @property
    def label(self) -> str:
        return self.row.values.get("label", "")

    @property
    def text(self) -> str:
        """The text of a document, the text to classify, or prompt and completion."""
        values = self.row.values
        return values["text"] if "text" in values else f"{values['prompt']}\n{values['completion']}"


@dataclass
class Gathered:
    """A stream's splits.

    Attributes:
        splits: its documents or examples, in an order drawn by the seed.
        labels: classification: names of all labels, sorted.
        notes: counts of what was read and removed.
    """

    splits: dict[Split, list[Item]]
    labels: list[str] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def gather(stream: PretrainData | FinetuneData, seed: int, problems: Problems) -> Gathered:
    """Reads all sources of a stream, removes duplicates and cuts the splits.

    What stands in several sources is kept where it is measured: in test before dev, in dev before train.

    Args:
        stream: the stream's configuration.
        seed: of the splits and of `max_documents`.
        problems: receives all that is wrong; the result is of use only where there is nothing.
    """
    counts: Counter[str] = Counter(read=0, duplicates_removed=0)
    by_option: dict[str, list[Item]] = {}
    whole = True
    for option, source in named_sources(stream):
        before = len(problems)
        rows = list(read(source, stream.columns, option, problems))
        if not rows:
            whole = False
            if len(problems) == before:
                problems.add(f"{option}: {source} holds no records")
        counts["read"] += len(rows)
        by_option[option.rsplit(".", 1)[1]] = _unique(rows, counts)
    if not whole:
        return Gathered({name: [] for name in SPLITS})

    taken: set[str] = set()
    for option in ("test_source", "dev_source", "source"):
        if option in by_option:
            kept = [item for item in by_option[option] if item.key not in taken]
            if taken:
                counts[f"also_held_out_removed_from_{option}"] = len(by_option[option]) - len(kept)
            by_option[option] = kept
            taken.update(item.key for item in kept)

    items = by_option["source"]
    if stream.max_documents is not None and len(items) > stream.max_documents:
        drawn = draw([item.key for item in items], stream.max_documents, seed)
        counts["not_drawn"] = len(items) - len(drawn)
        items = [item for item in items if item.key in drawn]

    splits = _cut(stream, items, by_option, seed, problems)
    splits = {name: shuffled(inside, seed, key=lambda item: item.key) for name, inside in splits.items()}
    gathered = Gathered(splits, notes=dict(counts))
    if isinstance(stream, FinetuneData) and stream.task == "classification":
        gathered.labels = _checked_labels(stream, splits, problems)
        gathered.notes["labels"] = {
            name: dict(sorted(Counter(item.label for item in inside).items())) for name, inside in splits.items()
        }
    return gathered


def _unique(rows: list[Row], counts: Counter[str]) -> list[Item]:
    """Keeps the first of each text. One text with two labels says nothing, so the second is removed as well."""
    kept: dict[str, Item] = {}
    for row in rows:
        values = row.values
        key = fold(values["text"]) if "text" in values else fold(values["prompt"], values["completion"])
        first = kept.setdefault(key, Item(key, row))
        if first.row is not row:
            counts["duplicates_removed"] += 1
            if "label" in values:
                counts["contradictory_labels"] += first.label != values["label"]
    return list(kept.values())


def _cut(
    stream: PretrainData | FinetuneData,
    items: list[Item],
    by_option: dict[str, list[Item]],
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
    place = cut([item.key for item in items], [item.label for item in items], fractions, seed)
    if place is None:
        names = " and ".join(["train", *(name for name in SPLITS if name in fractions)])
        labelled = ", and each label one in train" if any(item.label for item in items) else ""
        problems.add(
            f"{stream.section}.source: {len(items)} left after removing duplicates, too few for {names} to get one "
            f"each{labelled}; give more, or name {stream.section}.dev_source and {stream.section}.test_source"
        )
        return splits
    for item in items:
        splits[place[item.key]].append(item)
    for name, inside in splits.items():
        if not inside:
            problems.add(
                f"{stream.section}: the split {name} is empty after removing what also stands in another; give more"
            )
    return splits


def _checked_labels(stream: FinetuneData, splits: dict[Split, list[Item]], problems: Problems) -> list[str]:
    counts = Counter(item.label for inside in splits.values() for item in inside)
    labels = sorted(counts)
    column = f"{stream.section}.label_column ({stream.label_column})"
    if len(labels) == 1:
        problems.add(f"{column}: every example has the label {labels[0]!r}; at least two labels are needed")
    once = {item.label: item.row.where for inside in splits.values() for item in inside if counts[item.label] == 1}
    if once:
        named = [f"{label!r} ({where})" for label, where in sorted(once.items())[:SHOWN_LABELS]]
        more = f" and {len(once) - SHOWN_LABELS} more" if len(once) > SHOWN_LABELS else ""
        problems.add(
            f"{column}: occurring once only: {', '.join(named)}{more}; a label needs at least two examples. "
            "Add some, or remove these"
        )
    trained = {item.label for item in splits["train"]}
    for name in ("dev", "test"):
        unknown = sorted({item.label for item in splits[name]} - trained - set(once))
        if unknown and splits["train"]:
            named = [repr(label) for label in unknown[:SHOWN_LABELS]]
            more = f" and {len(unknown) - SHOWN_LABELS} more" if len(unknown) > SHOWN_LABELS else ""
            problems.add(f"{column}: in {name} but never in train: {', '.join(named)}{more}; add training examples")
    return labels
