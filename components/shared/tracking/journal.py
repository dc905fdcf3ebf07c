"""Journals on disk of records that MLflow has not received. Does not import MLflow, so that the command reads them quickly.

A step writes every operation to a journal before it is delivered, so that neither an unavailable server nor a kill loses it.

    <folder>/<time>-<title>-<hex>.jsonl    one attempt at a step: the first line identifies it, its operations follow
    <folder>/<the same>.delivered          number of delivered operations
    <folder>/<the same>.files/             copies of files that could not be delivered
    <folder>/runs.json                     maps the id of a run that started without MLflow to its id in MLflow

A journal is deleted after all of it is delivered and its step has ended. A process that writes or delivers it holds a lock.
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
"""Prefix of the ids of runs that MLflow does not know yet."""

Operation = dict[str, Any]


@dataclass(frozen=True)
class Owner:
    """Identifies the step that a journal belongs to.

    Attributes:
        address: tracking address, without credentials.
        experiment: MLflow experiment.
        title: the step and its subject.
        pipeline_run: id of the pipeline run.
        run: the step's MLflow run; None if the journal does not end a run of its own.
    """

    address: str
    experiment: str
    title: str
    pipeline_run: str | None = None
    run: str | None = None


class Journal:
    """The operations of one attempt at a step, in an append-only file.

    Attributes:
        path: the file.
        owner: the step that the operations belong to.
        pending: undelivered operations, oldest first.
        ended: whether the operations, delivered or not, include the end of the step's run.
        last_time: time of the last operation, in milliseconds; None in a new journal.
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
        """Creates a journal."""
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
        """Opens the journal of a step that has ended; None if another process holds its lock."""
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
        """Appends an operation. It is flushed to the operating system, so that a kill of the process does not lose it."""
        self.pending.append(operation)
        if operation["op"] == "end" and operation["run"] == self.owner.run:
            self.ended = True
        self._write(operation)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def advance(self, count: int) -> None:
        """Marks the oldest `count` operations as delivered."""
        del self.pending[:count]
        self._delivered += count
        write_json(_delivered(self.path), self._delivered)

    def keep(self, source: Path) -> str:
        """Copies a file or folder into the journal.

        Returns:
            The path of the copy, relative to the folder of journals.
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
        """Releases the journal and deletes it if nothing is pending."""
        if not self.pending:
            shutil.rmtree(_files(self.path), ignore_errors=True)
            _delivered(self.path).unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Releases the journal without deleting it."""
        self._file.close()


def _delivered(path: Path) -> Path:
    return path.with_suffix(".delivered")


def _files(path: Path) -> Path:
    return path.with_suffix(".files")


def read(path: Path) -> tuple[Owner, list[Operation], int] | None:
    """Reads a journal: its owner, its operations, and the number of delivered ones. None if it is empty."""
    lines: list[dict[str, Any]] = []
    # A killed process can leave a partial last line.
    with contextlib.suppress(OSError, ValueError), path.open(encoding="utf-8") as file:
        lines.extend(json.loads(line) for line in file if line.endswith("\n"))
    if not lines:
        return None
    delivered = 0
    with contextlib.suppress(OSError, ValueError):
        delivered = int(_delivered(path).read_text(encoding="utf-8"))
    return Owner(**lines[0]), lines[1:], delivered


def journals(folder: Path) -> list[Path]:
    """Returns the journals of a folder, oldest first."""
    return sorted(folder.glob("*.jsonl"))


def operations_of(folder: Path, pipeline_run: str | None) -> Iterator[Operation]:
    """Yields all operations of one pipeline run, delivered or not, in the order in which the steps started."""
    for path in journals(folder):
        found = read(path)
        if found and found[0].pipeline_run == pipeline_run:
            yield from found[1]


def step_runs(operations: Iterable[Operation]) -> list[StepRun]:
    """Returns the runs that started without MLflow, oldest first, as the operations describe them."""
    known: dict[str, StepRun] = {}
    for one in operations:
        if one["op"] == "run":
            known[one["run"]] = StepRun(one["name"], tags=dict(one["tags"]))
        elif one.get("run") in known:
            known[one["run"]].tags.update(one["values"] if one["op"] == "tags" else {})
            known[one["run"]].status = one.get("status", known[one["run"]].status)
    return list(known.values())


def known_runs(folder: Path) -> dict[str, str]:
    """Returns a dict from the ids of runs that started without MLflow to their ids in MLflow, if they are delivered."""
    try:
        return dict(json.loads((folder / "runs.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder while runs that started without MLflow are created, so that no run is created twice."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def count_of(operations: Iterable[Operation]) -> Counter[str]:
    """Counts the operations' values by kind."""
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
    """Formats counts for messages: `1,200 metric values, 2 files`."""
    plural = {"end of a run": "ends of runs"}
    return ", ".join(f"{n:,} {what if n == 1 else plural.get(what, what + 's')}" for what, n in counts.items() if n)


@dataclass(frozen=True)
class Undelivered:
    """The undelivered content of a folder of journals.

    Attributes:
        counts: number of undelivered values by kind.
        addresses: tracking addresses that they belong to.
    """

    counts: Counter[str]
    addresses: list[str]


def undelivered(folder: Path, address: str | None = None) -> Undelivered:
    """Counts undelivered records in a folder, for one address or for all. Journals of running steps are not counted."""
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
    """Returns the command that delivers a folder of journals."""
    inside_a_run = folder.parent.name == ".mixtune"
    return f"mixtune sync {folder.parent.parent}" if inside_a_run else "mixtune sync"


def folder_from_environment() -> Path | None:
    """Returns the folder for journals that the environment names."""
    given = os.environ.get(FOLDER)
    return Path(given) if given else None


class NotSentYetError(MixtuneError):
    """An operation needs a run from another journal that is not delivered yet."""

    kind = "unreachable"
