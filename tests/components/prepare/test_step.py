"""The step on small data: what it writes, what it removes and marks, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from mixtune.components.prepare.config import FinetuneData, PrepareStep
from mixtune.components.prepare.step import run
from mixtune.components.shared.data.prepared import DataManifest, Split
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.context import Context
from tests.conftest import sentences

from .prepared import Prepared, jsonl, outputs, prepare_finetune, prepare_pretrain, tokenizer_options
from .test_tokenization import base_model

SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("pretrained")
    rows = [{"text": text} for text in sentences(100)] + [{"text": f"第{number}篇文章讲天气。"} for number in range(20)]
    return prepare_pretrain(folder, jsonl(folder / "pt.jsonl", rows))


def labelled(count: int = 60, labels: str = "xyz") -> list[dict[str, Any]]:
    return [
        {"text": text, "label": labels[number % len(labels)]} for number, text in enumerate(sentences(count, seed=1))
    ]


def files(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


class TestPretrain:
    def test_every_document_is_in_one_split_whole_and_comes_back_from_its_tokens(self, pretrained: Prepared) -> None:
        tokenizer = AutoTokenizer.from_pretrained(pretrained.tokenizer.path)
        every = []
        splits: tuple[Split, ...] = ("train", "control", "dev", "test")
        for split in splits:
            documents = pretrained.documents(split)
            for index, record in enumerate(documents.records()):
                tokens = documents.tokens(index).tolist()
                assert tokens[0] == tokenizer.bos_token_id
                assert tokens[-1] == tokenizer.eos_token_id
                assert tokenizer.decode(tokens[1:-1]) == record["text"]
                assert record["bytes"] == len(record["text"].encode())
                assert record["source"].endswith("line " + record["source"].rsplit(" ", 1)[1])
            assert set(documents.supervised_from.tolist()) == {1}
            assert set(documents.labels.tolist()) == {-1}
            every += pretrained.texts(split)
        assert len(every) == len(set(every)) == 120
        assert [len(pretrained.documents(split)) for split in splits] == [103, 5, 6, 6]

    def test_manifests_and_metadata(self, pretrained: Prepared) -> None:
        train, heldout = pretrained.manifest, DataManifest.load(pretrained.heldout.path)
        assert (list(train.splits), list(heldout.splits)) == (["train", "control"], ["dev", "test"])
        assert train.stream == "pretrain"
        assert train.vocabulary_size == len(AutoTokenizer.from_pretrained(pretrained.tokenizer.path))
        assert train.splits["train"].tokens == len(pretrained.documents("train").flat)
        assert pretrained.train.metadata["train_documents"] == 103
        assert pretrained.heldout.metadata["test_tokens"] == heldout.splits["test"].tokens
        assert pretrained.train.metadata["digest"] == train.digest
        assert json.dumps(pretrained.train.metadata)

    def test_same_inputs_and_seed_give_the_same_bytes(self, tmp_path: Path) -> None:
        source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(50)])
        first, second, other = (
            prepare_pretrain(tmp_path / str(n), source, seed=seed) for n, seed in enumerate([3, 3, 4])
        )
        for name in ("train", "heldout", "tokenizer"):
            assert files(getattr(first, name).path) == files(getattr(second, name).path)
        assert first.page == second.page
        assert set(first.texts("test")) != set(other.texts("test"))

    def test_order_of_the_lines_is_of_no_matter(self, tmp_path: Path) -> None:
        rows = [{"text": text} for text in sentences(50)]
        one = prepare_pretrain(tmp_path / "a", jsonl(tmp_path / "a.jsonl", rows))
        two = prepare_pretrain(tmp_path / "b", jsonl(tmp_path / "b.jsonl", rows[::-1]))
        assert all(one.texts(split) == two.texts(split) for split in SPLITS)

    def test_duplicates_are_removed_but_for_the_first(self, tmp_path: Path) -> None:
        rows = [{"text": text} for text in ["One  text", "one text", "ONE\ttext", *sentences(20)]]
        made = prepare_pretrain(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows))
        assert made.count("duplicates") == 2
        assert [text for split in SPLITS for text in made.texts(split) if text.lower().startswith("one")] == [
            "One  text"
        ]

    def test_exact_duplicates_are_a_choice(self, tmp_path: Path) -> None:
        rows = [{"text": text} for text in ["One  text", "one text", "one text", *sentences(20)]]
        made = prepare_pretrain(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), duplicates="exact")
        assert made.count("duplicates") == 1
        assert {"One  text", "one text"} <= {text for split in SPLITS for text in made.texts(split)}

    def test_dev_and_test_sources_take_precedence(self, tmp_path: Path) -> None:
        texts = sentences(20)
        dev = jsonl(tmp_path / "dev.jsonl", [{"text": text} for text in [*texts[:5], "in dev only"]])
        test = jsonl(tmp_path / "test.jsonl", [{"text": text} for text in texts[3:8]])
        source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
        made = prepare_pretrain(tmp_path / "out", source, dev_source=str(dev), test_source=str(test))
        assert sorted(made.texts("train")) == sorted(texts[8:])
        assert sorted(made.texts("dev")) == sorted([*texts[:3], "in dev only"])
        assert sorted(made.texts("test")) == sorted(texts[3:8])
        assert made.count("held_out_too", "source") == 8
        assert made.count("held_out_too", "dev_source") == 2

    def test_max_documents(self, tmp_path: Path) -> None:
        source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(50)])
        made = prepare_pretrain(tmp_path / "out", source, max_documents=10, dev_fraction=0.2, test_fraction=0.2)
        assert [len(made.documents(split)) for split in SPLITS] == [6, 2, 2]
        assert made.manifest.notes["not_drawn"] == 40

    def test_the_control_text_comes_from_the_training_documents_alone(self, tmp_path: Path) -> None:
        source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(50)])
        none, some = (prepare_pretrain(tmp_path / str(share), source, control_fraction=share) for share in (0.0, 0.2))
        assert "control" not in none.manifest.splits
        assert sorted([*some.texts("train"), *some.texts("control")]) == sorted(none.texts("train"))
        assert len(some.texts("control")) == int(0.2 * len(none.texts("train")))
        for split in ("dev", "test"):
            assert some.texts(split) == none.texts(split)

    def test_too_few_documents(self, tmp_path: Path) -> None:
        source = jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
        with pytest.raises(RefusedError, match=r"2 left after removing duplicates, too few for train and dev and test"):
            prepare_pretrain(tmp_path / "out", source)
        assert not (tmp_path / "out").exists()

    def test_train_that_is_all_held_out(self, tmp_path: Path) -> None:
        source = str(jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}]))
        other = str(jsonl(tmp_path / "b.jsonl", [{"text": "three"}]))
        with pytest.raises(RefusedError, match="the split train is empty after removing what also stands"):
            prepare_pretrain(tmp_path / "out", source, dev_source=source, test_source=other)

    def test_nothing_left_to_cut_dev_from(self, tmp_path: Path) -> None:
        source = str(jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}]))
        with pytest.raises(RefusedError) as refused:
            prepare_pretrain(tmp_path / "out", source, test_source=source)
        few, removed = refused.value.problems
        assert "0 left after removing duplicates, too few for train and dev" in few
        assert removed == "data.pretrain: 2 of 2 records (100 %) are removed, since they stand in held-out data too"

    def test_an_unfinished_folder_loses_its_manifest_first(
        self, tmp_path: Path, pretrained: Prepared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(20)])
        made = prepare_pretrain(tmp_path / "out", source)
        (tmp_path / "out" / "heldout" / "test" / "tokens.npy").unlink()
        (tmp_path / "out" / "heldout" / "test" / "tokens.npy").mkdir()
        with pytest.raises(OSError, match="tokens"):
            prepare_pretrain(tmp_path / "out", source)
        for artifact in (made.train, made.heldout):
            with pytest.raises(RefusedError):
                DataManifest.load(artifact.path)

    def test_base_model_brings_its_tokenizer(self, tmp_path: Path) -> None:
        rows = [{"text": " ".join(text)} for text in ("abc", "def", "fed", "cab", "bad")]
        base = base_model(tmp_path / "base", eos_token="<eos>")
        options = tokenizer_options(base=base, vocabulary_size=None)
        made = prepare_pretrain(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), tokenizer=options)
        documents = made.documents("train")
        assert documents.tokens(0).tolist() == [7, *("abcdef".index(c) for c in made.texts("train")[0][::2]), 7]
        assert made.manifest.vocabulary_size == 8

    def test_problems_of_data_and_tokenizer_come_together(self, tmp_path: Path) -> None:
        (tmp_path / "base").mkdir()
        source = tmp_path / "a.jsonl"
        source.write_text('{"text": "x"}\n{\n')
        options = tokenizer_options(base=str(tmp_path / "base"), vocabulary_size=None)
        with pytest.raises(RefusedError) as refused:
            prepare_pretrain(tmp_path / "out", source, tokenizer=options, dev_source="no.csv")
        problems = refused.value.problems
        assert [problem.split(" ")[0] for problem in problems] == [
            "model.base:",
            "data.pretrain.dev_source:",
            f"{source},",
        ]


class TestClassification:
    def test_labels_are_sorted_and_in_every_split(self, tmp_path: Path, pretrained: Prepared) -> None:
        made = prepare_finetune(tmp_path / "out", jsonl(tmp_path / "a.jsonl", labelled(labels="zyx")), pretrained)
        assert made.manifest.labels == ["x", "y", "z"]
        assert DataManifest.load(made.heldout.path).labels == ["x", "y", "z"]
        for split in SPLITS:
            documents = made.documents(split)
            assert ["xyz"[label] for label in documents.labels] == [record["label"] for record in documents.records()]
            assert set(documents.labels.tolist()) == {0, 1, 2}
            assert made.manifest.notes["labels"][split]["x"] == sum(documents.labels == 0)
        assert [len(made.documents(split)) for split in SPLITS] == [48, 6, 6]

    def test_whole_numbers_are_sorted_as_numbers(self, tmp_path: Path, pretrained: Prepared) -> None:
        rows = [{"text": text, "label": number % 12} for number, text in enumerate(sentences(240, seed=1))]
        made = prepare_finetune(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), pretrained)
        assert made.manifest.labels == [str(number) for number in range(12)]
        documents = made.documents("train")
        assert documents.labels.tolist() == [int(record["label"]) for record in documents.records()]
        signed = [{**row, "label": [-1, 0, 1, 10, 2][number % 5]} for number, row in enumerate(rows)]
        made = prepare_finetune(tmp_path / "signed", jsonl(tmp_path / "b.jsonl", signed), pretrained)
        assert made.manifest.labels == ["-1", "0", "1", "2", "10"]
        mixed = [{**row, "label": ["1", "10", "2", "a"][number % 4]} for number, row in enumerate(rows)]
        made = prepare_finetune(tmp_path / "mixed", jsonl(tmp_path / "c.jsonl", mixed), pretrained)
        assert made.manifest.labels == ["1", "10", "2", "a"]

    def test_long_texts_are_cut_and_counted(self, tmp_path: Path, pretrained: Prepared) -> None:
        rows = labelled(30)
        rows[0]["text"] = "天" * 100
        made = prepare_finetune(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), pretrained)
        lengths = np.concatenate([np.diff(made.documents(split).offsets) for split in SPLITS])
        assert lengths.max() == 32
        tokenizer: Any = AutoTokenizer.from_pretrained(made.tokenizer.path)
        longer = [row for row in rows if len(tokenizer(row["text"], verbose=False)["input_ids"]) > 32]
        assert made.count("shortened") == len(longer) >= 1
        for split in SPLITS:
            for index, text in enumerate(made.texts(split)):
                plain = tokenizer(text, truncation=True, max_length=32)["input_ids"]
                assert made.documents(split).tokens(index).tolist() == plain

    def test_the_tokenizer_is_handed_on_and_ends_a_text_with_eos(self, tmp_path: Path, pretrained: Prepared) -> None:
        made = prepare_finetune(tmp_path / "out", jsonl(tmp_path / "a.jsonl", labelled(30)), pretrained)
        before: Any = AutoTokenizer.from_pretrained(pretrained.tokenizer.path)
        after: Any = AutoTokenizer.from_pretrained(made.tokenizer.path)
        assert after.get_vocab() == before.get_vocab()
        assert after("what is this")["input_ids"] == [*before("what is this")["input_ids"], before.eos_token_id]
        assert made.manifest.ends_with_eos

    def test_one_text_with_two_labels_is_counted(self, tmp_path: Path, pretrained: Prepared) -> None:
        rows = [*labelled(), {**labelled()[0], "label": "y"}]
        made = prepare_finetune(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), pretrained)
        assert made.count("contradictory") == 1

    def test_labels_that_go_with_duplicates_are_put_down_to_them(self, tmp_path: Path, pretrained: Prepared) -> None:
        texts = sentences(30, seed=1)
        rows = [{"text": text, "label": "lower"} for text in texts]
        rows += [{"text": text.upper(), "label": "UPPER"} for text in texts]
        source = jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(RefusedError) as refused:
            prepare_finetune(tmp_path / "out", source, pretrained)
        one, two, three = refused.value.problems
        assert one.endswith("every example has the label 'lower'; at least two labels are needed")
        assert two == (
            "data.finetune: 30 of 60 records (50 %) are removed as duplicates of earlier ones (case and white space aside; "
            "duplicates: exact keeps those that differ in them)"
        )
        assert "have another label, number or answer" in three
        made = prepare_finetune(tmp_path / "out", source, pretrained, duplicates="exact")
        assert made.manifest.labels == ["UPPER", "lower"]
        assert made.count("duplicates") == 0

    def test_contamination_by_either_stream_is_marked(self, tmp_path: Path, pretrained: Prepared) -> None:
        seen_in_pretraining = next(text for text in pretrained.texts("train") if len(text.split()) >= 13)
        chinese = next(text for text in pretrained.texts("train") if text.startswith("第"))
        dev = jsonl(
            tmp_path / "dev.jsonl",
            [
                {"text": f"Yes, {seen_in_pretraining.upper()}!", "label": "x"},
                {"text": "nothing of this stands anywhere", "label": "x"},
                {"text": chinese.replace("。", "!"), "label": "y"},
            ],
        )
        thirteen = "one two three four five six seven eight nine ten eleven twelve thirteen"
        test = jsonl(
            tmp_path / "test.jsonl",
            [{"text": f"{thirteen} and more", "label": "x"}, {"text": thirteen[: -len(" thirteen")], "label": "y"}],
        )
        source = jsonl(tmp_path / "a.jsonl", [*labelled(), {"text": f"It starts with {thirteen}", "label": "x"}])
        made = prepare_finetune(tmp_path / "out", source, pretrained, dev_source=str(dev), test_source=str(test))
        marks = {
            record["text"]: record["contaminated"]
            for split in ("dev", "test")
            for record in made.documents(split).records()
        }
        assert marks == {
            f"Yes, {seen_in_pretraining.upper()}!": True,
            "nothing of this stands anywhere": False,
            chinese.replace("。", "!"): True,
            f"{thirteen} and more": True,
            thirteen[: -len(" thirteen")]: False,
        }
        by = {record["text"]: record["contaminated_by"] for record in made.documents("dev").records()}
        assert list(by.values()).count(["pretrain"]) == 2
        assert [record["contaminated_by"] for record in made.documents("test").records()].count(["finetune"]) == 1
        notes = made.manifest.notes
        assert notes["contaminated"] == {"dev": 2, "test": 1}
        assert notes["contaminated_by_pretrain"] == {"dev": 2, "test": 0}
        assert notes["contaminated_by_finetune"] == {"dev": 0, "test": 1}
        page = Path(made.report.path).read_text(encoding="utf-8")
        assert "in the training text of the pretraining stream" in page
        assert "contaminated: also in pretraining text" in page
        assert "contaminated" not in made.documents("train").records()[0]

    def test_all_problems_of_labels_and_lines_at_once(self, tmp_path: Path, pretrained: Prepared) -> None:
        rows = [
            *labelled(),
            {"text": "lonely", "label": "once"},
            {"text": "", "label": "x"},
            {"text": "t", "label": None},
        ]
        dev = jsonl(tmp_path / "dev.jsonl", [{"text": f"dev {n}", "label": "unseen"} for n in range(2)])
        source = jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(RefusedError) as refused:
            prepare_finetune(tmp_path / "out", source, pretrained, dev_source=str(dev))
        assert refused.value.problems == [
            f"data.finetune.label_column (label): occurring once only: 'once' ({source}, line 61); a label needs at least "
            "two examples. Add some, or remove these",
            "data.finetune.label_column (label): in dev but never in train: 'unseen'; add training examples",
            f"{source}, line 62: text is empty",
            f"{source}, line 63: label is empty",
        ]
        assert not (tmp_path / "out").exists()

    def test_a_label_that_occurs_once_in_all_is_one_problem(self, tmp_path: Path, pretrained: Prepared) -> None:
        dev = jsonl(tmp_path / "dev.jsonl", [{"text": "lonely", "label": "once"}])
        source = jsonl(tmp_path / "a.jsonl", labelled())
        with pytest.raises(RefusedError, match="occurring once only: 'once'") as refused:
            prepare_finetune(tmp_path / "out", source, pretrained, dev_source=str(dev))
        assert len(refused.value.problems) == 1

    def test_one_label_only(self, tmp_path: Path, pretrained: Prepared) -> None:
        with pytest.raises(RefusedError, match="every example has the label 'x'; at least two labels are needed"):
            prepare_finetune(tmp_path / "out", jsonl(tmp_path / "a.jsonl", labelled(labels="x")), pretrained)

    def test_one_example(self, tmp_path: Path, pretrained: Prepared) -> None:
        source = jsonl(tmp_path / "a.jsonl", labelled(1))
        with pytest.raises(RefusedError, match="1 left after removing duplicates, too few"):
            prepare_finetune(tmp_path / "out", source, pretrained)

    def test_rare_labels_stay_in_train(self, tmp_path: Path, pretrained: Prepared) -> None:
        rows = labelled(40, labels="x")
        for number in range(10):
            rows[2 * number]["label"] = rows[2 * number + 1]["label"] = f"rare {number}"
        for seed in range(5):
            made = prepare_finetune(
                tmp_path / str(seed),
                jsonl(tmp_path / "a.jsonl", rows),
                pretrained,
                seed,
                dev_fraction=0.3,
                test_fraction=0.3,
            )
            assert set(made.documents("train").labels.tolist()) == set(range(11))


class TestGeneration:
    def rows(self, count: int = 20) -> list[dict[str, Any]]:
        return [{"prompt": f"第{n}题: 一加{n}等于?", "completion": f" {n + 1}!"} for n in range(count)]

    def test_loss_starts_at_the_completion(self, tmp_path: Path, pretrained: Prepared) -> None:
        source = jsonl(tmp_path / "a.jsonl", self.rows())
        made = prepare_finetune(
            tmp_path / "out", source, pretrained, task="generation", tokenizer=tokenizer_options(max_length=64)
        )
        tokenizer = AutoTokenizer.from_pretrained(made.tokenizer.path)
        assert made.manifest.task == "generation"
        assert made.manifest.labels is None
        for split in SPLITS:
            documents = made.documents(split)
            for index, record in enumerate(documents.records()):
                tokens, start = documents.tokens(index).tolist(), int(documents.supervised_from[index])
                assert tokens[:start] == tokenizer(record["prompt"])["input_ids"]
                assert tokenizer.decode(tokens[1:start]) == record["prompt"]
                assert tokenizer.decode(tokens[start:-1]) == record["completion"]
                assert tokens[-1] == tokenizer.eos_token_id
                assert record["bytes"] == len((record["prompt"] + record["completion"]).encode())

    def test_long_prompts_are_cut_at_their_left_and_long_completions_dropped(
        self, tmp_path: Path, pretrained: Prepared
    ) -> None:
        rows = [
            *self.rows(),
            {"prompt": "词" * 50 + "end", "completion": "yes"},
            {"prompt": "p", "completion": "答" * 50},
        ]
        source = jsonl(tmp_path / "a.jsonl", rows)
        test = jsonl(tmp_path / "test.jsonl", [rows[-2], rows[-1], rows[0]])
        made = prepare_finetune(tmp_path / "out", source, pretrained, task="generation", test_source=str(test))
        assert made.count("dropped", "test") == 1
        assert len(made.documents("test")) == 2
        tokenizer = AutoTokenizer.from_pretrained(made.tokenizer.path)
        records = made.documents("test").records()
        index = next(index for index, record in enumerate(records) if record["completion"] == "yes")
        tokens = made.documents("test").tokens(index).tolist()
        start = int(made.documents("test").supervised_from[index])
        assert len(tokens) == 32
        assert tokens[0] == tokenizer.bos_token_id
        assert str(tokenizer.decode(tokens[1:start])).endswith("end")
        assert tokenizer.decode(tokens[start:-1]) == "yes"

    def test_a_prompt_stands_in_one_split(self, tmp_path: Path, pretrained: Prepared) -> None:
        rows = [
            {"prompt": f"Say {number}".upper() if n % 2 else f"Say {number}", "completion": f"{number} {n}"}
            for number in range(60)
            for n in range(5)
        ]
        made = prepare_finetune(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), pretrained, task="generation")
        prompts = {split: {text.lower() for text in made.texts(split)} for split in SPLITS}
        assert [len(prompts[split]) for split in SPLITS] == [48, 6, 6]
        assert [len(made.documents(split)) for split in SPLITS] == [240, 30, 30]
        assert made.manifest.notes["contaminated"] == {"dev": 0, "test": 0}
        one = jsonl(tmp_path / "b.jsonl", [{"prompt": "Go on", "completion": f"{n}"} for n in range(60)])
        with pytest.raises(
            RefusedError, match=r"1 left after removing duplicates \(different prompts: a prompt stands"
        ):
            prepare_finetune(tmp_path / "out", one, pretrained, task="generation")

    def test_a_prompt_of_training_marks_a_held_out_example(self, tmp_path: Path, pretrained: Prepared) -> None:
        source = jsonl(tmp_path / "a.jsonl", self.rows())
        text = next(text for text in pretrained.texts("train") if text.startswith("第"))
        dev = jsonl(tmp_path / "dev.jsonl", [{"prompt": "another", "completion": "one"}])
        test = jsonl(
            tmp_path / "test.jsonl",
            [
                {"prompt": self.rows()[3]["prompt"], "completion": "another answer"},
                {"prompt": text, "completion": "and then?"},
                {"prompt": "a new one", "completion": " 4!"},
            ],
        )
        made = prepare_finetune(
            tmp_path / "out", source, pretrained, task="generation", test_source=str(test), dev_source=str(dev),
            tokenizer=tokenizer_options(max_length=64),
        )  # fmt: skip
        records = made.documents("test").records()
        by = {record["completion"]: record["contaminated_by"] for record in records}
        assert by == {"another answer": ["finetune"], "and then?": ["pretrain"], " 4!": []}

    def test_duplicates_are_exact(self, tmp_path: Path, pretrained: Prepared) -> None:
        rows = [{"prompt": f"city {number}", "completion": word} for number in range(20) for word in ("Rome", "rome")]
        source = jsonl(tmp_path / "a.jsonl", [*rows, rows[0]])
        made = prepare_finetune(tmp_path / "out", source, pretrained, task="generation")
        assert made.count("duplicates") == 1
        assert sum(len(made.documents(split)) for split in SPLITS) == 40
        records = [record for split in SPLITS for record in made.documents(split).records()]
        assert len({record["id"] for record in records}) == 40
        folded = prepare_finetune(tmp_path / "f", source, pretrained, task="generation", duplicates="folded")
        assert folded.count("duplicates") == 21

    def test_no_completion_fits(self, tmp_path: Path, pretrained: Prepared) -> None:
        rows = [{"prompt": f"p{n}", "completion": f"{n}" + "答" * 50} for n in range(10)]
        source = jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(RefusedError) as refused:
            prepare_finetune(tmp_path / "out", source, pretrained, task="generation")
        assert len(refused.value.problems) == 3
        assert "split dev has a completion that fits into model.max_length = 32 tokens; raise it" in str(refused.value)
        assert not (tmp_path / "out").exists()


def test_fine_tuning_stream_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    stream = FinetuneData(source=str(jsonl(tmp_path / "a.jsonl", labelled())))
    config = PrepareStep(stream="finetune", seed=0, tokenizer=tokenizer_options(), finetune=stream, fingerprint="")
    made = outputs(tmp_path / "out")
    with pytest.raises(RefusedError, match="tokenizer_in: is required"):
        run(config, context=Context.for_tests(), tokenizer_in=None, pretraining_data=None, **vars(made))


def test_both_streams_without_torch(tmp_path: Path) -> None:
    jsonl(tmp_path / "pt.jsonl", [{"text": text} for text in sentences(40)])
    jsonl(tmp_path / "ft.jsonl", labelled())
    code = """
import sys
sys.modules["torch"] = sys.modules["accelerate"] = sys.modules["safetensors"] = None
from pathlib import Path
from tests.components.prepare.prepared import jsonl, prepare_finetune, prepare_pretrain, tokenizer_options
folder = Path(sys.argv[1])
pretrained = prepare_pretrain(folder / "pt", folder / "pt.jsonl")
made = prepare_finetune(folder / "ft", folder / "ft.jsonl", pretrained)
print(made.manifest.splits["train"].documents)
masked = tokenizer_options(objective="masked_lm")
pretrained = prepare_pretrain(folder / "pt2", folder / "pt.jsonl", tokenizer=masked)
rows = [{"question": "q?", "context": f"context {n}", "answers": str(n)} for n in range(20)]
source = jsonl(folder / "qa.jsonl", rows)
made = prepare_finetune(folder / "qa", source, pretrained, task="question_answering", tokenizer=masked)
print(made.manifest.splits["train"].documents)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["48", "16"]
