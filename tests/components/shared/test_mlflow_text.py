"""A tracking server whose database does not take λ: a real MLflow server behind a proxy that answers 500 to such text."""

from __future__ import annotations

import http.server
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.shared.delivery import connect
from mixtune.components.shared.mlflow_text import to_ascii
from mixtune.components.shared.tracking import Tracker
from tests.mlflow_server import MlflowServer


@given(st.text())
def test_every_text_has_a_form_in_ascii(text: str) -> None:
    assert to_ascii(text).isascii()


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_stays_as_it_is(text: str) -> None:
    assert to_ascii(text) == text


def test_spelling() -> None:
    assert to_ascii("λ = 0.3, α, café, 中") == "lambda = 0.3, alpha, cafe, \\u4e2d"


class _Proxy(http.server.BaseHTTPRequestHandler):
    upstream: ClassVar[str]
    refused_words: ClassVar[tuple[str, ...]] = ()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            text = json.dumps(json.loads(body), ensure_ascii=False) if body else ""
        except ValueError:
            text = ""
        if not text.isascii() or any(word in text for word in self.refused_words):
            error = {"error_code": "INTERNAL_ERROR", "message": "'charmap' codec can't encode character"}
            self._send(500, json.dumps(error).encode())
            return
        kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        request = urllib.request.Request(
            self.upstream + self.path, data=body or None, headers=kept, method=self.command
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                self._send(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            self._send(error.code, error.read())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    handler = type("Proxy", (_Proxy,), {"upstream": server.uri, "refused_words": ("unspeakable",)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
    server.kill()


@pytest.fixture
def store(proxy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy)
    monkeypatch.setenv("MIXTUNE_JOURNAL_DIR", str(tmp_path / "undelivered"))
    # The server answers, so there is nothing to wait for.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return proxy


def test_text_arrives_in_ascii_or_not_at_all_and_holds_nothing_up(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIXTUNE_RUN_NAME", "Büchse run-1")
    tracker = Tracker.open("compare", "compare", "run-1")
    tags = {"mixtune.gate": "passed", "mixtune.headline": "λ = 0.3 forgets least", "mixtune.note": "unspeakable"}
    tracker.set_tags(tags, parent=True)
    tracker.log_params({"labels": "好 and 坏", "plain": 1})
    tracker.log_input("text 中", "d" * 64, "prepare", "training")
    tracker.log_metrics({"loss": 1.5}, 1)
    tracker.close_parent("FINISHED", "gate passed: λ = 0.3")
    tracker.close("FINISHED", {"kind": "done", "sentence": "α"})

    assert tracker.run_id is not None
    assert tracker.parent_id is not None
    client = connect(store)
    run, parent = client.get_run(tracker.run_id), client.get_run(tracker.parent_id)
    assert parent.info.run_name == "Buchse run-1"
    assert parent.data.tags["mixtune.headline"] == "lambda = 0.3 forgets least"
    assert parent.data.tags["mixtune.gate"] == "passed"
    assert parent.data.tags["mixtune.verdict"] == "gate passed: lambda = 0.3"
    assert "mixtune.note" not in parent.data.tags
    assert run.data.params == {"labels": "\\u597d and \\u574f", "plain": "1"}
    assert run.inputs.dataset_inputs[0].dataset.name == "text \\u4e2d"
    assert run.data.metrics == {"loss": 1.5}
    assert (run.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    said = capsys.readouterr().out
    assert "MLflow does not take the tag mixtune.note" in said
    assert "not delivered" not in said


def test_a_server_that_fails_at_everything_rejects_no_text(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a server cannot take because it is broken is kept, not left out."""
    tracker = Tracker.open("plan", "plan", "run-2")
    tracker.set_tags({"a": "there"})
    monkeypatch.setattr(_Proxy, "_answer", lambda self: self._send(500, b"{}"))
    for name in ("do_GET", "do_POST"):
        monkeypatch.setattr(_Proxy, name, _Proxy._answer)
    tracker.set_tags({"b": "λ"})
    tracker.close("FINISHED")
    said = capsys.readouterr().out
    assert "left out" not in said
    assert "not delivered to MLflow" in said
