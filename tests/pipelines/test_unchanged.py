"""A run that would repeat the last one shows the results that are there. Any difference makes it a new one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.config import load
from mixtune.components.shared.artifacts import write_json
from mixtune.pipelines.configuration import ready_made
from mixtune.pipelines.ended import Ended
from mixtune.pipelines.local.unchanged import LastResults, forget_results

Change = Callable[[Path, dict[str, Any]], None]
CODE = "1234"


def of(folder: Path, values: dict[str, Any], code: str = CODE) -> LastResults:
    return LastResults(load(values), code, folder / "out")


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A configuration whose run has ended with the gate not met."""
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")
    output = tmp_path / "out"
    write_json(output / "report" / "report.json", {"selected": "mixed-0.3"})
    for name in ("models/mixed-0.3/model.safetensors", "mlflow/mlflow.db", ".mixtune/cache/one.json"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("weights")
    values = ready_made("demo")
    values["data"]["pretrain"] = {"source": str(tmp_path / "text.txt")}
    of(tmp_path, values).remember(Ended("r1", "SUCCEEDED", "gate_not_met", "gate not met: no"), ["a note"])
    return values


def test_the_same_run_has_the_same_end(tmp_path: Path, values: dict[str, Any]) -> None:
    ended = of(tmp_path, values).repeated()
    assert ended == Ended(
        "r1", "SUCCEEDED", "gate_not_met", "gate not met: no", [], {"selected": "mixed-0.3"}, {}, ["a note"]
    )
    assert ended.status == 3


def _option(folder: Path, values: dict[str, Any]) -> None:
    values["seed"] = 1


def _data(folder: Path, values: dict[str, Any]) -> None:
    file = folder / "text.txt"
    before = file.stat()
    file.write_text("one\n\nTwo\n")  # same size and time
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _model(folder: Path, values: dict[str, Any]) -> None:
    (folder / "out" / "models" / "mixed-0.3" / "model.safetensors").unlink()


def _report(folder: Path, values: dict[str, Any]) -> None:
    (folder / "out" / "report" / "report.json").write_text(json.dumps({"selected": "another"}))


def _store(folder: Path, values: dict[str, Any]) -> None:
    (folder / "out" / "mlflow" / "mlflow.db").write_text("a version was deleted")


def _source_gone(folder: Path, values: dict[str, Any]) -> None:
    (folder / "text.txt").unlink()


def _record_damaged(folder: Path, values: dict[str, Any]) -> None:
    (folder / "out" / ".mixtune" / "results.json").write_text('{"settings": ')


def _forgotten(folder: Path, values: dict[str, Any]) -> None:
    forget_results(folder / "out")


@pytest.mark.parametrize("change", [_option, _data, _model, _report, _store, _source_gone, _record_damaged, _forgotten])
def test_any_change_makes_it_a_new_run(tmp_path: Path, values: dict[str, Any], change: Change) -> None:
    change(tmp_path, values)
    assert of(tmp_path, values).repeated() is None


def test_other_code_makes_it_a_new_run(tmp_path: Path, values: dict[str, Any]) -> None:
    assert of(tmp_path, values, "5678").repeated() is None


def test_what_mlflow_leaves_for_a_moment_is_no_change(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "out" / "mlflow" / "mlflow.db-journal").touch()
    assert of(tmp_path, values).repeated() is not None
