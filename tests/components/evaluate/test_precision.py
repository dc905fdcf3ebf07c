"""The precision that a model is measured in, on processors with instructions for bf16 and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mixtune.components.shared.config import Task
from mixtune.components.shared.model import bf16_on_cpu

from .made import LABELS, evaluate, write_labelled, write_model

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("has_products", [True, False])
@pytest.mark.parametrize("task", ["classification", "generation"])
def test_bf16_is_near_float32(tmp_path: Path, task: Task, has_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_on_cpu, "has_bf16_products", lambda: has_products)
    in_float32 = Mock(wraps=bf16_on_cpu._multiply)
    monkeypatch.setattr(bf16_on_cpu, "_multiply", in_float32)
    labels = LABELS if task == "classification" else None
    model = write_model(tmp_path / "model", "finetuned", "finetuned", labels, task=task)
    labelled = write_labelled(tmp_path / "labelled", task)
    found: dict[str, list[dict[str, Any]]] = {}
    for precision in ("float32", "bf16"):
        (tmp_path / precision).mkdir()
        _, folder = evaluate(tmp_path / precision, model, labelled, precision=precision)
        files = sorted((folder / "finetuned").glob("*.documents.jsonl"))
        found[precision] = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(found["bf16"]) > 10
    for low, exact in zip(found["bf16"], found["float32"], strict=True):
        assert low["nats"] == pytest.approx(exact["nats"], rel=0.01)
    assert found["bf16"] != found["float32"]
    assert in_float32.called != has_products
