"""Checks that a GPU computes what the CPU does. Without a GPU, those that a CPU can run are run there: few of them, and with
GPU_TESTS=all every one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from mixtune.components.shared.model.device import pick_device
from mixtune.components.shared.training import loop
from tests.components.shared.compared import gradient_descent

# Deterministic products of cuBLAS need a workspace of fixed size, which is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

RESULTS: dict[str, dict[str, object]] = {}
"""What the checks measured, and how they ended."""
ALL = torch.cuda.is_available() or os.environ.get("GPU_TESTS") == "all"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything here."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """What a step would compute on."""
    return pick_device()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keeps what a check measured for the report."""

    def keep(**measured: object) -> None:
        RESULTS.setdefault(request.node.name, {}).update(measured)

    return keep


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keeps how a check ended."""
    if "tests/gpu" in report.nodeid and (report.when == "call" or report.skipped):
        RESULTS.setdefault(report.nodeid.rpartition("::")[2], {})["outcome"] = report.outcome


def pytest_sessionfinish() -> None:
    """Writes the report, if GPU_REPORT names a file."""
    if file := os.environ.get("GPU_REPORT"):
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        packages = {each: version(each) for each in ("torch", "transformers", "accelerate", "peft")}
        report = {"device": name, **packages, "checks": RESULTS}
        Path(file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


@pytest.fixture
def plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains by plain gradient descent, after which weights can be compared."""
    monkeypatch.setattr(loop, "make_optimizer", gradient_descent)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Uses deterministic algorithms only. An operation that has none raises an error."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
