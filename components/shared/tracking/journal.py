"""Journals on disk of records that MLflow has not received. Does not import MLflow, so that the command reads them quickly.

A step writes every operation to a journal before it is delivered, so that neither an unavailable server nor a kill loses it.

    <folder>/<time>-<title>-<hex>.jsonl    one attempt at a step: the first line identifies it, its operations follow
    <folder>/<the same>.delivered          number of delivered operations
    <folder>/<the same>.files/             copies of files that could not be delivered
    <folder>/<the same>.lock               held by the process that writes or delivers the journal
    <folder>/runs.json                     maps the id of a run that started without MLflow to its id in MLflow

A journal is deleted after all of it is delivered and its step has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock

from ..artifacts import write_json
from ..errors import MixtuneError
from .verdict import StepRun

FOLDER = "MIXTUNE_JOURNAL_DIR"
LOCAL = "local-"
"""Prefix of the ids of runs that MLflow does not know yet."""
_PROBE_SECONDS = 0.2  # a process that checks whether a journal is in use holds its lock for an instant

Operation = dict[str, Any]


@dataclass(frozen=True)
class JournalOwner:
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

    def __init__(
        self,
        path: Path,
        owner: JournalOwner,
        operations: Iterable[Operation],
        delivered: int,
        file: TextIO,
        lock: FileLock,
    ) -> None:
        everything = list(operations)
        self.path, self.owner = path, owner
        self.pending = everything[delivered:]
        self.ended = any(operation["op"] == "end" and operation["run"] == owner.run for operation in everything)
        self.last_time: int | None = max(
            (operation["time"] for operation in everything if "time" in operation), default=None
        )
        self._delivered, self._file, self._lock = delivered, file, lock

    @classmethod
    def start(cls, folder: Path, owner: JournalOwner) -> Journal:
        """Creates a journal."""
        folder.mkdir(parents=True, exist_ok=True)
        file_title = re.sub(r"[^A-Za-z0-9._-]", "-", owner.title)
        path = folder / f"{time.time_ns():019d}-{file_title}-{os.urandom(3).hex()}.jsonl"
        lock = _lock(path)
        lock.acquire()
        try:
            file = path.open("a", encoding="utf-8")
        except OSError:
            _lock_file(path).unlink(missing_ok=True)
            lock.release()
            raise
        journal = cls(path, owner, (), 0, file, lock)
        journal._write(asdict(owner))
        return journal

    @classmethod
    def take(cls, path: Path) -> Journal | None:
        """Opens the journal of a step that has ended; None if another process holds its lock."""
        lock = _try_lock(path)
        if lock is None:
            return None
        content = read(path)
        try:
            file = path.open("a", encoding="utf-8")
        except OSError:
            content = None
        if content is None:
            lock.release()
            return None
        owner, operations, delivered = content
        return cls(path, owner, operations, delivered, file, lock)

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
        folder = _files(self.path) / str(len(list(_files(self.path).glob("*"))))
        folder.mkdir(parents=True)
        copy = folder / source.name
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
            _lock_file(self.path).unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Releases the journal without deleting it."""
        self._file.close()
        self._lock.release()


def _lock_file(path: Path) -> Path:
    return path.with_suffix(".lock")


def _lock(path: Path) -> FileLock:
    # Without flock, filelock would use the file's existence, which a killed process does not undo.
    return FileLock(_lock_file(path), thread_local=False, fallback_to_soft=False, poll_interval=0.02)


def _try_lock(path: Path) -> FileLock | None:
    """Locks an existing journal; None if another process holds its lock or has deleted the journal."""
    lock = _lock(path)
    try:
        lock.acquire(timeout=_PROBE_SECONDS)
    except OSError:
        return None
    if path.exists():
        return lock
    _lock_file(path).unlink(missing_ok=True)
    lock.release()
    return None


def _delivered(path: Path) -> Path:
    return path.with_suffix(".delivered")


def _files(path: Path) -> Path:
    return path.with_suffix(".files")


def read(path: Path) -> tuple[JournalOwner, list[Operation], int] | None:
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
    return JournalOwner(**lines[0]), lines[1:], delivered


def journals(folder: Path) -> list[Path]:
    """Returns the journals of a folder, oldest first."""
    return sorted(folder.glob("*.jsonl"))


def operations_of(folder: Path, pipeline_run: str | None) -> Iterator[Operation]:
    """Yields all operations of one pipeline run, delivered or not, in the order in which the steps started."""
    for path in journals(folder):
        content = read(path)
        if content and content[0].pipeline_run == pipeline_run:
            yield from content[1]


def step_runs(operations: Iterable[Operation]) -> list[StepRun]:
    """Returns the runs that started without MLflow, oldest first, as the operations describe them."""
    known: dict[str, StepRun] = {}
    for operation in operations:
        run = operation.get("run")
        if operation["op"] == "run":
            known[operation["run"]] = StepRun(operation["name"], tags=dict(operation["tags"]))
        elif run in known:
            known[run].tags.update(operation["values"] if operation["op"] == "tags" else {})
            known[run].status = operation.get("status", known[run].status)
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
    with FileLock(folder / "lock", fallback_to_soft=False):
        yield


def count_of(operations: Iterable[Operation]) -> Counter[str]:
    """Counts the operations' values by kind."""
    counts: Counter[str] = Counter()
    for operation in operations:
        match operation["op"]:
            case "metrics":
                counts["metric value"] += len(operation["values"])
            case "params":
                counts["setting"] += len(operation["values"])
            case "tags" | "link":
                counts["tag"] += len(operation.get("values") or operation["runs"])
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
        content = read(path)
        if content is None or address not in (None, content[0].address) or _in_use(path):
            continue
        owner, operations, delivered = content
        pending = operations[delivered:]
        counts += count_of(pending)
        if owner.run and not any(
            operation["op"] == "end" and operation["run"] == owner.run for operation in operations
        ):
            counts["end of a run"] += 1  # the step was killed
        addresses[owner.address] = None
    return Undelivered(counts, list(addresses))


def _in_use(path: Path) -> bool:
    lock = _try_lock(path)
    if lock is not None:
        lock.release()
    return lock is None


def sync_command(folder: Path) -> str:
    """Returns the command that delivers a folder of journals."""
    inside_a_run = folder.parent.name == ".mixtune"
    return f"mixtune sync {shlex.quote(str(folder.parent.parent))}" if inside_a_run else "mixtune sync"


def folder_from_environment() -> Path | None:
    """Returns the folder for journals that the environment names."""
    given = os.environ.get(FOLDER)
    return Path(given) if given else None


class NotSentYetError(MixtuneError):
    """An operation needs a run from another journal that is not delivered yet."""

    kind = "unreachable"
