"""MLflow away at the start, gone in the middle, back again: with a real server that is killed and started anew."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixtune.components.shared.artifacts import write_json
from mixtune.components.shared.errors import UnreachableError
from mixtune.components.shared.tracking import outbox
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.journal import journals, undelivered
from mixtune.components.shared.tracking.mlflow_runs import PARENT
from mixtune.components.shared.tracking.tracker import Tracker
from mixtune.pipelines.cli import app
from tests.mlflow_server import MlflowServer
from tests.stores import new_store


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(one_server: MlflowServer, run: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """A server that is up when the test begins."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_server.uri)
    if not one_server.runs:
        one_server.start()
    return one_server


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder of a run."""
    folder = tmp_path / "runs" / "tiny"
    write_json(folder / ".mixtune" / "folder.json", {"format": "mixtune-run/1", "name": "tiny"})
    monkeypatch.setenv("MIXTUNE_JOURNAL_DIR", str(folder / ".mixtune" / "undelivered"))
    monkeypatch.setenv("MIXTUNE_RUN_NAME", "tiny run")
    monkeypatch.chdir(tmp_path)
    return folder


def journal_of(run: Path) -> Path:
    return run / ".mixtune" / "undelivered"


def sync(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sync", *arguments], prog_name="mixtune")
    return result.exit_code, result.output


def log_everything(tracker: Tracker, folder: Path, first: int, last: int) -> None:
    for step in range(first, last):
        tracker.log_metrics({"loss": 1 / (step + 1), "rate": step / 7}, step)
    note = folder / f"note-{first}.txt"
    note.write_text(f"written at {first}")
    tracker.log_artifact(note, "notes")
    note.unlink()
    tracker.log_params({f"part-{first}": {"size": first}})
    tracker.log_input(f"data-{first}", "d" * 64, "prepare", "training")
    tracker.set_tags({"latest": str(first), f"part-{first}": "there"})
    tracker.set_tags({"mixtune.gate": "passed"}, parent=True)
    tracker.log_parent_metrics({"selected.bpb": 1.5})


def check_everything(uri: str, run_id: str, firsts: tuple[int, ...], count: int) -> None:
    """Whether MLflow has each thing once."""
    client = connect(uri)
    found = client.get_run(run_id)
    for name in ("loss", "rate"):
        history = client.get_metric_history(run_id, name)
        assert [one.step for one in history] == list(range(count)), "no gap, nothing twice"
        expected = [1 / (step + 1) if name == "loss" else step / 7 for step in range(count)]
        assert [one.value for one in history] == expected
    assert {one.path for one in client.list_artifacts(run_id, "notes")} == {
        f"notes/note-{first}.txt" for first in firsts
    }
    assert {f"part-{first}.size" for first in firsts} <= set(found.data.params)
    assert sorted(one.dataset.name for one in found.inputs.dataset_inputs) == sorted(
        f"data-{first}" for first in firsts
    )
    assert found.data.tags["latest"] == str(firsts[-1])
    parent = client.get_run(found.data.tags[PARENT])
    assert parent.data.tags["mixtune.gate"] == "passed"
    assert parent.data.metrics == {"selected.bpb": 1.5}


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_credentials_are_no_server_that_is_away(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    class Doorman(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(status)

        do_GET = do_POST

        def log_message(self, *given: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Doorman) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:wrong-word@127.0.0.1:{server.server_port}")
        monkeypatch.setenv("MIXTUNE_TRACKING_OFFLINE", "1")
        with pytest.raises(UnreachableError) as refused:
            Tracker.open("plan", "plan", "run-1")
        server.shutdown()
    assert "turns these credentials away; correct MLFLOW_TRACKING_USERNAME" in refused.value.problems[0]
    assert "wrong-word" not in refused.value.problems[0]


def test_an_address_that_swallows_everything_is_given_up_in_seconds(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{silent.getsockname()[1]}")
        import mlflow  # noqa: F401 - its import is not what is measured

        started = time.monotonic()
        with pytest.raises(UnreachableError) as unreachable:
            Tracker.open("plan", "plan", "run-1")
        assert time.monotonic() - started < 10
        assert "no MLflow server answers at http://127.0.0.1:" in unreachable.value.problems[0]
        assert "secret" not in unreachable.value.problems[0]
        assert not journals(journal_of(run))


def test_a_server_that_comes_back_during_the_step_has_everything_once(
    server: MlflowServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outbox, "FIRST_PAUSE_SECONDS", 0.1)
    tracker = Tracker.open("mixed", "mixed-0.3", "comes-back")
    log_everything(tracker, tmp_path, 0, 300)
    server.kill()
    started = time.monotonic()
    log_everything(tracker, tmp_path, 300, 900)
    assert time.monotonic() - started < 30, "a server that is away holds up a step"
    server.start()
    log_everything(tracker, tmp_path, 900, 1200)
    tracker.close("FINISHED", {"kind": "done"})
    said = capsys.readouterr().out
    assert said.count("something could not be delivered") == 1
    assert "MLflow answers again" in said
    assert "not delivered" not in said
    assert tracker.run_id is not None
    check_everything(server.uri, tracker.run_id, (0, 300, 900), 1200)
    assert connect(server.uri).get_run(tracker.run_id).info.status == "FINISHED"
    assert not journals(journal_of(run)), "nothing is left behind"


def test_what_a_step_could_not_deliver_is_said_and_synced(
    server: MlflowServer, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker.open("mixed", "mixed-0.3", "synced")
    log_everything(tracker, tmp_path, 0, 300)
    server.kill()
    log_everything(tracker, tmp_path, 300, 900)
    tracker.close_parent("FINISHED", "gate passed")
    tracker.close("FINISHED", {"kind": "done"})
    ended = int(time.time() * 1000)
    said = capsys.readouterr().out
    assert "metric values" in said
    assert "1 file" in said
    assert f"deliver it with `mixtune sync {run}`" in said

    status, printed = sync(str(run))
    assert status == 4, printed
    assert f"no MLflow server answers at {server.uri}; still undelivered: " in printed
    assert sync()[0] == 4

    server.start()
    before = tmp_path / "before"
    shutil.copytree(journal_of(run), before)
    status, printed = sync()
    assert status == 0, printed
    (line,) = printed.splitlines()
    assert line.startswith("runs/tiny: delivered to MLflow at ")
    assert "metric values" in line
    assert tracker.run_id is not None
    check_everything(server.uri, tracker.run_id, (0, 300), 900)
    info = connect(server.uri).get_run(tracker.run_id).info
    assert info.status == "FINISHED"
    assert info.end_time <= ended, "the step ended then, not when it was delivered"
    assert sync(str(run)) == (0, f"no records are left to deliver in {run}\n")

    # Killed before it noted anything of what it had delivered: the same again changes nothing.
    shutil.copytree(before, journal_of(run), dirs_exist_ok=True)
    for note in journal_of(run).glob("*.delivered"):
        note.unlink()
    assert sync(str(run))[0] == 0
    check_everything(server.uri, tracker.run_id, (0, 300), 900)


def test_a_server_that_hangs_holds_up_a_step_for_seconds_and_has_everything_once(
    server: MlflowServer, run: Path, tmp_path: Path
) -> None:
    tracker = Tracker.open("mixed", "mixed-0.3", "hangs")
    log_everything(tracker, tmp_path, 0, 300)
    server.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        log_everything(tracker, tmp_path, 300, 900)
        assert time.monotonic() - started < 40
    finally:
        server.signal(signal.SIGCONT)  # it now carries out the requests that nobody waits for any more
    tracker.close("FINISHED", {"kind": "done"})
    assert tracker.run_id is not None
    check_everything(server.uri, tracker.run_id, (0, 300), 900)
    assert not journals(journal_of(run))


def test_a_run_that_began_without_a_server_is_made_when_it_is_delivered_and_once(
    server: MlflowServer, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.kill()
    monkeypatch.setenv("MIXTUNE_TRACKING_OFFLINE", "1")
    began = int(time.time() * 1000)
    for title in ("finetune", "mixed-0.3"):
        tracker = Tracker.open("mixed", title, "offline")
        log_everything(tracker, tmp_path, 0, 200)
        tracker.close("FINISHED", {"kind": "done"})
    last = Tracker.open("finish", "finish", "offline")
    assert [(one.title, one.status) for one in last.children()][:2] == [
        ("finetune", "FINISHED"),
        ("mixed-0.3", "FINISHED"),
    ]
    assert last.parent_tags()["mixtune.gate"] == "passed"
    last.close_parent("FINISHED", "gate passed")
    last.close("FINISHED")
    ended = int(time.time() * 1000)
    assert "going on without it" in capsys.readouterr().out

    server.start()
    before = tmp_path / "before"
    shutil.copytree(journal_of(run), before)
    for again in range(2):
        status, printed = sync(str(run))
        assert status == 0, printed
        client = connect(server.uri)
        experiment = client.get_experiment_by_name("mixtune").experiment_id
        found = [one for one in client.search_runs([experiment]) if one.data.tags.get("mixtune.run_id") == "offline"]
        runs = {one.info.run_name: one for one in found}
        assert len(found) == 4, "no run is made twice"
        assert set(runs) == {"tiny run", "finetune", "mixed-0.3", "finish"}
        assert all(began <= one.info.start_time <= one.info.end_time <= ended for one in found)
        assert {one.info.status for one in found} == {"FINISHED"}
        assert runs["tiny run"].data.tags["mixtune.verdict"] == "gate passed"
        check_everything(server.uri, runs["mixed-0.3"].info.run_id, (0,), 200)
        if not again:  # as if the first time had been killed before it noted anything
            shutil.rmtree(journal_of(run))
            shutil.copytree(before, journal_of(run))


def test_a_step_that_is_killed_while_the_server_is_away_loses_nothing(
    server: MlflowServer, run: Path, tmp_path: Path
) -> None:
    code = """
import os, signal, sys
from mixtune.components.shared.tracking.tracker import Tracker
tracker = Tracker.open("mixed", "mixed-0.3", "killed")
print(tracker.run_id, flush=True)
sys.stdin.readline()
for step in range(700):
    tracker.log_metrics({"loss": 1 / (step + 1)}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    step = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert step.stdout is not None
    run_id = step.stdout.readline().strip()
    server.kill()
    step.communicate("go\n", timeout=60)
    assert step.returncode == -9
    server.start()
    again = Tracker.open("mixed", "mixed-0.3", "killed")
    client = connect(server.uri)
    assert [one.step for one in client.get_metric_history(run_id, "loss")] == list(range(700))
    first = client.get_run(run_id)
    assert first.info.status == "KILLED"
    assert first.data.tags["mixtune.replaced_by"] == again.run_id
    again.close("FINISHED")
    assert undelivered(journal_of(run)).counts == {}


def test_what_mlflow_refuses_is_left_out_alone(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = Tracker.open("plan", "plan", "run-1")
    tracker.log_params({"a": 1})
    tracker.log_params({"a": 2})
    for step in range(10):
        tracker.log_metrics({"good": step, **({"not?good": 1.0} if step == 5 else {})}, step)
    tracker.close("FINISHED")
    client = connect(uri)
    assert tracker.run_id is not None
    assert client.get_run(tracker.run_id).data.params == {"a": "1"}
    assert [one.step for one in client.get_metric_history(tracker.run_id, "good")] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert capsys.readouterr().out.count("left out") == 2
    assert not journals(journal_of(run))


def test_a_folder_that_cannot_be_written_costs_no_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MIXTUNE_JOURNAL_DIR", str(tmp_path / "file" / "undelivered"))
    tracker = Tracker.open("plan", "plan", "run-1")
    tracker.log_metrics({"loss": 1.0}, 3)
    tracker.close("FINISHED")
    assert tracker.run_id is not None
    assert connect(uri).get_run(tracker.run_id).data.metrics == {"loss": 1.0}
    assert "a temporary folder takes its place" in capsys.readouterr().out


def test_a_step_that_was_killed_with_nothing_undelivered_is_ended_by_a_sync(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    code = (
        "import os, signal\nfrom mixtune.components.shared.tracking.tracker import Tracker\n"
        "tracker = Tracker.open('mixed', 'mixed-0.3', 'run-1')\ntracker.log_params({'a': 1})\n"
        "print(tracker.run_id, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"MLFLOW_TRACKING_URI": uri}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert killed.returncode == -9
    assert connect(uri).get_run(killed.stdout.strip()).info.status == "RUNNING"
    assert sync(str(run)) == (0, f"{run}: delivered to MLflow at {uri}: 1 end of a run\n")
    assert connect(uri).get_run(killed.stdout.strip()).info.status == "KILLED"
    assert sync(str(run))[1] == f"no records are left to deliver in {run}\n"


def test_a_new_attempt_ends_the_run_that_a_killed_one_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    killed = Tracker.open("mixed", "mixed-0.3", "run-1")
    other = Tracker.open("mixed", "mixed-0.6", "run-1")
    elsewhere = Tracker.open("mixed", "mixed-0.3", "run-2")
    now = Tracker.open("mixed", "mixed-0.3", "run-1")
    client = connect(uri)
    runs: dict[str, Any] = {
        name: client.get_run(one.run_id)
        for name, one in {"killed": killed, "other": other, "elsewhere": elsewhere, "now": now}.items()
    }
    assert {name: one.info.status for name, one in runs.items()} == {
        "killed": "KILLED", "other": "RUNNING", "elsewhere": "RUNNING", "now": "RUNNING",
    }  # fmt: skip
    assert runs["killed"].data.tags["mixtune.replaced_by"] == now.run_id


def test_no_password_is_kept(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    monkeypatch.setenv("MIXTUNE_TRACKING_OFFLINE", "1")
    tracker = Tracker.open("plan", "plan", "run-1")
    tracker.log_params({"a": 1})
    tracker.close("FINISHED")
    kept = journals(journal_of(run))
    assert kept
    assert all("secret" not in path.read_text() for path in kept)
    assert "secret" not in capsys.readouterr().out


def test_without_a_folder_to_keep_it_in_a_step_says_that_it_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MIXTUNE_TRACKING_OFFLINE", "1")
    tracker = Tracker.open("plan", "plan", "run-1")
    folder = tracker.journal_folder
    tracker.close("FINISHED")
    said = capsys.readouterr().out
    assert "not delivered to MLflow at http://127.0.0.1:9: 1 run, " in said
    assert "MIXTUNE_JOURNAL_DIR" in said
    assert folder is not None
    assert not folder.exists()


def test_sync_refuses_a_folder_that_is_no_run_and_has_nothing_to_do_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sync() == (0, "no records are left to deliver in runs (there is no run)\n")
    status, printed = sync(str(tmp_path))
    assert status == 2
    assert "is not the output folder of a mixtune run" in printed


def test_sync_imports_neither_torch_nor_mlflow_where_nothing_is_undelivered(run: Path) -> None:
    code = (
        "import sys\nfrom mixtune.pipelines.local.sync import sync_and_show\nassert sync_and_show(None) == 0\n"
        "assert not {'torch', 'mlflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, cwd=run.parent.parent)
