"""Converts examples to documents with the tokens and targets of the task, and counts changed examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from ..shared.config import Task
from ..shared.data.prepared import Document, Split
from ..shared.data.tallies import Tallies
from ..shared.task_kinds import TASK_KINDS, Target
from .chats import TOO_LONG, InvalidChatError
from .long_texts import is_long
from .rows import Item, labels_of, texts_of
from .spans import Question, windows
from .tokenization import BATCH, Encoder, Survival

MIN_BYTES_PER_TOKEN = 2
"""Fewer are a sign that the tokenizer does not know the language. GPT-2's has 4.0 in English, 2.5 in German, 1.6 in
Russian, 1.4 in Chinese and 1.2 in Korean (medians of conversations in `chatterbot-corpus`)."""
LEAST_BYTES = 100
ID_CHARACTERS = 16
"""Hexadecimal digits of a document's id."""


@dataclass
class Found:
    """What is counted while examples of a split are converted.

    Attributes:
        split: the split.
        tallies: counts of what was lost or changed.
        counts: question answering: numbers of examples, windows, and windows that contain a whole answer; chats: numbers of
            turns of the assistant that are learned, and of those in a sequence of their own.
        problems: a sentence for each example that cannot be converted, and its content.
    """

    split: Split
    tallies: Tallies
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, Any]] = field(default_factory=list)

    def add(self, kind: str, item: Item, count: int, of: int = 1) -> None:
        """Adds `of` units of an example, of which `count` are affected."""
        self.tallies.add(kind, self.split, item.row.where, count, of)

    def leave_out(self, item: Item, encoder: Encoder, is_too_long: bool) -> bool:
        """Counts an example as left out if it is too long, or collects that as a problem. Returns whether it is left out."""
        if encoder.long_examples != "error":
            self.add("dropped", item, is_too_long)
            return is_too_long
        self.add("quarantined", item, is_too_long)
        if is_too_long:
            self.problems.append((f"{item.row.where}: {TOO_LONG.format(encoder.max_length)}", item.row.values))
        return is_too_long

    def survival(self, item: Item, text: str, found: Survival) -> None:
        """Adds what became of a text of an example."""
        self.add("unknown_tokens", item, found.unknown, found.tokens)
        self.add("lost_characters", item, found.lost, found.characters)
        self.num_tokens(item, text, found.tokens)

    def num_tokens(self, item: Item, text: str, num_tokens: int) -> None:
        """Notes whether a text has many tokens for its length. Short texts, such as names and numbers, do not tell."""
        size = len(text.encode())
        if size >= LEAST_BYTES:
            self.add("many_tokens", item, size < MIN_BYTES_PER_TOKEN * num_tokens)


@dataclass(frozen=True)
class ItemBatch:
    """Examples of one split.

    Attributes:
        items: the examples.
        labels: label names, in the order of their indices.
        found_in: for each held-out example, the streams whose training text contains its text; None if that was not looked for.
    """

    items: list[Item]
    labels: list[str] | None = None
    found_in: Sequence[Sequence[str]] | None = None


def documents_of(batch: ItemBatch, task: Task | None, encoder: Encoder, found: Found) -> list[Document]:
    """Returns the documents of some examples.

    Args:
        batch: the examples.
        task: the task; None for the pretraining stream.
        encoder: encoder that tokenises the texts.
        found: counts of what is lost are added to it.
    """
    records = [_record(item) for item in batch.items]
    for record, streams in zip(records, batch.found_in or [], strict=batch.found_in is not None):
        record |= {"contaminated": bool(streams), "contaminated_by": list(streams)}
    make = _texts if task is None else _MAKERS[TASK_KINDS[task].target]
    documents: list[Document] = []
    for is_chat, pairs in groupby(zip(batch.items, records, strict=True), lambda pair: pair[0].row.chat is not None):
        items, own = map(list, zip(*pairs, strict=True))
        if is_chat:
            documents += _chats(items, own, encoder, found, task is not None)
        else:
            documents += make(replace(batch, items=items), own, encoder, found)
    return documents


def _chats(
    items: Sequence[Item], records: Sequence[dict[str, Any]], encoder: Encoder, found: Found, labelled: bool
) -> Iterator[Document]:
    """Yields chats, and in training behind each those of its turns that are learned on their own."""
    chats = encoder.for_chats(labelled)
    for item, record in zip(items, records, strict=True):
        chat = item.row.chat
        assert chat is not None
        record |= {"messages": chat.messages} | ({"tools": chat.tools} if chat.tools else {})
        try:
            whole, apart = chats.encode(chat)
            message_hidden, reasoning_hidden = chats.hidden(chat)
        except InvalidChatError as problem:
            found.add("quarantined", item, 1)
            found.problems.append((f"{item.row.where}: {problem}", chat.to_json()))
            continue
        found.add("quarantined", item, 0)
        found.add("unanswered", item, len(chat.messages) > chat.last_turn + 1)
        found.add("hidden_messages", item, message_hidden)
        found.add("hidden_reasoning", item, reasoning_hidden)
        found.add("dropped", item, whole is None)
        if whole is None:
            continue
        found.add(_cut_kind(encoder), item, whole.cut)
        made = [whole, *(apart if found.split == "train" else [])]
        unknown = sum(chats.num_unknown(one) for one in made)
        found.add("unknown_tokens", item, unknown, sum(len(one.tokens) for one in made))
        if not whole.cut:
            found.num_tokens(item, item.text, chats.num_text_tokens(whole))
        found.counts.update(turns=sum(one.num_turns for one in made), turns_apart=len(made) - 1)
        for one in made:
            own = record if labelled else record | {"bytes": chats.bytes_of(one)}
            first = one.answer_from if labelled else 1
            yield Document(one.tokens, own, supervised_from=first, supervised=one.supervised)


def _texts(batch: ItemBatch, records: list[dict[str, Any]], encoder: Encoder, found: Found) -> Iterator[Document]:
    for start in range(0, len(records), BATCH):
        items = batch.items[start : start + BATCH]
        ids = iter(encoder.ids([item.text for item in items if not is_long(item.text)]))
        for item, record in zip(items, records[start : start + BATCH], strict=True):
            if is_long(item.text):
                document, survival = encoder.long_document(item.text)
            else:
                tokens = next(ids)
                document, survival = encoder.document(tokens), encoder.survival(item.text, tokens)
            found.survival(item, item.text, survival)
            yield Document(document, record)


def _labelled(batch: ItemBatch, records: list[dict[str, Any]], encoder: Encoder, found: Found) -> Iterator[Document]:
    """Yields texts with a label, with labels or with a number."""
    labels = batch.labels or []
    place = {label: index for index, label in enumerate(labels)}
    ids = encoder.ids([item.text for item in batch.items], special=True)
    for item, record, whole in zip(batch.items, records, ids, strict=True):
        found.survival(item, item.text, encoder.survival(item.text, whole, special=True))
        fitted = encoder.text(item.text, whole)
        if found.leave_out(item, encoder, fitted is None) or fitted is None:
            continue
        tokens, cut = fitted
        found.add("shortened", item, cut)
        own = labels_of(item.row)
        if item.row.number is not None:
            record["label"] = item.row.number
            yield Document(tokens, record, targets=[item.row.number])
        elif "label" in item.row.values:
            yield Document(tokens, record, label=place[own[0]])
        else:
            record["labels"] = list(own)
            yield Document(tokens, record, targets=[float(label in own) for label in labels])


def _prompted(batch: ItemBatch, records: list[dict[str, Any]], encoder: Encoder, found: Found) -> Iterator[Document]:
    """Yields prompts with their completions, each followed by one EOS."""
    for record in records:
        completion = encoder.without_eos(record["completion"])
        record["bytes"] -= len(record["completion"].encode()) - len(completion.encode())
        record["completion"] = completion
    prompts = encoder.ids([item.row.values["prompt"] for item in batch.items], special=True)
    completions = encoder.ids([record["completion"] for record in records])
    for item, record, prompt, tokens in zip(batch.items, records, prompts, completions, strict=True):
        text = item.row.values["prompt"]
        found.survival(item, text, encoder.survival(text, prompt, special=True))
        found.survival(item, record["completion"], encoder.survival(record["completion"], tokens))
        found.add("changed_references", item, not encoder.keeps(record["completion"], tokens))
        fitted = encoder.prompted(prompt, tokens)
        if found.leave_out(item, encoder, fitted is None) or fitted is None:
            continue
        joined, supervised_from, cut = fitted
        found.add(_cut_kind(encoder), item, cut)
        yield Document(joined, record, supervised_from=supervised_from)


def _questions(batch: ItemBatch, records: list[dict[str, Any]], encoder: Encoder, found: Found) -> Iterator[Document]:
    """Yields windows over contexts. If a window does not contain the whole first answer, its target is the first token."""
    for role in ("question", "context"):
        texts = {item.row.values[role]: item for item in batch.items}  # several questions share a context
        for (text, item), ids in zip(texts.items(), encoder.ids(list(texts)), strict=True):
            found.survival(item, text, encoder.survival(text, ids))
    asked = []
    for item in batch.items:
        first = item.row.answers[0] if item.row.answers else None
        span = (first.start, first.start + len(first.text)) if first else None
        asked.append(Question(item.row.values["question"], item.row.values["context"], span))
    for item, record, inside in zip(batch.items, records, windows(encoder, asked), strict=True):
        if found.leave_out(item, encoder, not inside):
            continue
        having = sum(window.answer is not None for window in inside)
        found.counts.update(examples=1, windows=len(inside), windows_with_answer=having)
        found.add("answers_in_no_window", item, bool(item.row.answers) and not having)
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


def _cut_kind(encoder: Encoder) -> str:
    return "cut_completions" if encoder.long_examples == "truncate_completion" else "shortened"


def _record(item: Item) -> dict[str, Any]:
    values = item.row.values
    size = sum(len(text.encode()) for text in texts_of(item.row))
    return {"id": item.key[:ID_CHARACTERS], "source": item.row.where, "bytes": size, **values}
