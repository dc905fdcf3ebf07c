"""TensorBoard event files with the curves of a training, on request."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..task_name import TaskName

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

EVENT_FOLDER = "MIXTUNE_TENSORBOARD_DIR"
FLUSH_SECONDS = 10
_CANDIDATES = {"pretrain": "pretrained", "finetune": "finetuned"}


class EventFiles:
    """The event files of one training, which TensorBoard can show while it runs.

    Args:
        folder: folder of the files; made with the first metrics.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._suffix = f".{os.urandom(4).hex()}"
        self._writer: SummaryWriter | None = None

    @classmethod
    def from_environment(cls, title: str) -> EventFiles | None:
        """Returns the event files of a task; None if none are asked for, or if the task trains nothing."""
        parent, name = os.environ.get(EVENT_FOLDER), TaskName.parse(title)
        if not parent or name is None or not name.trains:
            return None
        return cls(Path(parent) / str(name.candidate or _CANDIDATES.get(name.step, name.step)))

    def add(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Adds the metrics of a step. A curve of an earlier attempt ends before the first step that is added."""
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(
                str(self._folder), purge_step=step, flush_secs=FLUSH_SECONDS, filename_suffix=self._suffix
            )
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> list[Path]:
        """Closes the files and returns those that this object has written."""
        if self._writer is None:
            return []
        self._writer.close()
        self._writer = None
        return sorted(self._folder.glob(f"*{self._suffix}"))
