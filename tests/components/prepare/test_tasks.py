"""The tasks that are not classification or generation, from files to what training reads."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, T5Config

from mixtune.components.prepare.config import FinetuneData
from mixtune.components.prepare.gathering import gather
from mixtune.components.shared.data.prepared import DataManifest, Split
from mixtune.components.shared.data.problems import Problems
from mixtune.components.shared.errors import RefusedError
from tests.conftest import sentences

from .prepared import Prepared, jsonl, prepare_finetune, prepare_pretrain, tokenizer_options
from .wordpiece import bert_folder

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
MASKED = tokenizer_options(objective="masked_lm")


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("causal")
    return prepare_pretrain(folder, jsonl(folder / "pt.jsonl", texts()))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("masked")
    return prepare_pretrain(folder, jsonl(folder / "pt.jsonl", texts()), tokenizer=MASKED)


def texts() -> list[dict[str, Any]]:
    return [{"text": text} for text in [*sentences(80), *(f"第{number}篇文章讲天气。" for number in range(20))]]


class TestMultiLabel:
    def rows(self, count: int = 60) -> list[dict[str, Any]]:
        lists = [["天气"], ["b", "天气"], [], ["a", "b"]]
        return [{"text": text, "label": lists[n % 4]} for n, text in enumerate(sentences(count, seed=2))]

    def test_targets_and_records(self, tmp_path: Path, causal: Prepared) -> None:
        source = jsonl(tmp_path / "a.jsonl", self.rows())
        made = prepare_finetune(tmp_path / "out", source, causal, task="multi_label")
        assert made.manifest.labels == ["a", "b", "天气"]
        assert made.manifest.task == "multi_label"
        given = {row["text"]: row["label"] for row in self.rows()}
        for split in SPLITS:
            documents = made.documents(split)
            records = documents.records()
            assert documents.targets.shape == (len(documents), 3)
            assert documents.targets.dtype == np.float32
            for record, targets in zip(records, documents.targets.tolist(), strict=True):
                assert record["labels"] == sorted(given[record["text"]])
                assert targets == [float(label in record["labels"]) for label in ("a", "b", "天气")]
                assert "label" not in record
            assert set(documents.labels.tolist()) == {-1}
            notes = made.manifest.notes
            assert [notes["labels"][split].get(label, 0) for label in ("a", "b", "天气")] == documents.targets.sum(
                0
            ).tolist()
            assert notes["unlabelled"][split] == sum(not record["labels"] for record in records)
        assert [len(made.documents(split)) for split in SPLITS] == [48, 6, 6]

    def test_csv_gives_the_same_as_jsonl(self, tmp_path: Path, causal: Prepared) -> None:
        with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([row["text"], ";".join(row["label"])] for row in self.rows())
        one = prepare_finetune(tmp_path / "1", tmp_path / "a.csv", causal, task="multi_label")
        two = prepare_finetune(tmp_path / "2", jsonl(tmp_path / "a.jsonl", self.rows()), causal, task="multi_label")
        assert one.manifest.digest == two.manifest.digest

    def test_a_rare_label_stays_in_train(self, tmp_path: Path, causal: Prepared) -> None:
        rows = self.rows()
        for number in range(6):
            rows[number]["label"] = [*rows[number]["label"], f"rare {number}"]
        for seed in range(5):
            source = jsonl(tmp_path / "a.jsonl", rows)
            made = prepare_finetune(
                tmp_path / str(seed), source, causal, seed, task="multi_label", dev_fraction=0.4, test_fraction=0.4
            )
            assert (made.documents("train").targets.sum(0) > 0).all()

    @given(st.lists(st.sets(st.sampled_from("abcdef"), max_size=4), min_size=3, max_size=40), st.integers(0, 9))
    def test_every_label_of_the_source_occurs_in_train(self, lists: list[set[str]], seed: int) -> None:
        rows = [{"text": f"text {number}", "label": sorted(labels)} for number, labels in enumerate(lists)]
        fsspec.filesystem("memory").pipe("/multi.jsonl", "\n".join(map(json.dumps, rows)).encode())
        stream = FinetuneData(source="memory://multi.jsonl", task="multi_label", dev_fraction=0.4, test_fraction=0.4)
        problems = Problems()
        with tempfile.TemporaryDirectory() as folder:
            gathered = gather(stream, seed, problems, Path(folder))
        assert not [problem for problem in problems.sentences() if "never in train" in problem]
        if not problems:
            trained = set(gathered.rows.label_counts(gathered.splits["train"]))
            assert trained == set().union(*lists) == set(gathered.labels or [])

    def test_contradictions_are_counted_and_order_is_none(self, tmp_path: Path, causal: Prepared) -> None:
        rows = self.rows()
        more = [{**rows[1], "label": ["天气", "b"]}, {**rows[1], "label": ["b"]}, {**rows[2], "label": ["b"]}]
        made = prepare_finetune(
            tmp_path / "out", jsonl(tmp_path / "a.jsonl", [*rows, *more]), causal, task="multi_label"
        )
        assert made.count("duplicates") == 3
        assert made.count("contradictory") == 2

    def test_labels_that_are_held_out_only_and_none_at_all(self, tmp_path: Path, causal: Prepared) -> None:
        source = jsonl(tmp_path / "a.jsonl", self.rows())
        dev = jsonl(tmp_path / "dev.jsonl", [{"text": "one", "label": ["a", "x", "y"]}, {"text": "two", "label": None}])
        with pytest.raises(RefusedError) as refused:
            prepare_finetune(tmp_path / "out", source, causal, task="multi_label", dev_source=str(dev))
        assert refused.value.problems == [
            "data.finetune.label_column (label): in dev but never in train: 'x', 'y'; add training examples",
            f"{dev}, line 2: label is empty; an empty list says that there is no label",
        ]
        nothing = jsonl(tmp_path / "b.jsonl", [{**row, "label": []} for row in self.rows()])
        with pytest.raises(RefusedError, match="no example has any label; at least one label is needed") as refused:
            prepare_finetune(tmp_path / "out", nothing, causal, task="multi_label")
        assert len(refused.value.problems) == 1

    def test_one_label_is_enough(self, tmp_path: Path, causal: Prepared) -> None:
        rows = [{**row, "label": ["spam"] if row["label"] else []} for row in self.rows()]
        made = prepare_finetune(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), causal, task="multi_label")
        assert made.manifest.labels == ["spam"]


class TestRegression:
    def rows(self, count: int = 60) -> list[dict[str, Any]]:
        return [{"text": f"{text} 天", "label": n / 4 - 3} for n, text in enumerate(sentences(count, seed=3))]

    def test_targets_and_records(self, tmp_path: Path, causal: Prepared) -> None:
        made = prepare_finetune(tmp_path / "out", jsonl(tmp_path / "a.jsonl", self.rows()), causal, task="regression")
        given = {row["text"]: row["label"] for row in self.rows()}
        assert made.manifest.labels is None
        for split in SPLITS:
            documents = made.documents(split)
            records = documents.records()
            assert [record["label"] for record in records] == [given[record["text"]] for record in records]
            assert documents.targets.tolist() == [[record["label"]] for record in records]
            assert set(documents.labels.tolist()) == {-1}
            assert made.manifest.notes["target_mean"][split] == pytest.approx(float(documents.targets.mean()))
            assert made.manifest.notes["target_std"][split] == pytest.approx(float(documents.targets.std()))
        assert sum(len(made.documents(split)) for split in SPLITS) == 60

    def test_training_on_one_number_is_refused(self, tmp_path: Path, causal: Prepared) -> None:
        rows = [{**row, "label": 0.1 if n % 2 else 0.1 + 1e-12} for n, row in enumerate(self.rows())]
        with pytest.raises(RefusedError, match=r"every training example has the number 0\.1; at least two numbers"):
            prepare_finetune(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), causal, task="regression")
        dev = jsonl(tmp_path / "dev.jsonl", [{"text": "x", "label": 7}])
        with pytest.raises(RefusedError, match="every training example"):
            prepare_finetune(
                tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), causal, task="regression", dev_source=str(dev)
            )

    def test_contradictions_are_counted(self, tmp_path: Path, causal: Prepared) -> None:
        rows = [*self.rows(), {**self.rows()[0], "label": 100}, self.rows()[1]]
        made = prepare_finetune(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), causal, task="regression")
        assert made.count("duplicates") == 2
        assert made.count("contradictory") == 1


class TestEnds:
    """A head that reads one hidden state finds an EOS at the end of every text."""

    @pytest.mark.parametrize("task", ["multi_label", "regression"])
    def test_trained_here_for_a_causal_model(self, tmp_path: Path, causal: Prepared, task: str) -> None:
        made = self.made(tmp_path, causal, task)
        tokenizer: Any = AutoTokenizer.from_pretrained(made.tokenizer.path)
        assert made.manifest.ends_with_eos
        for index in range(len(made.documents("dev"))):
            tokens = made.documents("dev").tokens(index).tolist()
            assert tokens == tokenizer(made.texts("dev")[index], truncation=True, max_length=32)["input_ids"]
            assert tokens[-1] == tokenizer.eos_token_id

    @pytest.mark.parametrize("task", ["classification", "multi_label", "regression"])
    def test_trained_here_for_masked_lm(self, tmp_path: Path, masked: Prepared, task: str) -> None:
        made = self.made(tmp_path, masked, task, tokenizer=MASKED)
        tokenizer: Any = AutoTokenizer.from_pretrained(made.tokenizer.path)
        before = Path(masked.tokenizer.path, "tokenizer.json").read_bytes()
        assert not made.manifest.ends_with_eos
        assert Path(made.tokenizer.path, "tokenizer.json").read_bytes() == before
        for index, text in enumerate(made.texts("dev")):
            tokens = made.documents("dev").tokens(index).tolist()
            assert tokens == tokenizer(text, truncation=True, max_length=32)["input_ids"]
            assert (tokens[0], tokens[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
            assert tokens.count(tokenizer.eos_token_id) == 1

    @pytest.mark.parametrize("task", ["generation", "question_answering"])
    def test_neither_generation_nor_question_answering(self, tmp_path: Path, causal: Prepared, task: str) -> None:
        made = self.made(tmp_path, causal, task)
        before = Path(causal.tokenizer.path, "tokenizer.json").read_bytes()
        assert not made.manifest.ends_with_eos
        assert Path(made.tokenizer.path, "tokenizer.json").read_bytes() == before

    def made(self, folder: Path, pretrained: Prepared, task: str, **options: Any) -> Prepared:
        rows: list[dict[str, Any]] = []
        for number, text in enumerate(sentences(30, seed=4)):
            label: Any = {"multi_label": ["ab"[number % 2]], "regression": number}.get(task, "ab"[number % 2])
            one = {"text": text, "label": label, "prompt": text, "completion": "yes"}
            rows.append({**one, "question": f"which {number}", "context": text, "answers": text.split()[0]})
        source = jsonl(folder / "a.jsonl", rows)
        return prepare_finetune(folder / "out", source, pretrained, task=task, **options)


def test_pretraining_text_of_a_masked_model_stands_between_its_ends(masked: Prepared, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(masked.tokenizer.path)
    assert tokenizer.mask_token_id is not None
    for split in SPLITS:
        for index, text in enumerate(masked.texts(split)):
            whole = tokenizer(text, verbose=False)["input_ids"]
            assert masked.documents(split).tokens(index).tolist() == whole
            assert (whole[0], whole[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_pretraining_text_of_bert_stands_between_cls_and_sep(tmp_path: Path) -> None:
    base = bert_folder(tmp_path / "base", [row["text"] for row in texts()])
    options = tokenizer_options(base=base, vocabulary_size=None)
    made = prepare_pretrain(tmp_path / "out", jsonl(tmp_path / "a.jsonl", texts()), tokenizer=options)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    for index, text in enumerate(made.texts("train")):
        tokens = made.documents("train").tokens(index).tolist()
        assert tokens == tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens([tokens[0], tokens[-1]]) == ["[CLS]", "[SEP]"]


class TestQuestionAnswering:
    def rows(self, count: int = 40) -> list[dict[str, Any]]:
        """Every fourth without an answer; contexts of one window and of several."""
        rows: list[dict[str, Any]] = []
        for number, text in enumerate(sentences(count, seed=5)):
            context = f"{text}。第{number}个城市是北京{number}。" + text.upper() * (number % 3)
            answers: Any = {"text": [f"北京{number}"], "answer_start": [context.index("北京")]}
            if number % 4 == 0:
                answers = {"text": [], "answer_start": []}
            rows.append({"question": f"第{number}个?", "context": context, "answers": answers})
        return rows

    @pytest.fixture(scope="class", params=["masked", "bert"])
    def made(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
        folder = tmp_path_factory.mktemp(request.param)
        source = jsonl(folder / "a.jsonl", self.rows())
        if request.param == "masked":
            pretrained, options = request.getfixturevalue("masked"), MASKED
        else:
            base = bert_folder(folder / "base", [row["text"] for row in texts()])
            options = tokenizer_options(base=base, vocabulary_size=None)
            pretrained = prepare_pretrain(folder / "pt", jsonl(folder / "pt.jsonl", texts()), tokenizer=options)
        return prepare_finetune(folder / "out", source, pretrained, task="question_answering", tokenizer=options)

    def test_every_window_is_as_the_format_says(self, made: Prepared) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(made.tokenizer.path)
        given = {row["question"]: row for row in self.rows()}
        seen: dict[str, str] = {}
        for split in SPLITS:
            documents = made.documents(split)
            assert documents.targets.shape == (len(documents), 2)
            assert set(documents.labels.tolist()) == {-1}
            for index, record in enumerate(documents.records()):
                tokens = documents.tokens(index).tolist()
                row = given[record["question"]]
                assert record["context"] == row["context"]
                assert record["answers"] == row["answers"]["text"]
                assert seen.setdefault(record["question"], record["id"]) == record["id"]
                assert len(tokens) <= 32
                assert tokens[0] == tokenizer.cls_token_id
                first_sep = tokens.index(tokenizer.sep_token_id)
                assert documents.second_from[index] == record["context_from"] == first_sep + 1
                assert len(tokens) == record["context_from"] + len(record["offsets"]) + 1
                self.check_target(record, documents.targets[index].astype(int).tolist())
                low, high = record["offsets"][0][0], record["offsets"][-1][1]
                assert record["bytes"] == len((record["question"] + record["context"][low:high]).encode())
        assert len(seen) == len(set(seen.values())) == 40

    def check_target(self, record: dict[str, Any], target: list[int]) -> None:
        if target == [0, 0]:
            return
        first, last = (record["offsets"][place - record["context_from"]] for place in target)
        assert record["answers"][0] in record["context"][first[0] : last[1]]

    def test_each_answer_is_in_a_window_and_the_counts_say_so(self, made: Prepared) -> None:
        train, heldout = made.manifest.notes, DataManifest.load(made.heldout.path).notes
        assert train == heldout
        for split in SPLITS:
            documents = made.documents(split)
            records = documents.records()
            having = {r["id"] for r, target in zip(records, documents.targets.tolist(), strict=True) if any(target)}
            answered = {record["id"] for record in records if record["answers"]}
            assert having == answered
            assert train["examples"][split] == len({record["id"] for record in records})
            assert train["unanswerable"][split] == train["examples"][split] - len(answered)
            assert train["windows"][split] == len(documents) > train["examples"][split]
            assert train["windows_with_answer"][split] == sum(any(target) for target in documents.targets.tolist())
            assert (made.count("dropped", split), made.count("answers_in_no_window", split)) == (0, 0)

    def test_tokens_are_those_of_a_plain_call(self, made: Prepared) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(made.tokenizer.path)
        documents = made.documents("train")
        found: dict[tuple[str, str], list[list[int]]] = {}
        for index, record in enumerate(documents.records()):
            found.setdefault((record["question"], record["context"]), []).append(documents.tokens(index).tolist())
        for (question, context), windows in found.items():
            plain = tokenizer(
                question, context, truncation="only_second", max_length=32, stride=8, return_overflowing_tokens=True
            )
            assert windows == plain["input_ids"]

    def test_the_first_answer_is_learned_where_it_is_said_to_stand(self, tmp_path: Path, masked: Prepared) -> None:
        rows = self.rows()
        context = "b cat, a cat"
        rows += [{"question": "x", "context": context, "answers": {"text": ["cat", "a"], "answer_start": [9, 7]}}]
        source = jsonl(tmp_path / "a.jsonl", rows)
        other = [str(jsonl(tmp_path / f"{name}.jsonl", [{**rows[1], "question": name}])) for name in ("dev", "test")]
        made = prepare_finetune(
            tmp_path / "out", source, masked, task="question_answering", tokenizer=MASKED,
            dev_source=other[0], test_source=other[1],
        )  # fmt: skip
        documents = made.documents("train")
        index, record = next((i, r) for i, r in enumerate(documents.records()) if r["question"] == "x")
        first, last = documents.targets[index].astype(int).tolist()
        assert record["answers"] == ["cat", "a"]
        offsets = record["offsets"][first - record["context_from"] : last + 1 - record["context_from"]]
        assert context[offsets[0][0] : offsets[-1][1]].strip() == "cat"
        assert offsets[0][0] >= 8

    def test_questions_too_long_are_dropped_and_answers_too_long_counted(
        self, tmp_path: Path, masked: Prepared
    ) -> None:
        rows = self.rows()
        rows.append({"question": "天" * 40, "context": "北京", "answers": "北京"})
        rows.append({"question": "什么?", "context": "天气" * 40, "answers": "天气" * 30})
        test = jsonl(tmp_path / "test.jsonl", rows[-3:])
        made = prepare_finetune(
            tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows[:-2]), masked,
            task="question_answering", tokenizer=MASKED, test_source=str(test),
        )  # fmt: skip
        assert made.manifest.notes["examples"]["test"] == 2
        assert (made.count("dropped", "test"), made.count("answers_in_no_window", "test")) == (1, 1)
        assert {record["question"] for record in made.documents("test").records()} == {rows[-3]["question"], "什么?"}

    def test_no_question_leaves_room(self, tmp_path: Path, masked: Prepared) -> None:
        rows = [{**row, "question": row["question"] + "天" * 40} for row in self.rows()]
        with pytest.raises(RefusedError) as refused:
            prepare_finetune(
                tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), masked, task="question_answering", tokenizer=MASKED
            )
        assert len(refused.value.problems) == 3
        assert "split dev has a question that leaves its context room in model.max_length = 32 tokens; raise it" in str(
            refused.value
        )
        assert not (tmp_path / "out").exists()

    def test_all_questions_on_a_context_are_in_one_split(self, tmp_path: Path, masked: Prepared) -> None:
        rows = [{**row, "question": f"{row['question']} {n}"} for row in self.rows(20) for n in range(3)]
        source = jsonl(tmp_path / "a.jsonl", rows)
        made = prepare_finetune(tmp_path / "out", source, masked, task="question_answering", tokenizer=MASKED)
        contexts = [{record["context"] for record in made.documents(split).records()} for split in SPLITS]
        assert [len(inside) for inside in contexts] == [16, 2, 2]
        assert len(set.union(*contexts)) == 20
        assert made.manifest.notes["examples"] == {"train": 48, "dev": 6, "test": 6}
        one = jsonl(tmp_path / "b.jsonl", [{**row, "context": "北京1", "answers": "北京1"} for row in rows])
        with pytest.raises(
            RefusedError, match=r"1 left after removing duplicates \(different contexts: a context stands"
        ):
            prepare_finetune(tmp_path / "out", one, masked, task="question_answering", tokenizer=MASKED)

    def test_duplicates_are_of_question_and_context(self, tmp_path: Path, masked: Prepared) -> None:
        rows = self.rows()
        more = [
            {**rows[1], "question": rows[1]["question"].upper() + " "},
            {**rows[2], "answers": {"text": ["第2"], "answer_start": [rows[2]["context"].index("第2")]}},
            {**rows[3], "question": "another"},
        ]
        source = jsonl(tmp_path / "a.jsonl", [*rows, *more])
        options: dict[str, Any] = {"task": "question_answering", "tokenizer": MASKED}
        made = prepare_finetune(tmp_path / "exact", source, masked, **options)
        assert (made.count("duplicates"), made.count("contradictory")) == (1, 1)
        assert sum(made.manifest.notes["examples"].values()) == 42
        made = prepare_finetune(tmp_path / "folded", source, masked, **options, duplicates="folded")
        assert (made.count("duplicates"), made.count("contradictory")) == (2, 1)
        assert sum(made.manifest.notes["examples"].values()) == 41

    def test_contamination_of_a_context_marks_all_its_windows(self, tmp_path: Path, masked: Prepared) -> None:
        seen = next(text for text in masked.texts("train") if len(text.split()) >= 13)
        dev = jsonl(
            tmp_path / "dev.jsonl",
            [
                {"question": "Who?", "context": f"Once, {seen.upper()}! " + "x " * 40, "answers": "Once"},
                {"question": "Where?", "context": "nothing of this stands anywhere", "answers": "nothing"},
            ],
        )
        source = jsonl(tmp_path / "a.jsonl", self.rows())
        made = prepare_finetune(
            tmp_path / "out", source, masked, task="question_answering", tokenizer=MASKED, dev_source=str(dev)
        )
        marks = [(record["question"], record["contaminated"]) for record in made.documents("dev").records()]
        assert set(marks) == {("Who?", True), ("Where?", False)}
        assert len(marks) > 3
        assert made.manifest.notes["contaminated"]["dev"] == 1

    def test_without_any_answer_there_is_nothing_to_learn(self, tmp_path: Path, masked: Prepared) -> None:
        rows = [{**row, "answers": ""} for row in self.rows()]
        with pytest.raises(RefusedError, match=r"answers_column \(answers\): no training example has an answer"):
            prepare_finetune(
                tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), masked, task="question_answering", tokenizer=MASKED
            )

    def test_a_tokenizer_that_is_not_fast_is_refused_along_with_wrong_data(
        self, tmp_path: Path, masked: Prepared
    ) -> None:
        tokenizer = ByT5Tokenizer()
        tokenizer.save_pretrained(tmp_path / "base")
        T5Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
        options = tokenizer_options(base=str(tmp_path / "base"), vocabulary_size=None)
        pretrained = prepare_pretrain(tmp_path / "pt", jsonl(tmp_path / "pt.jsonl", texts()), tokenizer=options)
        rows = [*self.rows(), {"question": "x", "context": "y", "answers": "z"}]
        source = jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(RefusedError) as refused:
            prepare_finetune(tmp_path / "out", source, pretrained, task="question_answering", tokenizer=options)
        first, second = refused.value.problems
        assert first.startswith("data.finetune.task: is question_answering, which needs to know where in the text")
        assert "(ByT5Tokenizer, not a fast one) does not tell. Choose another base model or task" in first
        assert second == f"{source}, line 41: answers holds 'z', which does not stand in the context"
