"""Delivers a step's tracking records to MLflow: first to a journal on disk, then to the server, with retries."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from ..errors import first_line
from .journal import (
    Journal,
    JournalOwner,
    Operation,
    folder_from_environment,
    in_words,
    known_runs,
    operations_of,
    sync_command,
    undelivered,
)
from .mlflow_store import MlflowStore

FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 300.0


class Outbox:
    """The journal of one attempt at a step, and its delivery.

    Args:
        store: the tracking server.
        title: the step and its subject.
        pipeline_run: id of the pipeline run, if the step is part of one.
        run_id: the step's MLflow run, if the journal belongs to a step.
        folder: folder for journals; by default the folder that the environment names.
        owns: whether this process opened the run. Only the owner reports undelivered records.

    Attributes:
        last_delivery: time of the last delivery, from `time.monotonic`.
    """

    def __init__(
        self,
        store: MlflowStore,
        title: str,
        pipeline_run: str | None,
        run_id: str | None,
        folder: Path | None,
        owns: bool = True,
    ) -> None:
        self.store, self._owns = store, owns
        self.last_delivery = time.monotonic()
        self._owner = JournalOwner(store.address, store.experiment, title, pipeline_run, run_id if owns else None)
        self._folder = folder or folder_from_environment()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._journal: Journal | None = None
        self._pause = self._paused_until = 0.0
        self._disk_full = False

    @property
    def folder(self) -> Path:
        """Returns the folder for journals. If none is configured, it is temporary and deleted with the process."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="mixtune-undelivered-", ignore_cleanup_errors=True)
            self._folder = Path(self._temporary.name)
        return self._folder

    @property
    def num_pending(self) -> int:
        """Returns the number of undelivered operations."""
        return len(self._journal.pending) if self._journal else 0

    @property
    def is_paused(self) -> bool:
        """Tells whether the last delivery failed."""
        return self._pause > 0

    def add(self, operation: Operation) -> None:
        """Writes an operation to the journal."""
        try:
            self._open_journal().append(operation)
        except OSError as error:
            if not self._disk_full:
                say(f"what MLflow has not got cannot be written down ({error.strerror or error}); going on")
            self._disk_full = True

    def keep(self, path: Path) -> str:
        """Copies a file or folder into the journal and returns the path by which an operation refers to the copy.

        Raises:
            OSError: if it cannot be written.
        """
        return self._open_journal().keep(path)

    def _open_journal(self) -> Journal:
        if self._journal is None:
            folder = self.folder
            try:
                self._journal = Journal.start(folder, self._owner)
            except OSError as error:
                say(f"{folder} cannot be written ({error.strerror}); a temporary folder takes its place")
                self._folder = None
                self._journal = Journal.start(self.folder, self._owner)
        return self._journal

    def deliver(self, last: bool = False) -> bool:
        """Delivers all pending operations, unless delivery is paused after a failure.

        Args:
            last: delivers even during a pause.

        Returns:
            Whether nothing is pending.
        """
        if time.monotonic() < self._paused_until and not last:
            return False
        self.last_delivery = time.monotonic()
        try:
            if self._pause:
                self.store.look()
            self.deliver_now()
        except Exception as error:
            self.failed(error)
            return False
        if self._pause:
            say("MLflow answers again")
        self._pause = self._paused_until = 0.0
        return True

    def deliver_now(self) -> None:
        """Delivers all pending operations.

        Raises:
            Exception: if a delivery failed.
        """
        if self._journal:
            self.store.deliver(self._journal)

    def failed(self, error: Exception) -> None:
        """Logs that a delivery failed and pauses deliveries."""
        if not self._pause:
            say(f"something could not be delivered ({first_line(error)}); going on, it is kept and tried again")
        self.pause()

    def pause(self) -> None:
        """Pauses deliveries, longer each time: waiting for the server would slow down the training."""
        self._pause = min(max(2 * self._pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        self._paused_until = time.monotonic() + self._pause

    def deliver_leftovers(self) -> None:
        """Delivers journals of other steps that have ended."""
        if self._folder is None:
            return
        try:
            self.store.deliver_leftovers(self._folder)
        except Exception as error:
            self.failed(error)

    def close(self) -> None:
        """Delivers a last time, closes the journal and reports undelivered records."""
        if self._journal is None:
            return
        if self.deliver(last=True):
            self.deliver_leftovers()
        folder = self._journal.path.parent
        self._journal.close()
        self._journal = None
        if not self._owns:
            return
        counts = undelivered(folder).counts
        message = f"not delivered to MLflow at {self.store.address}: {in_words(counts)}"
        if self._temporary is not None:
            if counts:
                say(f"{message}; it is lost with this process, since MIXTUNE_JOURNAL_DIR names no folder to keep it in")
            self._temporary.cleanup()
        elif counts:
            say(f"{message}; it is kept in {folder}; deliver it with `{sync_command(folder)}`")

    def id_in_mlflow(self, run_id: str) -> str | None:
        """Returns the MLflow id of a run that started without MLflow; None if it is not delivered yet."""
        return known_runs(self.folder).get(run_id)

    def operations(self) -> list[Operation]:
        """Returns all operations in the journals of this pipeline run, delivered or not."""
        return list(operations_of(self.folder, self._owner.pipeline_run))


def say(line: str) -> None:
    """Prints a line about tracking to the step's log."""
    print(f"tracking: {line}", flush=True)
