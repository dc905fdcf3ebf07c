"""A project for every test that wants one of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from .project import Project


@pytest.fixture
def fresh(tmp_path: Path) -> Project:
    return Project(tmp_path)
