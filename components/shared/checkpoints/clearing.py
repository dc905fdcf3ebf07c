"""Deletes the checkpoints of finished trainings. Does not import torch, since `finish` uses it."""

from __future__ import annotations

import contextlib

from .store import folder_of, is_url, read_note, remove

PASSED_ON = ("input-", "job-", "partial-")
"""Beginnings of the folders through which artifacts reach the nodes of a training. They are deleted, too."""


def clear_finished(checkpoint_dir: str, run_id: str) -> int:
    """Deletes the checkpoints of all trainings that a run finished. Their results are stored elsewhere by then.

    Args:
        checkpoint_dir: value of MIXTUNE_CHECKPOINT_DIR, a folder or an fsspec URL.

    Returns:
        The number of trainings whose checkpoints were deleted.
    """
    if is_url(checkpoint_dir):
        from .remote import clear_finished_at

        return clear_finished_at(checkpoint_dir, run_id)
    root = folder_of(checkpoint_dir)
    folders = [file.parent for file in root.glob("*/finished.json") if (read_note(file) or {}).get("run") == run_id]
    for folder in folders:
        # Delete finished.json last: if this is interrupted, the next call finds the folder again.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "finished.json"):
            remove(path)
        with contextlib.suppress(OSError):
            folder.rmdir()
    return sum(not folder.name.startswith(PASSED_ON) for folder in folders)
