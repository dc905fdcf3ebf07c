"""Runs and single steps that are killed half-way, on real files: run again they give what an finished one gives."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mixtune.components.checks import fingerprints
from mixtune.components.config import load, parts
from mixtune.components.shared.outcome import Outcome, load_outcomes
from mixtune.components.shared.tracking.connection import connect
from mixtune.pipelines.configuration import read_config

from . import forked
from .project import Project, plain


def outcome_of(project: Project, title: str) -> Outcome:
    outcomes = load_outcomes(next((project.output / ".mixtune" / "outcomes").iterdir()))
    return next(outcome for outcome in outcomes if outcome.title == title)


STEPS = {
    "prepare pretrain": ("prepare_pretrain", ("train", "heldout", "tokenizer", "report")),
    "prepare finetune": ("prepare_finetune", ("train", "heldout", "tokenizer", "report")),
    "pretrain": ("pretrain", ("model", "metrics")),
    "evaluate mixed-0.3": ("evaluate", ("evaluation", "metrics", "classification")),
    "evaluate interpolated": ("interpolate", ("evaluation", "metrics", "classification")),
}


def start(
    project: Project, title: str, folder: Path, environment: dict[str, str]
) -> tuple[BaseProcess, list[Path], Path]:
    """One step on the inputs that it had in the run, with outputs of its own; its output is in the file."""
    config = read_config(project.folder / "config.yaml")
    name, outputs = STEPS[title]
    part = getattr(parts(config, fingerprints(config)), name)
    given = outcome_of(project, title).artifacts | {output: str(folder / output) for output in outputs}
    command = ["step", title.split()[0], "--config", part.to_json()]
    command += [word for name, path in given.items() for word in ("--artifact", f"{name}={path}")]
    log = folder.with_suffix(".log")
    return forked.start(command, project.folder, environment, log), [folder / output for output in outputs], log


def digests(folder: Path, root: Path) -> dict[str, str]:
    """What is in a folder or file; of JSON, all but the moment."""
    found = {}
    for file in sorted(path for path in (folder.rglob("*") if folder.is_dir() else [folder]) if path.is_file()):
        content = file.read_bytes()
        if file.suffix in (".json", ".jsonl") or folder.name == "metrics":
            rows = [
                plain(json.loads(line)) for line in ([content] if file.suffix != ".jsonl" else content.splitlines())
            ]
            content = json.dumps(rows, sort_keys=True).replace(str(root), "").encode()
        found[str(file.relative_to(root))] = hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.parametrize(
    ("title", "number"),
    [
        ("prepare pretrain", signal.SIGKILL),
        ("prepare finetune", signal.SIGTERM),
        ("pretrain", signal.SIGKILL),
        ("evaluate mixed-0.3", signal.SIGTERM),
        ("evaluate interpolated", signal.SIGKILL),
    ],
)
def test_a_step_that_is_killed_half_way_leaves_no_output_and_gives_the_same_when_run_again(
    finished: Project, tmp_path: Path, title: str, number: signal.Signals
) -> None:
    environment = {"MIXTUNE_CHECKPOINT_DIR": "", "MLFLOW_TRACKING_URI": "", "MIXTUNE_OUTCOME_DIR": str(tmp_path / "o")}
    again = tmp_path / "again"
    made = outcome_of(finished, title).artifacts
    expected = {output: digests(Path(made[output]), Path(made[output])) for output in STEPS[title][1]}

    process, outputs, log = start(finished, title, again, environment)
    deadline = time.monotonic() + 300
    while not any(path.is_file() for path in again.rglob("*.part*")) and not list(again.glob("*.part/*")):
        assert time.monotonic() < deadline
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.0005)
    assert process.pid
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == (143 if number == signal.SIGTERM else -number)
    assert not any(output.exists() for output in outputs), "what is half-written is never in its place"

    process, outputs, log = start(finished, title, again, environment)
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    assert {output.name: digests(output, output) for output in outputs} == expected
    assert {path.name for path in again.iterdir()} == {output.name for output in outputs if expected[output.name]}


def test_registering_twice_makes_one_version(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(finished.config)
    (made,) = finished.client().search_model_versions("name = 'tiny'")
    monkeypatch.chdir(finished.folder)
    part = parts(config, fingerprints(config)).register
    artifacts = outcome_of(finished, "register").artifacts | {"model": str(tmp_path / "model")}
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{finished.output / 'mlflow' / 'mlflow.db'}",
        "MIXTUNE_OUTCOME_DIR": str(tmp_path / "outcomes"),
    }
    command = [sys.executable, "-m", "mixtune.pipelines.cli", "step", "register", "--config", part.to_json()]
    command += [word for name, path in artifacts.items() for word in ("--artifact", f"{name}={path}")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [one.version for one in finished.client().search_model_versions("name = 'tiny'")] == [made.version]
    assert (
        connect(environment["MLFLOW_TRACKING_URI"]).get_model_version_by_alias("tiny", "candidate").version
        == made.version
    )
