"""Steps keep the memory that tensors free: what glibc is told, where, and that it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixtune.components.config import load
from mixtune.components.shared.startup import MALLOC_TUNABLES
from mixtune.pipelines.configuration import ready_made
from mixtune.pipelines.local.folder import Run
from mixtune.pipelines.local.run import environment_of_steps

ROOT = Path(__file__).parents[2]


def test_images_and_local_runs_say_the_same_and_the_users_own_choice_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"GLIBC_TUNABLES={MALLOC_TUNABLES}" in (ROOT / "docker" / "Dockerfile").read_text().split()
    config, run = load(ready_made("demo")), Run("one", tmp_path)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert environment_of_steps(config, run)["GLIBC_TUNABLES"] == MALLOC_TUNABLES
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert environment_of_steps(config, run)["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_serves_the_next_step_without_page_faults() -> None:
    code = """
import resource
import torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for round in range(20):
    before = faults() if round == 10 else (before if round else 0)
    torch.ones(16_000_000)
print(faults() - before)
"""
    counted = []
    for tunables in ("", MALLOC_TUNABLES):
        environment = {**os.environ, "GLIBC_TUNABLES": tunables}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        counted.append(int(done.stdout))
    by_default, kept = counted
    assert by_default > 200  # 31 for each tensor where the kernel gives huge pages to all
    assert kept < max(100, by_default / 100)
