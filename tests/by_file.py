"""How tests are given to the workers of pytest-xdist."""

from __future__ import annotations

from pathlib import Path

from xdist.scheduler import LoadFileScheduling


class ByFile(LoadFileScheduling):  # type: ignore[misc] # xdist has no types
    """Gives the tests of a file to one worker, and those of all files in `containers`, which share their images."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        folder = Path(file).parent
        return str(folder) if folder.name == "containers" else file
