"""Trainings that are killed at random moments, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STORM = Path(__file__).parent / "storm.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--kills", "3", "--seed", "1"],
        ["--kills", "2", "--seed", "2", "--processes", "2"],
        ["--kills", "2", "--seed", "3", "--sigterm"],
        ["--kills", "2", "--seed", "4", "--sigterm", "--processes", "2"],
        ["--kills", "2", "--seed", "5", "--processes", "2", "--parallelism", "fsdp"],
        ["--kills", "2", "--seed", "6", "--processes", "2", "--parallelism", "fsdp", "--one"],
    ],
    ids=[
        "kill",
        "kill, two processes",
        "SIGTERM",
        "SIGTERM, two processes",
        "kill, two processes, sharded",
        "kill, one of two, sharded",
    ],
)
def test_killed_trainings_end_bitwise_equal(options: list[str]) -> None:
    done = subprocess.run([sys.executable, str(STORM), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{options[1]} kills, bitwise equal"
