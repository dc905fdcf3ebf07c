"""What the tests of the pipeline share: projects, a finished run, and compiling that is quick."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from .project import LONGER, Project

PRINTED = "printed.txt"
"""What the finished run printed."""


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run, one for the tests of all workers: they only read it."""
    of_worker = tmp_path_factory.getbasetemp()
    folder = (of_worker.parent if "PYTEST_XDIST_WORKER" in os.environ else of_worker) / "finished"
    with FileLock(f"{folder}.lock"):
        if not (folder / PRINTED).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            project = Project(folder)
            project.config["mixed"] |= LONGER
            with tempfile.TemporaryDirectory() as temporary:
                project.environment["TMPDIR"] = temporary
                status, _, printed = project.run()
                assert status == 0, printed
                assert list(Path(temporary).iterdir()) == []  # what KFP and torch put there is gone
            (folder / PRINTED).write_text(printed, encoding="utf-8")
    project = Project(folder)
    project.config["mixed"] |= LONGER
    return project


@pytest.fixture
def copied(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished run, which a test may go on from."""
    return finished.copied_to(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def _quick_compiling() -> Iterator[None]:
    """Gives KFP the name of its caller without the source code of the whole stack.

    KFP asks `inspect.stack()` for it at every option of every task. Some frames of an xdist worker have no file, and for each
    of those `inspect` searches all modules: with torch imported that makes 5 s of a compilation of 0.2 s.
    """

    def stack() -> list[Any]:
        return [None, [None, None, None, sys._getframe(2).f_code.co_name]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kfp.dsl.pipeline_task.inspect", SimpleNamespace(stack=stack))
        yield
