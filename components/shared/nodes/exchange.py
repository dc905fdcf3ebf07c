"""Artifacts on their way between the pod of a step and the nodes of its training, on the volume of the checkpoints.

    <checkpoints>/input-8e1c.../files        a copy of an input, which all trainings of a run share
    <checkpoints>/input-8e1c.../files.json   the hashes of its files
    <checkpoints>/job-mixtune-.../           the folder of one TrainJob:
        order.json, raised-<rank>.json, done.json    as of several processes in one pod (running/processes.py)
        outputs/<name>                       what the first process writes
        results.json                         the hashes of all files in outputs; written last
    .../finished.json                        the run that it belongs to; `finish` deletes the folder when that run has succeeded

Folders appear under their names when they are complete. An output without its entry in results.json is no result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..artifacts import Artifact, ArtifactLike, write_json
from ..checkpoints.clearing import PASSED_ON
from ..checkpoints.store import digest_of, holder, read_note, remove
from ..errors import MixtuneError

INPUT, JOB, PARTIAL = PASSED_ON
Artifacts = Mapping[str, ArtifactLike | list[ArtifactLike] | None]
_FILES, _HASHES, _RESULTS, _RUN = "files", "files.json", "results.json", "finished.json"
_LOOKS = 60


def lay_in(root: Path, run_id: str, artifact: ArtifactLike) -> Path:
    """Copies an input to the volume, unless another training of the run did.

    Returns:
        The copy.
    """
    key = hashlib.sha256(f"{run_id}\n{artifact.uri}".encode()).hexdigest()[:16]
    folder = root / f"{INPUT}{key}"
    if not (folder / _HASHES).is_file():
        partial = root / f"{PARTIAL}{key}-{os.urandom(4).hex()}"
        write_json(partial / _RUN, holder())  # first, so that `finish` deletes what a killed attempt left
        try:
            _copy(Path(artifact.path), partial / _FILES)
            write_json(partial / _HASHES, hashes_of(partial / _FILES))
            with contextlib.suppress(OSError):  # another training was first
                partial.rename(folder)
        finally:
            remove(partial)
    return folder / _FILES


def prepare_folder(
    root: Path, folder: Path, run_id: str, artifacts: Artifacts, outputs: tuple[str, ...]
) -> dict[str, Any]:
    """Empties the folder of a TrainJob and lays its inputs in.

    Returns:
        The artifacts as the nodes see them.
    """
    for path in folder.iterdir():
        remove(path)
    write_json(folder / _RUN, holder())
    seen: dict[str, Any] = {}
    for name, artifact in artifacts.items():
        if artifact is None or isinstance(artifact, list):
            continue
        path = folder / "outputs" / name if name in outputs else lay_in(root, run_id, artifact)
        seen[name] = Artifact(str(path), artifact.uri, artifact.metadata)
    return seen


def check_inputs(order: Mapping[str, Any]) -> None:
    """Compares the inputs of an order with their hashes.

    Raises:
        MixtuneError: if a file is missing or was changed.
    """
    for artifact in order["artifacts"].values():
        path = Path(artifact["path"])
        known = read_note(path.parent / _HASHES)
        if known is not None and (wrong := _differing(path, known)):
            remove(path.parent)  # the next attempt copies it again
            raise MixtuneError(f"{path / wrong}: is not what was copied there; run again")


def is_done(folder: Path) -> bool:
    """Tells whether an attempt of the TrainJob has written its results."""
    return (folder / _RESULTS).is_file()


def seal_results(folder: Path) -> None:
    """Records the hashes of the outputs, after which they are results."""
    write_json(folder / _RESULTS, hashes_of(folder / "outputs"))


def fetch_results(folder: Path, artifacts: Artifacts, outputs: tuple[str, ...], settle_seconds: float) -> None:
    """Copies the outputs of a TrainJob to where the step has them.

    Args:
        outputs: names of the outputs.
        settle_seconds: how long to wait until all files are visible here.

    Raises:
        MixtuneError: if a file is missing, or if its copy differs from its hash. What was copied is no result then.
    """
    until = time.monotonic() + settle_seconds
    while (wrong := _missing(folder)) is not None:
        if time.monotonic() >= until:
            raise MixtuneError(f"the results of the training are not whole ({wrong}); run again")
        time.sleep(settle_seconds / _LOOKS)
    known = json.loads((folder / _RESULTS).read_text(encoding="utf-8"))
    for name in outputs:
        output: Any = artifacts.get(name)
        if output is None or not (folder / "outputs" / name).exists():
            continue
        _copy(folder / "outputs" / name, Path(output.path))
        copied = {
            file.removeprefix(name).lstrip("/") or ".": of
            for file, of in known.items()
            if file == name or file.startswith(f"{name}/")
        }
        if wrong := _differing(Path(output.path), copied):
            raise MixtuneError(f"the results of the training are not whole ({name}/{wrong} lacks its hash); run again")


def _missing(folder: Path) -> str | None:
    """Returns what is not visible of the results; None if all files are there with their sizes."""
    known = read_note(folder / _RESULTS)
    if known is None:
        return f"{_RESULTS} is missing"
    for name, of in known.items():
        file = folder / "outputs" / name
        if not file.is_file() or file.stat().st_size != of["bytes"]:
            return f"outputs/{name}"
    return None


def hashes_of(path: Path) -> dict[str, dict[str, Any]]:
    """Returns size and SHA-256 of each file of a folder, by its path in it; of a single file under the name `.`."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    with ThreadPoolExecutor() as pool:  # a hash of large blocks does not hold the interpreter's lock
        digests = list(pool.map(digest_of, files))
    return {
        file.relative_to(path).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }


def _differing(path: Path, known: Mapping[str, Any]) -> str | None:
    """Returns the first file that is missing or differs from its hash."""

    def differs(name: str) -> bool:
        file, of = path / name, known[name]
        return not file.is_file() or file.stat().st_size != of["bytes"] or digest_of(file) != of["sha256"]

    with ThreadPoolExecutor() as pool:
        return next((name for name, wrong in zip(known, pool.map(differs, known), strict=True) if wrong), None)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)
