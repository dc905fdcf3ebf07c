"""Several sources of a stream: weights, columns, conditions, and the formats that sources can have."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mixtune.components.prepare.config import FinetuneData, PrepareStep, PretrainData
from mixtune.components.prepare.gathering import _connected
from mixtune.components.prepare.near_duplicates import near_duplicates
from mixtune.components.prepare.shares import kept_by_weight
from mixtune.components.prepare.step import run
from mixtune.components.shared.data.data_sets import is_hub
from mixtune.components.shared.data.sources import check_source, fingerprint, named_sources
from mixtune.components.shared.data.values import meets
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.context import Context
from tests.conftest import sentences

from .prepared import Prepared, jsonl, outputs, tokenizer_options


def prepare(folder: Path, sources: list[dict[str, Any]], **options: Any) -> Prepared:
    made = outputs(folder)
    stream = PretrainData.model_validate({"sources": sources, "control_fraction": 0, **options})
    config = PrepareStep(stream="pretrain", seed=0, tokenizer=tokenizer_options(), pretrain=stream, fingerprint="")
    run(config, context=Context.for_tests(), tokenizer_in=None, pretraining_data=None, **vars(made))
    return made


def write(folder: Path, name: str, count: int, seed: int, column: str = "text", **more: Any) -> str:
    rows = [{column: text, "number": number, **more} for number, text in enumerate(sentences(count, seed=seed))]
    return str(jsonl(folder / f"{name}.jsonl", rows))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), min_size=1, max_size=200),
    st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
)
def test_weights_are_met_up_to_one_document(documents: list[tuple[int, int]], weights: list[float]) -> None:
    sources, tokens = (np.array(column) for column in zip(*documents, strict=True))
    kept = kept_by_weight(sources, tokens, weights)
    there = sorted(set(sources.tolist()))
    of_each = {number: tokens[sources == number] for number in there}
    scale = min(of_each[number].sum() / weights[number] for number in there)
    for number in there:
        own = kept[sources == number]
        assert own[0]
        assert not (np.diff(own.astype(int)) > 0).any(), "the first ones, without gaps"
        used = of_each[number][own].sum()
        assert abs(used - scale * weights[number]) <= of_each[number].max()
    scarcest = min(there, key=lambda number: of_each[number].sum() / weights[number])
    assert kept[sources == scarcest].all()


def test_shares_of_weighted_sources_are_realised_and_told(tmp_path: Path) -> None:
    sources: list[dict[str, Any]] = [
        {"path": write(tmp_path, "a", 300, 1), "weight": 1},
        {"path": write(tmp_path, "b", 300, 2), "weight": 3},
    ]
    made = prepare(tmp_path / "out", sources)
    for split in ("train", "dev", "test"):
        first, second = made.manifest.notes["shares"][split]
        assert (first["asked"], second["asked"]) == (0.25, 0.75)
        documents = made.documents(split)
        lengths = np.diff(documents.offsets)
        from_a = np.array(["a.jsonl" in record["source"] for record in documents.records()])
        assert first["tokens"] == lengths[from_a].sum()
        assert second["tokens"] == lengths[~from_a].sum()
        assert first["share"] == pytest.approx(0.25, abs=lengths.max() / lengths.sum())
        assert first["left_out_tokens"] > 0
        assert second["left_out_tokens"] == 0
        assert first["documents"] + second["documents"] == len(documents)
    assert "share asked" in made.page
    assert "25.0 %" in made.page


def test_held_out_sources_have_no_weight_and_no_share(tmp_path: Path) -> None:
    sources = [
        {"path": write(tmp_path, "a", 100, 1), "weight": 1},
        {"path": write(tmp_path, "b", 100, 2), "weight": 1},
    ]
    made = prepare(tmp_path / "out", sources, test_source=write(tmp_path, "test", 30, 3))
    assert len(made.documents("test")) == 30
    found = made.manifest.notes["shares"]
    assert set(found) == {"train", "dev"}
    assert all(sum(row["share"] for row in rows) == pytest.approx(1) for rows in found.values())


def test_without_weights_all_data_is_taken_once(tmp_path: Path) -> None:
    sources = [{"path": write(tmp_path, "a", 40, 1)}, {"path": write(tmp_path, "b", 60, 2)}]
    made = prepare(tmp_path / "out", sources)
    assert sum(len(made.documents(split)) for split in ("train", "dev", "test")) == 100
    assert {row["asked"] for row in made.manifest.notes["shares"]["train"]} == {None}


def test_a_document_that_two_sources_hold_is_kept_once(tmp_path: Path) -> None:
    sources = [{"path": write(tmp_path, "a", 40, 1)}, {"path": write(tmp_path, "b", 40, 1)}]
    made = prepare(tmp_path / "out", sources)
    assert made.count("duplicates") == 40


def test_each_source_has_its_own_columns_and_conditions(tmp_path: Path) -> None:
    other = write(tmp_path, "other", 60, 2, column="body", language="en")
    with Path(other).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"body": "ein Satz", "language": "de", "number": 0}) + "\n")
    sources: list[dict[str, Any]] = [
        {"path": write(tmp_path, "a", 40, 1)},
        {
            "path": other,
            "columns": {"text_column": "body"},
            "filter": {"language": "en", "number": {"min": 10, "max": 29}},
        },
    ]
    made = prepare(tmp_path / "out", sources)
    assert made.count("filtered") == 41
    assert sum(len(made.documents(split)) for split in ("train", "dev", "test")) == 60


@pytest.mark.parametrize(
    ("value", "asked", "untyped", "met"),
    [
        ("en", "en", False, True),
        ("en", ["zh", "en"], False, True),
        ("en", ["zh"], False, False),
        (None, "en", False, False),
        (float("nan"), 1, False, False),
        (3, 3, False, True),
        (1, True, False, False),
        (True, True, False, True),
        ("true", True, True, True),
        (" 3", 3, True, True),
        ("3.5", {"min": 3}, True, True),
        ("x", {"min": 3}, True, False),
        (2, {"min": 3}, False, False),
        (True, {"min": 0}, False, False),
        (5, {"max": 4}, False, False),
        ([1], 1, False, False),
    ],
)
def test_conditions(value: Any, asked: Any, untyped: bool, met: bool) -> None:
    stream = PretrainData.model_validate({"sources": [{"path": "a.jsonl", "filter": {"column": asked}}]})
    assert meets(value, stream.sources[0].filter["column"], untyped) == met


def test_a_condition_on_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    source = {"path": write(tmp_path, "a", 10, 1), "filter": {"langauge": "en"}}
    stream = PretrainData.model_validate({"sources": [source]})
    (problem,) = check_source(stream)
    assert "data.pretrain.sources.0.path" in problem
    assert "has no column langauge; its columns are text, number" in problem


def test_no_record_that_meets_the_conditions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="holds no records that meet filter"):
        prepare(tmp_path / "out", [{"path": write(tmp_path, "a", 10, 1), "filter": {"number": 99}}])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "source is required and was not given"),
        ({"source": "a", "sources": [{"path": "b"}]}, "exclude each other"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "all of them need a weight, or none"),
        (
            {"sources": [{"path": "a", "columns": {"text": "b"}}]},
            "there is no option text; these are group_column, ",
        ),
        ({"sources": [{"path": "a", "revision": "main"}]}, "hub data sets only"),
        ({"sources": [{"path": "embedded"}]}, "must not be embedded"),
        ({"sources": [{"path": "s3://me:secret@bucket/a"}]}, "must not carry a password"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        PretrainData.model_validate(options)


def test_hub_names_have_their_revision_and_split() -> None:
    given = {"path": "hub:o/n", "revision": "abc", "split": "validation"}
    stream = FinetuneData.model_validate({"sources": [given, {"path": "hf://datasets/o/n"}]})
    first, second = named_sources(stream)
    assert first.path == "hub:o/n@abc#validation"
    assert is_hub(second.path)
    assert not is_hub("hf://datasets/o/n/data/train.parquet"), "a file, which fsspec reads"


def test_arrow_files_and_saved_folders_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"text": text} for text in sentences(60)]
    expected = prepare(tmp_path / "jsonl", [{"path": str(jsonl(tmp_path / "rows.jsonl", rows))}])
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    saved = Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"all": saved}).save_to_disk(str(tmp_path / "splits"))
    sources: list[dict[str, Any]] = [{"path": str(tmp_path / name)} for name in ("file.arrow", "stream.arrow", "saved")]
    for source in [*sources, {"path": str(tmp_path / "splits"), "split": "all"}]:
        assert check_source(PretrainData.model_validate({"sources": [source]})) == []
        made = prepare(tmp_path / f"of {Path(source['path']).name}", [source])
        assert made.manifest.digest == expected.manifest.digest
    (problem,) = check_source(PretrainData.model_validate({"source": str(tmp_path / "splits")}))
    assert "it has no split train, but all" in problem
    (tmp_path / "broken.arrow").write_bytes(b"ARROW1 and nothing else")
    (problem,) = check_source(PretrainData.model_validate({"source": str(tmp_path / "broken.arrow")}))
    assert "is no Arrow file" in problem


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_compressed_files_are_read_and_truncated_ones_named(tmp_path: Path, ending: str) -> None:
    source = tmp_path / f"text.jsonl.{ending}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in sentences(300)).encode()
    for piece in (lines[:1000], lines[1000:]):  # some programs write several frames one after the other
        with source.open("ab") as raw:
            if ending == "zst":
                raw.write(pa.compress(piece, codec="zstd", asbytes=True))
            else:
                raw.write({"gz": gzip, "bz2": bz2, "xz": lzma}[ending].compress(piece))
    made = prepare(tmp_path / "out", [{"path": str(source)}])
    assert sum(len(made.documents(split)) for split in ("train", "dev", "test")) == 300
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(RefusedError, match="cannot be read"):
        prepare(tmp_path / "again", [{"path": str(source)}])


def test_files_in_a_tar_archive_are_read(tmp_path: Path) -> None:
    rows = [{"text": text} for text in sentences(60)]
    with tarfile.open(tmp_path / "corpus.tar", "w") as archive:
        for name, part in (("a.jsonl", rows[:30]), ("b.jsonl", rows[30:])):
            archive.add(jsonl(tmp_path / name, part), name)
    made = prepare(tmp_path / "out", [{"path": f"tar://*.jsonl::{tmp_path}/corpus.tar"}])
    assert sum(len(made.documents(split)) for split in ("train", "dev", "test")) == 60


def test_a_saved_folder_that_changes_is_another_source(tmp_path: Path) -> None:
    from datasets import Dataset

    found = set()
    for number in range(2):
        Dataset.from_list([{"text": f"{number}"}]).save_to_disk(str(tmp_path / "saved"))
        found.add(fingerprint(PretrainData.model_validate({"source": str(tmp_path / "saved")})))
    assert len(found) == 2


class TestNearDuplicates:
    def long(self, count: int, seed: int = 0) -> list[str]:
        draw = np.random.default_rng(seed)
        return [" ".join(f"w{word}" for word in draw.integers(0, 5000, 120)) for _ in range(count)]

    def test_they_are_removed_and_held_out_ones_are_kept(self, tmp_path: Path) -> None:
        texts = self.long(60)
        copies = [f"{text} and two more words" for text in texts[:10]]
        test = jsonl(tmp_path / "test.jsonl", [{"text": f"Copied: {text}"} for text in texts[50:55]])
        source = jsonl(tmp_path / "text.jsonl", [{"text": text} for text in [*texts, *copies]])
        made = prepare(tmp_path / "out", [{"path": str(source)}], near_duplicates=0.8, test_source=str(test))
        assert made.count("near_duplicates") == made.count("near_duplicates", "source") == 15
        assert len(made.documents("test")) == 5
        (row,) = [row for row in made.manifest.tallies if row.kind == "near_duplicates" and row.part == "source"]
        assert "such as" in row.detail
        assert "which is like" in row.detail
        kept = prepare(tmp_path / "all", [{"path": str(source)}])
        assert sum(len(kept.documents(split)) for split in ("train", "dev", "test")) == 70

    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), min_size=1, max_size=12))
    def test_similar_texts_are_found_and_others_are_not(self, drawn: list[tuple[int, int]]) -> None:
        base = self.long(6, seed=3)
        texts = [f"{base[which]} " + " ".join(f"x{which}{n}{more}" for n in range(more)) for which, more in drawn]
        found = list(near_duplicates(texts, 0.8))

        def passages(text: str) -> set[str]:
            words = text.split()
            return {" ".join(words[at : at + 5]) for at in range(len(words) - 4)}

        for number, other in enumerate(found):
            similar = {
                n: len(passages(texts[number]) & passages(texts[n])) / len(passages(texts[number]) | passages(texts[n]))
                for n in range(number)
                if found[n] is None
            }
            if other is not None:
                assert similar[other] > 0.65
            assert other is not None or max(similar.values(), default=0) < 0.95


class TestGroups:
    def rows(self) -> list[dict[str, Any]]:
        texts = sentences(90)
        return [{"text": text, "author": number % 18, "label": "ab"[number % 2]} for number, text in enumerate(texts)]

    def test_records_of_one_group_stand_in_one_split(self, tmp_path: Path) -> None:
        source = jsonl(tmp_path / "a.jsonl", self.rows())
        made = prepare(
            tmp_path / "out", [{"path": str(source)}], group_column="author", dev_fraction=0.2, test_fraction=0.2
        )
        groups = {
            split: {record["group"] for record in made.documents(split).records()} for split in ("train", "dev", "test")
        }
        assert all(groups.values())
        assert sum(map(len, groups.values())) == 18
        sizes = [made.manifest.splits["train"].bytes, len("".join(made.texts("train")).encode())]
        assert sizes[0] == sizes[1], "the group is no text"

    def test_a_group_that_is_missing_is_named(self, tmp_path: Path) -> None:
        rows = self.rows()
        rows[4]["author"] = None
        source = jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(RefusedError, match="line 5: author is empty"):
            prepare(tmp_path / "out", [{"path": str(source)}], group_column="author")

    @given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60))
    def test_what_shares_a_prompt_or_a_group_is_one_part(self, pairs: list[tuple[int, int]]) -> None:
        units, groups = (np.unique(column, return_inverse=True)[1] for column in zip(*pairs, strict=True))
        part = _connected(units, groups)
        for column in (units, groups):
            for value in set(column.tolist()):
                assert len(set(part[column == value].tolist())) == 1
        joined = {(f"u{u}", f"g{g}"): p for u, g, p in zip(units.tolist(), groups.tolist(), part.tolist(), strict=True)}
        for one in set(part.tolist()):  # and no more than that: within a part, all are connected
            pending = [key for key, value in joined.items() if value == one]
            reached = set(pending[0])
            while grown := {name for pair in pending if reached & set(pair) for name in pair} - reached:
                reached |= grown
            assert reached == {name for pair in pending for name in pair}


class TestLabelledSources:
    def prepared(self, tmp_path: Path, weights: tuple[float, float], labels: str = "ab") -> Prepared:
        made = outputs(tmp_path / "out")
        files = {"one": sentences(200, seed=1), "two": sentences(200, seed=2)}
        sources = []
        for number, (name, texts) in enumerate(files.items()):
            rows = [{"text": f"{name} {text}", "label": labels[number]} for text in texts]
            sources.append(
                {"path": str(jsonl(tmp_path / f"{name}.jsonl", [*rows, *shared()])), "weight": weights[number]}
            )
        stream = FinetuneData.model_validate({"sources": sources})
        text = prepare(tmp_path / "text", [{"path": write(tmp_path, "text", 60, 9)}])
        config = PrepareStep(stream="finetune", seed=0, tokenizer=tokenizer_options(), finetune=stream, fingerprint="")
        run(config, context=Context.for_tests(), tokenizer_in=text.tokenizer, pretraining_data=text.train, **vars(made))
        return made

    def test_labels_and_contamination_are_counted_behind_the_weights(self, tmp_path: Path) -> None:
        made = self.prepared(tmp_path, (1, 4))
        notes = made.manifest.notes
        for split in ("train", "dev", "test"):
            documents = made.documents(split)
            own = [record["label"] for record in documents.records()]
            assert notes["labels"][split] == {label: own.count(label) for label in sorted(set(own))}
            if split != "train":
                marked = sum(record["contaminated"] for record in documents.records())
                assert notes["contaminated"][split] == marked
        counts = notes["labels"]["train"]
        assert counts["b"] > 3 * counts["a"]

    def test_a_label_that_the_weights_leave_out_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RefusedError, match="no training example is left of 'a'"):
            self.prepared(tmp_path, (1, 1_000_000), "cb")


def shared() -> list[dict[str, Any]]:
    """Examples that both sources hold."""
    return [{"text": text, "label": "a"} for text in sentences(5, seed=5)]
