"""Checkpoints at an fsspec URL such as s3://. They are written to a local folder and uploaded in the background.

    <url>/newest.json             names of the complete checkpoints, newest first; updated after each upload
    <url>/step-00000120-1f0c/     as in a local folder
    <url>/lease-3.json            the current holder: the lease with the highest number
    <url>/finished.json           as in a local folder

An object store has no locks, so a lease is an object with a number that is only created if it does not exist. Its holder
rewrites it every few seconds (heartbeat). A waiting process creates the next number if the lease has not changed for a
minute of its own clock.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from ..errors import MixtuneError, first_line
from .store import NUM_KEPT, Checkpoint, CheckpointStore, Say, describe_holder, find_defect, holder

if TYPE_CHECKING:
    from torch import Tensor

BEAT_SECONDS = 10.0
DEAD_SECONDS = 60.0
JOIN_SECONDS = 5.0


def open_url(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL, without listings caches, and the path in it.

    Raises:
        MixtuneError: if the protocol is unknown or its package is not installed.
    """
    try:
        files, path = fsspec.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise MixtuneError(f"checkpoints: {url} cannot be used ({error})") from None
    return files, path.rstrip("/")


class RemoteCheckpointStore(CheckpointStore):
    """Checkpoints with a copy at a URL. A later attempt resumes from that copy.

    Args:
        url: URL of this training's folder.
        key: see `CheckpointStore`.
        say: see `CheckpointStore`.
    """

    def __init__(self, url: str, key: str, say: Say) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="mixtune-checkpoints-")), key, say)
        self.url = url
        self._files, self._root = open_url(url)
        self._lease = 0
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._seen: tuple[int, int, float] = (0, 0, 0.0)
        self._waited_for: dict[str, Any] = {}
        self._lost: str | None = None
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self._pending: Path | None = None
        self._changed = threading.Condition()

    def make_folder(self) -> None:
        """Checks that the URL is writable.

        Raises:
            MixtuneError: if it is not.
        """
        probe = f"{self._root}/probe-{self._token}"
        try:
            bucket = self._root.split("/", 1)[0]
            if bucket and not self._files.exists(bucket):
                raise FileNotFoundError(f"there is no {bucket}")  # a mistyped bucket must not be created
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(probe, b"")
            self._files.rm_file(probe)
        except Exception as error:
            raise MixtuneError(
                f"checkpoints: {self.url} cannot be written ({first_line(error)}); correct MIXTUNE_CHECKPOINT_DIR or its "
                "credentials, or leave it out to train without checkpoints"
            ) from None

    def try_claim(self) -> bool:
        """Takes the lease if it is free or its holder has sent no heartbeat for a minute."""
        number, known = self._last_lease()
        now = time.monotonic()
        if number and not known.get("released"):
            if self._seen[:2] != (number, known.get("beat", 0)):
                self._seen = number, known.get("beat", 0), now
            self._waited_for = known
            if now - self._seen[2] < DEAD_SECONDS:
                return False
        with contextlib.suppress(Exception):  # another process created it first; the next read decides
            self._files.pipe_file(self._lease_path(number + 1), self._lease_text(), mode="create")
        taken, record = self._last_lease()
        if taken != number + 1 or record.get("token") != self._token:
            return False
        if number and not known.get("released"):
            self._say(
                f"checkpoints: taking over from {describe_holder(known)}, which has sent no heartbeat for a minute"
            )
        self._lease = taken
        for older in range(max(1, taken - 3), taken):
            with contextlib.suppress(Exception):
                self._files.rm_file(self._lease_path(older))
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._keep_lease, self._send)]
        for thread in self._threads:
            thread.start()
        return True

    def waiting_for(self) -> str:
        """Describes the holder of the lease."""
        return describe_holder(self._waited_for)

    def release(self) -> None:
        """Releases the lease and stops uploading."""
        self._ending.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        if self._lease and self._lost is None:
            with contextlib.suppress(Exception):  # the lease then expires
                self._files.pipe_file(self._lease_path(self._lease), self._lease_text(released=True))
        self._lease = 0
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(
        self,
        step: int,
        tensors: Mapping[str, dict[str, Tensor]],
        state: Mapping[str, Any],
        write: Callable[[Path], None] | None = None,
    ) -> Path:
        """Saves a checkpoint locally and schedules its upload.

        Raises:
            MixtuneError: see `CheckpointStore.save`; also if another run has taken over the training.
        """
        if self._lost is not None:
            raise MixtuneError(f"checkpoints: {self._lost} has taken over this training; this one ends")
        target = super().save(step, tensors, state, write)
        with self._changed:
            self._pending = target  # replaces a checkpoint that still waits for its upload
            self._changed.notify_all()
        return target

    def newest(self) -> Checkpoint | None:
        """Downloads the newest complete checkpoint."""
        for name in self._pointer():
            folder = self.folder / name
            folder.mkdir(parents=True, exist_ok=True)
            try:
                for path in self._files.ls(f"{self._root}/{name}", detail=False):
                    self._files.get_file(path, str(folder / path.rsplit("/", 1)[1]))
                reason = find_defect(folder, self.key)
            except FileNotFoundError:
                reason = "it is missing"
            except Exception as error:
                raise MixtuneError(
                    f"checkpoints: {self.url}/{name} cannot be read ({first_line(error)}); run again, or remove it to start "
                    "anew"
                ) from None
            if reason is None:
                return Checkpoint(int(name.split("-")[1]), folder)
            self._say(f"checkpoints: passing over {name}: {reason}")
            shutil.rmtree(folder)
        return None

    def flush(self, seconds: float) -> None:
        """Waits up to `seconds` for pending uploads and logs a checkpoint that was not uploaded."""
        with self._changed:
            sent = self._changed.wait_for(lambda: self._pending is None and self.in_use is None, seconds)
        if not sent:
            self._say(f"checkpoints: the last one could not be sent to {self.url} within {seconds:.0f} s")

    def finish(self) -> None:
        """See `CheckpointStore.finish`."""
        with contextlib.suppress(Exception):  # only saves space
            self._files.pipe_file(f"{self._root}/finished.json", json.dumps(holder()).encode())
        self.release()

    def _send(self) -> None:
        """Uploads pending checkpoints, one at a time. Runs in a background thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._ending.is_set())
                if self._pending is None:
                    return
                self.in_use, self._pending = self._pending, None
            try:
                self._send_one(self.in_use)
            except Exception as error:
                self._say(
                    f"checkpoints: {self.in_use.name} could not be sent to {self.url} ({first_line(error)}); the next one "
                    "will be tried all the same"
                )
            with self._changed:
                self.in_use = None
                self._changed.notify_all()

    def _send_one(self, folder: Path) -> None:
        before = self._pointer()
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "manifest.json"):
            self._files.put_file(str(file), f"{self._root}/{folder.name}/{file.name}")
        number, _ = self._last_lease()
        if number != self._lease:
            self._lost = describe_holder(self._last_lease()[1])
            return
        names = [folder.name, *before][:NUM_KEPT]
        self._files.pipe_file(f"{self._root}/newest.json", json.dumps(names).encode())
        for path in self._files.ls(self._root, detail=False):
            name = path.rsplit("/", 1)[1]
            if name.startswith("step-") and name not in names:
                self._files.rm(path, recursive=True)

    def _keep_lease(self) -> None:
        """Sends heartbeats and detects that another process took over. Runs in a background thread."""
        while not self._ending.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the next heartbeat may succeed
                number, record = self._last_lease()
                if number > self._lease:
                    self._lost = describe_holder(record)
                    return
                self._beat += 1
                self._files.pipe_file(self._lease_path(self._lease), self._lease_text())

    def _last_lease(self) -> tuple[int, dict[str, Any]]:
        """Returns the highest lease number and its content; 0 and {} if there is no lease."""
        numbers = [0]
        with contextlib.suppress(FileNotFoundError):
            for path in self._files.ls(self._root, detail=False):
                if match := re.fullmatch(r"lease-(\d+)\.json", path.rsplit("/", 1)[1]):
                    numbers.append(int(match.group(1)))
        number = max(numbers)
        return number, (self._json(self._lease_path(number)) or {}) if number else {}

    def _lease_path(self, number: int) -> str:
        return f"{self._root}/lease-{number}.json"

    def _lease_text(self, released: bool = False) -> bytes:
        return json.dumps({**holder(), "token": self._token, "beat": self._beat, "released": released}).encode()

    def _pointer(self) -> list[str]:
        names = self._json(f"{self._root}/newest.json")
        return [name for name in names if re.fullmatch(r"step-\d+-\w+", str(name))] if isinstance(names, list) else []

    def _json(self, path: str) -> Any:
        try:
            return json.loads(self._files.cat_file(path))
        except (FileNotFoundError, ValueError):
            return None


def clear_finished_at(root: str, run_id: str) -> int:
    """Deletes the checkpoints of all trainings that a run finished, at a URL."""
    files, path = open_url(root)
    count = 0
    for note in files.glob(f"{path}/*/finished.json"):
        with contextlib.suppress(FileNotFoundError, ValueError):
            if json.loads(files.cat_file(note)).get("run") == run_id:
                files.rm(note.rsplit("/", 1)[0], recursive=True)
                count += 1
    return count
