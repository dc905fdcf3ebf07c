"""The first losses of two small trainings are those on record, so that a change of the numbers does not pass unseen.

Whoever changes the numbers on purpose records them anew: `python -m tests.components.mixed.test_golden_losses`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from mixtune.components.mixed.config import MixedCandidate
from mixtune.components.shared.artifacts import read_jsonl
from mixtune.components.shared.config import Objective, Task
from tests.components.stages import Stages

pytestmark = pytest.mark.numeric

RECORD = Path(__file__).with_name("golden_losses.json")
STEPS = 20
TRAININGS: dict[str, tuple[Task, Objective, MixedCandidate]] = {
    "classification with a causal model": (
        "classification",
        "causal_lm",
        MixedCandidate(id="mixed-0.3", mix_weight=0.3),
    ),
    "question answering with a masked model": (
        "question_answering",
        "masked_lm",
        MixedCandidate(id="mixed-0.1", mix_weight=0.1),
    ),
}


def losses(folder: Path, name: str) -> dict[str, list[float]]:
    """Trains in the folder and returns both streams' losses and λ at each step."""
    task, objective, candidate = TRAININGS[name]
    stages = Stages(folder, task, objective)
    stages.pretrain()
    model = stages.mixed(candidate, steps=STEPS, log_every_steps=1, learning_rate=2e-3, warmup_steps=4)
    curve = list(read_jsonl(model / "training.jsonl"))
    names = ("loss_pretrain", "loss_finetune", "mix_weight")
    return {name: [float(entry[name]) for entry in curve] for name in names}


@pytest.mark.parametrize("name", TRAININGS)
def test_the_losses_are_those_on_record(tmp_path: Path, name: str) -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))[name]
    trained = losses(tmp_path, name)
    assert {key: len(values) for key, values in trained.items()} == dict.fromkeys(recorded, STEPS)
    for key, values in trained.items():
        assert values == pytest.approx(recorded[key], rel=1e-5), key


if __name__ == "__main__":
    record = {}
    for each in TRAININGS:
        with tempfile.TemporaryDirectory() as temporary:
            record[each] = {key: [float(f"{v:.8g}") for v in vs] for key, vs in losses(Path(temporary), each).items()}
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
