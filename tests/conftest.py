"""Small real parts that many tests use: data folders, tokenizers and models of a few thousand parameters."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# One thread: small matrices gain nothing from two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# Code that inductor compiled for other instructions must not be used.
_CAPABILITY = os.environ.get("ATEN_CPU_CAPABILITY", "all")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/mixtune-tests-compiled-{_CAPABILITY}")
for name in [name for name in os.environ if name.startswith(("MLFLOW_", "MIXTUNE_"))]:
    del os.environ[name]

# No example fails because the machine is busy. Continuous integration tries the same examples each time, so that it judges the
# change; other runs try new ones.
hypothesis.settings.register_profile(
    "mixtune",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
hypothesis.settings.load_profile("mixtune")

# Minutes each, the longest first.
LONG = (
    "containers",
    "test_demo.py",
    "test_run.py",
    "test_distributed.py",
    "test_run_tasks.py",
    "test_brought_model.py",
    "test_mlflow.py",
    "test_sync.py",
    "test_run_stopped.py",
    "test_storm.py",
    "test_with_evaluate.py",
    "test_undelivered.py",
    "test_images.py",
    "test_e2e.py",
    "test_killed.py",
    "test_training_options.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones first, so that no worker is left with them at the end."""

    def place(item: pytest.Item) -> int:
        return next((number for number, name in enumerate(LONG) if name in item.path.parts), len(LONG))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores, since many tests wait: for a server, a lease, a download."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives all tests of the images to one worker, so that they are built once."""
    if config.getoption("dist") != "loadfile":
        return None
    from .by_file import ByFile

    return ByFile(config, log)


WORDS = tuple("the a cat dog bird sees hears likes small large red blue old new house garden tree river".split())  # noqa: SIM905


def sentences(count: int, seed: int = 0, words: tuple[str, ...] = WORDS) -> list[str]:
    """Distinct short texts."""
    draw = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[" ".join(draw.choice(words) for _ in range(draw.randint(6, 18)))] = None
    return list(texts)


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A disk of a size such as 3m at a place; skips the test where nothing can be mounted."""
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # a database may still be open


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], Path]:
    """Writes rows to a JSONL file in the test's folder."""

    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
