"""Checkpoints of one training in one folder. A checkpoint is complete or does not exist, even if writing it is interrupted.

    <folder>/step-00000120-1f0c/    weights.safetensors, optimizer.safetensors, state.json; manifest.json with their hashes
                                    (of a sharded training, one file of tensors from each process)
    <folder>/holder.json            the process that trains now; <folder>/lease.lock is the actual lock
    <folder>/finished.json          the run that finished this training; `finish` deletes the folder when that run has succeeded

A checkpoint is written to a temporary folder. Every file is synced, the manifest last; then the folder is renamed. Tensors are
stored as safetensors and the rest as JSON, so loading a checkpoint cannot execute code.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..artifacts import write_json
from ..errors import MixtuneError

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT_DIR = "MIXTUNE_CHECKPOINT_DIR"
FORMAT = "mixtune-checkpoint/1"
NUM_KEPT = 2
WAIT_SECONDS = 1.0
WAITING_LINE_SECONDS = 60.0
TENSORS = ("weights", "optimizer")
_PARTIAL_PREFIX = "aside-"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: number of completed optimizer steps.
        folder: its folder.
    """

    step: int
    folder: Path

    def state(self) -> dict[str, Any]:
        """Returns the state that is not tensors."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        return state


class CheckpointStore:
    """The checkpoints of one training.

    Args:
        folder: the training's folder. No other training uses it.
        key: hash of the training's content. Checkpoints with another key are not used.
        say: writes a line to the log.
    """

    def __init__(self, folder: Path, key: str, say: Say) -> None:
        self.folder, self.key, self._say = folder, key, say
        self._lock = FileLock(folder / "lease.lock")
        self.in_use: Path | None = None
        """A checkpoint that another thread is reading. It is not deleted meanwhile."""

    def make_folder(self) -> None:
        """Creates the folder.

        Raises:
            MixtuneError: if it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f"{_PARTIAL_PREFIX}probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise MixtuneError(_cannot_write(self.folder, error)) from None

    def try_claim(self) -> bool:
        """Takes the lease if it is free. Logs whose lease it takes over if the previous holder was killed."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        previous_holder = read_note(self.folder / "holder.json")
        if previous_holder is not None:
            self._say(
                f"checkpoints: taking over from {describe_holder(previous_holder)}, which ended without releasing them"
            )
        write_json(self.folder / "holder.json", holder())
        for leftover in self.folder.glob(f"{_PARTIAL_PREFIX}*"):
            remove(leftover)
        return True

    def waiting_for(self) -> str:
        """Describes the holder of the lease."""
        return describe_holder(read_note(self.folder / "holder.json") or {})

    def release(self) -> None:
        """Releases the lease."""
        if self._lock.is_locked:
            (self.folder / "holder.json").unlink(missing_ok=True)
            self._lock.release()

    def save(
        self,
        step: int,
        tensors: Mapping[str, dict[str, Tensor]],
        state: Mapping[str, Any],
        write: Callable[[Path], None] | None = None,
    ) -> Path:
        """Writes a checkpoint and deletes all but the newest ones.

        Args:
            tensors: of each file, by name.
            state: everything else.
            write: writes the tensors to a folder; None writes them in full.

        Raises:
            MixtuneError: if there is not enough memory or disk space. Earlier checkpoints remain.
        """
        from safetensors.torch import save_file

        partial = self.folder / f"{_PARTIAL_PREFIX}{step}-{os.urandom(2).hex()}"
        target = self.folder / f"step-{step:08d}-{os.urandom(2).hex()}"
        try:
            partial.mkdir()
            if write is not None:
                write(partial)
            else:
                for name in TENSORS:
                    whole = {key: tensor.contiguous() for key, tensor in tensors[name].items()}
                    save_file(whole, partial / f"{name}.safetensors")
            (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
            files = {file.name: {"bytes": file.stat().st_size, "sha256": digest_of(file)} for file in _synced(partial)}
            write_json(partial / "manifest.json", {"format": FORMAT, "key": self.key, "step": step, "files": files})
            _sync(partial / "manifest.json")
            _sync(partial)
            partial.rename(target)
            _sync(self.folder)
        except (OSError, MemoryError) as error:
            remove(partial)
            raise MixtuneError(self._cannot_save(step, tensors, error)) from None
        except Exception as error:  # safetensors wraps errors of the file system in its own exception
            remove(partial)
            if "o space left" in str(error) or "Quota" in str(error) or "I/O error" in str(error):
                raise MixtuneError(self._cannot_save(step, tensors, error)) from None
            raise
        self._remove_older(target)
        return target

    def _cannot_save(self, step: int, tensors: Mapping[str, dict[str, Tensor]], error: BaseException) -> str:
        need = sum(tensor.numel() * tensor.element_size() for part in tensors.values() for tensor in part.values())
        last = next((folder for _, folder in self._folders()), None)
        remaining = f"the one of step {_step_of(last)} is whole and stays" if last else "there is none before it"
        with_what = f"it needs {megabytes(need)}, {megabytes(shutil.disk_usage(self.folder).free)} are free there"
        reason = getattr(error, "strerror", None) or str(error).strip() or "no more memory"
        if isinstance(error, MemoryError):
            with_what, reason = f"it needs about {megabytes(need)}", "out of memory"
        return (
            f"checkpoints: the one of step {step} could not be written to {self.folder} ({reason}): {with_what}; {remaining}; "
            "free space and run again"
        )

    def _remove_older(self, newest: Path) -> None:
        newest_first = [newest, *(folder for _, folder in self._folders() if folder != newest)][:NUM_KEPT]
        for _, folder in self._folders():
            if folder not in newest_first and folder != self.in_use:
                remove(folder)

    def _folders(self) -> Iterator[tuple[int, Path]]:
        """Yields the steps and folders of the checkpoints, newest first."""
        folders = [(_step_of(folder), folder) for folder in self.folder.glob("step-*") if folder.is_dir()]
        return iter(sorted(folders, reverse=True))

    def newest(self) -> Checkpoint | None:
        """Returns the newest complete checkpoint. Logs why it skips and deletes unusable ones."""
        for step, folder in self._folders():
            reason = find_defect(folder, self.key)
            if reason is None:
                return Checkpoint(step, folder)
            self._say(f"checkpoints: passing over {folder.name}: {reason}")
            remove(folder)
        return None

    def used_bytes(self) -> int:
        """Returns the total size of the existing checkpoints."""
        return sum(file.stat().st_size for _, folder in self._folders() for file in folder.iterdir())

    def flush(self, seconds: float) -> None:
        """Waits for pending uploads. Checkpoints in a local folder have none."""

    def finish(self) -> None:
        """Marks the training as finished. Keeps the newest checkpoint, in case the run loses the training's outputs."""
        write_json(self.folder / "finished.json", holder())
        for _, folder in list(self._folders())[1:]:
            remove(folder)
        self.release()


def is_url(root: str) -> bool:
    """Tells whether checkpoints are stored at an fsspec URL instead of in a folder."""
    return "://" in root and not root.startswith("file://")


def folder_of(root: str) -> Path:
    """Returns the folder of a root that is not a remote URL."""
    return Path(root.removeprefix("file://")).absolute()


def find_defect(folder: Path, key: str) -> str | None:
    """Returns why a checkpoint cannot be used; None if it is complete."""
    manifest = read_note(folder / "manifest.json")
    if manifest is None:
        return "it has no readable manifest.json"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, this version of mixtune reads {FORMAT}"
    if manifest.get("key") != key:
        return "it belongs to a training with other data, another model or other settings"
    files = manifest.get("files")
    if not isinstance(files, dict) or not {"state.json"} < files.keys():
        return "its manifest does not name all files"
    for name, known in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != known["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {known['bytes']}"
        if digest_of(file) != known["sha256"]:
            return f"{name} is corrupt (its content does not have the hash that the manifest names)"
    return None


def digest_of(file: Path) -> str:
    """Returns the SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def holder() -> dict[str, Any]:
    """Describes this process for other processes that wait for the lease."""
    run = os.environ.get("MIXTUNE_RUN_ID", "")
    return {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def describe_holder(known: Mapping[str, Any]) -> str:
    if not known:
        return "another run"
    run = f"run {known.get('run')}" if known.get("run") else "a run"
    return f"{run} (process {known.get('pid')} on {known.get('host')}, since {known.get('since')})"


def megabytes(count: float) -> str:
    """Formats a size for messages."""
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e9:,.1f} GB"


def read_note(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _step_of(folder: Path) -> int:
    with contextlib.suppress(IndexError, ValueError):
        return int(folder.name.split("-")[1])
    return -1


def _synced(folder: Path) -> list[Path]:
    files = sorted(folder.iterdir())
    for file in files:
        _sync(file)
    return files


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    if path.is_dir():
        # Delete the manifest first: without it, a partially deleted checkpoint counts as incomplete.
        with contextlib.suppress(OSError):
            (path / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"checkpoints: {folder} cannot be written ({error.strerror or error}); give MIXTUNE_CHECKPOINT_DIR another place, or "
        "leave it out to train without checkpoints"
    )
