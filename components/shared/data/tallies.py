"""Counts what is lost or changed on the way from a source to the model.

One table for all of it, from which come the lines of a step's log, the tables of the reports, and the warnings of the command.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .source_names import source_of

Part = Literal["source", "dev_source", "test_source", "train", "control", "dev", "test"]
"""Where something was counted: in a source option, before the splits exist, or in a split."""

SHOWN_SOURCES = 12
LEAST_UNITS = 100
"""A source with fewer units is not judged alone: one unit would be a share of more than 1 %."""


@dataclass(frozen=True)
class TallyKind:
    """One kind of tally.

    Attributes:
        unit: what is counted.
        words: predicate of the sentence "3 of 60 UNIT WORDS".
        advice: what to do.
        warn_from: share from which it is a warning; None if it never is.
        refuse_from: share of a part from which the data is refused; None if it never is.
        by_source: whether the share in one source alone can be a warning.
    """

    unit: str
    words: str
    advice: str = ""
    warn_from: float | None = 0.01
    refuse_from: float | None = None
    by_source: bool = False


_OTHER_TOKENIZER = "use a base model whose tokenizer knows this text"

KINDS: dict[str, TallyKind] = {
    "several_lines": TallyKind("records", "span several lines of their file", warn_from=None),
    "swallowed_lines": TallyKind(
        "lines", "stand in quotes and look like records of their own", "close the quotes, or double those that are text"
    ),
    "quoted_like": TallyKind(
        "records", "have a field in quotes with doubled quotes inside, which are kept as they are", "set tsv_quotes"
    ),
    "filtered": TallyKind("records", "do not meet the conditions of filter, and are not read", warn_from=None),
    "quarantined": TallyKind(
        "records",
        "are invalid and left out; quarantine.jsonl has them with the reasons",
        "correct them",
        warn_from=0.0,
    ),
    "too_short": TallyKind("records", "are left out as too short", warn_from=None),
    "too_long": TallyKind("records", "are left out as too long", warn_from=None),
    "repetitive": TallyKind("records", "are left out, since they repeat themselves", warn_from=None),
    "duplicates": TallyKind("records", "are removed as duplicates of earlier ones"),
    "contradictory": TallyKind(
        "records",
        "have another label, number or answer than an earlier one with the same text, and are removed",
        "correct them in the source",
    ),
    "held_out_too": TallyKind("records", "are removed, since they stand in held-out data too"),
    "near_duplicates": TallyKind("records", "are removed as near-duplicates of others", warn_from=None),
    "case_labels": TallyKind(
        "examples",
        "have a label that differs from another in case alone",
        "write it alike if it is one label",
        warn_from=0.0,
    ),
    "far_numbers": TallyKind(
        "examples",
        "have a number on a scale that a head learns slowly",
        "write (number - mean) / standard deviation into the column, and convert predictions back",
        warn_from=0.0,
    ),
    "unknown_tokens": TallyKind(
        "tokens", "are unknown to the tokenizer", _OTHER_TOKENIZER, refuse_from=0.5, by_source=True
    ),
    "lost_characters": TallyKind(
        "characters", "do not come back from their tokens", _OTHER_TOKENIZER, refuse_from=0.5, by_source=True
    ),
    "many_tokens": TallyKind(
        "texts",
        "have fewer than 2 bytes per token, as in a language that the tokenizer does not know",
        "they take more time and memory; a base model whose tokenizer knows the language, or a larger model.vocabulary_size, "
        "needs fewer tokens",
        warn_from=0.1,
        by_source=True,
    ),
    "changed_references": TallyKind(
        "examples",
        "have a completion that the tokenizer changes, so that answers are compared with other text",
        "write completions in characters and case that the tokenizer keeps",
    ),
    "dropped": TallyKind(
        "examples",
        "are dropped, since they do not fit into model.max_length",
        "raise model.max_length",
    ),
    "shortened": TallyKind("examples", "are cut to model.max_length", "raise model.max_length"),
    "cut_completions": TallyKind(
        "examples", "have a completion that is cut to model.max_length", "raise model.max_length"
    ),
    "unanswered": TallyKind(
        "examples", "end with messages after the last turn of the assistant, which are left out", warn_from=None
    ),
    "hidden_messages": TallyKind(
        "examples",
        "have a message of the system or the user that the chat template leaves out or changes",
        "give a template that writes it in model.chat_template",
        warn_from=0.0,
    ),
    "hidden_reasoning": TallyKind(
        "examples",
        "have reasoning in their last turn that the chat template leaves out",
        "give a template that writes it in model.chat_template",
    ),
    "answers_in_no_window": TallyKind(
        "examples", "have an answer that no window of model.max_length tokens holds whole", "raise model.max_length"
    ),
    "long_references": TallyKind(
        "examples",
        "have a reference longer than evaluate.max_new_tokens, which no answer can equal",
        "raise evaluate.max_new_tokens",
    ),
}


class Tally(BaseModel):
    """One row of the table.

    Attributes:
        kind: key of `KINDS`.
        source: file, data set or package; None for all sources of the part together.
        count: affected units.
        of: all units.
        detail: further words, such as the place of an example.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    part: Part
    source: str | None = None
    count: int
    of: int
    detail: str = ""

    @property
    def share(self) -> float:
        """Returns the affected share."""
        return self.count / self.of if self.of else 0.0

    @property
    def words(self) -> str:
        """Returns the count, the total and the share."""
        return f"{self.count:,} of {self.of:,} {KINDS[self.kind].unit} ({percentage(self.share)})"

    def is_warning(self) -> bool:
        """Tells whether the share is so large that users are warned."""
        kind = KINDS[self.kind]
        least = kind.warn_from
        return (
            least is not None
            and self.count > 0
            and self.share >= least
            and (self.source is None or (kind.by_source and self.of >= LEAST_UNITS))
        )


class Tallies:
    """Collects counts of one stream.

    Args:
        embedded: whether the text is the embedded one, see `source_of`.
    """

    def __init__(self, embedded: bool = False) -> None:
        self._embedded = embedded
        self._counts: dict[tuple[str, Part], Counter[str]] = {}
        self._totals: dict[tuple[str, Part], Counter[str]] = {}
        self._details: dict[tuple[str, Part], str] = {}

    def add(self, kind: str, part: Part, where: str, count: int, of: int = 1, detail: str = "") -> None:
        """Adds `of` units of a source, of which `count` are affected.

        Args:
            where: the source, with or without line or row.
            detail: further words; the last ones are kept.
        """
        source = source_of(where, self._embedded)
        self._counts.setdefault((kind, part), Counter())[source] += int(count)
        self._totals.setdefault((kind, part), Counter())[source] += of
        if detail:
            self._details[kind, part] = detail

    def merge(self, other: Tallies) -> None:
        """Adds the counts of another collection of the same stream."""
        for mine, theirs in ((self._counts, other._counts), (self._totals, other._totals)):
            for key, counts in theirs.items():
                mine.setdefault(key, Counter()).update(counts)
        self._details |= other._details

    def to_json(self) -> list[Any]:
        """Returns all counts as a value for JSON."""
        return [
            [kind, part, dict(self._counts[kind, part]), dict(totals), self._details.get((kind, part), "")]
            for (kind, part), totals in self._totals.items()
        ]

    @classmethod
    def from_json(cls, value: Iterable[Any], embedded: bool = False) -> Tallies:
        """Returns the collection that `to_json` described."""
        tallies = cls(embedded)
        for kind, part, counts, totals, detail in value:
            tallies._counts[kind, part], tallies._totals[kind, part] = Counter(counts), Counter(totals)
            if detail:
                tallies._details[kind, part] = detail
        return tallies

    def table(self) -> list[Tally]:
        """Returns a row for each kind and part, and below it the sources that are affected most, if there are several."""
        order = list(KINDS)
        rows: list[Tally] = []
        for kind, part in sorted(self._counts, key=lambda key: order.index(key[0])):
            counts, totals = self._counts[kind, part], self._totals[kind, part]
            detail = self._details.get((kind, part), "")
            rows.append(Tally(kind=kind, part=part, count=counts.total(), of=totals.total(), detail=detail))
            if len(totals) > 1:
                rows += [
                    Tally(kind=kind, part=part, source=source, count=count, of=totals[source])
                    for source, count in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:SHOWN_SOURCES]
                    if count
                ]
        return rows


def log_lines(rows: Iterable[Tally], stream: str) -> list[str]:
    """Returns a sentence for each kind of which something was found."""
    return [_sentence(found, stream) for found in by_kind(rows) if any(row.count for row in found)]


def warnings(rows: Iterable[Tally], stream: str) -> list[str]:
    """Returns a sentence for each kind of which so much was found that users are warned."""
    return [_sentence(found, stream) for found in by_kind(rows) if any(row.is_warning() for row in found)]


@dataclass(frozen=True)
class TallyLine:
    """One line of a table for people.

    Attributes:
        what: unit and words of the kind; empty in the lines below its first one.
        where: part and source; empty for all together.
        marked: whether it is a warning.
    """

    what: str
    where: str
    tally: Tally
    marked: bool

    @property
    def share(self) -> str:
        """Returns the share in percent."""
        return percentage(self.tally.share)


def table_lines(rows: Iterable[Tally], found_only: bool = False) -> list[TallyLine]:
    """Returns for each kind a line of all together, and lines for the parts and sources in which something was found.

    Args:
        found_only: whether to leave out kinds of which nothing was found.
    """
    lines: list[TallyLine] = []
    for inside in by_kind(rows):
        kind, together = KINDS[inside[0].kind], whole(inside)
        if found_only and not together.count:
            continue
        details = "; ".join(dict.fromkeys(row.detail for row in inside if row.detail and row.count))
        what = f"{kind.unit} that {kind.words}{f' ({details})' if details else ''}"
        marked = any(row.is_warning() for row in inside)
        lines.append(TallyLine(what, "", together, marked))
        several = len({row.part for row in inside}) > 1
        for row in inside:
            where = " · ".join(name for name in (row.part if several else None, row.source) if name)
            if row.count and where:
                lines.append(TallyLine("", where, row, row.is_warning()))
    return lines


def refusals(rows: Iterable[Tally], stream: str) -> list[str]:
    """Returns a sentence for each kind of which so much was found in a part that the data is of no use."""
    return [
        f"{_sentence(found, stream)}; from {percentage(limit)} on this is refused"
        for found in by_kind(rows)
        if (limit := KINDS[found[0].kind].refuse_from) is not None
        and any(row.source is None and row.count and row.share >= limit for row in found)
    ]


def by_kind(rows: Iterable[Tally]) -> list[list[Tally]]:
    """Groups the rows of a table by kind."""
    found: dict[str, list[Tally]] = {}
    for row in rows:
        found.setdefault(row.kind, []).append(row)
    return list(found.values())


def whole(rows: Sequence[Tally]) -> Tally:
    """Adds up the parts of one kind."""
    parts = [row for row in rows if row.source is None]
    return parts[0].model_copy(update={"count": sum(r.count for r in parts), "of": sum(r.of for r in parts)})


def percentage(share: float) -> str:
    """Formats a share; small ones with one digit more."""
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def _sentence(rows: Sequence[Tally], stream: str) -> str:
    """Describes one kind: all parts together, then each, and the source with the largest share if that is much larger."""
    kind, together = KINDS[rows[0].kind], whole(rows)
    parts = [row for row in rows if row.source is None]
    notes = [f"{row.part} {row.count:,} of {row.of:,}" for row in parts] if len(parts) > 1 else []
    sources = [row for row in rows if row.source is not None and row.of >= LEAST_UNITS]
    worst = max(sources, key=lambda row: row.share, default=None)
    if worst is not None and worst.share > 2 * together.share:
        notes.append(f"most in {worst.source}, {worst.count:,} of {worst.of:,}")
    notes += dict.fromkeys(row.detail for row in parts if row.detail and row.count)
    inside = f" ({'; '.join(notes)})" if notes else ""
    advice = f"; {kind.advice}" if kind.advice else ""
    return f"data.{stream}: {together.words} {kind.words}{inside}{advice}"
