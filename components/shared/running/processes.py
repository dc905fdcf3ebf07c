"""Runs a training step in several processes: one for each GPU of the pod, or as many as MIXTUNE_PROCESSES says.

A training step is restarted under torchrun, every process with the same arguments. The first process writes the outputs. If
torchrun already started this process (RANK is set), no processes are started.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifacts import Artifact, ArtifactLike, write_json
from ..errors import MixtuneError, RefusedError, is_out_of_memory
from ..model.device import requested_gpus
from ..section import Section
from ..startup import quick_imports
from ..tracking.tracker import Tracker
from .context import Context

TRAINING_STEPS = ("pretrain", "finetune", "mixed")
TORCHRUN = """
import sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main(sys.argv[1:])
except ChildFailedError:
    sys.exit(1)
"""
"""torchrun without its own traceback: the step reports the errors of its processes."""


def is_main() -> bool:
    """Tells whether this is the process that writes the outputs."""
    return int(os.environ.get("RANK", "0")) == 0


def trains(step: str, config: Section) -> bool:
    """Tells whether a step trains a model with its configuration."""
    return step in TRAINING_STEPS and bool(getattr(getattr(config, step, None), "trains", False))


def num_processes(step: str, config: Section) -> int:
    """Returns the number of processes for a step."""
    if "RANK" in os.environ or not trains(step, config):
        return 1
    return processes_here()


def processes_here() -> int:
    """Returns the number of processes of a training on this machine.

    Raises:
        RefusedError: if the environment asks for something that is no number.
    """
    given = os.environ.get("MIXTUNE_PROCESSES")
    if given is not None:
        if not given.isdecimal() or int(given) < 1:
            raise RefusedError(f"MIXTUNE_PROCESSES: must be a whole number above 0, found {given}")
        return int(given)
    import torch

    # A container can see more GPUs than its task requested.
    return requested_gpus() or max(1, torch.cuda.device_count())


def run_in_processes(
    count: int,
    step: str,
    config: Section,
    context: Context,
    artifacts: Mapping[str, ArtifactLike | list[ArtifactLike] | None],
    parameters: Mapping[str, Any],
) -> None:
    """Runs a step's `run` in several processes and copies the artifacts' metadata from the first one.

    Raises:
        MixtuneError: if a process raised it or died.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_order(Path(folder), step, config, context, artifacts, parameters)
        context.say(f"{context.title}: {count} processes")
        status = run_torchrun(Path(folder), "--standalone", f"--nproc-per-node={count}")
        raise_what_was_raised(Path(folder))
        if status != 0:
            raise MixtuneError(f"a process of the training ended with status {status}; its output stands above")
        read_done(Path(folder), artifacts, context)


def write_order(
    folder: Path,
    step: str,
    config: Section,
    context: Context,
    artifacts: Mapping[str, ArtifactLike | list[ArtifactLike] | None],
    parameters: Mapping[str, Any],
) -> None:
    """Writes order.json, from which processes run the step."""
    order = {
        "step": step,
        "config": config.to_json(),
        "title": context.title,
        "run_id": context.run_id,
        "mlflow_run": context.tracker.run_id,
        "mlflow_parent": context.tracker.parent_id,
        "journal": str(context.tracker.journal_folder or ""),
        "artifacts": {
            name: {"path": artifact.path, "uri": artifact.uri, "metadata": artifact.metadata}
            for name, artifact in artifacts.items()
            if artifact is not None and not isinstance(artifact, list)
        },
        "parameters": dict(parameters),
    }
    write_json(folder / "order.json", order)


def run_torchrun(folder: Path, *options: str) -> int:
    """Runs the step of an order in the processes of torchrun, which end with this one.

    Args:
        folder: contains order.json.
        options: of torchrun.

    Returns:
        Exit status.
    """
    with subprocess.Popen([sys.executable, "-c", TORCHRUN, *options, "-m", __name__, str(folder)]) as processes:
        try:
            return processes.wait()
        except BaseException:
            processes.terminate()
            raise


def raise_what_was_raised(folder: Path) -> None:
    """Raises what a process recorded: a refusal rather than another error, since the others often follow from it."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("raised-*.json"))]
    for raised in sorted(records, key=lambda one: one["kind"] != "refused"):
        raise (RefusedError if raised["kind"] == "refused" else MixtuneError)(*raised["problems"])


def read_done(
    folder: Path, artifacts: Mapping[str, ArtifactLike | list[ArtifactLike] | None], context: Context
) -> None:
    """Copies the artifacts' metadata and the facts that the first process wrote."""
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    for name, metadata in done["metadata"].items():
        output: Any = artifacts[name]
        output.metadata.update(metadata)
    context.facts.update(done["facts"])


def run_process(folder: Path) -> int:
    """Runs the step in one of the processes.

    Args:
        folder: contains order.json; the process writes its result or error there.

    Returns:
        Exit status.
    """
    order = json.loads((folder / "order.json").read_text(encoding="utf-8"))
    package = __package__.rsplit(".", 2)[0]  # __name__ is __main__ here
    section: type[Section] = getattr(
        importlib.import_module(f"{package}.{order['step']}.config"), f"{order['step'].capitalize()}Step"
    )
    artifacts = {name: Artifact(**artifact) for name, artifact in order["artifacts"].items()}
    tracker = Tracker.off()
    if is_main():
        journal = Path(order["journal"]) if order["journal"] else None
        tracker = Tracker.attach(order["mlflow_run"], order["mlflow_parent"], journal, order["title"])
    context = Context(title=order["title"], tracker=tracker, run_id=order["run_id"], quiet=not is_main())
    try:
        with quick_imports():
            module = importlib.import_module(f"{package}.{order['step']}.step")
        module.run(section.from_json(order["config"]), context=context, **artifacts, **order["parameters"])
    except MixtuneError as error:
        raised = {"kind": error.kind, "problems": error.problems}
        write_json(folder / f"raised-{os.environ['RANK']}.json", raised)
        return 1
    except Exception as error:
        traceback.print_exc()
        if is_out_of_memory(error):
            raised = {"kind": "failed", "problems": ["out of memory; use more memory"]}
            write_json(folder / f"raised-{os.environ['RANK']}.json", raised)
        return 1
    finally:
        tracker.detach()
    if is_main():
        metadata = {name: artifact.metadata for name, artifact in artifacts.items()}
        write_json(folder / "done.json", {"metadata": metadata, "facts": context.facts})
    return 0


if __name__ == "__main__":
    sys.exit(run_process(Path(sys.argv[1])))
