"""Texts that are tokenised in pieces, and the memory that they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.prepare import long_texts
from mixtune.components.prepare.contamination import WORDS, contaminated
from mixtune.components.prepare.long_texts import pieces_of
from mixtune.components.prepare.splitting import fold
from mixtune.components.shared.errors import RefusedError
from tests.conftest import sentences

from .prepared import jsonl, prepare_finetune, prepare_pretrain
from .test_chat_pieces import tokenizer
from .test_tokenization import encoder

TEXT = "\n".join(sentences(20)) + "  天气很好，\n\n  我们去散步。" * 5


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 60)


@given(st.text(alphabet="ab \n", max_size=400), st.integers(2, 40))
def test_pieces_join_to_the_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "PIECE_CHARACTERS", size)
        pieces = list(pieces_of(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces) or not text


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("name", ["chatml", "first", "prepend"])
def test_tokens_are_those_of_the_whole_text(name: str) -> None:
    made = encoder(tokenizer(name))
    tokens, survival = made.long_document(TEXT)
    assert len(list(pieces_of(TEXT))) > 8
    whole = made.document(made.ids([TEXT])[0])
    assert made.tokenizer.decode(tokens.tolist()) == made.tokenizer.decode(whole.tolist())
    assert survival.characters == made.survival(TEXT, []).characters
    if name == "chatml":  # its pre-tokenizer splits at line ends; tokens of the others can span them
        assert tokens.tolist() == whole.tolist()
        assert survival == made.survival(TEXT, whole[1:-1].tolist())
    assert abs(len(tokens) - len(whole)) <= 2 * len(list(pieces_of(TEXT)))


def test_long_texts_are_compared_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"w{n}" for n in range(300)]
    held_out = [[" ".join(words[at : at + WORDS])] for at in range(len(words) - WORDS)] + [["w1 w2"], ["a b " * 9]]
    before = contaminated(held_out, [" ".join(words)]), fold(TEXT), fold(f" {TEXT}\t")
    monkeypatch.setattr(long_texts, "PIECE_CHARACTERS", 60)
    assert (contaminated(held_out, [" ".join(words)]), fold(TEXT), fold(f" {TEXT}\t")) == before
    assert before[0].count(False) == 2
    assert before[1] == before[2]


MEASURE = """
import resource, sys
from pathlib import Path
from tests.components.prepare.prepared import prepare_pretrain
prepare_pretrain(Path(sys.argv[1]) / "out", sys.argv[2])
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
# The resource usage of this process itself begins with that of the process that started it.
print(max(int(status["VmHWM"].split()[0]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_for_a_long_line_is_some_times_its_size(tmp_path: Path) -> None:
    """A line of 2 MB stands for one of 200 MB, which would take minutes. Encoded as a whole it needs 300 MB, and 110 so."""
    lines = sentences(1000)
    source = jsonl(
        tmp_path / "a.jsonl", [*({"text": text} for text in lines[:100]), {"text": " ".join(lines * 99)[:2_000_000]}]
    )
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert int(done.stdout.split()[-1]) < 200_000, done.stdout


def test_long_examples_are_refused_before_they_are_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixtune.components.prepare import reading

    monkeypatch.setattr(reading, "MAX_EXAMPLE_CHARACTERS", 5000)
    text = prepare_pretrain(tmp_path / "pt", jsonl(tmp_path / "pt.jsonl", [{"text": one} for one in sentences(60)]))
    rows: list[dict[str, Any]] = [{"text": one, "label": "ab"[n % 2]} for n, one in enumerate(sentences(40))]
    source = jsonl(tmp_path / "a.jsonl", [*rows, {"text": "long " * 2000, "label": "a"}])
    with pytest.raises(RefusedError, match=r"a\.jsonl, line 41: has 0\.0 million characters; an example or a chat can"):
        prepare_finetune(tmp_path / "out", source, text)
    made = prepare_finetune(tmp_path / "out", source, text, on_error="skip")
    assert made.count("quarantined", "source") == 1
