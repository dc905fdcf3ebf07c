"""One engine and one build for all tests in this folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtune.components.shared.outcome import Outcome, load_outcomes
from tests.components.evaluate.harness_made import write_tasks
from tests.pipelines.project import Project

from . import engine


class Built:
    """The engine, with all images in it."""

    def __init__(self, host: str) -> None:
        self.host = host

    def docker(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [engine.docker(), "-H", self.host, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 or not check, done.stderr
        return done

    def inspect(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.docker("image", "inspect", name).stdout)[0])

    def start(self, project: Project, *arguments: str, config: dict[str, Any] | None = None) -> subprocess.Popen[str]:
        """`mixtune run --runner docker` in a project's folder."""
        (project.folder / "config.yaml").write_text(yaml.safe_dump(config or project.config), encoding="utf-8")
        return subprocess.Popen(
            [sys.executable, "-m", "mixtune.pipelines.cli", "run", "config.yaml", "--runner", "docker", *arguments],
            cwd=project.folder, env={**os.environ, "DOCKER_HOST": self.host}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip


def with_harness(project: Project, own_cache: bool) -> Project:
    """The same, with a task of lm-evaluation-harness; a container cannot write beside the tasks."""
    write_tasks(project.folder / "tasks", 20, own_cache)
    project.config["evaluate"] |= {"lm_eval": {"tasks": ["tiny_choice"], "tasks_folder": "tasks"}}
    return project


def outcomes(output: Path) -> dict[str, Outcome]:
    """The records of the last run in an output folder."""
    run = json.loads((output / ".mixtune" / "last_run.json").read_text())["id"]
    return {one.title: one for one in load_outcomes(output / ".mixtune" / "outcomes" / run)}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    reason = engine.why_not()
    if reason:
        assert not engine.WANTED, f"these tests must run here, but: {reason}"
        pytest.skip(f"no container is built or run: {reason}")
    with engine.engine() as host:
        engine.make_base(host)
        engine.build(host, tmp_path_factory.mktemp("build"))
        yield Built(host)


@pytest.fixture(scope="session")
def ran(built: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, str]:
    """The whole DAG in its containers: a finished run, and what the command printed."""
    project = with_harness(Project(tmp_path_factory.mktemp("in-containers")), own_cache=False)
    with built.start(project, "--memory", "3g") as process:
        printed = process.communicate(timeout=900)[0]
    assert process.returncode == 0, printed + (next(project.output.glob("logs/*/kfp.log")).read_text()[-3000:])
    return project, printed
