"""The parts of a local run, each on real files: claiming a folder, publishing, history, the verdict, what is shown."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import pytest
import yaml

from mixtune.components.config import Config, load
from mixtune.components.shared.artifacts import ModelCard, write_json
from mixtune.components.shared.errors import RefusedError, cannot_be_written
from mixtune.components.shared.outcome import Outcome
from mixtune.components.shared.running.context import WorkDone, note_cached, note_progress
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.tracker import Tracker
from mixtune.components.shared.tracking.verdict import judge
from mixtune.pipelines.configuration import ready_made
from mixtune.pipelines.ended import Ended
from mixtune.pipelines.local.folder import Run, claim
from mixtune.pipelines.local.last_run import KILLED, begin_record, close_killed_run, was_killed
from mixtune.pipelines.local.publishing import Published, publish
from mixtune.pipelines.local.run import _conclude, _notes, tracking_uri
from mixtune.pipelines.local.sync import sync_and_show
from tests.conftest import small_disk


class Made:
    """A run whose steps have ended: records, comparison and models stand in its folder as the steps leave them."""

    def __init__(
        self,
        output: Path,
        id: str = "one",
        models: tuple[str, ...] = ("pretrained", "mixed-0.3"),
        passed: bool = True,
    ) -> None:
        self.run = Run(id, output)
        self.config: Config = load({**ready_made("demo"), "name": id})
        for folder in (self.run.logs, self.run.outcomes, self.run.progress.parent):
            folder.mkdir(parents=True, exist_ok=True)
        self.run.progress.touch()
        self.cache = self.run.state / "artifacts" / id
        for name in models:
            ModelCard(id=name, kind="pretrained").save(self.cache / name)
            (self.cache / name / "config.json").write_text("{}")
            (self.cache / name / "model.safetensors").write_bytes(b"weights of " + name.encode())
        comparison = self.cache / "comparison"
        gate = {"passed": passed, "reasons": []}
        write_json(comparison / "models.json", {name: str(self.cache / name) for name in models})
        write_json(comparison / "report.json", {"name": id, "selected": models[-1], "gate": gate})
        facts = {"gate": "passed", "selected": models[-1]}
        self.compared = Outcome(title="compare", kind="done", artifacts={"comparison": str(comparison)}, facts=facts)

    @property
    def models(self) -> Path:
        return self.run.output / "models"

    def publish(self) -> Published:
        return publish(self.run, self.config, self.compared, None)

    def conclude(self, *outcomes: Outcome) -> Ended:
        for outcome in outcomes:
            outcome.save(self.run.outcomes)
        return _conclude(self.run, self.config, None)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "out")


def done(title: str) -> Outcome:
    return Outcome(title=title, kind="done")


def test_all_steps_done_is_status_0(made: Made) -> None:
    assert made.conclude(made.compared, done("register"), done("finish")).status == 0


def test_a_gate_that_ends_the_run_as_failed_is_status_3_and_its_report_is_published(made: Made) -> None:
    report = made.cache / "comparison" / "report.json"
    write_json(report, {"name": "one", "selected": "mixed-0.3", "gate": {"passed": False, "reasons": []}})
    changes = {"kind": "gate_not_met", "sentences": ["the gate is not met: a"], "facts": {"gate": "not met"}}
    compared = made.compared.model_copy(update=changes)
    ended = made.conclude(compared, done("finish"))
    assert (ended.status, ended.problems) == (3, [])
    assert ended.report is not None
    assert (made.run.output / "report" / "report.json").is_file()
    assert _notes(made.run) == ["compare: the gate is not met: a"]


def test_a_register_step_that_was_killed_is_a_failure(made: Made) -> None:
    ended = made.conclude(made.compared, done("finish"))
    assert ended.status == 1
    assert ended.problems == [
        "register: ended without an outcome record (probably killed), so nothing was registered",
        f"register: its log is {made.run.logs / 'kfp.log'}",
    ]
    assert ended.report is not None


def test_every_step_that_started_and_left_no_record_is_named(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTUNE_PROGRESS_FILE", str(made.run.progress))
    note_progress("pretrain")
    note_cached("evaluate pretrained")
    note_progress("mixed-0.3")
    note_progress("mixed-0.3", **asdict(WorkDone("tokens", 0, 0, "documents")))
    note_progress("finetune")
    with made.run.progress.open("a") as file:
        file.write('{"title": "half a li')
    ended = made.conclude(done("pretrain"), done("finish"))
    assert ended.status == 1
    log = made.run.logs / "kfp.log"
    assert ended.problems == [
        line
        for one in ("mixed-0.3", "finetune")
        for line in (f"{one}: ended without an outcome record (probably killed)", f"{one}: its log is {log}")
    ]


def test_a_step_that_was_refused_gives_the_status_also_where_another_was_killed(made: Made) -> None:
    refused = Outcome(title="register", kind="refused", sentences=["no"])
    ended = made.conclude(made.compared, refused, done("finish"))
    assert ended.status == 2
    assert ended.problems == ["register: no"]


def test_a_reason_that_finish_has_too_is_told_once(made: Made) -> None:
    refused = [Outcome(title=title, kind="refused", sentences=["no address"]) for title in ("plan", "finish")]
    ended = made.conclude(*refused)
    assert (ended.status, ended.problems) == (2, ["plan: no address"])


def test_a_finish_that_failed_gives_its_status(made: Made) -> None:
    finish = Outcome(title="finish", kind="unreachable", sentences=["no MLflow server answers"])
    ended = made.conclude(made.compared, done("register"), finish)
    assert (ended.status, ended.problems) == (4, ["finish: no MLflow server answers"])


def test_a_run_without_a_finish_has_failed_and_says_how_its_process_ended(made: Made) -> None:
    (made.run.logs / "kfp.log").write_text("Traceback\nIndexError: list index out of range\n\n", encoding="utf-8")
    ended = made.conclude(made.compared, done("register"))
    assert ended.status == 1
    assert ended.problems == [
        f"the pipeline ended early (IndexError: list index out of range); see {made.run.logs / 'kfp.log'}"
    ]


@pytest.mark.parametrize(("stopped", "status"), [("interrupted", 130), ("terminated", 143)])
def test_a_stopped_run_is_closed_with_the_verdict_of_every_run(
    made: Made, monkeypatch: pytest.MonkeyPatch, stopped: Literal["interrupted", "terminated"], status: int
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Outcome(title="pretrain", kind="terminated", sentences=["ended by SIGTERM"]).save(made.run.outcomes)
    ended = _conclude(made.run, made.config, stopped=stopped)
    assert (ended.status, ended.problems) == (status, [])
    client = connect(tracking_uri(made.config, made.run.output))
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert (run.info.status, run.data.tags["mixtune.verdict"]) == ("KILLED", judge([], {}, "CANCELED").sentence)


def test_publishing_leaves_alone_what_is_the_users(made: Made) -> None:
    made.publish()
    (made.models / "notes.txt").write_text("mine")
    (made.models / "mine").mkdir()
    (made.models / "mine" / "weights").write_text("mine")
    ModelCard(id="mixed-0.3", kind="mixed").save(made.models / "copy-of-mixed")
    (made.models / "best").symlink_to("mixed-0.3")
    second = Made(made.run.output, "two", models=("pretrained", "mixed-0.6"))
    assert second.publish().problems == []
    names = {path.name for path in made.models.iterdir()}
    assert names == {"notes.txt", "mine", "copy-of-mixed", "best", "pretrained", "mixed-0.6", "selected"}
    assert (made.models / "mine" / "weights").read_text() == "mine"
    assert (made.models / "selected").resolve().name == "mixed-0.6"


def test_where_the_gate_is_not_met_no_model_is_selected(made: Made) -> None:
    made.publish()
    assert (made.models / "selected").is_symlink()
    Made(made.run.output, "two", passed=False).publish()
    assert {path.name for path in made.models.iterdir()} == {"pretrained", "mixed-0.3"}


def test_something_of_the_users_in_a_models_place_is_kept_and_named(made: Made) -> None:
    for name in ("mixed-0.3", "selected"):
        (made.models / name).mkdir(parents=True)
        (made.models / name / "thesis.txt").write_text("years")
    ended = made.conclude(made.compared, done("register"), done("finish"))
    assert ended.status == 2
    assert [problem.partition(":")[0] for problem in ended.problems] == ["models", "models"]
    for name in ("mixed-0.3", "selected"):
        assert (made.models / name / "thesis.txt").is_file()
    assert (made.models / "pretrained" / "mixtune.json").is_file()


def test_only_weights_are_shared_with_the_cache(made: Made) -> None:
    made.publish()
    for folder, published in (("mixed-0.3", made.models / "mixed-0.3"), ("comparison", made.run.output / "report")):
        for file in (made.cache / folder).iterdir():
            shared = file.samefile(published / file.name)
            assert shared == (file.suffix == ".safetensors"), file


def test_a_report_that_does_not_fit_is_said_in_a_sentence_and_the_one_before_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "out", "256k"):
        made = Made(tmp_path / "out")
        made.publish()
        made.run = Run("two", made.run.output)
        (Path(made.compared.artifacts["comparison"]) / "large").write_bytes(bytes(150_000))
        with pytest.raises(OSError, match="No space left") as raised:
            made.publish()
        sentence = cannot_be_written(raised.value)
        assert sentence is not None
        assert "new/report/large: cannot be written (no space left on device)" in sentence
        assert json.loads((tmp_path / "out" / "report" / "run.json").read_text()) == {"id": "one"}


def test_history_pairs_a_report_with_its_own_configuration(made: Made) -> None:
    output = made.run.output
    made.publish()
    # A run that failed before it had a report: only config.yaml at the top is its own.
    (output / "config.yaml").write_text("name: failed")
    assert not (output / "history").exists()
    for id in ("two", "three"):
        Made(output, id).publish()
    assert {path.name for path in (output / "history").iterdir()} == {"one", "two"}
    for id in ("one", "two"):
        kept = output / "history" / id
        assert yaml.safe_load((kept / "config.yaml").read_text())["name"] == id
        assert json.loads((kept / "report" / "report.json").read_text())["name"] == id
        assert json.loads((kept / "report" / "run.json").read_text()) == {"id": id}
    assert (output / "config.yaml").read_text() == "name: failed"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_run_no_longer_has_or_replaces_is_in_the_history_with_the_files_of_the_user(made: Made) -> None:
    made.publish()
    mine = {"mixed-0.3/thesis.txt": b"years", "pretrained/notes/one.txt": b"of work"}
    for name, content in mine.items():
        (made.models / name).parent.mkdir(exist_ok=True)
        (made.models / name).write_bytes(content)
    (made.run.output / "report" / "remarks.md").write_text("mine too")
    before, report = everything(made.models), everything(made.run.output / "report")
    weights = (made.models / "mixed-0.3" / "model.safetensors").stat().st_ino

    second = Made(made.run.output, "two", models=("pretrained", "mixed-0.6"))
    kept = made.run.output / "history" / "one"
    assert second.publish().notes == [f"earlier models are kept in {kept / 'models'}: mixed-0.3, pretrained"]
    assert everything(kept / "models") == {
        name: content for name, content in before.items() if not name.startswith("selected/")
    }
    assert everything(kept / "report") == report
    assert (kept / "models" / "mixed-0.3" / "model.safetensors").stat().st_ino == weights, "moved, not copied"
    assert {path.name for path in made.models.iterdir()} == {"pretrained", "mixed-0.6", "selected"}


def test_a_candidate_that_has_not_changed_stays_where_it_is(made: Made) -> None:
    made.publish()
    folder = (made.models / "mixed-0.3").stat().st_ino
    for id in ("two", "three"):
        made.run = Run(id, made.run.output)
        published = made.publish()
        assert published.notes == []
    assert (made.models / "mixed-0.3").stat().st_ino == folder
    assert not list((made.run.output / "history").glob("*/models"))
    (made.models / "mixed-0.3" / "config.json").write_text('{"changed": "by the user"}')
    (made.run.output / "report" / "run.json").unlink()
    made.run = Run("four", made.run.output)
    made.publish()
    kept = made.run.output / "history" / "before-four" / "models" / "mixed-0.3" / "config.json"
    assert kept.read_text() == '{"changed": "by the user"}'
    assert (made.models / "mixed-0.3" / "config.json").read_text() == "{}"


def test_a_name_that_is_taken_in_the_history_costs_nothing_there(made: Made) -> None:
    made.publish()
    (made.models / "mixed-0.3" / "first.txt").write_text("first")
    taken = made.run.output / "history" / "one" / "models" / "mixed-0.3"
    taken.mkdir(parents=True)
    made.publish()
    assert list(taken.iterdir()) == []
    assert (taken.parent / "2-mixed-0.3" / "first.txt").is_file()


@pytest.mark.parametrize(("name", "who"), [("100%", "MLflow"), ("what?", "MLflow"), ("a{{$.x}}b", "Kubeflow replaces")])
def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_made(tmp_path: Path, name: str, who: str) -> None:
    with pytest.raises(RefusedError, match=who):
        claim(tmp_path / name / "run", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(RefusedError, match="cannot be used"):
            claim(output, "x")


def test_a_lock_that_cannot_be_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".mixtune" / "lock").mkdir(parents=True)
    write_json(tmp_path / ".mixtune" / "folder.json", {})
    with pytest.raises(RefusedError, match="cannot be used"):
        claim(tmp_path, "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RefusedError, match="Permission denied"):
        claim(tmp_path / "run", "x")


@pytest.mark.parametrize("by_sync", [False, True])
def test_the_mlflow_run_of_a_killed_command_is_closed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_sync: bool
) -> None:
    output = tmp_path / "out"
    claim(output, "one").release()
    made = Made(output)
    uri = tracking_uri(made.config, output)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    begin_record(made.run, uri, "mixtune")
    tracker = Tracker.open("pretrain", "pretrain", made.run.id)
    assert tracker.parent_id
    client = connect(uri)
    assert client.get_run(tracker.parent_id).info.status == "RUNNING"
    for _ in range(2):
        if by_sync:
            assert sync_and_show(output) == 0
        else:
            close_killed_run(output)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert {run.info.status for run in runs} == {"KILLED"}
    assert len(runs) == 2
    assert client.get_run(tracker.parent_id).data.tags["mixtune.verdict"] == KILLED
    assert not was_killed(output)
    # A run that `finish` has closed keeps its verdict.
    begin_record(made.run, uri, "mixtune")
    client.set_terminated(tracker.parent_id, "FINISHED")
    done("finish").save(made.run.outcomes)
    close_killed_run(output)
    assert client.get_run(tracker.parent_id).info.status == "FINISHED"
