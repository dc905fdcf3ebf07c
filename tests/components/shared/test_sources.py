"""Sources: files, web addresses and hub data sets, their passwords, their quick check and their fingerprints."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.prepare.config import FinetuneData, PretrainData
from mixtune.components.shared.data.problems import SHOWN_PROBLEMS
from mixtune.components.shared.data.sources import check_source, fingerprint
from mixtune.components.shared.errors import RefusedError

from .read_sources import problems_of, texts_of


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server on the test's folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_web_address(tmp_path: Path, server: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "from the web"}\n')
    assert texts_of(f"{server}/a.jsonl?version=1") == ["from the web"]
    assert problems_of(f"{server}/b.jsonl") == [f"data.x.source: {server}/b.jsonl does not exist; correct the path"]
    assert len(fingerprint(PretrainData(source=f"{server}/a.jsonl"))) == 64


def test_web_file_changed_without_an_etag_has_another_fingerprint(tmp_path: Path, server: str) -> None:
    path, stream = tmp_path / "a.jsonl", PretrainData(source=f"{server}/a.jsonl")
    path.write_text('{"text": "one"}\n')
    os.utime(path, (1_000_000_000, 1_000_000_000))
    first = fingerprint(stream)
    assert fingerprint(stream) == first
    path.write_text('{"text": "two"}\n')
    os.utime(path, (1_000_000_060, 1_000_000_060))
    second = fingerprint(stream)
    path.write_text('{"text": "three"}\n')
    os.utime(path, (1_000_000_060, 1_000_000_060))
    assert len({first, second, fingerprint(stream)}) == 3


class TestPasswords:
    WITH = (
        "https://user:secret@host/a.jsonl",
        "https://:secret@host/a.jsonl",
        "s3://key:secret@bucket/a.jsonl",
        "s3://key:secret@bucket[1]/*.jsonl",
        "simplecache::https://user:secret@host/a.jsonl",
    )

    @pytest.mark.parametrize("source", WITH)
    @pytest.mark.parametrize("option", ["source", "dev_source", "test_source"])
    def test_configuration_refuses_them_and_does_not_show_them(self, option: str, source: str) -> None:
        text = json.dumps({"source": "a.jsonl", option: source})
        with pytest.raises(RefusedError) as refused:
            FinetuneData.from_json(text)
        (problem,) = refused.value.problems
        assert problem.startswith(f"{option}: must not carry a password; hand it over in the environment")
        assert "secret" not in problem

    @pytest.mark.parametrize("source", WITH)
    def test_check_refuses_them(self, source: str) -> None:
        stream = PretrainData.model_construct(source="embedded", dev_source=source)
        (problem,) = check_source(stream)
        assert problem.startswith("data.pretrain.dev_source: must not carry a password")
        assert "secret" not in problem

    @pytest.mark.parametrize(
        "source",
        [
            "https://user@host:8080/a.jsonl",
            "https://host:8080/a@b.jsonl",
            "https://host/a:b@c.jsonl",
            "github://owner:repository@main/a.jsonl",
            "hub:owner/name@main#test",
            "a:b@c.jsonl",
        ],
    )
    def test_what_is_no_password_is_taken(self, source: str) -> None:
        assert PretrainData(source=source).source == source


class TestCheck:
    def test_good_sources(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text,label\nx,y\n")
        (tmp_path / "a.txt").write_text("one\n\ntwo\n")
        assert check_source(FinetuneData(source=str(tmp_path / "a.csv"))) == []
        assert check_source(PretrainData(source=str(tmp_path / "a.txt"))) == []
        assert check_source(PretrainData(source="embedded")) == []
        assert check_source(FinetuneData(source="hub:owner/name/config@main#test", task="generation")) == []

    def test_all_sources_are_looked_at(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
        stream = FinetuneData(
            source=str(tmp_path / "a.jsonl"), dev_source="embedded", test_source="no.csv", task="generation"
        )
        found = check_source(stream)
        assert len(found) == 3
        assert "line 1 has no column prompt, completion; its columns are body" in found[0]
        assert found[1].startswith("data.finetune.dev_source: embedded can stand in source only")
        assert found[2] == "data.finetune.test_source: no.csv does not exist; correct the path"

    @pytest.mark.parametrize("task", ["multi_label", "regression", "question_answering"])
    def test_embedded_has_no_examples_for_other_tasks(self, task: Any) -> None:
        stream = FinetuneData(source="embedded", task=task)
        (problem,) = check_source(stream)
        assert problem.startswith(
            "data.finetune.source: embedded holds examples for classification and generation only"
        )
        assert problems_of("embedded", stream.columns) == [problem.replace("data.finetune", "data.x")]

    def test_first_records_are_checked_for_the_task(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "t", "label": "x"}\n')
        assert check_source(FinetuneData(source=str(path), task="multi_label")) == []
        assert check_source(FinetuneData(source=str(path), task="regression")) == [
            f"{path}, line 1: label is text, not a number"
        ]
        path.write_text('{"question": "q", "context": "c", "answers": "x"}\n')
        assert (
            "does not stand in the context"
            in check_source(FinetuneData(source=str(path), task="question_answering"))[0]
        )

    def test_only_the_beginning_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "x"}\n' * 10 + "broken\n")
        assert check_source(PretrainData(source=str(path))) == []
        path.write_text("broken\n" * 100)
        assert 1 <= len(check_source(PretrainData(source=str(path)))) <= SHOWN_PROBLEMS + 1

    def test_remote_files_are_not_opened(self) -> None:
        assert check_source(PretrainData(source="http://127.0.0.1:9/a.jsonl")) == []


class TestFingerprint:
    def test_follows_the_content(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "x"}\n')
        stream = PretrainData(source=str(path))
        first = fingerprint(stream)
        path.touch()
        assert fingerprint(stream) == first
        path.write_text('{"text": "y"}\n')
        assert fingerprint(stream) != first

    def test_covers_dev_and_test_sources_and_every_file_of_a_folder(self, tmp_path: Path) -> None:
        for name in ("train", "dev", "test"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.txt").write_text(name)
        stream = PretrainData(
            source=str(tmp_path / "train"), dev_source=str(tmp_path / "dev"), test_source=str(tmp_path / "test")
        )
        seen = {fingerprint(stream)}
        for name in ("train", "dev", "test"):
            (tmp_path / name / "b.txt").write_text("more")
            seen.add(fingerprint(stream))
        assert len(seen) == 4

    def test_exchanging_dev_and_test_is_a_change(self, tmp_path: Path) -> None:
        paths = []
        for name in ("a", "b"):
            (tmp_path / f"{name}.txt").write_text(name)
            paths.append(str(tmp_path / f"{name}.txt"))
        one = PretrainData(source=paths[0], dev_source=paths[0], test_source=paths[1])
        other = PretrainData(source=paths[0], dev_source=paths[1], test_source=paths[0])
        assert fingerprint(one) != fingerprint(other)
        only_dev = PretrainData(source=paths[0], dev_source=paths[1])
        only_test = PretrainData(source=paths[0], test_source=paths[1])
        assert fingerprint(only_dev) != fingerprint(only_test)

    def test_remote_content(self) -> None:
        import fsspec

        filesystem = fsspec.filesystem("memory")
        filesystem.pipe("/print/a.txt", b"one")
        stream = PretrainData(source="memory://print/a.txt")
        first = fingerprint(stream)
        assert fingerprint(stream) == first
        filesystem.pipe("/print/a.txt", b"two!")
        assert fingerprint(stream) != first

    def test_hub_commit_is_taken_at_its_word(self) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        prints = {fingerprint(PretrainData(source=f"hub:o/n@{revision}")) for revision in (commit, commit[::-1])}
        assert len(prints) == 2

    def test_missing_file_is_refused(self) -> None:
        with pytest.raises(RefusedError, match=r"data\.pretrain\.source: no\.csv does not exist"):
            fingerprint(PretrainData(source="no.csv"))
