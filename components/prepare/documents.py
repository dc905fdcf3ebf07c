"""Converts the examples of a split to documents with the tokens and targets of the task, and counts changed examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..shared.config import Task
from ..shared.data.prepared import Document, Split
from ..shared.data.tallies import Tallies
from ..shared.task_kinds import TASK_KINDS, Target
from .gathering import Gathered, Item
from .spans import Question, windows
from .tokenization import Encoder, Survival


def split_documents(
    gathered: Gathered, split: Split, task: Task | None, encoder: Encoder, found_in: list[list[str]] | None
) -> list[Document]:
    """Returns the documents of one split.

    Args:
        gathered: all splits; counts of what is lost are added to its tallies.
        split: the split to convert.
        task: the task; None for the pretraining stream.
        encoder: encoder that tokenises the texts.
        found_in: for each held-out example, the streams whose training text contains its text.
    """
    items = gathered.splits[split]
    records = [_record(item) for item in items]
    for record, streams in zip(records, found_in or [], strict=found_in is not None):
        record |= {"contaminated": bool(streams), "contaminated_by": streams}
    make = _texts if task is None else _MAKERS[TASK_KINDS[task].target]
    return list(make(items, records, encoder, split, gathered))


def _texts(
    items: list[Item],
    records: list[dict[str, Any]],
    encoder: Encoder,
    split: Split,
    gathered: Gathered,
) -> Iterator[Document]:
    ids = encoder.ids([item.text for item in items], split)
    for item, record, tokens in zip(items, records, ids, strict=True):
        _count_survival(gathered.tallies, split, item, encoder.survival(item.text, tokens))
        yield Document(encoder.document(tokens), record)


def _labelled(
    items: list[Item],
    records: list[dict[str, Any]],
    encoder: Encoder,
    split: Split,
    gathered: Gathered,
) -> Iterator[Document]:
    """Yields texts with a label, with labels or with a number."""
    labels = gathered.labels or []
    place = {label: index for index, label in enumerate(labels)}
    ids = encoder.ids([item.text for item in items], split, special=True)
    for item, record, whole in zip(items, records, ids, strict=True):
        _count_survival(gathered.tallies, split, item, encoder.survival(item.text, whole, special=True))
        tokens, cut = encoder.text(item.text, whole)
        gathered.tallies.add("shortened", split, item.row.where, cut)
        if item.row.number is not None:
            record["label"] = item.row.number
            yield Document(tokens, record, targets=[item.row.number])
        elif "label" in item.row.values:
            yield Document(tokens, record, label=place[item.labels[0]])
        else:
            record["labels"] = list(item.labels)
            yield Document(tokens, record, targets=[float(label in item.labels) for label in labels])


def _prompted(
    items: list[Item],
    records: list[dict[str, Any]],
    encoder: Encoder,
    split: Split,
    gathered: Gathered,
) -> Iterator[Document]:
    """Yields prompts with their completions, each followed by one EOS. Examples that do not fit are dropped."""
    for record in records:
        completion = encoder.without_eos(record["completion"])
        record["bytes"] -= len(record["completion"].encode()) - len(completion.encode())
        record["completion"] = completion
    prompts = encoder.ids([item.row.values["prompt"] for item in items], f"{split} prompts", special=True)
    completions = encoder.ids([record["completion"] for record in records], f"{split} completions")
    for item, record, prompt, tokens in zip(items, records, prompts, completions, strict=True):
        _count_survival(
            gathered.tallies, split, item, encoder.survival(item.row.values["prompt"], prompt, special=True)
        )
        _count_survival(gathered.tallies, split, item, encoder.survival(record["completion"], tokens))
        kept = encoder.keeps(record["completion"], tokens)
        gathered.tallies.add("changed_references", split, item.row.where, not kept)
        fitted = encoder.prompted(prompt, tokens)
        gathered.tallies.add("dropped", split, item.row.where, fitted is None)
        if fitted is None:
            continue
        joined, supervised_from, cut = fitted
        gathered.tallies.add("shortened", split, item.row.where, cut)
        yield Document(joined, record, supervised_from=supervised_from)


def _questions(
    items: list[Item],
    records: list[dict[str, Any]],
    encoder: Encoder,
    split: Split,
    gathered: Gathered,
) -> Iterator[Document]:
    """Yields windows over contexts. If a window does not contain the whole first answer, its target is the first token."""
    counts = Counter(examples=0, windows=0, windows_with_answer=0)
    for role in ("question", "context"):
        texts = {item.row.values[role]: item for item in items}  # several questions share a context
        for (text, item), ids in zip(texts.items(), encoder.ids(list(texts), f"{split} {role}s"), strict=True):
            _count_survival(gathered.tallies, split, item, encoder.survival(text, ids))
    asked = []
    for item in items:
        first = item.row.answers[0] if item.row.answers else None
        span = (first.start, first.start + len(first.text)) if first else None
        asked.append(Question(item.row.values["question"], item.row.values["context"], span))
    for item, record, inside in zip(items, records, windows(encoder, asked, split), strict=True):
        gathered.tallies.add("dropped", split, item.row.where, not inside)
        if not inside:
            continue
        having = sum(window.answer is not None for window in inside)
        counts.update(examples=1, windows=len(inside), windows_with_answer=having)
        gathered.tallies.add("answers_in_no_window", split, item.row.where, bool(item.row.answers) and not having)
        question, context = record["question"], record["context"]
        for window in inside:
            low, high = (window.offsets[0][0], window.offsets[-1][1]) if window.offsets else (0, 0)
            extra = {
                "bytes": len(question.encode()) + len(context[low:high].encode()),
                "answers": [answer.text for answer in item.row.answers],
                "context_from": window.context_from,
                "offsets": [list(pair) for pair in window.offsets],
            }
            yield Document(
                window.tokens, record | extra, targets=window.answer or (0, 0), second_from=window.second_from
            )
    for name, count in counts.items():
        gathered.notes.setdefault(name, {})[split] = count


def _count_survival(tallies: Tallies, split: Split, item: Item, found: Survival) -> None:
    tallies.add("unknown_tokens", split, item.row.where, found.unknown, found.tokens)
    tallies.add("lost_characters", split, item.row.where, found.lost, found.characters)


_MAKERS: dict[Target, Callable[..., Iterator[Document]]] = {
    "label": _labelled,
    "labels": _labelled,
    "number": _labelled,
    "answers": _questions,
    "text": _prompted,
}


def _record(item: Item) -> dict[str, Any]:
    values = item.row.values
    size = sum(len(text.encode()) for role, text in values.items() if role != "label")
    return {"id": item.key[:16], "source": item.row.where, "bytes": size, **values}
