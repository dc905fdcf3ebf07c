"""The output folder of a local run: its structure and its lock.

    <output>/.mixtune/          artifacts, cache, outcome records; without it the next run starts from scratch
    <output>/logs/<run>/        one log for each step, and KFP's own

An output folder belongs to one run at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mixtune.components.shared.artifacts import write_json
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.section import PLACEHOLDER

from .moving import follow, marker_of


@dataclass(frozen=True)
class Run:
    """A local run.

    Attributes:
        id: unique id.
        output: the output folder.
    """

    id: str
    output: Path

    @property
    def state(self) -> Path:
        return self.output / ".mixtune"

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.output / "logs" / self.id

    @property
    def outcomes(self) -> Path:
        return self.state / "outcomes" / self.id

    @property
    def journal(self) -> Path:
        return journal_folder(self.output)

    @property
    def progress(self) -> Path:
        return self.state / "progress" / f"{self.id}.jsonl"


_NOT_IN_PATHS = {
    "%": "which an SQLite address for MLflow cannot contain",
    "?": "which an SQLite address for MLflow cannot contain",
    PLACEHOLDER: "which Kubeflow replaces",
}
"""Text that the path of an output folder cannot contain, with the reason."""


def claim(output: Path, name: str) -> FileLock:
    """Locks an output folder for one run, and follows it if it was moved.

    Raises:
        RefusedError: if it cannot be used, contains something other than a mixtune run, or is used by another run.
    """
    for text, reason in _NOT_IN_PATHS.items():
        if text in str(output.absolute()):
            raise RefusedError(f"--output: {output.absolute()} contains {text}, {reason}; choose another folder")
    marker = marker_of(output)
    lock = FileLock(marker.parent / "lock", timeout=0)
    try:
        if output.exists() and not output.is_dir():
            raise RefusedError(f"--output: {output} is a file; choose another folder")
        if output.is_dir() and any(output.iterdir()) and not marker.is_file():
            raise RefusedError(f"--output: {output} is not empty and contains no mixtune run; choose another folder")
        marker.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if not marker.is_file():
            write_json(marker, {"format": "mixtune-run/1", "name": name})
        follow(output)
    except RefusedError:
        lock.release()
        raise
    except Timeout:
        raise RefusedError(f"--output: another run is using {output}; wait for it or choose another folder") from None
    except OSError as error:
        lock.release()
        raise RefusedError(f"--output: {output} cannot be used ({error.strerror}); choose another folder") from None
    return lock


def journal_folder(output: Path) -> Path:
    """Returns the folder for a run's records that MLflow has not received."""
    return output / ".mixtune" / "undelivered"
