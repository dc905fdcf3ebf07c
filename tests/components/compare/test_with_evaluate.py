"""What `evaluate` writes is what `compare` reads: real small models, both task kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixtune.components.shared.artifacts import Artifact

from ..evaluate import made as measured
from .made import Outcome, compare


def whole_run(folder: Path, generation: bool, metric: str) -> Outcome:
    """Evaluates four small models on the same held-out data and compares them."""
    labels = None if generation else measured.LABELS
    labelled = measured.write_labelled(folder / "labelled", generation)
    models = {
        name: measured.write_model(
            folder / name,
            name,
            name.split("-")[0],  # type: ignore[arg-type]
            None if name == "pretrained" else labels,
            seed,
        )
        for seed, name in enumerate(("pretrained", "finetuned", "mixed-0.3"))
    }

    def evaluation(name: str, model: Artifact, **options: Any) -> Artifact:
        text = folder / name / "text"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.symlink_to(folder / "text")
        _, path = measured.evaluate(folder / name, model, labelled, metric=metric, **options)
        return Artifact(str(path))

    measured.write_text(folder / "text")
    inputs: dict[str, Any] = {
        "pretrained": evaluation("of-pretrained", models["pretrained"]),
        "finetuned": evaluation("of-finetuned", models["finetuned"]),
        "mixed": [evaluation("of-mixed", models["mixed-0.3"])],
        "interpolated": evaluation(
            "of-interpolated", models["pretrained"], other=models["finetuned"], interpolation_alphas=[0.5]
        ),
    }
    return compare(folder, inputs)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_classification(tmp_path: Path, metric: str) -> None:
    done = whole_run(tmp_path, generation=False, metric=metric)
    assert [row["id"] for row in done.report["candidates"]] == [
        "pretrained",
        "finetuned",
        "mixed-0.3",
        "interpolated-0.5",
    ]
    assert done.row("pretrained")["task_score"] is None
    for name in ("finetuned", "mixed-0.3", "interpolated-0.5"):
        row = done.row(name)
        # The split's own metric, computed by scikit-learn, and the value that the bootstrap is drawn around.
        assert row["task_score"]["value"] == pytest.approx(row[metric])
    assert done.row("interpolated-0.5")["params"] == {"alpha": 0.5}
    assert done.report["contamination"]["test"] == {"examples": 11, "contaminated": 1}
    assert set(done.report["data"]) == {"pretrain", "finetune"}


@pytest.mark.parametrize("metric", ["exact_match", "token_f1"])
def test_generation(tmp_path: Path, metric: str) -> None:
    done = whole_run(tmp_path, generation=True, metric=metric)
    for row in done.report["candidates"]:
        assert row["task_score"]["value"] == pytest.approx(row[metric])
        assert row["completion_nats_per_token"] > 0
