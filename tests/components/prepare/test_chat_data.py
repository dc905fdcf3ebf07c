"""Chats from files to what training reads."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from mixtune.components.prepare.config import FinetuneData, PretrainData
from mixtune.components.shared.data.prepared import Split
from mixtune.components.shared.errors import RefusedError
from tests.components.shared.read_sources import problems_of, rows_of
from tests.conftest import sentences

from .chat_families import reference, tokenizer_of
from .prepared import Prepared, jsonl, prepare_finetune, prepare_pretrain, tokenizer_options

COLUMNS = FinetuneData(source="-", task="generation").columns
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


def turns(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def base(folder: Path, family: str = "chatml") -> Any:
    """Options of a base model whose tokenizer is that of a family."""
    tokenizer = tokenizer_of(family)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
    return tokenizer_options(base=str(folder), max_length=120, vocabulary_size=None)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Prepared]:
    folder = tmp_path_factory.mktemp("chatml")
    options = base(folder / "base")
    texts = jsonl(folder / "texts.jsonl", [{"text": text} for text in sentences(40)])
    return options, prepare_pretrain(folder, texts, tokenizer=options)


class TestReading:
    def test_formats_are_recognised_by_their_columns(self, tmp_path: Path) -> None:
        messages = turns("第一", "b 🙂", "c", "d")
        names = {"user": "human", "assistant": "gpt"}
        shared = [{"from": names[one["role"]], "value": one["content"]} for one in messages]
        rows: dict[str, dict[str, Any]] = {
            "messages": {"messages": messages},
            "conversations": {"conversations": shared, "id": 3},
            "both": {"prompt": messages[:3], "completion": messages[3:]},
            "unfinished": {"prompt": "no completion", "messages": messages},
        }
        chats = [rows_of(jsonl(tmp_path / f"{name}.jsonl", [row]), COLUMNS)[0] for name, row in rows.items()]
        for one in chats:
            assert one.chat is not None
            assert one.chat.messages == messages
            assert one.values == {"prompt": "user: 第一\n\nassistant: b 🙂\n\nuser: c", "completion": "d"}
        assert [one.chat.learn_from for one in chats if one.chat] == [0, 0, 3, 0]
        plain = rows_of(jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "completion": "b", "messages": 1}]), COLUMNS)
        assert (plain[0].values, plain[0].chat) == ({"prompt": "a", "completion": "b"}, None)
        single = rows_of(jsonl(tmp_path / "s.jsonl", [{"messages": messages[:2]}]), COLUMNS)
        assert single[0].values["prompt"] == "第一"

    def test_own_columns(self, tmp_path: Path) -> None:
        source = jsonl(tmp_path / "a.jsonl", [{"dialog": turns("a", "b"), "functions": [{"name": "f"}]}])
        options = FinetuneData(
            source="-", task="generation", messages_column="dialog", tools_column="functions", group_column="who"
        )
        assert "has no column who" in problems_of(source, options.columns)[0]
        source = jsonl(tmp_path / "a.jsonl", [{"dialog": turns("a", "b"), "functions": [{"name": "f"}], "who": "me"}])
        (row,) = rows_of(source, options.columns)
        assert row.values == {"prompt": '[{"name": "f"}]\n\nuser: a', "completion": "b", "group": "me"}
        assert row.chat is not None
        assert row.chat.tools == [{"name": "f"}]

    def test_text_comes_first_in_pretraining(self, tmp_path: Path) -> None:
        columns = PretrainData(source="-").columns
        both = jsonl(tmp_path / "a.jsonl", [{"text": "t", "messages": turns("a", "b")}])
        assert [row.chat for row in rows_of(both, columns)] == [None]
        (row,) = rows_of(jsonl(tmp_path / "b.jsonl", [{"messages": turns("a", "b")}]), columns)
        assert row.values == {"text": "a\n\nb"}
        assert (
            "has no column text; its columns are body"
            in problems_of(jsonl(tmp_path / "c.jsonl", [{"body": "t"}]), columns)[0]
        )

    def test_every_format_gives_the_same(self, tmp_path: Path) -> None:
        import pandas as pd

        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü", "b": [1]}'}}
        chats: list[list[dict[str, Any]]] = [
            turns("a", "b"),
            [
                *turns("c"),
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "2", "tool_call_id": "1"},
                *turns("", "e")[1:],
            ],
        ]
        one = jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
        pd.DataFrame({"messages": chats}).to_parquet(tmp_path / "a.parquet")
        with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["messages"], *[[json.dumps(chat)] for chat in chats]])
        (tmp_path / "a.json").write_text(json.dumps([{"messages": chat} for chat in chats]))
        expected = [row.chat for row in rows_of(one, COLUMNS)]
        for name in ("a.parquet", "a.csv", "a.json"):
            assert [row.chat for row in rows_of(tmp_path / name, COLUMNS)] == expected
        assert expected[1] is not None
        assert expected[1].messages[1]["tool_calls"] == [
            {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": "ü", "b": [1]}}}
        ]

    def test_every_mistake_is_named(self, tmp_path: Path) -> None:
        ok = turns("a", "b")
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "no json"}}]}
        half = "holds half of a surrogate pair, which is no character"
        known = "it must be one of system, user, assistant, tool (or human, gpt, observation)"
        wrong: list[tuple[Any, str]] = [
            ("text", "messages is text, not a list of messages"),
            ([], "messages is an empty list"),
            ([3], "messages, message 1, is a number, not an object with role and content"),
            ([*ok, {"role": "bot", "content": "x"}], f"messages, message 3, has the role 'bot'; {known}"),
            ([{"content": "x"}], f"messages, message 1, has no role; {known}"),
            (turns("a", " \n"), "messages, message 2, of the assistant, is empty"),
            (turns("", "b"), "messages, message 1, of the user, is empty"),
            ([{"role": "user", "content": "x"}], "messages holds no message of the assistant"),
            (
                [{"role": "assistant", "content": "x"}],
                "messages begins with the only message of the assistant, so there is nothing to answer",
            ),
            ([{"role": "user", "content": 3}, ok[1]], "messages, message 1, has content that is a number, not text"),
            (
                [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ok[1]],
                "messages, message 1, holds a part of type image; only text can be learned",
            ),
            ([ok[0], call], "messages, message 2, has a tool call whose arguments are no JSON object"),
            (turns("a", "\ud800"), f"messages, message 2, has content that {half}"),
            ([ok[0] | {"name": "\ud800"}, ok[1]], f"messages {half}"),
            ([ok[0] | {"weight": float("nan")}, ok[1]], "messages holds NaN or Infinity, which JSON does not have"),
        ]  # fmt: skip
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"messages": value}) + "\n" for value, _ in wrong), encoding="utf-8")
        assert problems_of(path, COLUMNS) == [f"{path}, line {n}: {text}" for n, (_, text) in enumerate(wrong, start=1)]
        mixed = jsonl(
            tmp_path / "b.jsonl", [{"prompt": ok[:1], "completion": "b"}, {"prompt": "a", "completion": ok[1:]}]
        )
        assert problems_of(mixed, COLUMNS) == [
            f"{mixed}, line 1: completion is text, not a list of messages",
            f"{mixed}, line 2: completion is a list, not text",
        ]


class TestPreparing:
    def test_documents(self, tmp_path: Path, chatml: tuple[Any, Prepared]) -> None:
        options, pretrained = chatml
        rows = [
            {"messages": turns(f"第{n}题", f"答{n}", *(["more", f"that {n} 🙂"] if n % 3 else []))} for n in range(30)
        ]
        made = prepare_finetune(
            tmp_path, jsonl(tmp_path / "a.jsonl", rows), pretrained, task="generation", tokenizer=options
        )
        learned = 0
        for split in SPLITS:
            documents = made.documents(split)
            for index, record in enumerate(documents.records()):
                assert {"messages": record["messages"]} in rows
                ids, mask = reference("chatml", record["messages"])
                assert documents.tokens(index).tolist() == ids
                low, high = documents.offsets[index : index + 2].tolist()
                supervised = documents.supervised(low, high)
                assert supervised is not None
                assert supervised.tolist() == np.flatnonzero(mask).tolist()
                start = int(documents.supervised_from[index])
                assert tokenizer_of("chatml").decode(ids[start:]) == f"{record['completion']}<|im_end|>"
                learned += sum(message["role"] == "assistant" for message in record["messages"])
        assert sum(made.manifest.notes["turns"].values()) == learned
        saved: Any = AutoTokenizer.from_pretrained(made.tokenizer.path)
        assert saved.chat_template == tokenizer_of("chatml").chat_template
        assert "turns of the assistant that are learned" in made.page
        shown = made.documents("test").records()[0]["messages"]
        for turn in shown:
            text = f"{turn['content']}&lt;|im_end|&gt;"
            assert (f"<mark>{text}</mark>" in made.page) == (turn["role"] == "assistant")

    def test_problems_have_file_and_line(self, tmp_path: Path) -> None:
        options = base(tmp_path / "base", "gemma")
        texts = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in sentences(40)])
        pretrained = prepare_pretrain(tmp_path, texts, tokenizer=options)
        rows = [{"messages": turns(f"q {n}", f"a {n}")} for n in range(30)]
        rows[4]["messages"].insert(0, {"role": "system", "content": "x"})
        rows[7]["messages"].insert(1, {"role": "user", "content": "again"})
        source = jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(RefusedError) as refused:
            prepare_finetune(tmp_path / "out", source, pretrained, task="generation", tokenizer=options)
        assert sorted(refused.value.problems) == [
            f"{source}, line 5: the chat template refuses the messages (There is no system role)",
            f"{source}, line 8: the chat template refuses the messages (Turns of user and model have to alternate)",
        ]
        made = prepare_finetune(
            tmp_path / "out", source, pretrained, task="generation", tokenizer=options, on_error="skip"
        )
        assert sum(len(made.documents(split)) for split in SPLITS) == 28
        quarantine = (Path(made.train.path) / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
        assert {json.loads(line)["record"]["messages"][0]["role"] for line in quarantine} == {"system", "user"}
        split = [row.count for row in made.manifest.tallies if row.kind == "quarantined" and row.part in SPLITS]
        assert sum(split) == 2

    def test_without_a_template(self, tmp_path: Path) -> None:
        texts = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in sentences(40)])
        rows = [{"messages": turns(f"q {n}", f"a {n}")} for n in range(30)]
        source = jsonl(tmp_path / "a.jsonl", rows)
        options = tokenizer_options(max_length=64)
        pretrained = prepare_pretrain(tmp_path / "1", texts, tokenizer=options)
        with pytest.raises(
            RefusedError, match=r"the tokenizer of scratch has no chat template; set model.chat_template"
        ):
            prepare_finetune(tmp_path / "2", source, pretrained, task="generation", tokenizer=options)
        # The first record tells, before the rest is read.
        (tmp_path / "b.jsonl").write_text(source.read_text() + "no JSON\n")
        with pytest.raises(RefusedError) as refused:
            prepare_finetune(tmp_path / "2", tmp_path / "b.jsonl", pretrained, task="generation", tokenizer=options)
        assert len(refused.value.problems) == 1

        template = tmp_path / "own.jinja"
        template.write_text(
            "{{ bos_token }}{% for m in messages %}{{ m.role }}>{{ m.content }}"
            "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant>{% endif %}"
        )
        options = options.model_copy(update={"chat_template": str(template)})
        pretrained = prepare_pretrain(tmp_path / "3", texts, tokenizer=options)
        made = prepare_finetune(tmp_path / "4", source, pretrained, task="generation", tokenizer=options)
        tokenizer: Any = AutoTokenizer.from_pretrained(made.tokenizer.path)
        documents = made.documents("dev")
        tokens, record = documents.tokens(0).tolist(), documents.records()[0]
        assert tokens == tokenizer.apply_chat_template(record["messages"], return_dict=False)
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[int(documents.supervised_from[0]) : -1]) == record["completion"]

    def test_a_template_that_cannot_be_used(self, tmp_path: Path) -> None:
        texts = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in sentences(40)])
        broken = tmp_path / "broken.jinja"
        broken.write_text("{% for m in messages %}\n{{ m.role }")
        for file, problem in ((broken, "line 2: is no Jinja template"), (tmp_path / "none", "cannot be read")):
            options = tokenizer_options().model_copy(update={"chat_template": str(file)})
            with pytest.raises(RefusedError, match=problem):
                prepare_pretrain(tmp_path / "out", texts, tokenizer=options)

    def test_chats_as_pretraining_text(self, tmp_path: Path, chatml: tuple[Any, Prepared]) -> None:
        options, _ = chatml
        rows = [{"messages": turns(f"第{n}题", f"答{n}", "more", f"that {n}" * 40)} for n in range(40)]
        made = prepare_pretrain(tmp_path, jsonl(tmp_path / "a.jsonl", rows), tokenizer=options)
        documents = made.documents("dev")
        record = documents.records()[0]
        ids, mask = reference("chatml", record["messages"])
        assert len(ids) > options.max_length
        assert documents.tokens(0).tolist() == ids
        supervised = documents.supervised(0, len(ids))
        assert supervised is not None
        assert supervised.tolist() == np.flatnonzero(mask).tolist()
        assert record["bytes"] == sum(len(turn["content"].encode()) for turn in record["messages"][1::2])

    def test_reasoning_that_is_shown_once_gives_sequences_of_their_own(self, tmp_path: Path) -> None:
        options = base(tmp_path / "base", "qwen3")
        texts = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in sentences(40)])
        pretrained = prepare_pretrain(tmp_path, texts, tokenizer=options)
        rows = [{"messages": turns(f"q {n}", "a", "b", f"c {n}")} for n in range(30)]
        made = prepare_finetune(
            tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), pretrained, task="generation", tokenizer=options
        )
        assert [len(made.documents(split)) for split in SPLITS] == [48, 3, 3]
        assert made.manifest.notes["turns_apart"] == {"train": 24, "dev": 0, "test": 0}
