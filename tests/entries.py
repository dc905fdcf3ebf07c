"""The steps without torch, started as a cluster starts them: the compiled package's command, with KFP's executor input."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mixtune.components.config import load
from mixtune.components.form import PLACEMENT, parameters
from tests.components.compare.made import FINETUNED, INTERPOLATED, MIXED, PRETRAINED, write_evaluation
from tests.components.register.made import write_report
from tests.conftest import sentences

PACKAGE = Path(__file__).resolve().parents[1] / "pipelines" / "compiled" / "mixtune.yaml"
STEPS = ("plan", "prepare", "compare", "register", "finish")


class Entries:
    """Inputs for each step, small ones, below one folder.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._package = next(yaml.safe_load_all(PACKAGE.read_text(encoding="utf-8")))
        for name, rows in (
            ("text", [{"text": text} for text in sentences(60)]),
            ("labels", [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(sentences(60, seed=7))]),
        ):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        candidates = {"pretrained": PRETRAINED, "finetuned": FINETUNED, "interpolated": INTERPOLATED, "mixed": MIXED}
        for name, candidate in candidates.items():
            write_evaluation(folder / name, [candidate])
        (folder / "comparison").mkdir()
        write_report(folder / "comparison", "finetuned", "classification")

    def command(self, step: str) -> list[str]:
        """The command of the step's container. `prepare`, `compare` and `register` need what `plan` wrote.

        Args:
            step: name of the step.
        """
        container = self._package["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
        given = self._executor_input(step)
        return [json.dumps(given) if part == "{{$}}" else part for part in container["command"] + container["args"]]

    def run(self, step: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Runs the step to its end; its standard error goes where its output goes, so that the order of lines is kept."""
        return subprocess.run(
            self.command(step),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def _executor_input(self, step: str) -> dict[str, Any]:
        component = self._package["components"][f"comp-{step}"]
        values = self._values(step)
        outputs = self.folder / "outputs" / step
        declared = component.get("outputDefinitions", {})
        return {
            "inputs": {
                "parameterValues": values,
                "artifacts": {name: _artifact(name, path) for name, path in self._inputs(step).items()},
            },
            "outputs": {
                "parameters": {name: {"outputFile": str(outputs / name)} for name in declared.get("parameters", {})},
                "artifacts": {name: _artifact(name, outputs / name) for name in declared.get("artifacts", {})},
                "outputFile": str(outputs / "executor_output.json"),
            },
        }

    def _values(self, step: str) -> dict[str, Any]:
        if step == "plan":
            config = {
                "model": {"base": "scratch", "max_length": 64, "scratch": {"vocabulary_size": 300}},
                "data": {
                    "pretrain": {"source": str(self.folder / "text.jsonl")},
                    "finetune": {"source": str(self.folder / "labels.jsonl")},
                },
                "pretrain": {"steps": 2},
                "gate": {"resamples": 200},
            }
            return {**parameters(load(config)), PLACEMENT: {}}
        if step == "finish":
            state = {"state": "SUCCEEDED", "pipelineTaskName": "exit-handler-1", "pipelineJobResourceName": "mixtune-1"}
            return {"status": {**state, "error": {}}}
        part = {"prepare": "prepare_pretrain"}.get(step, step)
        return {"config": (self.folder / "outputs" / "plan" / part).read_text(encoding="utf-8")}

    def _inputs(self, step: str) -> dict[str, Path]:
        names = {
            "compare": ("pretrained", "finetuned", "interpolated", "mixed"),
            "register": ("selected", "other", "comparison"),
        }
        return {name: self.folder / name for name in names.get(step, ())}


def _artifact(name: str, path: Path) -> dict[str, Any]:
    return {"artifacts": [{"name": name, "uri": str(path), "type": {"schemaTitle": "system.Artifact"}, "metadata": {}}]}


def is_useful(line: str) -> bool:
    """Whether a line of a step's output is not KFP's executor's own: its log, and its input as indented JSON."""
    return bool(line.strip()) and not line.startswith(("[KFP Executor", " ", "{", "}"))
