"""What MLflow has not got yet, on disk. Knows nothing of MLflow, so that the command reads it in no time.

A step writes every operation down before it is delivered, so that neither a server that goes away nor a kill loses one.

    <folder>/<time>-<title>-<hex>.jsonl    one attempt of a step: a first line that says whose it is, then its operations
    <folder>/<the same>.delivered          how many of them are delivered
    <folder>/<the same>.files/             copies of the files that could not be delivered
    <folder>/runs.json                     id of a run that began without MLflow -> id that MLflow gave it

A journal goes when all of it is delivered and its step has ended. While a process writes or delivers one, it is locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ..artifacts import write_json
from ..errors import MixtuneError
from .verdict import StepRun

FOLDER = "MIXTUNE_JOURNAL_DIR"
LOCAL = "local-"
"""How the id of a run begins that MLflow does not know yet."""

Operation = dict[str, Any]


@dataclass(frozen=True)
class Owner:
    """Whose operations a journal holds.

    Attributes:
        address: tracking address, without credentials.
        experiment: MLflow experiment.
        title: the step, and what it works on.
        pipeline_run: id of the pipeline run.
        run: the step's MLflow run; None if the journal ends no run of its own.
    """

    address: str
    experiment: str
    title: str
    pipeline_run: str | None = None
    run: str | None = None


class Journal:
    """The operations of one attempt of a step, in a file that only grows.

    Attributes:
        path: the file.
        owner: whose operations they are.
        pending: what is not delivered, oldest first.
        ended: whether the end of the step's run is among the operations, delivered or not.
        last_time: when the last operation was made, in milliseconds; known for a journal that was left behind.
    """

    def __init__(self, path: Path, owner: Owner, operations: Iterable[Operation], delivered: int, file: TextIO) -> None:
        everything = list(operations)
        self.path, self.owner = path, owner
        self.pending = everything[delivered:]
        self.ended = any(one["op"] == "end" and one["run"] == owner.run for one in everything)
        self.last_time: int | None = max((one["time"] for one in everything if "time" in one), default=None)
        self._delivered, self._file = delivered, file

    @classmethod
    def start(cls, folder: Path, owner: Owner) -> Journal:
        """Begins a journal."""
        folder.mkdir(parents=True, exist_ok=True)
        words = re.sub(r"[^A-Za-z0-9._-]", "-", owner.title)
        path = folder / f"{time.time_ns():019d}-{words}-{os.urandom(3).hex()}.jsonl"
        file = path.open("a", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX)
        journal = cls(path, owner, (), 0, file)
        journal._write(asdict(owner))
        return journal

    @classmethod
    def take(cls, path: Path) -> Journal | None:
        """Takes up a journal that its step left behind; None if a process is still at it, or another was faster."""
        try:
            file = path.open("r+", encoding="utf-8")
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        found = read(path)
        if found is None or not path.exists():
            file.close()
            return None
        owner, operations, delivered = found
        return cls(path, owner, operations, delivered, file)

    def append(self, operation: Operation) -> None:
        """Writes an operation down; with the system when this returns, so that killing the process does not lose it."""
        self.pending.append(operation)
        if operation["op"] == "end" and operation["run"] == self.owner.run:
            self.ended = True
        self._write(operation)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def advance(self, count: int) -> None:
        """Notes that the oldest `count` operations are delivered."""
        del self.pending[:count]
        self._delivered += count
        write_json(_delivered(self.path), self._delivered)

    def keep(self, source: Path) -> str:
        """Copies a file or folder into the journal.

        Returns:
            Where the copy is, for an operation to name.
        """
        place = _files(self.path) / str(len(list(_files(self.path).glob("*"))))
        place.mkdir(parents=True)
        copy = place / source.name
        if source.is_dir():
            shutil.copytree(source, copy)
        else:
            shutil.copy2(source, copy)
        return str(copy.relative_to(self.path.parent))

    def close(self) -> None:
        """Lets go of the journal, and removes it where nothing is left to deliver."""
        if not self.pending:
            shutil.rmtree(_files(self.path), ignore_errors=True)
            _delivered(self.path).unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Lets go of the journal and leaves it as it is."""
        self._file.close()


def _delivered(path: Path) -> Path:
    return path.with_suffix(".delivered")


def _files(path: Path) -> Path:
    return path.with_suffix(".files")


def read(path: Path) -> tuple[Owner, list[Operation], int] | None:
    """Reads a journal: whose it is, its operations, and how many of them are delivered. None if there is nothing in it."""
    lines: list[dict[str, Any]] = []
    # A process that was killed can have left half a last line.
    with contextlib.suppress(OSError, ValueError), path.open(encoding="utf-8") as file:
        lines.extend(json.loads(line) for line in file if line.endswith("\n"))
    if not lines:
        return None
    delivered = 0
    with contextlib.suppress(OSError, ValueError):
        delivered = int(_delivered(path).read_text(encoding="utf-8"))
    return Owner(**lines[0]), lines[1:], delivered


def journals(folder: Path) -> list[Path]:
    """The journals of a folder, oldest first."""
    return sorted(folder.glob("*.jsonl"))


def operations_of(folder: Path, pipeline_run: str | None) -> Iterator[Operation]:
    """All that the journals hold of one pipeline run, delivered or not, in the order in which the steps began."""
    for path in journals(folder):
        found = read(path)
        if found and found[0].pipeline_run == pipeline_run:
            yield from found[1]


def step_runs(operations: Iterable[Operation]) -> list[StepRun]:
    """The runs that began without MLflow, as operations tell of them, oldest first."""
    known: dict[str, StepRun] = {}
    for one in operations:
        if one["op"] == "run":
            known[one["run"]] = StepRun(one["name"], tags=dict(one["tags"]))
        elif one.get("run") in known:
            known[one["run"]].tags.update(one["values"] if one["op"] == "tags" else {})
            known[one["run"]].status = one.get("status", known[one["run"]].status)
    return list(known.values())


def known_runs(folder: Path) -> dict[str, str]:
    """For each run that began without MLflow and is there by now: its first id -> the one that MLflow gave it."""
    try:
        return dict(json.loads((folder / "runs.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder while runs are made for what began without MLflow, so that no run is made twice."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def count_of(operations: Iterable[Operation]) -> Counter[str]:
    """How much there is of each kind, in words."""
    counts: Counter[str] = Counter()
    for one in operations:
        match one["op"]:
            case "metrics":
                counts["metric value"] += len(one["values"])
            case "params":
                counts["setting"] += len(one["values"])
            case "tags" | "link":
                counts["tag"] += len(one.get("values") or one["runs"])
            case "artifact":
                counts["file"] += 1
            case "input":
                counts["input"] += 1
            case "run":
                counts["run"] += 1
            case "end" | "close":
                counts["end of a run"] += 1
    return counts


def in_words(counts: Counter[str]) -> str:
    """Counts as a person reads them: `1,200 metric values, 2 files`."""
    plural = {"end of a run": "ends of runs"}
    return ", ".join(f"{n:,} {what if n == 1 else plural.get(what, what + 's')}" for what, n in counts.items() if n)


@dataclass(frozen=True)
class Undelivered:
    """What a folder of journals still holds.

    Attributes:
        counts: how much of each kind.
        addresses: where it is to go.
    """

    counts: Counter[str]
    addresses: list[str]


def undelivered(folder: Path, address: str | None = None) -> Undelivered:
    """What steps left behind in a folder, for one address or for all. What a running step is at is not counted."""
    counts: Counter[str] = Counter()
    addresses: dict[str, None] = {}
    for path in journals(folder):
        found = read(path)
        if found is None or address not in (None, found[0].address) or _in_use(path):
            continue
        owner, operations, delivered = found
        pending = operations[delivered:]
        counts += count_of(pending)
        if owner.run and not any(one["op"] == "end" and one["run"] == owner.run for one in operations):
            counts["end of a run"] += 1  # the step was killed
        addresses[owner.address] = None
    return Undelivered(counts, list(addresses))


def _in_use(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def sync_command(folder: Path) -> str:
    """The command that delivers a journal folder."""
    inside_a_run = folder.parent.name == ".mixtune"
    return f"mixtune sync {folder.parent.parent}" if inside_a_run else "mixtune sync"


def folder_from_environment() -> Path | None:
    """Where journals are kept, as the environment says."""
    given = os.environ.get(FOLDER)
    return Path(given) if given else None


class NotSentYetError(MixtuneError):
    """An operation needs a run that another journal makes, and that one is not delivered yet."""

    kind = "unreachable"
