"""Reading lists of labels, numbers and answers, in every format, and finding every mistake in them."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.shared.data.data_sets import read_dataset
from mixtune.components.shared.data.values import ReferenceAnswer
from tests.components.shared.read_sources import problems_of, reading, rows_of

from .prepared import jsonl

MULTI = {"text": "text", "labels": "label"}
NUMBERED = {"text": "text", "number": "label"}
ASKED = {"question": "question", "context": "context", "answers": "answers"}


def table(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


class TestLabelLists:
    def found(self, source: Path) -> list[tuple[str, ...]]:
        return [row.labels for row in rows_of(source, MULTI)]

    def test_jsonl(self, tmp_path: Path) -> None:
        lists: list[Any] = [["b", "a"], [], ["天气", 3, 2.0, " x "], ["a", "a"], "b; a", '["c;d"]', "", [True]]
        source = jsonl(tmp_path / "a.jsonl", [{"text": "t", "label": labels} for labels in lists])
        assert self.found(source) == [
            ("a", "b"), (), ("2", "3", "x", "天气"), ("a",), ("a", "b"), ("c;d",), (), ("true",)
        ]  # fmt: skip
        assert rows_of(source, MULTI)[0].values == {"text": "t"}

    def test_csv(self, tmp_path: Path) -> None:
        cells = ["b;a", "", " 天气 ; 3;", '["x;y", 4]', "one [draft]", "one"]
        source = table(tmp_path / "a.csv", [["text", "label"], *[["t", cell] for cell in cells]])
        assert self.found(source) == [("a", "b"), (), ("3", "天气"), ("4", "x;y"), ("one [draft]",), ("one",)]

    def test_text_of_a_list_that_is_no_json_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        lists = [["red", "green"], ["it's"], []]  # the second is JSON too
        pd.DataFrame({"text": ["t"] * 3, "label": lists}).to_csv(path, index=False)
        with path.open("a") as file:
            file.write("t,['red' 'green']\nt,[draft]\n")
        form = 'which starts as a list but is no JSON; write it as ["red", "green"], or red;green'
        assert problems_of(path, MULTI) == [
            f"{path}, line {number}: label is {shown}, {form}"
            for number, shown in (
                (2, '"[\'red\', \'green\']"'), (5, '"[\'red\' \'green\']"'), (6, "'[draft]'")
            )
        ]  # fmt: skip
        rows = [{"text": "t", "label": "['red']"}]
        assert len(problems_of(jsonl(tmp_path / "a.jsonl", rows), MULTI)) == 1

    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pd.DataFrame({"text": ["t"] * 3, "label": [["b", "天"], [], ["a"]]}).to_parquet(path)
        assert self.found(path) == [("b", "天"), (), ("a",)]
        pd.DataFrame({"text": ["t"], "label": [[2, 1]]}).to_parquet(path)
        assert self.found(path) == [("1", "2")]

    def test_hub_data_set_gives_names_of_classes(self) -> None:
        from datasets import ClassLabel, Dataset, Features, List, Value

        features = Features({"text": Value("string"), "label": List(ClassLabel(names=["neg", "pos"]))})
        data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [[1, 0], [], [-1]]}, features=features)
        by = reading(MULTI)
        rows = list(read_dataset(data, "hub:o/n", by))
        assert [row.labels for row in rows] == [("neg", "pos"), ()]
        assert by.problems.sentences() == ["hub:o/n, row 3: label holds a label that is empty"]

    def test_every_mistake_is_named(self, tmp_path: Path) -> None:
        wrong: list[Any] = [
            None,
            3,
            {"a": 1},
            ["a", ""],
            ["a", None],
            [0.5],
            [["a"]],
            float("nan"),
            ["\ud800"],
            ["nan"],
        ]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": "t", "label": labels}) + "\n" for labels in wrong))
        assert problems_of(path, MULTI) == [
            f"{path}, line {number}: label {problem}"
            for number, problem in enumerate(
                [
                    "is empty; an empty list says that there is no label",
                    "is a number, not a list of labels",
                    "is an object, not a list of labels",
                    "holds a label that is empty",
                    "holds a label that is empty",
                    "holds a label that is 0.5; a label is text or a whole number",
                    "holds a label that is a list, not text",
                    "is NaN, not a list of labels",
                    "holds a label that holds half of a surrogate pair, which is no character",
                    "holds a label that is nan, which stands for a missing value; remove the record, or give the class "
                    "another name",
                ],
                start=1,
            )
        ]


class TestNumbers:
    def found(self, source: Path) -> list[float | None]:
        return [row.number for row in rows_of(source, NUMBERED)]

    def test_formats(self, tmp_path: Path) -> None:
        assert self.found(jsonl(tmp_path / "a.jsonl", [{"text": "t", "label": n} for n in (1, -2.5, 0, 1e30)])) == [
            1.0, -2.5, 0.0, 1e30
        ]  # fmt: skip
        cells = ["1", " -2.5 ", "1e-3", "+4"]
        assert self.found(table(tmp_path / "a.csv", [["text", "label"], *[["t", cell] for cell in cells]])) == [
            1.0, -2.5, 0.001, 4.0
        ]  # fmt: skip
        for name, values in (("i", [1, 2]), ("f", [0.5, 1.5]), ("d", [Decimal("0.5"), Decimal("1.25")])):
            pd.DataFrame({"text": ["t"] * 2, "label": values}).to_parquet(tmp_path / f"{name}.parquet")
            assert self.found(tmp_path / f"{name}.parquet") == [float(value) for value in values]

    @given(st.lists(st.floats(-3e38, 3e38), min_size=1))
    def test_whatever_csv_holds_comes_back(self, numbers: list[float]) -> None:
        import fsspec

        content = "text,label\n" + "".join(f"t,{number!r}\n" for number in numbers)
        fsspec.filesystem("memory").pipe("/numbers.csv", content.encode())
        assert [row.number for row in rows_of("memory://numbers.csv", NUMBERED)] == numbers

    def test_every_mistake_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        wrong = ["null", "NaN", "Infinity", "-1e999", '"3"', "true", "[1]", "1e39", "1" + "0" * 400]
        path.write_text("".join(f'{{"text": "t", "label": {value}}}\n' for value in wrong))
        too_large = "a number must be finite and at most 3.4e+38"
        assert problems_of(path, NUMBERED) == [
            f"{path}, line {number}: label {problem}"
            for number, problem in enumerate(
                [
                    "is empty",
                    "is NaN, not a number",
                    f"is inf; {too_large}",
                    f"is -inf; {too_large}",
                    "is text, not a number",
                    "is a truth value, not a number",
                    "is a list, not a number",
                    f"is 1e+39; {too_large}",
                    f"is inf; {too_large}",
                ],
                start=1,
            )
        ]
        cells = ["", "three", "1,5", "nan", "inf", "1_000"]
        source = table(tmp_path / "a.csv", [["text", "label"], *[["t", cell] for cell in cells]])
        assert [problem.split(": ", 1)[1] for problem in problems_of(source, NUMBERED)] == [
            "label is empty",
            "label is 'three', not a number",
            "label is '1,5', not a number",
            "label is NaN, not a number",
            f"label is inf; {too_large}",
            "label is '1_000', not a number",
        ]


class TestAnswers:
    CONTEXT = "北京是中国的首都。Paris is the capital of France; Paris is large."

    def found(self, source: str | Path) -> list[tuple[ReferenceAnswer, ...]]:
        return [row.answers for row in rows_of(source, ASKED)]

    def rows(self, *answers: Any) -> list[dict[str, Any]]:
        return [{"question": "Which?", "context": self.CONTEXT, "answers": one} for one in answers]

    def test_jsonl(self, tmp_path: Path) -> None:
        second = self.CONTEXT.rindex("Paris")
        source = jsonl(
            tmp_path / "a.jsonl",
            self.rows(
                "Paris",
                ["北京", "中国的首都"],
                {"text": ["Paris", "large"], "answer_start": [second, second + 9]},
                {"text": ["Paris"]},
            ),
        )
        assert self.found(source) == [
            (ReferenceAnswer("Paris", 9),),
            (ReferenceAnswer("北京", 0), ReferenceAnswer("中国的首都", 3)),
            (ReferenceAnswer("Paris", second), ReferenceAnswer("large", second + 9)),
            (ReferenceAnswer("Paris", 9),),
        ]
        nothing = jsonl(tmp_path / "b.jsonl", self.rows("", [], {"text": [], "answer_start": []}, None, "  "))
        assert self.found(nothing) == [()] * 5

    def test_blanks_around_an_answer_and_repetitions_are_left_out(self, tmp_path: Path) -> None:
        start = self.CONTEXT.index(" is")
        answers = {"text": [" is ", "is", "is"], "answer_start": [start, start + 1, start + 1]}
        assert self.found(jsonl(tmp_path / "a.jsonl", self.rows(answers))) == [(ReferenceAnswer("is", start + 1),)]
        assert self.found(jsonl(tmp_path / "a.jsonl", self.rows("Paris\n"))) == [(ReferenceAnswer("Paris", 9),)]

    def test_csv_holds_text_or_json(self, tmp_path: Path) -> None:
        cells = ["Paris", "", '["北京", "Paris"]', '{"text": ["Paris"], "answer_start": [9]}']
        rows = [[self.CONTEXT, "Which?", cell] for cell in cells]
        source = table(tmp_path / "a.csv", [["context", "question", "answers"], *rows])
        assert self.found(source) == [
            (ReferenceAnswer("Paris", 9),),
            (),
            (ReferenceAnswer("北京", 0), ReferenceAnswer("Paris", 9)),
            (ReferenceAnswer("Paris", 9),),
        ]
        brackets = table(tmp_path / "b.csv", [["context", "question", "answers"], ["it [sic] is", "Which?", "[sic]"]])
        assert self.found(brackets) == [(ReferenceAnswer("[sic]", 3),)]

    def test_parquet_and_hub(self, tmp_path: Path) -> None:
        from datasets import Dataset

        rows = self.rows({"text": ["北京"], "answer_start": [0]}, {"text": [], "answer_start": []})
        pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
        assert self.found(tmp_path / "a.parquet") == [(ReferenceAnswer("北京", 0),), ()]
        by = reading(ASKED)
        hub = read_dataset(Dataset.from_list(rows), "hub:o/n", by)
        assert [row.answers for row in hub] == [(ReferenceAnswer("北京", 0),), ()]
        assert by.problems.sentences() == []

    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(0), st.integers(1))
    def test_any_piece_of_the_context_is_found_where_it_is_said_to_stand(
        self, context: str, at: int, size: int
    ) -> None:
        import fsspec

        start = at % len(context)
        piece = context[start : start + size]
        record = {"question": "q", "context": context, "answers": {"text": [piece], "answer_start": [start]}}
        if not piece.strip():
            return
        fsspec.filesystem("memory").pipe("/piece.jsonl", json.dumps(record).encode())
        ((answer,),) = self.found("memory://piece.jsonl")
        assert answer.text == piece.strip()
        assert context[answer.start : answer.start + len(answer.text)] == answer.text
        assert answer.start >= start

    def test_every_mistake_is_named(self, tmp_path: Path) -> None:
        wrong: list[Any] = [
            "London",
            ["Paris", "London"],
            {"text": ["Paris"], "answer_start": [8]},
            {"text": ["Paris"], "answer_start": [900]},
            {"text": ["Paris"], "answer_start": [-5]},
            {"text": ["Paris"], "answer_start": [9, 10]},
            {"text": ["Paris"], "answer_start": ["9"]},
            {"answer_start": [9]},
            [""],
            [3],
            7,
            float("nan"),
            "\ud800",
        ]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows(*wrong)))
        assert problems_of(path, ASKED) == [
            f"{path}, line {number}: answers {problem}"
            for number, problem in enumerate(
                [
                    "holds 'London', which does not stand in the context",
                    "holds 'London', which does not stand in the context",
                    "holds 'Paris' at character 8 of the context, where '。Pari' stands",
                    "holds 'Paris' at character 900 of the context, where nothing stands",
                    "holds 'Paris' at character -5 of the context, where nothing stands",
                    "has 1 in text, and answer_start is not a list of as many",
                    "has an answer_start that is no whole number",
                    "is an object without the list text; give text, and with it answer_start if you can",
                    "holds an answer that is empty",
                    "holds an answer that is a number, not text",
                    "is a number, not text, a list of texts or an object with text and answer_start",
                    "is NaN, not an answer",
                    "holds an answer that holds half of a surrogate pair, which is no character",
                ],
                start=1,
            )
        ]

    def test_a_wrong_context_is_one_problem_and_missing_columns_are_named(self, tmp_path: Path) -> None:
        rows: list[dict[str, Any]] = [{"question": "", "context": " ", "answers": "x"}]
        rows += [{"question": "q", "context": None, "answers": "x"}]
        path = jsonl(tmp_path / "a.jsonl", rows)
        assert problems_of(path, ASKED) == [
            f"{path}, line 1: question is empty",
            f"{path}, line 1: context is empty",
            f"{path}, line 2: context is empty",
        ]
        jsonl(path, [{"question": "q", "answer": "x"}])
        assert problems_of(path, ASKED) == [
            f"data.x.source: {path}, line 1 has no column context, answers; its columns are question, answer"
        ]
