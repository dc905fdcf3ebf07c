"""What the tests of the pipeline share: a project of one's own, and compiling that is quick."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .project import Project


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    return Project(tmp_path)


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
