"""Writes checkpoints while the training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def copied(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Returns copies in the memory of the CPU; of sharded tensors, of this process's parts."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    staged: Any = BlockingAsyncStager().stage({name: dict(part) for name, part in tensors.items()})
    return dict(staged)


class BackgroundWriter:
    """Runs one piece of work at a time in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def has_failed(self) -> bool:
        """Tells whether the last work raised an exception that `wait` has not raised yet."""
        return self._error is not None

    def start(self, work: Callable[[], object]) -> None:
        """Starts a piece of work when the one before it is done.

        Raises:
            Exception: what the one before it raised.
        """
        self.wait()
        # A second SIGTERM ends the process at once; an unfinished checkpoint has no final name.
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the work is done.

        Raises:
            Exception: what it raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error
