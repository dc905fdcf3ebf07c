"""Converts rows to token sequences, whatever their splits, and counts what is lost or changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from ..shared.config import Task
from ..shared.task_kinds import TASK_KINDS, Target
from .chats import TOO_LONG, ChatEncoder, InvalidChatError
from .encoded import EncodedDocument, EncodedRow, RowCounts
from .long_texts import is_long
from .rows import Item, num_bytes
from .spans import Question, windows
from .tokenization import BATCH, Encoder


def encode(items: Sequence[Item], task: Task | None, encoder: Encoder) -> list[EncodedRow]:
    """Returns what the tokenizer makes of each row.

    Args:
        items: the rows.
        task: the task; None for the pretraining stream.
        encoder: encoder that tokenises the texts.
    """
    make = _texts if task is None else _MAKERS[TASK_KINDS[task].target]
    rows: list[EncodedRow] = []
    for is_chat, inside in groupby(items, lambda item: item.row.chat is not None):
        own = list(inside)
        rows += _chats(own, encoder, task is not None) if is_chat else make(own, encoder)
    return rows


def _left_out(row: EncodedRow, item: Item, encoder: Encoder, is_too_long: bool) -> bool:
    """Counts an example as left out if it is too long, or notes that as a problem. Returns whether it is left out."""
    if encoder.long_examples != "error":
        row.counts.add("dropped", is_too_long)
        return is_too_long
    row.counts.add("quarantined", is_too_long)
    if is_too_long:
        row.problem = (f"{item.row.where}: {TOO_LONG.format(encoder.max_length)}", item.row.values)
    return is_too_long


def _chats(items: Sequence[Item], encoder: Encoder, labelled: bool) -> Iterator[EncodedRow]:
    """Yields chats, each with those of its turns that are learned on their own."""
    chats = encoder.for_chats(labelled)
    for item in items:
        row = EncodedRow()
        _encode_chat(row, item, chats, _cut_kind(encoder), labelled)
        yield row


def _encode_chat(row: EncodedRow, item: Item, chats: ChatEncoder, cut_kind: str, labelled: bool) -> None:
    chat = item.row.chat
    assert chat is not None
    try:
        whole, apart = chats.encode(chat)
        message_hidden, reasoning_hidden = chats.hidden(chat)
    except InvalidChatError as problem:
        row.counts.add("quarantined", 1)
        row.problem = (f"{item.row.where}: {problem}", chat.to_json())
        return
    row.counts.add("quarantined", 0)
    row.counts.add("unanswered", len(chat.messages) > chat.last_turn + 1)
    row.counts.add("hidden_messages", message_hidden)
    row.counts.add("hidden_reasoning", reasoning_hidden)
    row.counts.add("dropped", whole is None)
    if whole is None:
        return
    row.counts.add(cut_kind, whole.cut)
    if not whole.cut:
        row.counts.num_tokens(item.text, chats.num_text_tokens(whole))
    for one in (whole, *apart):
        document = EncodedDocument(
            one.tokens,
            {} if labelled else {"bytes": chats.bytes_of(one)},
            supervised_from=one.answer_from if labelled else 1,
            supervised=one.supervised,
            is_apart=one is not whole,
            numbers={"turns": one.num_turns, "turns_apart": int(one is not whole)},
        )
        document.counts.add("unknown_tokens", chats.num_unknown(one), len(one.tokens))
        row.documents.append(document)


def _texts(items: Sequence[Item], encoder: Encoder) -> Iterator[EncodedRow]:
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        ids = iter(encoder.ids([item.text for item in batch if not is_long(item.text)]))
        for item in batch:
            if is_long(item.text):
                document, survival = encoder.long_document(item.text)
            else:
                tokens = next(ids)
                document, survival = encoder.document(tokens), encoder.survival(item.text, tokens)
            row = EncodedRow([EncodedDocument(document)])
            row.counts.survival(item.text, survival)
            yield row


def _labelled(items: Sequence[Item], encoder: Encoder) -> Iterator[EncodedRow]:
    """Yields texts with a label, with labels or with a number."""
    ids = encoder.ids([item.text for item in items], special=True)
    for item, whole in zip(items, ids, strict=True):
        row = EncodedRow()
        row.counts.survival(item.text, encoder.survival(item.text, whole, special=True))
        fitted = encoder.text(item.text, whole)
        if not _left_out(row, item, encoder, fitted is None) and fitted is not None:
            tokens, cut = fitted
            row.counts.add("shortened", cut)
            row.documents.append(EncodedDocument(tokens))
        yield row


def _prompted(items: Sequence[Item], encoder: Encoder) -> Iterator[EncodedRow]:
    """Yields prompts with their completions, each followed by one EOS."""
    shorter = [encoder.without_eos(item.row.values["completion"]) for item in items]
    prompts = encoder.ids([item.row.values["prompt"] for item in items], special=True)
    for item, completion, prompt, tokens in zip(items, shorter, prompts, encoder.ids(shorter), strict=True):
        row, text = EncodedRow(), item.row.values["prompt"]
        row.counts.survival(text, encoder.survival(text, prompt, special=True))
        row.counts.survival(completion, encoder.survival(completion, tokens))
        row.counts.add("changed_references", not encoder.keeps(completion, tokens))
        fitted = encoder.prompted(prompt, tokens)
        if not _left_out(row, item, encoder, fitted is None) and fitted is not None:
            joined, supervised_from, cut = fitted
            row.counts.add(_cut_kind(encoder), cut)
            row.documents.append(EncodedDocument(joined, supervised_from=supervised_from))
            if completion != (given := item.row.values["completion"]):
                size = num_bytes(item.row) - len(given.encode()) + len(completion.encode())
                row.documents[0].extra = {"bytes": size, "completion": completion}
        yield row


def _questions(items: Sequence[Item], encoder: Encoder) -> Iterator[EncodedRow]:
    """Yields windows over contexts. If a window does not contain the whole first answer, its target is the first token."""
    rows = [EncodedRow() for _ in items]
    for role in ("question", "context"):
        texts = list(dict.fromkeys(item.row.values[role] for item in items))  # several questions share a context
        counts = {text: RowCounts() for text in texts}
        for (text, own), ids in zip(counts.items(), encoder.ids(texts), strict=True):
            own.survival(text, encoder.survival(text, ids))
        for row, item in zip(rows, items, strict=True):
            row.of_texts[role] = counts[item.row.values[role]]
    asked = []
    for item in items:
        first = item.row.answers[0] if item.row.answers else None
        span = (first.start, first.start + len(first.text)) if first else None
        asked.append(Question(item.row.values["question"], item.row.values["context"], span))
    for row, item, inside in zip(rows, items, windows(encoder, asked), strict=True):
        if not _left_out(row, item, encoder, not inside) and inside:
            having = sum(window.answer is not None for window in inside)
            row.numbers = {"examples": 1, "windows": len(inside), "windows_with_answer": having}
            row.counts.add("answers_in_no_window", bool(item.row.answers) and not having)
            question, context = item.row.values["question"], item.row.values["context"]
            for window in inside:
                low, high = (window.offsets[0][0], window.offsets[-1][1]) if window.offsets else (0, 0)
                extra = {
                    "bytes": len(question.encode()) + len(context[low:high].encode()),
                    "answers": [answer.text for answer in item.row.answers],
                    "context_from": window.context_from,
                    "offsets": [list(pair) for pair in window.offsets],
                }
                row.documents.append(
                    EncodedDocument(
                        window.tokens, extra, targets=list(window.answer or (0, 0)), second_from=window.second_from
                    )
                )
        yield row


_MAKERS: dict[Target, Callable[[Sequence[Item], Encoder], Iterator[EncodedRow]]] = {
    "label": _labelled,
    "labels": _labelled,
    "number": _labelled,
    "answers": _questions,
    "text": _prompted,
}


def _cut_kind(encoder: Encoder) -> str:
    return "cut_completions" if encoder.long_examples == "truncate_completion" else "shortened"
