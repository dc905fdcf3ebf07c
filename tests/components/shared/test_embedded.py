"""The embedded data: enough of it, balanced, the same every time, and without the answers in the questions."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections import Counter

import pytest

from mixtune.components.shared.data import embedded
from mixtune.components.shared.errors import RefusedError


@pytest.fixture(scope="module")
def examples() -> list[tuple[str, str, str]]:
    return list(embedded.classification())


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    return list(embedded.texts())


def test_text_is_between_one_and_two_megabytes_and_of_every_source(texts: list[tuple[str, str]]) -> None:
    assert 1_200_000 <= sum(len(text.encode()) for text, _ in texts) <= 1_700_000
    first = {re.split("[/,]", where)[0] for _, where in texts}
    assert first == {"python reference", "stdlib", *embedded.TEXT_PACKAGES}
    assert len({where for _, where in texts}) > 2000


def test_labels_are_balanced_and_there_are_enough_examples(examples: list[tuple[str, str, str]]) -> None:
    counts = Counter(label for _, label, _ in examples)
    assert counts == dict.fromkeys(embedded.LABELLED_PACKAGES.values(), embedded.EXAMPLES_PER_LABEL)
    assert len({text for text, _, _ in examples}) > 4700


def test_no_name_and_no_alias_is_left(examples: list[tuple[str, str, str]]) -> None:
    names = [*embedded.LABELLED_PACKAGES, *embedded.LABELLED_PACKAGES.values(), "huggingface", "pyplot"]
    giveaway = re.compile(rf"{'|'.join(names)}|\b(np|pd|plt|sa|mpl)\.", re.IGNORECASE)
    assert [text for text, _, _ in examples if giveaway.search(text)] == []


@pytest.mark.parametrize(
    ("text", "blotted"),
    [
        ("np.linalg.norm of NumPy.", "___ of ___."),
        ("See :class:`~sklearn.svm.SVC`, scikit-learn's.", "See :class:`~___`, ___'s."),
        ("A Pandas4Warning or is_pandas_array", "A ___ or ___"),
        ("pd.DataFrame; update, inputs, sample, graph", "___; update, inputs, sample, graph"),
        ("Hugging Face, huggingface_hub/utils/_http.py, HF_HOME", "___, ___, ___"),
    ],
)
def test_blotting(text: str, blotted: str) -> None:
    assert embedded.blotted(text) == blotted


def test_examples_are_short_and_end_between_words(examples: list[tuple[str, str, str]]) -> None:
    lengths = [len(text) for text, _, _ in examples]
    assert min(lengths) >= embedded.SHORTEST_CHARACTERS
    assert max(lengths) <= embedded.EXAMPLE_CHARACTERS
    assert embedded.shortened("one two three", 8) == "one two"
    assert embedded.shortened("one", 3) == "one"
    assert embedded.shortened("one two three", 7) == "one two"


def test_generation_leaves_the_answer_out_of_the_prompt() -> None:
    examples = list(embedded.generation())
    assert len(examples) == len(embedded.LABELLED_PACKAGES) * embedded.EXAMPLES_PER_LABEL
    assert all("\n" not in completion and completion.strip() for _, completion, _ in examples)
    assert all(prompt.endswith("\n\nSummary:\n") for prompt, _, _ in examples)
    assert sum(completion in prompt for prompt, completion, _ in examples) < len(examples) / 100


def test_passages_hold_all_paragraphs_in_order() -> None:
    text = "\n\n".join(f"paragraph {number}" + "x" * 50 * number for number in range(12))
    passages = list(embedded.passages(text, 500))
    assert len(passages) > 4
    assert "\n\n".join(passages) == text
    assert list(embedded.passages("\n\n")) == []


def test_another_process_reads_the_same_and_imports_none_of_the_packages(
    texts: list[tuple[str, str]], examples: list[tuple[str, str, str]]
) -> None:
    code = """
import hashlib, sys
from mixtune.components.shared.data import embedded
digest = hashlib.sha256(repr([list(embedded.texts()), list(embedded.classification())]).encode()).hexdigest()
print(digest, *[name for name in [*embedded.LABELLED_PACKAGES, *embedded.TEXT_PACKAGES, "torch", "transformers"]
                if name in sys.modules and name not in ("pydantic",)])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "1"}
    )
    assert done.stdout.split() == [hashlib.sha256(repr([texts, examples]).encode()).hexdigest()]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(embedded.TEXT_PACKAGES, "no_such_package", "no-such-package")
    with pytest.raises(RefusedError, match="embedded needs the packages no-such-package, which are not installed"):
        embedded.versions()
