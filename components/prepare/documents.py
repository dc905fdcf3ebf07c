"""Converts the examples of a split to documents with the tokens and targets of the task, and counts changed examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..shared.config import Task
from ..shared.data.prepared import Document, Split
from ..shared.task_kinds import TASK_KINDS, Target
from .gathering import Gathered, Item
from .spans import Question, windows
from .tokenization import Encoder


def split_documents(
    gathered: Gathered, split: Split, task: Task | None, encoder: Encoder, found_in: list[list[str]] | None
) -> list[Document]:
    """Returns the documents of one split.

    Args:
        gathered: all splits; counts of shortened and dropped examples are added to its notes.
        split: the split to convert.
        task: the task; None for the pretraining stream.
        encoder: encoder that tokenises the texts.
        found_in: for each held-out example, the streams whose training text contains its text.
    """
    items, counts = gathered.splits[split], Counter[str]()
    records = [_record(item) for item in items]
    for record, streams in zip(records, found_in or [], strict=found_in is not None):
        record |= {"contaminated": bool(streams), "contaminated_by": streams}
    make = _texts if task is None else _MAKERS[TASK_KINDS[task].target]
    found = list(make(items, records, encoder, split, gathered.labels or [], counts))
    for name, count in counts.items():
        gathered.notes.setdefault(name, {})[split] = count
    return found


def _texts(
    items: list[Item],
    records: list[dict[str, Any]],
    encoder: Encoder,
    split: Split,
    labels: list[str],
    counts: Counter[str],
) -> Iterator[Document]:
    ids = encoder.ids([item.text for item in items], split)
    for record, tokens in zip(records, ids, strict=True):
        yield Document(encoder.document(tokens), record)


def _labelled(
    items: list[Item],
    records: list[dict[str, Any]],
    encoder: Encoder,
    split: Split,
    labels: list[str],
    counts: Counter[str],
) -> Iterator[Document]:
    """Yields texts with a label, with labels or with a number."""
    counts["shortened"] = 0
    place = {label: index for index, label in enumerate(labels)}
    ids = encoder.ids([item.text for item in items], split, special=True)
    for item, record, whole in zip(items, records, ids, strict=True):
        tokens, cut = encoder.text(item.text, whole)
        counts["shortened"] += cut
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
    labels: list[str],
    counts: Counter[str],
) -> Iterator[Document]:
    """Yields prompts with their completions. Examples that do not fit are dropped."""
    counts.update(shortened=0, dropped=0)
    prompts = encoder.ids([item.row.values["prompt"] for item in items], f"{split} prompts", special=True)
    completions = encoder.ids([item.row.values["completion"] for item in items], f"{split} completions")
    for record, prompt, completion in zip(records, prompts, completions, strict=True):
        fitted = encoder.prompted(prompt, completion)
        if fitted is None:
            counts["dropped"] += 1
            continue
        tokens, supervised_from, cut = fitted
        counts["shortened"] += cut
        yield Document(tokens, record, supervised_from=supervised_from)


def _questions(
    items: list[Item],
    records: list[dict[str, Any]],
    encoder: Encoder,
    split: Split,
    labels: list[str],
    counts: Counter[str],
) -> Iterator[Document]:
    """Yields windows over contexts. If a window does not contain the whole first answer, its target is the first token."""
    counts.update(examples=0, dropped=0, windows=0, windows_with_answer=0, answers_in_no_window=0)
    asked = []
    for item in items:
        first = item.row.answers[0] if item.row.answers else None
        span = (first.start, first.start + len(first.text)) if first else None
        asked.append(Question(item.row.values["question"], item.row.values["context"], span))
    for item, record, inside in zip(items, records, windows(encoder, asked, split), strict=True):
        counts["examples" if inside else "dropped"] += 1
        having = sum(window.answer is not None for window in inside)
        counts.update(windows=len(inside), windows_with_answer=having)
        counts["answers_in_no_window"] += bool(inside and item.row.answers and not having)
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
