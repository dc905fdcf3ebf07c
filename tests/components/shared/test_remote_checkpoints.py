"""Checkpoints in an object store: an S3 server of this machine, with conditional writes as S3 has them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from mixtune.components.shared.checkpoints import remote as remote_checkpoints
from mixtune.components.shared.checkpoints.remote import RemoteCheckpointStore, clear_finished_at
from mixtune.components.shared.checkpoints.store import CHECKPOINT_DIR
from mixtune.components.shared.errors import MixtuneError
from tests.s3_server import s3_server

from .cut_off import CutOffError, Training, equal

TENSORS = {"weights": {"w": torch.arange(1000.0)}, "optimizer": {"0.exp_avg": torch.zeros(1000)}}


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture
def bucket(server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    for variable, value in server.items():
        monkeypatch.setenv(variable, value)
    name = f"bucket-{abs(hash(request.node.name))}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/checkpoints"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_checkpoints, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(remote_checkpoints, "DEAD_SECONDS", 1.0)


def files() -> Any:
    return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)


def names(url: str) -> list[str]:
    """What is there, without what the lease is made of."""
    found = (path.rsplit("/", 1)[1] for path in files().ls(url, detail=False))
    return sorted(name for name in found if not name.startswith("lease-"))


def store(url: str, lines: list[str] | None = None) -> RemoteCheckpointStore:
    made = RemoteCheckpointStore(url, "k", (lines if lines is not None else []).append)
    made.make_folder()
    return made


def claimed(url: str, lines: list[str] | None = None) -> RemoteCheckpointStore:
    made = store(url, lines)
    assert made.try_claim()
    return made


def test_cut_off_twice_and_gone_on_it_is_bitwise_the_same(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path)
    monkeypatch.setenv(CHECKPOINT_DIR, "")
    expected, _ = training.run()
    monkeypatch.setenv(CHECKPOINT_DIR, bucket)
    monkeypatch.setenv("MIXTUNE_RUN_ID", "run-1")
    for after in (3, 7):
        with pytest.raises(CutOffError):
            training.run(cut_off_after=after)
    model, result = training.run()
    assert "goes on from the checkpoint of step 6" in training.lines[-1]
    assert equal(expected, model)
    assert result.checkpoints is not None
    result.checkpoints.finish()
    assert clear_finished_at(bucket, "run-2") == 0
    assert clear_finished_at(bucket, "run-1") == 1
    assert clear_finished_at(bucket, "run-1") == 0


def test_two_are_kept_and_the_pointer_names_them(bucket: str) -> None:
    writer = claimed(bucket)
    for step in (2, 4, 6):
        writer.save(step, TENSORS, {"step": step})
        writer.flush(20)
    kept = json.loads(files().cat_file(f"{bucket}/newest.json"))
    assert [int(name.split("-")[1]) for name in kept] == [6, 4]
    assert names(bucket) == sorted([*kept, "newest.json"])
    writer.release()
    reader = claimed(bucket)
    found = reader.newest()
    assert found is not None
    assert found.state() == {"step": 6}
    assert torch.equal(load_file(found.folder / "weights.safetensors")["w"], TENSORS["weights"]["w"])
    reader.release()


def test_half_an_upload_is_never_taken(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    writer = claimed(bucket, lines)
    writer.save(2, TENSORS, {"step": 2})
    writer.flush(20)
    put = writer._files.put_file

    def broken(here: str, there: str) -> None:
        if here.endswith("weights.safetensors"):
            raise ConnectionError("the line is cut")
        put(here, there)

    monkeypatch.setattr(writer._files, "put_file", broken)
    writer.save(4, TENSORS, {"step": 4})
    writer.flush(20)
    assert "could not be sent" in lines[0]
    assert "the line is cut" in lines[0]
    writer.release()
    reader = claimed(bucket)
    found = reader.newest()
    assert found is not None
    assert found.step == 2
    reader.release()


def test_a_corrupt_object_is_passed_over_with_a_reason(bucket: str) -> None:
    writer = claimed(bucket)
    for step in (2, 4):
        writer.save(step, TENSORS, {"step": step})
        writer.flush(20)
    writer.release()
    newest = json.loads(files().cat_file(f"{bucket}/newest.json"))[0]
    files().pipe_file(f"{bucket}/{newest}/weights.safetensors", b"nonsense")
    lines: list[str] = []
    reader = claimed(bucket, lines)
    found = reader.newest()
    assert found is not None
    assert found.step == 2
    assert newest in lines[0]
    assert "weights.safetensors has 8 bytes instead of" in lines[0]
    reader.release()


def test_a_second_live_run_waits_and_takes_over_when_the_first_is_dead(
    bucket: str, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXTUNE_RUN_ID", "run-1")
    first = claimed(bucket)
    lines: list[str] = []
    second = store(bucket, lines)
    until = time.monotonic() + 2.0
    while time.monotonic() < until:  # longer than a dead one would be waited for
        assert not second.try_claim()
        time.sleep(0.1)
    assert "run run-1 (process" in second.waiting_for()
    first._ending.set()  # its heart stops, as by a kill
    until = time.monotonic() + 20
    while not second.try_claim():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "taking over from run run-1" in lines[0]
    second.save(2, TENSORS, {})
    second.flush(20)
    second.release()
    third = claimed(bucket, lines)
    assert len(lines) == 1  # given back in order, so there is nothing to say
    third.release()


def test_who_was_taken_for_dead_writes_nothing_more(bucket: str, hasty: None) -> None:
    first = claimed(bucket)
    files().pipe_file(f"{bucket}/lease-2.json", json.dumps({"run": "run-2", "host": "other", "pid": 1}).encode())
    first.save(2, TENSORS, {})
    first.flush(20)
    assert "newest.json" not in names(bucket)
    until = time.monotonic() + 20
    while first._lost is None and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(MixtuneError, match=r"run run-2 .* has taken over this training; this one ends"):
        first.save(4, TENSORS, {})


def test_of_many_who_come_at_once_one_gets_it(bucket: str) -> None:
    stores = [store(bucket) for _ in range(4)]
    got: list[bool] = []
    threads = [threading.Thread(target=lambda one=one: got.append(one.try_claim())) for one in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(got) == 1
    for one in stores:
        one.release()


def test_a_store_that_goes_away_does_not_stop_the_training(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    writer = claimed(bucket, lines)
    monkeypatch.setattr(
        writer, "_files", fsspec.filesystem("s3", endpoint_url="http://127.0.0.1:9", skip_instance_cache=True)
    )
    writer.save(2, TENSORS, {})
    writer.flush(60)
    assert "could not be sent to" in lines[0]
    writer.release()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://no-such-bucket/x", r"cannot be written \(there is no no-such-bucket\)"),
        ("nonsense://x/y", "cannot be used"),
    ],
)
def test_a_place_that_cannot_be_used_is_said_before_training(bucket: str, url: str, reason: str) -> None:
    with pytest.raises(MixtuneError, match=rf"checkpoints: {url} {reason}"):
        store(url)
