"""What runs on each node of a TrainJob: torchrun with the step of the order, between a check before and a seal after it.

    python -m mixtune.components.shared.nodes.node FOLDER

Kubeflow Trainer sets PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT. The exit status decides what happens next:

    0   the training is done
    1   an error that is on record: the TrainJob fails, and the step's own retries decide
    2   refused: the TrainJob fails, and nothing is retried
    3   a process died without a record, such as after the loss of another node: all nodes start again from the checkpoint
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from ..artifacts import write_json
from ..ascii_text import spell_in_output
from ..checkpoints.store import read_note, remove
from ..errors import MixtuneError
from ..outcome import EXIT_STATUS
from ..running.context import take_tracking_secret
from ..running.processes import processes_here, run_torchrun
from .exchange import check_inputs, is_done, seal_results

LOST = 3


def run_node(folder: Path) -> int:
    """Runs the training's processes of this node.

    Args:
        folder: the folder of the TrainJob on the volume that all nodes share.

    Returns:
        Exit status.
    """
    rank = int(os.environ["PET_NODE_RANK"])
    if is_done(folder):
        return 0  # an earlier attempt, whose pods were lost after its end
    if EXIT_STATUS["refused"] == (before := status_on_record(folder)):
        return before
    try:
        if rank == 0:
            for leftover in (*folder.glob("raised-*.json"), folder / "done.json", folder / "outputs"):
                remove(leftover)
            check_inputs(json.loads((folder / "order.json").read_text(encoding="utf-8")))
        status = run_torchrun(folder, *_rendezvous())
    except MixtuneError as error:
        write_json(folder / f"raised-node-{rank}.json", {"kind": error.kind, "problems": error.problems})
        return EXIT_STATUS[error.kind]
    if status != 0:
        return status_on_record(folder) or LOST
    if rank == 0:
        seal_results(folder)
    return 0


def _rendezvous() -> list[str]:
    """Returns torchrun's options. PET_NPROC_PER_NODE would give a process to each CPU of a node without GPUs."""
    given = {
        "nnodes": os.environ["PET_NNODES"],
        "node-rank": os.environ["PET_NODE_RANK"],
        "nproc-per-node": str(processes_here()),
        "master-addr": os.environ["PET_MASTER_ADDR"],
        "master-port": os.environ["PET_MASTER_PORT"],
    }
    return [f"--{name}={value}" for name, value in given.items()]


def status_on_record(folder: Path) -> int:
    """Returns the exit status of what the processes recorded: 2 if one was refused, 1 if one failed, else 0."""
    records: list[Any] = [read_note(file) for file in folder.glob("raised-*.json")]
    return max((EXIT_STATUS[record["kind"]] for record in records if record), default=0)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """Ends torchrun, whose processes save a checkpoint. Without a handler the first process of a container ignores SIGTERM."""
    raise SystemExit(EXIT_STATUS["terminated"])


if __name__ == "__main__":
    spell_in_output()
    take_tracking_secret()
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(run_node(Path(sys.argv[1])))
