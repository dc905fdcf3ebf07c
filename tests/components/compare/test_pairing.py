"""How evaluations are paired, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixtune.components.shared.artifacts import Artifact, read_json, write_json
from mixtune.components.shared.errors import MixtuneError, RefusedError

from .made import MIXED, PRETRAINED, STRONGER, compare, write_all, write_evaluation


def test_documents_in_another_order_are_paired_by_id(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    before = compare(tmp_path / "before", inputs)
    for file in (tmp_path / "mixed-0.3" / "mixed-0.3").glob("*.jsonl"):
        file.write_text("".join(sorted(file.read_text().splitlines(keepends=True), reverse=True)))
    assert compare(tmp_path / "after", inputs).row("mixed-0.3") == before.row("mixed-0.3")


def test_other_documents_are_refused_and_named(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED, STRONGER)
    documents = tmp_path / "mixed-0.3" / "mixed-0.3" / "dev.documents.jsonl"
    documents.write_text(documents.read_text().replace("dev-d7", "elsewhere"))
    examples = tmp_path / "mixed-0.5" / "mixed-0.5" / "test.examples.jsonl"
    examples.write_text("".join(examples.read_text().splitlines(keepends=True)[2:]))
    with pytest.raises(RefusedError) as refused:
        compare(tmp_path, inputs)
    assert refused.value.problems == [
        "mixed-0.3: on dev, other documents were measured than for pretrained: dev-d7 missing; elsewhere not measured there",
        "mixed-0.5: on test, other examples were measured than for finetuned: test-e0, test-e1 missing",
    ]
    assert not (tmp_path / "out" / "comparison").exists()


def test_a_loss_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    documents = tmp_path / "mixed-0.3" / "mixed-0.3" / "test.documents.jsonl"
    rows = [json.loads(line) for line in documents.read_text().splitlines()]
    rows[4]["nats"] = None
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(MixtuneError, match=r"^mixed-0.3: the loss of document test-d4 \(test\) is not finite$"):
        compare(tmp_path, inputs)


def test_what_evaluate_found_not_finite_is_named(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    path = tmp_path / "mixed-0.3" / "evaluation.json"
    named = [{"candidate": "mixed-0.3", "split": "dev", "what": "example", "id": "dev-e2"}]
    write_json(path, {**read_json(path, "an evaluation"), "not_finite": named})
    with pytest.raises(MixtuneError, match=r"^mixed-0.3: the loss of example dev-e2 \(dev\) is not finite$"):
        compare(tmp_path, inputs)


def test_folders_that_are_no_evaluation_are_all_named(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "other" / "evaluation.json", {"format": "mixtune-model/1"})
    inputs["mixed"] = [Artifact(str(tmp_path / "empty")), Artifact(str(tmp_path / "other"))]
    with pytest.raises(RefusedError) as refused:
        compare(tmp_path, inputs)
    assert refused.value.problems == [
        f"{tmp_path / 'empty'}: has no evaluation.json, so it is not an evaluation made by mixtune",
        f"{tmp_path / 'other'}: evaluation.json is not of the format mixtune-evaluation/1, so it is not an evaluation",
    ]


def test_evaluations_of_other_data_are_refused(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    path = tmp_path / "mixed-0.3" / "evaluation.json"
    manifest = read_json(path, "an evaluation")
    manifest["task"]["metric"] = "macro_f1"
    write_json(path, manifest)
    with pytest.raises(RefusedError, match="was measured on another task than"):
        compare(tmp_path, inputs)


def test_a_candidate_evaluated_twice_is_refused(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    inputs["mixed"].append(write_evaluation(tmp_path / "again", [MIXED]))
    with pytest.raises(RefusedError, match=r"mixed-0\.3: was evaluated 2 times"):
        compare(tmp_path, inputs)


def test_an_evaluation_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the split dev of the pretraining stream holds no documents"):
        compare(tmp_path / "text", write_all(tmp_path / "text", MIXED, documents=0))
    with pytest.raises(RefusedError, match="the split test of the fine-tuning stream holds no scored examples"):
        compare(tmp_path / "task", write_all(tmp_path / "task", MIXED, examples=0))


def test_different_likelihoods_are_not_compared(tmp_path: Path) -> None:
    inputs = write_all(tmp_path, MIXED)
    inputs["pretrained"] = write_evaluation(
        tmp_path / "masked", [PRETRAINED], likelihood="fixed-mask pseudo-likelihood"
    )
    with pytest.raises(RefusedError, match=r"not the same measure \(causal in .*; fixed-mask .* in .*masked\)"):
        compare(tmp_path, inputs)
