"""Runs that are interrupted, killed or refused: what is said, and what is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import yaml

from mixtune.components.shared.outcome import load_outcomes
from mixtune.pipelines.local.folder import claim
from tests.conftest import sentences, small_disk
from tests.pipelines.project import ALWAYS, Project, plain


@pytest.fixture
def running(fresh: Project) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command and returns it when a file of the output folder exists."""
    processes = []

    def start(pattern: str, *options: str) -> subprocess.Popen[str]:
        (fresh.folder / "config.yaml").write_text(yaml.safe_dump(fresh.config), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-m", "mixtune.pipelines.cli", "run", "config.yaml", *options], cwd=fresh.folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        processes.append(process)
        deadline = time.monotonic() + 300
        while not list(fresh.output.glob(pattern)):
            assert time.monotonic() < deadline
            assert process.poll() is None, "it ended too early"
            time.sleep(0.05)
        return process

    yield start
    for process in processes:
        process.kill()


@pytest.mark.slow
def test_after_signals_and_a_kill_the_same_command_ends_with_the_report_of_an_undisturbed_run(
    fresh: Project, finished: Project, running: Callable[..., subprocess.Popen[str]]
) -> None:
    fresh.config = finished.config
    goes_on = "finished steps are kept; run the same command again to continue\n"
    # A step's result is in the cache when a step that depends on it has started.
    process = running("logs/*/pretrain.log")
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=120)
    assert (process.returncode, printed) == (130, f"mixtune: interrupted; {goes_on}")

    process = running("logs/*/mixed-0.3.log")
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=120)
    assert (process.returncode, printed) == (143, f"mixtune: ended by SIGTERM; {goes_on}")
    assert not psutil.wait_procs(everyone, timeout=20)[1], "no process is left"

    process = running(".mixtune/checkpoints/mixed-0.3-*/step-0000002*")
    everyone = psutil.Process(process.pid).children(recursive=True)
    assert len(everyone) >= 3, "the runner, the servers and a step"
    process.kill()
    process.wait()
    assert not psutil.wait_procs(everyone, timeout=60)[1], "the runner, a server or a step lives on"
    claim(fresh.output, "tiny").release()
    outcomes = (fresh.output / ".mixtune" / "outcomes").iterdir()
    done = {outcome.title for run in outcomes for outcome in load_outcomes(run) if outcome.kind == "done"}
    assert done > {"prepare pretrain", "prepare finetune", "pretrain"}
    assert "mixed-0.3" not in done

    status, ran, told = fresh.run()
    assert status == 0, told
    # KFP's local runner takes tasks in an arbitrary order, so that `finetune` may come after the mixed candidates.
    assert not ran & (done - ALWAYS), "finished steps are not repeated"
    newest = max((fresh.output / "logs").iterdir())
    assert "mixed-0.3: goes on from the checkpoint of step" in (newest / "mixed-0.3.log").read_text()
    assert plain(fresh.report()) == plain(finished.report())
    assert not (fresh.output / ".mixtune" / "checkpoints").exists(), "a run that succeeded needs none"

    statuses = [run.info.status for run in fresh.pipeline_runs()]
    assert (statuses[0], statuses[2:]) == ("FINISHED", ["KILLED", "KILLED"]), "newest first"
    client = fresh.client()
    experiment = client.get_experiment_by_name("mixtune").experiment_id
    runs = client.search_runs([experiment], "attributes.run_name = 'mixed-0.3'")
    (whole,) = [run for run in runs if run.info.status == "FINISHED"]
    steps = [point.step for point in client.get_metric_history(whole.info.run_id, "loss")]
    assert steps == list(range(10, 121, 10)), "no gap and no duplicate"
    steps = [point.step for point in client.get_metric_history(whole.info.run_id, "watch_forgetting")]
    assert steps == list(range(0, 121, 4)), "no gap and no duplicate"


def test_nothing_is_said_to_be_kept_where_it_is_not(
    fresh: Project, running: Callable[..., subprocess.Popen[str]]
) -> None:
    process = running("logs/*/pretrain.log", "--no-cache")
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=120)
    assert (process.returncode, printed) == (130, "mixtune: interrupted\n")


REFUSED: list[tuple[str, Callable[[Project], object], str]] = [
    ("missing file", lambda p: (p.folder / "text.jsonl").unlink(), "text.jsonl"),
    ("missing column", lambda p: p.config["data"]["finetune"].update(label_column="klass"), "klass"),
    ("lambda above one", lambda p: p.config["mixed"].update(lambdas=[1.5]), "mixed.lambdas.0"),
    ("unknown key", lambda p: p.config.update(mixd={}), "mixd"),
    ("wrong type", lambda p: p.config["pretrain"].update(steps="many"), "pretrain.steps"),
    ("no model", lambda p: p.config["model"].update(base="./nowhere"), "nowhere"),
    ("empty file", lambda p: (p.folder / "labels.jsonl").write_text(""), "labels.jsonl"),
]


@pytest.mark.parametrize(("spoil", "word"), [(one[1], one[2]) for one in REFUSED], ids=[one[0] for one in REFUSED])
def test_refused_before_anything_runs_and_nothing_is_written(
    fresh: Project, spoil: Callable[[Project], object], word: str
) -> None:
    spoil(fresh)
    done = fresh.mixtune("run", "config.yaml")
    assert done.returncode == 2, done.stderr
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (fresh.folder / "runs").exists()


def test_bad_data_is_refused_with_all_problems_of_its_stream_by_any_number_of_tasks(fresh: Project) -> None:
    rows: list[dict[str, Any]] = [
        {"text": text, "label": "a" if i % 2 else "b"} for i, text in enumerate(sentences(40))
    ]
    rows[25] = {"text": "once only here", "label": "once"}
    rows[26]["text"] = "   "
    rows[29]["label"] = None
    for stream, own in (("text", [{"text": text} for text in sentences(80, seed=2)]), ("labels", rows)):
        (fresh.folder / stream).mkdir()
        for number in range(2):
            fresh.write(f"{stream}/{number}.jsonl", own[number::2])
    fresh.config["data"]["pretrain"]["source"], fresh.config["data"]["finetune"]["source"] = "text", "labels"

    def refused(workers: int) -> tuple[list[str], dict[str, bytes]]:
        fresh.output = fresh.folder / "runs" / str(workers)
        asked = ("--output", str(fresh.output), "--set", f"placement.prepare_workers={workers}")
        done = fresh.mixtune("run", "config.yaml", *asked)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        made = {
            str(file).rsplit("/prepare/", 1)[1]: file.read_bytes()
            for name in ("train", "heldout", "tokenizer")
            for file in fresh.output.glob(f".mixtune/artifacts/*/prepare/{name}/**/*")
            if file.is_file() and file.name != "manifest.json"  # which names the run
        }
        return [line for line in done.stderr.splitlines() if "data.finetune" in line or "labels/" in line], made

    alone = refused(1)
    prepared = {"prepare pretrain", "prepare finetune"}
    assert fresh.ran() == {"plan", "finish"} | prepared, "nothing is trained on data that is refused"
    for word in ("0.jsonl, line 14", "1.jsonl, line 15"):
        assert any(word in line for line in alone[0]), word
    together = refused(2)
    of_portions = {f"{title} {part}" for title in prepared for part in ("portions", "portion 1", "portion 2")}
    assert fresh.ran() == {"plan", "finish"} | prepared | of_portions
    assert together == alone
    assert len(alone[1]) > 10


def test_a_folder_that_is_no_run_is_left_alone(fresh: Project) -> None:
    fresh.output.mkdir(parents=True)
    (fresh.output / "thesis.txt").write_text("years of work")
    done = fresh.mixtune("run", "config.yaml")
    assert done.returncode == 2
    assert "contains no mixtune run" in done.stderr
    assert [path.name for path in fresh.output.iterdir()] == ["thesis.txt"]


def test_an_unreachable_tracking_server_is_status_4(fresh: Project) -> None:
    fresh.config["tracking"] = {"uri": "http://127.0.0.1:9"}
    done = fresh.mixtune("run", "config.yaml")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "no MLflow server answers at http://127.0.0.1:9" in done.stderr


def test_a_password_in_the_configuration_is_refused_and_not_shown(fresh: Project) -> None:
    fresh.config["tracking"] = {"uri": "http://someone:secret@127.0.0.1:9"}
    done = fresh.mixtune("run", "config.yaml")
    assert done.returncode == 2
    assert "MLFLOW_TRACKING_PASSWORD" in done.stderr
    assert "secret" not in done.stdout + done.stderr
    assert not (fresh.folder / "runs").exists()


def test_two_runs_in_one_folder_do_not_mix(fresh: Project) -> None:
    lock = claim(fresh.output, "tiny")
    try:
        done = fresh.mixtune("run", "config.yaml")
    finally:
        lock.release()
    assert done.returncode == 2
    assert "another run is using" in done.stderr


def test_a_full_disk_is_said_in_a_sentence(fresh: Project) -> None:
    with small_disk(fresh.output, "16k"):
        done = fresh.mixtune("run", "config.yaml")
    assert done.returncode == 1
    assert f"mixtune: {fresh.output}" in done.stderr
    assert "cannot be written (no space left on device); free space" in done.stderr
    assert "Traceback" not in done.stderr
