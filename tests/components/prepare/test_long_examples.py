"""Examples with more tokens than the model reads: refused, left out, or cut where the configuration says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoTokenizer

from mixtune.components.prepare.chats import ChatEncoder, InvalidChatError
from mixtune.components.prepare.config import FinetuneData, LongExamples
from mixtune.components.prepare.tokenization import Encoder, train_tokenizer
from mixtune.components.shared.data.chats import Chat
from mixtune.components.shared.data.prepared import QUARANTINE, Split
from mixtune.components.shared.data.tallies import warnings
from mixtune.components.shared.errors import RefusedError
from tests.conftest import sentences

from .chat_families import FAMILIES, tokenizer_of
from .prepared import Prepared, jsonl, prepare_finetune, prepare_pretrain

MAX_LENGTH = 16
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
CHOICES: tuple[LongExamples, ...] = get_args(LongExamples)


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_tokenizer(sentences(100), 400, MAX_LENGTH)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("pretrained")
    return prepare_pretrain(folder / "out", jsonl(folder / "a.jsonl", [{"text": text} for text in sentences(200)]))


@given(
    st.lists(st.integers(3, 99), max_size=30),
    st.lists(st.integers(3, 99), min_size=1, max_size=30),
    st.sampled_from(CHOICES),
)
def test_an_example_loses_only_what_may_be_cut(
    trained: Any, prompt: list[int], completion: list[int], choice: LongExamples
) -> None:
    made = Encoder(trained, MAX_LENGTH, long_examples=choice)
    whole = [made.bos, *prompt, *completion, made.eos]
    fitted = made.prompted([made.bos, *prompt], completion)
    if len(whole) <= MAX_LENGTH:
        assert fitted == (whole, 1 + len(prompt), False)
    elif choice in ("error", "drop"):
        assert fitted is None
    elif choice == "truncate_prompt":
        left = MAX_LENGTH - 1 - len(completion) - 1
        kept = prompt[len(prompt) - left :]
        assert fitted == (None if left < 0 else ([made.bos, *kept, *completion, made.eos], 1 + left, True))
    else:
        assert fitted == (None if len(prompt) + 1 >= MAX_LENGTH else (whole[:MAX_LENGTH], 1 + len(prompt), True))


def chat(*contents: str) -> Chat:
    return Chat([{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)], [])


@given(
    st.sampled_from(sorted(FAMILIES)),
    st.lists(
        st.sampled_from(["Hi", "Where is it? " * 3, "好的", "It is there, near the river."]), min_size=1, max_size=3
    ),
    st.integers(8, 90),
    st.sampled_from(CHOICES),
)
def test_a_chat_loses_only_what_may_be_cut(name: str, texts: list[str], length: int, choice: LongExamples) -> None:
    given_chat = chat(*(text for text in texts for _ in range(2)))
    everything, all_apart = ChatEncoder(tokenizer_of(name), None).encode(given_chat)
    encoder = ChatEncoder(tokenizer_of(name), length, long_examples=choice)
    assert everything is not None
    fits = all(len(one.tokens) <= length for one in [everything, *all_apart])
    if not fits and choice == "error":
        with pytest.raises(InvalidChatError, match=f"more than model.max_length = {length} tokens"):
            encoder.encode(given_chat)
        return
    whole, apart = encoder.encode(given_chat)
    assert (whole is not None and not whole.cut) == fits
    if whole is None:
        assert not apart
        return
    answer = everything.tokens[everything.answer_from :].tolist()
    own = whole.tokens[whole.answer_from :].tolist()
    assert all(len(one.tokens) <= length for one in [whole, *apart])
    assert whole.supervised[whole.answer_from :].any()
    if choice == "truncate_completion":
        assert whole.tokens.tolist() == everything.tokens[:length].tolist()
        assert whole.answer_from == everything.answer_from
        assert own == answer[: len(own)]
    else:
        assert own == answer


ROWS = [{"prompt": f"What is {n}?", "completion": f" {n}!"} for n in range(40)]
LONG = [
    {"prompt": "词" * 50 + "end", "completion": "yes"},  # the prompt is too long
    {"prompt": "p", "completion": "答" * 50},  # the completion is
]


def prepared(folder: Path, pretrained: Prepared, choice: LongExamples, **options: Any) -> Prepared:
    source, test = jsonl(folder / "a.jsonl", ROWS), jsonl(folder / "test.jsonl", [*ROWS[:2], *LONG])
    return prepare_finetune(
        folder / choice, source, pretrained, task="generation", test_source=str(test), long_examples=choice, **options
    )


@pytest.mark.parametrize(
    ("choice", "counts", "kept"),
    [
        ("truncate_prompt", {"shortened": 1, "dropped": 1}, 3),
        ("truncate_completion", {"cut_completions": 1, "dropped": 1}, 3),
        ("drop", {"shortened": 0, "dropped": 2}, 2),
    ],
)
def test_every_case_is_counted_and_warned_of(
    tmp_path: Path, pretrained: Prepared, choice: LongExamples, counts: dict[str, int], kept: int
) -> None:
    made = prepared(tmp_path, pretrained, choice)
    assert {kind: made.count(kind) for kind in counts} == counts
    assert len(made.documents("test")) == kept
    told = " ".join(warnings(made.manifest.tallies, "finetune"))
    for kind, words in (("cut_completions", "completion that is cut"), ("dropped", "are dropped")):
        assert (words in told) == bool(counts.get(kind))
        assert words in made.page or kind not in counts


def test_a_cut_completion_has_no_end(tmp_path: Path, pretrained: Prepared) -> None:
    made = prepared(tmp_path, pretrained, "truncate_completion")
    tokenizer: Any = AutoTokenizer.from_pretrained(made.tokenizer.path)
    documents = made.documents("test")
    place = [record["prompt"] for record in documents.records()].index("p")
    tokens, start = documents.tokens(place).tolist(), int(documents.supervised_from[place])
    assert len(tokens) == 32
    assert tokenizer.decode(tokens[1:start]) == "p"
    assert tokens[start:] == tokenizer("答" * 50, add_special_tokens=False)["input_ids"][: 32 - start]


def test_error_names_each_and_skip_puts_them_aside(tmp_path: Path, pretrained: Prepared) -> None:
    with pytest.raises(RefusedError) as refused:
        prepared(tmp_path, pretrained, "error")
    problems = refused.value.problems
    assert [problem.split(": ")[0] for problem in sorted(problems)] == [
        f"{tmp_path}/test.jsonl, line {n}" for n in (3, 4)
    ]
    assert all("has more than model.max_length = 32 tokens" in problem for problem in problems)
    made = prepared(tmp_path, pretrained, "error", on_error="skip")
    assert made.count("quarantined") == 2
    lines = (Path(made.train.path) / QUARANTINE).read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["record"]["prompt"] for line in lines) == ["p", LONG[0]["prompt"]]


@pytest.mark.parametrize("choice", ["error", "drop", "truncate_prompt"])
def test_texts_with_a_label(tmp_path: Path, pretrained: Prepared, choice: LongExamples) -> None:
    rows = [{"text": f"{text} {n}", "label": "ab"[n % 2]} for n, text in enumerate(sentences(60))]
    source = jsonl(tmp_path / "a.jsonl", [*rows, {"text": "词" * 50, "label": "a"}])
    if choice == "error":
        with pytest.raises(RefusedError, match=r"line 61: has more than model.max_length = 32 tokens"):
            prepare_finetune(tmp_path / "out", source, pretrained, long_examples=choice)
        return
    made = prepare_finetune(tmp_path / "out", source, pretrained, long_examples=choice)
    dropped = int(choice == "drop")
    assert (made.count("dropped"), made.count("shortened")) == (dropped, 1 - dropped)
    assert sum(len(made.documents(split)) for split in SPLITS) == 61 - dropped


def test_questions_without_room_for_their_context(tmp_path: Path, pretrained: Prepared) -> None:
    rows = [{"question": f"What is {n}?", "context": f"It is {n}.", "answers": f"{n}"} for n in range(20)]
    source = jsonl(tmp_path / "a.jsonl", [*rows, {"question": "词" * 50, "context": "It is 1.", "answers": "1"}])
    with pytest.raises(RefusedError, match=r"line 21: has more than model.max_length"):
        prepare_finetune(tmp_path / "out", source, pretrained, task="question_answering", long_examples="error")


def test_only_completions_can_be_cut() -> None:
    for task in ("classification", "question_answering"):
        with pytest.raises(ValidationError, match=f"long_examples: {task} has no completions to truncate"):
            FinetuneData(source="a.jsonl", task=task, long_examples="truncate_completion")
