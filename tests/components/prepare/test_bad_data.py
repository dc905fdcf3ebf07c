"""Data in every state: one case for each row of the table in docs/data.md, by the code that reads, removes and splits."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.prepare.chats import ChatEncoder, InvalidChatError
from mixtune.components.prepare.config import FinetuneData
from mixtune.components.prepare.gathering import gather
from mixtune.components.shared.data.chats import Chat
from mixtune.components.shared.data.problems import Problems
from tests.conftest import sentences

from .chat_families import tokenizer_of

DOCS = Path(__file__).parents[3] / "docs" / "data.md"
GOOD = [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(sentences(30))]
PAIRS: dict[str, Any] = {"task": "generation"}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
ELSEWHERE = {
    "a line of 200 MB": "test_long_texts.py: memory with a line of 2 MB; `MAX_EXAMPLE_CHARACTERS`",
    "a completion that is longer than the sequence": "test_long_examples.py",
}
"""Rows that other files test."""


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@dataclass(frozen=True)
class Case:
    """Files of a source, and what comes of them.

    Attributes:
        row: first cell of the row in the documentation.
        content: content of the file, or of each file of a folder.
        problem: part of the sentence that refuses the data; None if nothing is wrong.
        kept: number of examples that are kept.
        name: name of the file.
        options: options of the stream.
        spoil: what happens to the folder of the files after that.
    """

    row: str
    content: bytes | dict[str, bytes]
    problem: str | None = None
    kept: int = len(GOOD)
    name: str = "a.jsonl"
    options: dict[str, Any] = field(default_factory=dict)
    spoil: Callable[[Path], Any] | None = None


WHOLE = lines(*GOOD)
CSV = "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in GOOD)
SCRIPTS = [
    *("🙂👍🏽👩‍👩‍👧 family", "مرحبا بالعالم، كيف الحال؟", "שלום עולם"),
    *("今天天气很好。", "今日は天気がいいですね。", "e\u0301tude"),
]
CASES = [
    Case("a malformed JSON line", WHOLE + b'{"text": "no end\n', "line 31, character 10: is no JSON"),
    Case("a missing column", lines({"text": "a"}), "has no column label; its columns are text"),
    Case("values of mixed types", WHOLE + lines({"text": 5, "label": "a"}), "line 31: text is a number, not text"),
    Case(
        "other columns that differ between files",
        {
            "1.jsonl": lines(*({**row, "meta": {"n": [1]}} for row in GOOD[:15])),
            "2.jsonl": lines(*({**row, "meta": "x"} for row in GOOD[15:])),
        },
    ),
    Case("null", WHOLE + lines({"text": None, "label": "a"}), "line 31: text is empty"),
    Case("NaN", WHOLE + b'{"text": NaN, "label": "a"}\n', "line 31: text is NaN, not text"),
    Case("blank text", WHOLE + lines({"text": " \t\u3000", "label": "a"}), "line 31: text is empty"),
    Case("bytes that are not UTF-8", WHOLE + b'{"text": "\xff", "label": "a"}\n', "line 31: is not UTF-8 (byte 0xff"),
    Case("UTF-16", "".join(map(json.dumps, GOOD)).encode("utf-16"), "is UTF-16; save it as UTF-8"),
    Case("a byte order mark", b"\xef\xbb\xbf" + WHOLE),
    Case("CRLF line ends", WHOLE.replace(b"\n", b"\r\n")),
    Case("NUL bytes", WHOLE + b'{"text": "a\x00b", "label": "a"}\n', "line 31, character 12: is no JSON"),
    Case("NUL as an escape", WHOLE + b'{"text": "a\\u0000b", "label": "a"}\n', kept=31),
    Case("no rows", b"", "holds no records"),
    Case("one row", lines(GOOD[0]), "1 left after removing duplicates, too few"),
    Case("one class", lines(*({**row, "label": "a"} for row in GOOD)), "every example has the label 'a'"),
    Case("a label seen once", lines(*GOOD, {"text": "odd", "label": "c"}), "occurring once only: 'c'"),
    Case("unbalanced quotes in CSV", (CSV + '"open,a\n').encode(), "is no valid CSV", name="a.csv"),
    Case("fewer fields than the header in CSV", (CSV + "alone\n").encode(), "number of fields is 1", name="a.csv"),
    Case("a truncated archive", gzip.compress(WHOLE)[:-20], "cannot be read", name="a.jsonl.gz"),
    Case("a name with the wrong ending", gzip.compress(WHOLE), "is compressed with gzip; its name must end in .gz"),
    Case("a name with an unknown ending", WHOLE, "ends in none of .jsonl", name="a.dat"),
    Case("a missing file", WHOLE, "does not exist", spoil=lambda folder: (folder / "a.jsonl").unlink()),
    Case(
        "a file that vanishes or cannot be read",
        {"1.jsonl": WHOLE},
        "cannot be read",
        spoil=lambda folder: (folder / "2.jsonl").symlink_to(folder / "gone"),
    ),
    Case("a missing completion", lines({"prompt": "a", "completion": ""}), "completion is empty", options=PAIRS),
    Case(
        "an empty turn of the assistant",
        lines({"messages": [USER, {"role": "assistant", "content": ""}]}),
        "messages, message 2, of the assistant, is empty",
        options=PAIRS,
    ),
    Case(
        "emoji, right-to-left text, Chinese, Japanese",
        lines(*GOOD, *({"text": text, "label": "a"} for text in SCRIPTS)),
        kept=30 + len(SCRIPTS),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.row for case in CASES])
def test_what_comes_of_it(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    files = case.content if isinstance(case.content, dict) else {case.name: case.content}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if case.spoil is not None:
        case.spoil(folder)
    source = folder if isinstance(case.content, dict) else folder / case.name
    problems = Problems()
    gathered = gather(FinetuneData(source=str(source), **case.options), 0, problems, tmp_path)
    found = problems.sentences()
    if case.problem is not None:
        assert any(case.problem in sentence for sentence in found), found
        assert all("Traceback" not in sentence and "\n" not in sentence for sentence in found)
        return
    assert found == []
    texts = {item.text for split in gathered.splits.values() for item in gathered.rows.items(split)}
    assert len(texts) == case.kept
    assert set(SCRIPTS) <= texts or case.kept != 30 + len(SCRIPTS)


TEMPLATES = {
    "two messages of the user in a row": ("mistral", [USER, USER, ANSWER], "have to alternate"),
    "a message of the system where the template has none": (
        "gemma",
        [{"role": "system", "content": "Be brief."}, USER, ANSWER],
        "There is no system role",
    ),
}


@pytest.mark.parametrize("row", TEMPLATES)
def test_what_the_template_refuses(row: str) -> None:
    name, messages, problem = TEMPLATES[row]
    with pytest.raises(InvalidChatError, match=f"the chat template refuses the messages .*{problem}"):
        ChatEncoder(tokenizer_of(name), None).encode(Chat(messages, []))


def test_the_documentation_has_a_row_for_each() -> None:
    section = DOCS.read_text(encoding="utf-8").split("## Data in every state")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", section, re.MULTILINE)[1:]  # without the heading
    assert rows == list(dict.fromkeys(rows))
    assert set(rows) == {case.row for case in CASES} | set(TEMPLATES) | set(ELSEWHERE)
