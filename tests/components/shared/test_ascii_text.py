"""Text for terminals and servers that cannot show or store all characters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.shared.ascii_text import to_ascii

SHOWN = "mixed-λ ← café 中 \udc80"


@given(st.text())
def test_every_text_has_a_form_in_ascii(text: str) -> None:
    assert to_ascii(text).isascii()


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_stays_as_it_is(text: str) -> None:
    assert to_ascii(text) == text


def test_spelling() -> None:
    assert to_ascii("λ = 0.3, α, café, 中") == "lambda = 0.3, alpha, cafe, \\u4e2d"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "mixed-lambda <- cafe \\u4e2d \\udc80"),
        ("latin-1", "mixed-lambda <- café \\u4e2d \\udc80"),
        ("utf-8", "mixed-λ ← café 中 \\udc80"),
    ],
)
def test_output_that_lacks_characters(encoding: str, shown: str) -> None:
    program = f"""
import sys
from mixtune.components.shared.ascii_text import spell_in_output
spell_in_output()
print({SHOWN!r})
print({SHOWN!r}, file=sys.stderr)
"""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert [text.decode(encoding).strip() for text in (done.stdout, done.stderr)] == [shown, shown]


def test_the_command_on_a_latin_1_terminal(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("mixtune")), "check", str(tmp_path / "λ.yaml")]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"lambda.yaml" in done.stderr
    assert b"Traceback" not in done.stderr
