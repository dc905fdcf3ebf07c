"""A registered adapter answers as the model that was trained, without the hub."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from mixtune.components.mixed.config import MixedCandidate
from mixtune.components.register.config import RegisterStep
from mixtune.components.register.step import run as run_register
from mixtune.components.shared.artifacts import ModelCard
from mixtune.components.shared.model.adapters import has_adapter
from mixtune.components.shared.model.loading import load_model
from mixtune.components.shared.model.tokenizer import load_tokenizer
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.registry import fetch
from mixtune.components.shared.tracking.tracker import Tracker
from tests.components.shared.test_adapters import outputs
from tests.components.stages import Stages
from tests.stores import new_store

from .made import write_report

TEXT = "w3 w4 w5 w6"


def test_a_registered_adapter_answers_as_it_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    store = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    stages = Stages(tmp_path)
    stages.pretrain()
    candidate = MixedCandidate(id="mixed-0.3-lora-2", mix_weight=0.3, lora_rank=2, lora_merge=False, learning_rate=0.05)
    folder = stages.mixed(candidate)
    assert has_adapter(folder)
    write_report(tmp_path / "comparison", "mixed", "classification", ["no", "yes"])
    run_register(
        RegisterStep(registered_model="tiny", alias="candidate", max_length=16),
        context=Context("register", Tracker.open("register", "register", "run-1"), "run-1", quiet=True),
        selected=stages.artifact("mixed"), other=stages.artifact("comparison"),
        comparison=stages.artifact("comparison"), model=stages.artifact("registered"),
    )  # fmt: skip

    model = load_model(folder).eval()
    ids = load_tokenizer(folder)(TEXT)["input_ids"]
    shares = outputs(model, ids).softmax(-1)[0].tolist()
    (row,) = mlflow.pyfunc.load_model("models:/tiny@candidate").predict([TEXT])
    assert list(row["probabilities"].values()) == pytest.approx(shares, abs=1e-5)
    answer = mlflow.transformers.load_model("models:/tiny@candidate")(TEXT)
    assert answer[0]["score"] == pytest.approx(max(shares), abs=1e-5)

    (tmp_path / "fetched").mkdir()
    fetched = fetch(connect(store), "models:/tiny/1", tmp_path / "fetched")
    assert ModelCard.load(fetched).id == candidate.id
    assert "peft==" in (tmp_path / "fetched" / "requirements.txt").read_text()
    plain = peft.AutoPeftModelForSequenceClassification.from_pretrained(fetched).eval()
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([ids])).logits
    assert logits.softmax(-1)[0].tolist() == pytest.approx(shares, abs=1e-5)
