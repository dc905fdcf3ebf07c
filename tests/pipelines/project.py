"""A small project on real files, which tests run as its user would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import yaml

from mixtune.components.shared.artifacts import Utilisation
from mixtune.components.shared.outcome import load_outcomes
from mixtune.components.shared.tracking.connection import connect
from tests.conftest import sentences

ALWAYS = {"plan", "compare", "finish"}
"""Steps that run each time, whatever the cache holds."""
LONGER = {"steps": 120, "batch_size": 8, "learning_rate": 0.003, "precision": "float32", "checkpoint_steps": 5}
"""A mixed training that lasts long enough to be killed in the middle."""

# Without what is told by a clock or belongs to a run.
OF_THE_MOMENT = {
    "seconds",
    "evaluate_seconds",
    "mlflow_run",
    "mlflow_runs",
    "evaluate_run",
    "parent_run",
    "utilisation",
    "evaluate_share",
    "training_share",
    *Utilisation.model_fields,
}


class Project:
    """A user's folder with data and a configuration, and the command run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "runs" / "tiny"
        self.environment: dict[str, str] = {}
        if not (folder / "text.jsonl").exists():
            self.write("text.jsonl", [{"text": f"{one} . {two}"} for one, two in pairwise(sentences(240))])
            self.write_labels(200)
        self.config: dict[str, Any] = {
            "name": "tiny",
            "model": {
                "base": "scratch",
                "max_length": 64,
                "scratch": {"vocabulary_size": 400, "hidden_size": 32, "layers": 2, "heads": 2},
            },
            "data": {
                "pretrain": {"source": "text.jsonl", "dev_fraction": 0.1, "test_fraction": 0.1},
                "finetune": {"source": "labels.jsonl", "dev_fraction": 0.2, "test_fraction": 0.2},
            },
            "pretrain": {"steps": 25, "batch_size": 8, "learning_rate": 0.003, "precision": "float32"},
            "finetune": {"steps": 12, "batch_size": 8, "learning_rate": 0.003, "precision": "float32"},
            "mixed": {"lambdas": [0.3], "steps": 12, "batch_size": 8, "learning_rate": 0.003, "precision": "float32"},
            "watch": {"every_steps": 4},
            # Everything passes, so that register runs.
            "evaluate": {"precision": "float32"},
            "gate": {
                "max_score_drop": 1,
                "max_forgetting_share": None,
                "resamples": 200,
                "rule": "best_task_score",
                "beat_trivial": False,  # the models are too small to learn anything
            },
        }

    def copied_to(self, folder: Path) -> Self:
        """The same project in another folder, to go on with."""
        apart = shutil.ignore_patterns("lock")
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True, ignore=apart)
        copy = type(self)(folder)
        copy.config = json.loads(json.dumps(self.config))
        return copy

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write_labels(self, count: int) -> None:
        good = sentences(count // 2, seed=7, words=tuple("fine good great lovely warm bright film".split()))  # noqa: SIM905
        bad = sentences(count // 2, seed=8, words=tuple("poor bad awful cold dull dark film".split()))  # noqa: SIM905
        rows = [{"text": text, "label": "good"} for text in good] + [{"text": text, "label": "bad"} for text in bad]
        self.write("labels.jsonl", rows)

    def mixtune(self, *arguments: str, config: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config or self.config), encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-m", "mixtune.pipelines.cli", *arguments], cwd=self.folder, capture_output=True, text=True,
            timeout=600, check=False, env={**os.environ, **self.environment},
        )  # fmt: skip

    def run(self, *arguments: str) -> tuple[int, set[str], str]:
        """Exit status, titles of the steps that really ran, and all that was printed."""
        done = self.mixtune("run", "config.yaml", *arguments)
        return done.returncode, self.ran(), done.stdout + done.stderr

    def ran(self) -> set[str]:
        run_id = json.loads((self.output / ".mixtune" / "last_run.json").read_text())["id"]
        return {outcome.title for outcome in load_outcomes(self.output / ".mixtune" / "outcomes" / run_id)}

    def report(self) -> dict[str, Any]:
        return dict(json.loads((self.output / "report" / "report.json").read_text()))

    def client(self) -> Any:
        return connect(f"sqlite:///{self.output / 'mlflow' / 'mlflow.db'}")

    def pipeline_runs(self) -> list[Any]:
        """The parent runs, newest first."""
        client = self.client()
        experiment = client.get_experiment_by_name("mixtune").experiment_id
        order = ["attributes.start_time DESC"]
        return list(client.search_runs([experiment], "tags.`mixtune.step` = 'pipeline'", order_by=order))


def plain(value: Any) -> Any:
    """Without what differs from run to run."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items() if name not in OF_THE_MOMENT}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value
