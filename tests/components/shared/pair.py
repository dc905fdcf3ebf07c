"""Two processes of one torchrun, which run the trainings of many tests one after another: torch is imported once, not in each.

A step that wants processes starts `ASK` where it would start torchrun. Everything else of the step is real: it writes its
order, waits for a process, and reads what the processes wrote.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
QUEUE = "TESTS_QUEUE_OF_PAIR"
ASK = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {__name__} import ask; ask()"
"""A program with torchrun's arguments."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SECONDS = 120


@contextlib.contextmanager
def pair(queue: Path, module: str, processes: int = 2) -> Iterator[None]:
    """Starts the processes.

    Args:
        queue: an empty folder for the orders.
        module: it calls `serve` with the queue.
        processes: how many.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (queue / "log").open("wb") as log:
        command = [*TORCHRUN, f"--nproc-per-node={processes}", "-m", module, "serve", str(queue)]
        with subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
            try:
                yield
            finally:
                (queue / "end").touch()
                process.wait(SECONDS)
    assert process.returncode == 0, (queue / "log").read_text()


def ask() -> None:
    """Gives the folder of an order to the processes and waits until all are done with it."""
    queue = Path(os.environ[QUEUE])
    number = len(list(queue.glob("*.order")))
    order = queue / f"{number}.part"
    order.write_text(json.dumps({"folder": sys.argv[-1], "environment": dict(os.environ)}))
    order.rename(order.with_suffix(".order"))
    statuses = [queue / f"{number}.status-{rank}" for rank in range(int(os.environ["MIXTUNE_PROCESSES"]))]
    _wait_for(all, statuses, SECONDS)
    worst = max(int(status.read_text() or 1) for status in statuses)
    if worst:
        sys.stderr.write((queue / "log").read_text())
    sys.exit(worst)


def serve(queue: Path, run: Callable[[Path], int]) -> None:
    """Runs what is ordered, in each of the two processes, until the pair ends.

    Args:
        run: gets the folder of an order and returns an exit status.
    """
    of_torchrun = dict(os.environ)
    number = 0
    while True:
        order = queue / f"{number}.order"
        _wait_for(any, [order, queue / "end"], math.inf)
        if not order.exists():
            return
        given = json.loads(order.read_text())
        os.environ.clear()
        os.environ.update(given["environment"] | of_torchrun)
        status = queue / f"{number}.part-{os.environ['RANK']}"
        status.write_text(str(run(Path(given["folder"]))))
        status.rename(queue / f"{number}.status-{os.environ['RANK']}")
        number += 1


def _wait_for(how_many: Callable[[Iterable[bool]], bool], files: list[Path], seconds: float) -> None:
    started = time.monotonic()
    while not how_many(file.exists() for file in files):
        assert time.monotonic() - started < seconds, "the pair does not answer"
        time.sleep(0.02)
