"""Wall-clock seconds of `mixtune run`: a first run and a cached run of a small project, and candidates side by side.

python tests/benchmarks/local_run.py [--command .venv/bin/mixtune]... [--repeat 5]
python tests/benchmarks/local_run.py --parallel [--repeat 3]

Several commands, such as one of another checkout, are measured in alternation. With --parallel, the mixed candidates of the
demo are trained and evaluated repeatedly on the same prepared data, in alternation one at a time and two at a time.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.pipelines.project import Project


def seconds(command: list[str], folder: Path) -> float:
    """Returns how long a command takes. Ends the benchmark if it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):  # 3: the gate was not met, which says nothing about the speed
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started


def small_project(commands: list[str], repeat: int) -> dict[str, list[float]]:
    """Measures a first run and a run whose results are all cached."""
    measured: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        project = Project(Path(temporary))
        (project.folder / "config.yaml").write_text(yaml.safe_dump(project.config), encoding="utf-8")
        for _ in range(repeat):
            for command in commands:
                shutil.rmtree(project.output, ignore_errors=True)
                for name in ("first run", "cached run"):
                    run = [command, "run", "config.yaml"]
                    measured[f"{command}, {name}"].append(seconds(run, project.folder))
    return measured


def side_by_side(command: str, repeat: int) -> dict[str, list[float]]:
    """Measures the mixed candidates of the demo, their evaluation and the comparison."""
    measured: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds([command, "run", "--output", "demo"], folder)
        for _ in range(repeat):
            for parallel in (1, 2):
                rerun = [command, "rerun", "demo", "--from", "mixed", "--set", f"run.parallel={parallel}"]
                measured[f"run.parallel={parallel}"].append(seconds(rerun, folder))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", action="append", help="the mixtune command; repeat it to compare several")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--parallel", action="store_true")
    asked = parser.parse_args()
    commands = asked.command or [str(Path(sys.executable).with_name("mixtune"))]
    measured = side_by_side(commands[0], asked.repeat) if asked.parallel else small_project(commands, asked.repeat)
    print("| | median | slowest |\n|---|---|---|")  # noqa: T201
    for name, values in measured.items():
        print(f"| {name} | {statistics.median(values):.1f} s | {max(values):.1f} s |")  # noqa: T201


if __name__ == "__main__":
    main()
