"""Deletes the checkpoints of finished trainings. Without torch, since `finish` does it."""

from __future__ import annotations

import contextlib

from .store import folder_of, is_url, read_note, remove


def clear_finished(place: str, run_id: str) -> int:
    """Removes the checkpoints of the trainings that ended in a run, whose results are now safe.

    Args:
        place: as MIXTUNE_CHECKPOINT_DIR names it.

    Returns:
        How many trainings they were of.
    """
    if is_url(place):
        from .remote import clear_finished_at

        return clear_finished_at(place, run_id)
    root = folder_of(place)
    found = [file.parent for file in root.glob("*/finished.json") if (read_note(file) or {}).get("run") == run_id]
    for left in found:
        # The note last, so that a kill in the middle leaves a place that the next one clears.
        for path in sorted(left.iterdir(), key=lambda path: path.name == "finished.json"):
            remove(path)
        with contextlib.suppress(OSError):
            left.rmdir()
    return len(found)
