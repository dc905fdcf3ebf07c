"""Streams that several tasks read: whatever the portions, the result is that of one task, byte for byte."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mixtune.components.prepare import encoding, portion, portions
from mixtune.components.prepare.config import FinetuneData, PrepareStep, PretrainData
from mixtune.components.prepare.reading import Portion, join, load_portions, read_portion
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.config import EMBEDDED
from mixtune.components.shared.data.locating import FileRange
from mixtune.components.shared.data.problems import Problems, Skipped
from mixtune.components.shared.data.tallies import Tallies
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.context import Context
from tests.conftest import sentences

from .chat_families import tokenizer_of
from .prepared import Prepared, jsonl, prepare_finetune, prepare_pretrain, read_in_portions, tokenizer_options
from .test_chat_data import turns
from .test_shards import ANIMALS
from .test_step import files
from .wordpiece import bert_folder

CHINESE = [f"第{number}篇文章讲天气，今天{'很' * (number % 4)}好。" for number in range(12)]
MANY = 4


def same(one: Prepared, other: Prepared) -> None:
    for name in ("train", "heldout", "tokenizer"):
        assert files(getattr(one, name).path) == files(getattr(other, name).path)
    assert one.page == other.page


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each kind. Texts stand in several of them."""
    folder = tmp_path_factory.mktemp("texts")
    english = sentences(90, seed=3)
    jsonl(folder / "a.jsonl", [{"text": text} for text in [*english[:30], *CHINESE[:8], english[2].upper()]])
    with (folder / "b.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["id", "text"], *enumerate([*english[25:50], "two\nlines of one record", CHINESE[0]])]
        )
    (folder / "c.txt").write_text("\n\n".join(english[50:53]), encoding="utf-8")
    parquet.write_table(pa.table({"text": [*english[55:75], *CHINESE[6:], english[0]]}), folder / "d.parquet")
    with gzip.open(folder / "e.jsonl.gz", "wt", encoding="utf-8") as packed:
        packed.writelines(json.dumps({"text": text}) + "\n" for text in [*english[70:], english[25] + " too"])
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Options of a base model whose tokenizer loses characters."""
    base = bert_folder(tmp_path_factory.mktemp("bert"), [*sentences(40), *CHINESE[:3]])
    return tokenizer_options(base=base, vocabulary_size=None)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Prepared:
    return prepare_pretrain(tmp_path_factory.mktemp("pretrained"), texts)


@pytest.fixture
def encoded_late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that `prepare` itself encodes."""
    counts: list[int] = []
    encode = encoding.encode

    def counted(items: Any, *rest: Any) -> Any:
        counts.append(len(items))
        return encode(items, *rest)

    monkeypatch.setattr("mixtune.components.prepare.documents.encode", counted)
    monkeypatch.setattr("mixtune.components.prepare.shards.usable_cores", lambda: 1)
    return counts


class TestText:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"near_duplicates": 0.8, "duplicates": "exact", "control_fraction": 0.2},
            {"min_characters": 15, "max_repetition": 0.3, "max_documents": 40},
        ],
        ids=["plain", "near duplicates", "filters"],
    )
    def test_any_number_of_tasks_gives_the_same_bytes(
        self, tmp_path: Path, texts: Path, bert: Any, options: dict[str, Any], encoded_late: list[int]
    ) -> None:
        one = prepare_pretrain(tmp_path / "1", texts, tokenizer=bert, **options)
        assert one.count("duplicates") > 3
        assert one.count("unknown_tokens") > 0
        assert sum(encoded_late) > 30
        for workers in (2, 3, 9):
            encoded_late.clear()
            same(one, prepare_pretrain(tmp_path / str(workers), texts, workers=workers, tokenizer=bert, **options))
            assert sum(encoded_late) == 0, "the tasks of the portions have encoded everything"

    def test_a_tokenizer_that_is_trained_sees_all_portions(
        self, tmp_path: Path, texts: Path, pretrained: Prepared
    ) -> None:
        same(pretrained, prepare_pretrain(tmp_path, texts, workers=3))

    def test_several_sources_with_weights_and_held_out_files(self, tmp_path: Path, texts: Path, bert: Any) -> None:
        options: dict[str, Any] = {
            "sources": [
                {"path": str(texts), "weight": 1},
                {"path": str(texts / "a.jsonl"), "weight": 3, "filter": {"text": [*sentences(90, seed=3), *CHINESE]}},
            ],
            "dev_source": str(texts / "*.parquet"),
            "test_source": str(jsonl(tmp_path / "t.jsonl", [{"text": text} for text in sentences(20, seed=8)])),
        }
        one = prepare_pretrain(tmp_path / "1", None, tokenizer=bert, **options)
        for workers in (2, 3):
            same(one, prepare_pretrain(tmp_path / str(workers), None, workers=workers, tokenizer=bert, **options))

    def test_records_that_are_skipped(self, tmp_path: Path, texts: Path, bert: Any) -> None:
        folder = tmp_path / "data"
        folder.mkdir()
        for name in ("1.jsonl", "2.jsonl", "3.jsonl"):
            (folder / name).write_bytes((texts / "a.jsonl").read_bytes() + b'{"text": 1}\n{"text"\n')
        one = prepare_pretrain(tmp_path / "1", folder, tokenizer=bert, on_error="skip")
        made = prepare_pretrain(tmp_path / "3", folder, workers=3, tokenizer=bert, on_error="skip")
        same(one, made)
        lines = [json.loads(line) for line in (Path(made.train.path) / "quarantine.jsonl").read_text().splitlines()]
        assert [line["problem"].split("/")[-1].split(":")[0] for line in lines] == [
            f"{name}.jsonl, line {line}" for name in (1, 2, 3) for line in ("40", "41, character 8")
        ]


def examples(task: str) -> list[dict[str, Any]]:
    english = [*sentences(80, seed=5), *CHINESE]
    if task == "question_answering":
        animal = [next((word for word in text.split() if word in ANIMALS), "") for text in english]
        return [
            {"question": question, "context": text, "answers": answer}
            for text, answer in zip(english, animal, strict=True)
            for question in ("which animal?", "what is it?")
        ]
    if task == "generation":
        return [
            {"prompt": text, "completion": text[: 5 + n % 60] + ("<|eos|>" if n % 5 == 0 else "")}
            for n, text in enumerate(english)
        ]
    label: dict[str, Any] = {
        "classification": lambda n: "zyx"[n % 3],
        "multi_label": lambda n: ["abc"[m] for m in range(3) if (n + m) % 4 < 2],
        "regression": lambda n: n / 7 - 3,
    }
    return [{"text": text, "label": label[task](n)} for n, text in enumerate(english)]


class TestExamples:
    @pytest.mark.parametrize(
        "task", ["classification", "multi_label", "regression", "question_answering", "generation"]
    )
    def test_any_number_of_tasks_gives_the_same_bytes(
        self, tmp_path: Path, texts: Path, pretrained: Prepared, bert: Any, task: str, encoded_late: list[int]
    ) -> None:
        options: dict[str, Any] = {"task": task}
        if task == "question_answering":
            options["tokenizer"] = bert
            pretrained = prepare_pretrain(tmp_path / "text", texts, tokenizer=bert)
        rows, folder = examples(task), tmp_path / "data"
        rows += rows[:5]
        folder.mkdir()
        for number in range(MANY):
            jsonl(folder / f"{number}.jsonl", rows[number::MANY])
        one = prepare_finetune(tmp_path / "1", folder, pretrained, **options)
        for workers in (2, 3):
            encoded_late.clear()
            made = prepare_finetune(tmp_path / str(workers), folder, pretrained, workers=workers, **options)
            same(one, made)
            assert sum(encoded_late) == 0

    @pytest.mark.parametrize("family", ["chatml", "qwen3"])
    def test_chats(self, tmp_path: Path, family: str, encoded_late: list[int]) -> None:
        tokenizer = tokenizer_of(family)
        tokenizer.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
        options = tokenizer_options(base=str(tmp_path / "base"), max_length=90, vocabulary_size=None)
        folder = tmp_path / "data"
        folder.mkdir()
        words = [*sentences(40, seed=6), *CHINESE]
        for number in range(MANY):
            rows = []
            for n, said in enumerate(words[number::MANY]):
                messages = turns(said, f"<think>why</think>{said[:9]}", "and?", said * (1 + n % 3))
                rows.append({"messages": messages + turns("open")[: n % 2]})
            jsonl(folder / f"{number}.jsonl", rows)
        text, other = (
            prepare_pretrain(tmp_path / f"t{workers}", folder, workers=workers, tokenizer=options) for workers in (1, 3)
        )
        same(text, other)
        assert encoded_late
        made = {}
        for workers in (1, 2, 3):
            encoded_late.clear()
            made[workers] = prepare_finetune(
                tmp_path / f"e{workers}", folder, text, workers=workers, tokenizer=options, task="generation"
            )
            same(made[1], made[workers])
        assert sum(encoded_late) == 0
        if family == "qwen3":
            assert made[1].manifest.notes["turns_apart"]["train"] > 0

    def test_examples_that_are_too_long_are_all_named(self, tmp_path: Path, pretrained: Prepared) -> None:
        folder = tmp_path / "data"
        folder.mkdir()
        for number, rows in enumerate((examples("classification")[:40], examples("classification")[40:])):
            rows[3]["text"] = "天" * 100
            jsonl(folder / f"{number}.jsonl", [{**row, "text": f"{row['text']} {number}"} for row in rows])
        found = []
        for workers in (1, 2):
            with pytest.raises(RefusedError) as refused:
                prepare_finetune(tmp_path / str(workers), folder, pretrained, workers=workers, long_examples="error")
            found.append(refused.value.problems)
        assert found[0] == found[1]
        assert {problem.split(": ")[0] for problem in found[0]} >= {f"{folder}/{n}.jsonl, line 4" for n in (0, 1)}


BAD = {
    "a wrong column": {"1.jsonl": b'{"body": "x"}\n', "3.csv": b"body\nx\n"},
    "many bad lines": {f"{n}.jsonl": b'{"text": 3}\n{"text": "fine"}\n{\n' * 9 for n in range(4)},
    "an empty file": {"0.jsonl": b"", "1.jsonl": b'{"text": "x"}\n', "2.txt": b" \n"},
    "nothing but empty files": {"0.jsonl": b"", "1.csv": b"text\n"},
    "bytes": {
        "0.jsonl": b'{"text": "\xff"}\n',
        "1.jsonl": "x".encode("utf-16"),
        "2.jsonl.gz": gzip.compress(b"{}")[:-4],
    },
    "too few": {"0.jsonl": b'{"text": "x"}\n', "1.jsonl": b'{"text": "X"}\n'},
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_problems_of_all_portions_are_told_as_by_one_task(tmp_path: Path, case: str, on_error: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in BAD[case].items():
        (folder / name).write_bytes(content)
    options: dict[str, Any] = {
        "on_error": on_error,
        "dev_source": str(folder / "no.csv"),
        "tokenizer": tokenizer_options(),
    }
    found = []
    for workers in (1, 2, 3):
        with pytest.raises(RefusedError) as refused:
            prepare_pretrain(tmp_path / str(workers), folder, workers=workers, **options)
        found.append(refused.value.problems)
    assert found[0] == found[1] == found[2]
    assert any("no.csv does not exist" in problem for problem in found[0])
    if case == "many bad lines" and on_error == "fail":
        assert len(found[0]) == 1 + 20 + 1
        assert found[0][-1] == "and 52 more problems of records"


class TestCutting:
    def stream(self, folder: Path, sizes: list[int]) -> PretrainData:
        for number, size in enumerate(sizes):
            (folder / f"{number:03d}.jsonl").write_bytes(b"x" * size)
        return PretrainData(source=str(folder))

    @pytest.mark.parametrize(
        ("sizes", "workers", "wanted"),
        [
            ([10, 10, 10, 10], 2, [2, 2]),
            ([10, 10, 10], 9, [1, 1, 1]),
            ([1, 1, 1, 97], 2, [3, 1]),
            ([97, 1, 1, 1], 3, [1, 3]),
            ([0, 0], 2, [2]),
            ([5], 4, [1]),
        ],
    )
    def test_portions_have_about_the_same_size(
        self, tmp_path: Path, sizes: list[int], workers: int, wanted: list[int]
    ) -> None:
        found = portions.cut(self.stream(tmp_path, sizes), workers)
        ranges = [segment.files for one in found for segment in one.segments]
        assert [one.end - one.first for one in ranges if one] == wanted
        assert [one.first for one in ranges if one] == [0, *(one.end for one in ranges[:-1] if one)]
        assert [(one.number, one.of) for one in found] == [(n + 1, len(wanted)) for n in range(len(wanted))]

    def test_what_is_no_list_of_files_is_read_by_one_task(self, tmp_path: Path) -> None:
        self.stream(tmp_path, [5, 5])
        options: dict[str, Any] = {"dev_source": "hub:a/b", "test_source": str(tmp_path / "none.csv")}
        found = portions.cut(PretrainData(source=str(tmp_path), **options), 2)
        assert [[segment.files for segment in one.segments] for one in found] == [
            [FileRange(0, 1, 2)],
            [FileRange(1, 2, 2), None, None],
        ]
        assert portions.cut(PretrainData(source=EMBEDDED), 5) == [Portion.whole(PretrainData(source=EMBEDDED))]

    def test_files_that_change_meanwhile_are_noticed(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        for name in ("a", "c"):
            jsonl(tmp_path / "data" / f"{name}.jsonl", [{"text": text} for text in sentences(30)])
        stream = PretrainData(source=str(tmp_path / "data"))
        first, second = portions.cut(stream, 2)
        read = [read_portion(stream, first, tmp_path / "1")]
        jsonl(tmp_path / "data" / "b.jsonl", [{"text": "new"}])
        read.append(read_portion(stream, second, tmp_path / "2"))
        problems = Problems()
        join(stream, read, problems, Tallies())
        assert [sentence.partition(str(tmp_path / "data"))[2] for sentence in problems.sentences()] == [
            " has other files than at the start of the run; start it again"
        ]

    def test_a_missing_portion_is_noticed(self, tmp_path: Path, texts: Path) -> None:
        stream = PretrainData(source=str(texts))
        config = PrepareStep(stream="pretrain", seed=0, tokenizer=tokenizer_options(), pretrain=stream, fingerprint="")
        made = read_in_portions(config, 3, tmp_path)
        with pytest.raises(RefusedError, match="must be all 3 of the stream, found 2, 3"):
            load_portions([Path(one.path) for one in made[:2]])


ROWS = st.lists(
    st.sampled_from(
        [
            '{"text": "a b", "label": "x"}',
            '{"text": "A  B", "label": "y"}',
            '{"text": "天气很好", "label": "z"}',
            '{"text": "c", "label": "w", "more": [1]}',
            '{"text": "", "label": "x"}',
            '{"text": 4}',
            "",
            "{",
        ]
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=6), st.integers(1, 6), st.sampled_from(["fail", "skip"]))
def test_portions_are_joined_as_if_they_had_been_read_at_once(
    tmp_path_factory: pytest.TempPathFactory, contents: list[list[str]], workers: int, on_error: Any
) -> None:
    folder = tmp_path_factory.mktemp("joined")
    (folder / "data").mkdir()
    for number, lines in enumerate(contents):
        (folder / "data" / f"{number}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    stream = FinetuneData(source=str(folder / "data"), on_error=on_error)
    found = []
    for name, cut in (("whole", [Portion.whole(stream)]), ("cut", portions.cut(stream, workers))):
        for one in cut:
            read_portion(stream, one, folder / name / str(one.number)).save()
        file = folder / f"{name}-quarantine"
        problems, tallies = Problems(Skipped(file) if on_error == "skip" else None), Tallies()
        parts = load_portions([folder / name / str(one.number) for one in cut])
        rows, by_option = join(stream, parts, problems, tallies)
        items = [(item.key, item.row) for item in rows.items(by_option["source"])]
        arrays = {key: value.tobytes() for key, value in arrays_of(rows)}
        quarantine = file.read_bytes() if file.exists() else b""
        found.append(
            (items, arrays, rows.source_names, rows.label_sets, problems.sentences(), tallies.table(), quarantine)
        )
    assert found[0] == found[1]


def arrays_of(rows: Any) -> Iterator[tuple[str, Any]]:
    for name in ("keys", "units", "targets", "sources", "labels", "reasons", "source_ends"):
        yield name, getattr(rows, name)
    yield "ends", rows.lines.ends


def test_a_portion_tells_what_it_read(tmp_path: Path, texts: Path, bert: Any) -> None:
    stream = PretrainData(source=str(texts))
    config = PrepareStep(stream="pretrain", seed=0, tokenizer=bert, pretrain=stream, fingerprint="")
    (first, *_) = portions.run(config, context=Context.for_tests(), workers=2)
    rows = Artifact(str(tmp_path / "rows"))
    portion.run(
        PrepareStep.from_json(first["config"]),
        context=Context.for_tests(),
        portion=first["portion"],
        tokenizer_in=None,
        rows=rows,
    )
    assert rows.metadata["portion"] == 1
    assert rows.metadata["rows"] > 20
    assert not list(Path(rows.path).glob("chunk-*"))
