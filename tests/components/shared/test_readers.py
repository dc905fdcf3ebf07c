"""Reading every format, finding every mistake, at once and with its place."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.shared.data.data_sets import read_dataset
from mixtune.components.shared.data.problems import SHOWN_PROBLEMS
from mixtune.components.shared.data.sources import read
from mixtune.components.shared.data.tallies import log_lines, warnings

from .read_sources import LABELLED, problems_of, reading, rows_of, texts_of


class TestFormats:
    def test_jsonl_with_bom_crlf_and_blank_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes('﻿{"text": "一二三"}\r\n\r\n{"text": "b\\r\\nc"}'.encode())
        rows = rows_of(path)
        assert [row.values["text"] for row in rows] == ["一二三", "b\r\nc"]
        assert [row.where for row in rows] == [f"{path}, line 1", f"{path}, line 3"]

    def test_json_as_one_list(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
        assert [(row.values["text"], row.where) for row in rows_of(path)] == [
            ("a", f"{path}, item 1"),
            ("b", f"{path}, item 2"),
        ]

    def test_json_with_a_record_on_each_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text('{"text": "a"}\n{"text": "b"}\n')
        assert texts_of(path) == ["a", "b"]

    def test_csv_with_quoted_line_ends_keeps_count_of_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_bytes('﻿text,label\r\n"one\r\ntwo, ""three""",x\r\n\r\n四,y\r\n'.encode())
        rows = rows_of(path, LABELLED)
        assert [row.values for row in rows] == [
            {"text": 'one\r\ntwo, "three"', "label": "x"},
            {"text": "四", "label": "y"},
        ]
        assert [row.where for row in rows] == [f"{path}, line 2", f"{path}, line 5"]

    def test_tsv(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tsv"
        path.write_text("label\ttext\nx\ta, b\n")
        assert rows_of(path, LABELLED)[0].values == {"text": "a, b", "label": "x"}

    def test_quotes_in_tsv_are_characters_unless_asked_for(self, tmp_path: Path) -> None:
        rows = [f"text {number}\tlabel {number % 2}" for number in range(60)]
        rows[10], rows[40] = '"Why\tx', 'not?"\ty'
        path = tmp_path / "a.tsv"
        path.write_text("\n".join(["text\tlabel", *rows]) + "\n")
        found = rows_of(path, LABELLED)
        assert len(found) == 60
        assert [found[number].values for number in (10, 40)] == [
            {"text": '"Why', "label": "x"},
            {"text": 'not?"', "label": "y"},
        ]
        frame = pd.DataFrame({"text": ["a\tb", 'say "x"', "one\ntwo"], "label": ["x", "y", "z"]})
        frame[1:2].to_csv(path, sep="\t", index=False)
        by = reading(LABELLED)
        assert [row.values["text"] for row in read(str(path), by)] == ['"say ""x"""']
        assert warnings(by.tallies.table(), "x") == [
            "data.x: 1 of 1 records (100 %) have a field in quotes with doubled quotes inside, which are kept as they are; set "
            "tsv_quotes"
        ]
        frame.to_csv(path, sep="\t", index=False)
        assert [row.values["text"] for row in rows_of(path, LABELLED, tsv_quotes=True)] == list(frame["text"])

    def test_records_that_span_lines_are_counted(self, tmp_path: Path) -> None:
        lines = [f"text {number},label {number % 2}" for number in range(60)]
        lines[10], lines[40] = '"Why,x', 'not?",y'
        path = tmp_path / "a.csv"
        path.write_text("\n".join(["text,label", *lines]) + "\n")
        by = reading(LABELLED)
        assert len(list(read(str(path), by))) == 30
        one, two = log_lines(by.tallies.table(), "x")
        assert one == (
            "data.x: 1 of 30 records (3.3 %) span several lines of their file (such as the 31 lines from "
            f"{path}, line 12)"
        )
        assert two.startswith("data.x: 29 of 61 lines (48 %) stand in quotes and look like records of their own")
        assert warnings(by.tallies.table(), "x") == [two]

    def test_paragraphs_in_a_field_are_no_swallowed_records(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        text = "Dear all,\n\nthe train, as it seems, is late.\nIt comes at five.\n\nYours,\nAnn"
        pd.DataFrame({"text": [f"{number} {text}" for number in range(20)], "label": ["x"] * 20}).to_csv(path)
        by = reading(LABELLED)
        assert len(list(read(str(path), by))) == 20
        assert len(log_lines(by.tallies.table(), "x")) == 1
        assert warnings(by.tallies.table(), "x") == []

    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pd.DataFrame({"id": range(1500), "text": [f"文 {i}" for i in range(1500)]}).to_parquet(path)
        rows = rows_of(path)
        assert [row.values["text"] for row in rows] == [f"文 {i}" for i in range(1500)]
        assert rows[-1].where == f"{path}, row 1500"

    def test_one_text_file_gives_its_paragraphs(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes("\r\none\r\nstill one\r\n \t\r\n\r\n二\r\n".encode())
        assert [(row.values["text"], row.where) for row in rows_of(path)] == [
            ("one\nstill one", f"{path}, line 2"),
            ("二", f"{path}, line 6"),
        ]

    def test_several_text_files_are_one_document_each(self, tmp_path: Path) -> None:
        (tmp_path / "b.txt").write_text("second\n\nfile\n")
        (tmp_path / "a.txt").write_text("first\n")
        assert texts_of(tmp_path) == ["first", "second\n\nfile"]

    @pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
    def test_gzip(self, tmp_path: Path, suffix: str) -> None:
        content = {".jsonl": '{"text": "词"}', ".csv": "text\n词\n", ".txt": "词"}[suffix]
        path = tmp_path / f"a{suffix}.gz"
        path.write_bytes(gzip.compress(content.encode()))
        assert texts_of(path) == ["词"]

    def test_folder_is_read_in_order_and_passes_over_what_is_hidden_or_unknown(self, tmp_path: Path) -> None:
        for name in ("b.jsonl", "a/z.jsonl", ".hidden.jsonl", "_part.jsonl", ".cache/x.jsonl", "README.md", "x.tar.gz"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"text": name}) + "\n")
        assert texts_of(tmp_path) == ["a/z.jsonl", "b.jsonl"]
        assert rows_of(f"{tmp_path}/")[0].where == f"{tmp_path}/a/z.jsonl, line 1"

    def test_glob(self, tmp_path: Path) -> None:
        for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
            (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
        assert texts_of(tmp_path / "a*.jsonl") == ["a1.jsonl", "a2.jsonl"]

    def test_name_with_brackets_is_a_file_before_it_is_a_glob(self, tmp_path: Path) -> None:
        (tmp_path / "a[1].jsonl").write_text('{"text": "bracket"}\n')
        assert texts_of(tmp_path / "a[1].jsonl") == ["bracket"]

    def test_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
        monkeypatch.chdir(tmp_path)
        assert rows_of("a.jsonl")[0].where == "a.jsonl, line 1"

    def test_fsspec_url(self) -> None:
        import fsspec

        filesystem = fsspec.filesystem("memory")
        filesystem.pipe("/some/a.jsonl.gz", gzip.compress(b'{"text": "far"}\n'))
        filesystem.pipe("/some/b.csv", b"text\naway\n")
        assert texts_of("memory://some/a.jsonl.gz") == ["far"]
        assert texts_of("memory://some") == ["far", "away"]
        assert texts_of("memory://some/*.csv") == ["away"]

    def test_hub_data_set_gives_names_of_classes(self) -> None:
        from datasets import ClassLabel, Dataset, Features, Value

        features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
        data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
        by = reading(LABELLED)
        rows = list(read_dataset(data, "hub:o/n", by))
        assert [row.values["label"] for row in rows] == ["pos", "neg"]
        assert by.problems.sentences() == ["hub:o/n, row 3: label is empty"]

    def test_labels_can_be_numbers_and_truth_values(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in (3, 2.0, True, " x ")))
        assert [row.values["label"] for row in rows_of(path, LABELLED)] == ["3", "2", "true", "x"]

    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1))
    def test_whatever_csv_holds_comes_back(self, texts: list[str]) -> None:
        import fsspec

        texts = [text for text in texts if text.strip()]
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer)
        writer.writerows([["id", "text"], *[[str(i), text] for i, text in enumerate(texts)]])
        fsspec.filesystem("memory").pipe("/roundtrip.csv", buffer.getvalue().encode())
        if texts:
            assert texts_of("memory://roundtrip.csv") == texts


class TestMistakes:
    def test_missing_file_folder_glob_and_unknown_format(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "a.docx").write_bytes(b"x")
        assert problems_of("nowhere/a.jsonl") == ["data.x.source: nowhere/a.jsonl does not exist; correct the path"]
        assert "holds no file that ends in .jsonl" in problems_of(tmp_path / "empty")[0]
        assert problems_of(tmp_path / "*.jsonl") == [f"data.x.source: no file matches {tmp_path}/*.jsonl"]
        assert "a.docx ends in none of .jsonl" in problems_of(tmp_path / "a.docx")[0]

    def test_protocol_without_its_package_and_unknown_protocol(self) -> None:
        assert "gs://bucket/a.jsonl needs a package that is not installed" in problems_of("gs://bucket/a.jsonl")[0]
        assert "what://a.jsonl cannot be opened" in problems_of("what://a.jsonl")[0]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.json"])
    def test_empty_file(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"")
        assert problems_of(tmp_path / name) == [f"data.x.source: {tmp_path / name} holds no records"]

    def test_empty_file_among_others_is_found_beside_another_problem(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("{\n")
        (tmp_path / "b.jsonl").write_text("")
        (tmp_path / "c.txt").write_text(" \n")
        found = problems_of(tmp_path)
        assert len(found) == 3
        assert found[0] == f"data.x.source: {tmp_path}/b.jsonl holds no records"
        assert "a.jsonl, line 1, character" in found[1]
        assert found[2] == f"{tmp_path}/c.txt: is empty"

    def test_every_bad_line_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(
            b'{"text": "fine"}\n{"text": oops}\n{"text": NaN}\n{"text": null}\n{"text": "  "}\n{"text": 3}\n["text"]\n'
            b'{"body": "x"}\n{"text": "\\ud800"}\n{"text": "\xff"}\n'
        )
        assert problems_of(path) == [
            f"{path}, line 2, character 10: is no JSON (Expecting value)",
            f"{path}, line 3: text is NaN, not text",
            f"{path}, line 4: text is empty",
            f"{path}, line 5: text is empty",
            f"{path}, line 6: text is a number, not text",
            f"{path}, line 7: is a list, not an object with named fields",
            f"{path}, line 8: has no text",
            f"{path}, line 9: text holds half of a surrogate pair, which is no character",
            f"{path}, line 10: is not UTF-8 (byte 0xff at position 11); save the file as UTF-8",
        ]

    def test_long_lists_of_problems_are_cut(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("{\n" * (SHOWN_PROBLEMS + 7))
        found = problems_of(path)
        assert len(found) == SHOWN_PROBLEMS + 1
        assert found[-1] == "and 7 more problems of records"

    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
    def test_missing_column_names_those_that_exist(self, tmp_path: Path, name: str) -> None:
        frame = pd.DataFrame({"body": ["x"], "label": ["y"]})
        write = {".jsonl": lambda p: frame.to_json(p, orient="records", lines=True), ".parquet": frame.to_parquet}
        write.get((tmp_path / name).suffix, lambda p: frame.to_csv(p, index=False))(tmp_path / name)
        (problem,) = problems_of(tmp_path / name, LABELLED)
        assert "has no column text; its columns are body, label" in problem
        assert name in problem

    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
    def test_nan_labels(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        if name == "a.jsonl":
            path.write_text('{"text": "t", "label": 1.0}\n{"text": "t", "label": NaN}\n{"text": "t", "label": 0.5}\n')
        elif name == "a.csv":
            path.write_text("text,label\nt,1\nt,nan\nt,\n")
        else:
            pd.DataFrame({"text": ["t"] * 3, "label": [1.0, float("nan"), 0.5]}).to_parquet(path)
        found = problems_of(path, LABELLED)
        assert len(found) == 2
        assert f"{path}, {'row 2' if name == 'a.parquet' else 'line 3' if name == 'a.csv' else 'line 2'}: " in found[0]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"])
    def test_missing_labels_are_the_same_in_every_format(self, tmp_path: Path, name: str) -> None:
        labels = ["none", "x", "None", "N/A", "null", "nan", "NA", " NULL ", ""]
        frame = pd.DataFrame({"text": ["t"] * len(labels), "label": labels})
        write = {
            "a.jsonl": lambda: frame.to_json(tmp_path / name, orient="records", lines=True),
            "a.json": lambda: frame.to_json(tmp_path / name, orient="records"),
            "a.csv": lambda: frame.to_csv(tmp_path / name, index=False),
            "a.tsv": lambda: frame.to_csv(tmp_path / name, index=False, sep="\t", quoting=csv.QUOTE_NONE),
            "a.parquet": lambda: frame.to_parquet(tmp_path / name),
        }
        write[name]()
        by = reading(LABELLED)
        assert [row.values["label"] for row in read(str(tmp_path / name), by)] == ["none", "x"]
        found = [problem.split(": ", 1)[1] for problem in by.problems.sentences()]
        rule = "which stands for a missing value; remove the record, or give the class another name"
        assert found == [*(f"label is {text.strip()}, {rule}" for text in labels[2:-1]), "label is empty"]

    def test_other_json_is_one_sentence(self, tmp_path: Path) -> None:
        rows = [{"text": "a", "more": [1, 2]}, {"text": "b"}]
        path = tmp_path / "a.jsonl"
        path.write_text("\n" + "\n".join(json.dumps(row, indent=1) for row in rows))
        objects = f"data.x.source: {path}, line 2: an object spans several lines; write one object on each line"
        assert problems_of(path) == [objects]
        for indent in (None, 2):
            path.write_text(json.dumps(rows, indent=indent))
            assert problems_of(path) == [
                f"data.x.source: {path} is a JSON list; write one object on each line, or let its name end in .json"
            ]
        pretty = tmp_path / "a.json"
        pretty.write_text(json.dumps(rows[0], indent=1))
        assert problems_of(pretty) == [f"{objects.replace('a.jsonl, line 2', 'a.json, line 1')} or a list of objects"]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
    def test_compressed_content_with_another_name_is_one_sentence(self, tmp_path: Path, name: str) -> None:
        content: dict[Callable[[bytes], bytes], str] = {
            gzip.compress: "is compressed with gzip; its name must end in .gz",
            bz2.compress: "is compressed with bzip2; its name must end in .bz2",
            lzma.compress: "is compressed with xz; its name must end in .xz",
        }
        for compress, problem in content.items():
            (tmp_path / name).write_bytes(compress(b'{"text": "a"}\n' * 100))
            assert problems_of(tmp_path / name) == [f"data.x.source: {tmp_path / name} {problem}"]

    def test_columns_count_within_the_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"text": "a"}\r\n{"text": \r\n{"text": oops}\n')
        first, second = problems_of(path)
        assert first.startswith(f"{path}, line 2, character ")
        assert int(first.split("character ")[1].split(":")[0]) in (9, 10)
        assert second.startswith(f"{path}, line 3, character 10: ")

    def test_csv_with_wrong_number_of_fields_and_an_open_quote(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text('text,label\n"a\nb",x\nc\nd,y,z\n"never closed\n')
        assert problems_of(path, LABELLED) == [
            f"{path}, line 4: the number of fields is 1, in the header 2",
            f"{path}, line 5: the number of fields is 3, in the header 2",
            f"{path}, line 6: is no valid CSV (unexpected end of data)",
        ]

    def test_csv_with_the_column_twice(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text,text\na,b\n")
        assert "has 2 columns named text" in problems_of(tmp_path / "a.csv")[0]

    def test_text_file_has_no_labels(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x\n")
        assert "is plain text and has no columns text, label" in problems_of(tmp_path / "a.txt", LABELLED)[0]

    def test_broken_containers(self, tmp_path: Path) -> None:
        packed = gzip.compress(b'{"text": "x"}\n' * 1000)
        (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
        (tmp_path / "none.jsonl.gz").write_bytes(b"plain")
        (tmp_path / "none.parquet").write_bytes(b"plain")
        (tmp_path / "utf16.csv").write_text("text\nx\n", encoding="utf-16")
        for name in ("cut.jsonl.gz", "none.jsonl.gz"):
            (problem,) = problems_of(tmp_path / name)
            assert problem.startswith(f"data.x.source: {tmp_path / name} cannot be read")
        assert "none.parquet is no Parquet file" in problems_of(tmp_path / "none.parquet")[0]
        assert "utf16.csv is UTF-16; save it as UTF-8" in problems_of(tmp_path / "utf16.csv")[0]

    def test_hub_name_that_is_none_and_hub_that_is_out_of_reach(self) -> None:
        assert "hub:nothing is no hub data set; write hub:owner/name" in problems_of("hub:nothing")[0]
        (problem,) = problems_of("hub:nobody-at-all/nothing-at-all")
        assert problem.startswith("data.x.source: hub:nobody-at-all/nothing-at-all cannot be loaded (")
