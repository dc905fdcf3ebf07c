"""CPU seconds that a step without torch uses before its first useful line, started as a cluster starts it.

python tests/benchmarks/startup.py [--step plan]... [--repeat 5] [--tracking http] [--cache with] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.entries import STEPS, Entries, is_useful
from tests.mlflow_server import MlflowServer

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Used:
    """CPU seconds (user and system) of one process and what it started.

    Attributes:
        executor: until KFP's executor printed its first line.
        first_line: until the step printed its first useful line.
        whole: to the end of the step.
        line: the first useful line.
    """

    executor: float
    first_line: float
    whole: float
    line: str


def cpu_seconds(session: int) -> float:
    """CPU seconds used so far by the processes of a session and by what they have waited for."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue  # ended in the meantime
        if int(fields[3]) == session:
            ticks += sum(int(one) for one in fields[11:15])
    return ticks / TICKS


def measure(entries: Entries, step: str, environment: dict[str, str]) -> Used:
    """Runs a step once."""
    before = os.times()
    process = subprocess.Popen(
        entries.command(step), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    executor = first = 0.0
    line = ""
    printed = []
    assert process.stdout is not None
    for text in process.stdout:
        printed.append(text)
        if not executor:
            executor = cpu_seconds(process.pid)
        if not first and is_useful(text):
            first, line = cpu_seconds(process.pid), text.strip()
    process.wait()
    after = os.times()
    whole = after.children_user + after.children_system - before.children_user - before.children_system
    # `register` has no model to register here, and fails once it has imported torch.
    assert first and (process.returncode == 0 or step == "register"), "".join(printed)  # noqa: PT018
    return Used(executor, first, whole, line)


def environments(folder: Path, tracking: str, step: str, cache: str, repeat: int) -> Iterator[dict[str, str]]:
    """The environment of a container, as far as it matters for start-up; once for each repetition."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "MIXTUNE_", "PYTHON"))}
    own |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MIXTUNE_RUN_ID": "startup",
        "MLFLOW_TRACKING_URI": tracking,
    }
    for number in range(repeat):
        # As in an image without bytecode, where PYTHONPYCACHEPREFIX names a folder that starts empty.
        prefix = folder / ("cache" if cache == "with" else f"{step}-{number}")
        yield own | {"PYTHONPYCACHEPREFIX": str(prefix)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step", choices=STEPS, action="append", help="this step only (may be given again)")
    parser.add_argument(
        "--tracking", choices=("sqlite", "http"), action="append", help="this kind of MLflow store only"
    )
    parser.add_argument("--cache", choices=("with", "without"), action="append", help="with or without bytecode only")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each step; the table has their medians")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    figures = []
    print("| MLflow | bytecode | step | KFP's executor | first line | slowest | whole step | the line |")  # noqa: T201
    print("|---|---|---|---|---|---|---|---|")  # noqa: T201
    with tempfile.TemporaryDirectory() as place:
        server = MlflowServer(Path(place) / "server")
        try:
            for tracking in given.tracking or ("sqlite", "http"):
                if tracking == "http":
                    server.start()
                uri = server.uri if tracking == "http" else f"sqlite:///{place}/mlflow.db"
                folder = Path(place) / tracking
                folder.mkdir()
                entries = Entries(folder)
                for environment in environments(folder, uri, "", "with", 1):
                    for step in STEPS:  # makes the store, the bytecode and the files that the later steps read
                        measure(entries, step, environment)
                for cache in given.cache or ("with", "without"):
                    for step in given.step or STEPS:
                        runs = [
                            measure(entries, step, one) for one in environments(folder, uri, step, cache, given.repeat)
                        ]
                        middle = {
                            name: statistics.median(getattr(run, name) for run in runs)
                            for name in ("executor", "first_line", "whole")
                        }
                        slowest = max(run.first_line for run in runs)
                        print(  # noqa: T201
                            f"| {tracking} | {cache} | {step} | {middle['executor']:.2f} s | {middle['first_line']:.2f} s "
                            f"| {slowest:.2f} s | {middle['whole']:.2f} s | {runs[0].line[:60]} |",
                            flush=True,
                        )
                        figures.append(
                            {"tracking": tracking, "cache": cache, "step": step, "runs": [asdict(run) for run in runs]}
                        )
        finally:
            server.kill()
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
