"""A real tracking server as k8s/base deploys it, and real runs against it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from mixtune.components.shared.running.context import TRACKING_KEYS
from tests.pipelines.project import Project

from .deployed import STEPS_USER, Deployed, made_up, secrets_in
from .manifests import ROOT, find

pytestmark = pytest.mark.slow

# A step that logs, as any step does: by the environment, through Tracker.
STEP = """
import json, sys, time
from mixtune.components.shared.tracking.tracker import Tracker
tracker = Tracker.open("mixed", sys.argv[1], sys.argv[2])
print("open", flush=True)
for line in sys.stdin:
    first, last = map(int, line.split())
    for step in range(first, last):
        tracker.log_metrics({"loss": 1 / (step + 1), "tokens": float(step)}, step=step)
    tracker.set_tags({"mixtune.got_to": str(last)})
    print("logged", last, flush=True)
tracker.close("FINISHED", {"kind": "done"})
print(json.dumps({"run": tracker.run_id, "parent": tracker.parent_id}), flush=True)
"""


ACTIVE = "SELECT count(*) FROM runs WHERE lifecycle_stage = 'active'"


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    deployed = Deployed(tmp_path_factory.mktemp("deployed"))
    try:
        deployed.start()
        done = deployed.set_password(STEPS_USER, deployed.steps_password)
        assert done.returncode == 0, done.stderr
        yield deployed
    finally:
        deployed.remove()


@pytest.fixture
def client(deployed: Deployed, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's own client, as the user that steps are."""
    from mlflow import MlflowClient

    for name, value in deployed.for_steps().items():
        monkeypatch.setenv(name, value)
    return MlflowClient(deployed.uri, registry_uri=deployed.uri)


@pytest.fixture(scope="module")
def finished(deployed: Deployed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, str]:
    """A whole run that knows of the server what the secret tells, and its output."""
    project = Project(tmp_path_factory.mktemp("project"))
    # What else a run can do is tested elsewhere; here its records matter.
    project.config["evaluate"]["interpolation_alphas"] = []
    status, printed = run(project, deployed.for_steps())
    assert status == 0, printed
    return project, printed


def run(project: Project, environment: dict[str, str]) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        done = project.mixtune("run", "config.yaml")
    return done.returncode, done.stdout + done.stderr


def step(deployed: Deployed, title: str, pipeline_run: str, experiment: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STEP, title, pipeline_run],
        env={**os.environ, **deployed.for_steps(experiment), "MIXTUNE_JOURNAL_DIR": str(folder)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def tell(process: subprocess.Popen[str], first: int, last: int) -> None:
    """Has a step log metrics of some optimizer steps."""
    assert process.stdin is not None
    process.stdin.write(f"{first} {last}\n")
    process.stdin.flush()


def line(process: subprocess.Popen[str], said: list[str] | None = None) -> str:
    """The next line that is none about tracking; those that are go into `said`."""
    assert process.stdout is not None
    while (text := process.stdout.readline()).startswith("tracking:"):
        if said is not None:
            said.append(text)
    return text.strip()


def test_a_whole_run_is_on_record(deployed: Deployed, finished: tuple[Project, str], client: Any) -> None:
    project, _ = finished
    assert set(deployed.for_steps()) == set(TRACKING_KEYS)
    experiment = client.get_experiment_by_name("mixtune")
    assert experiment.artifact_location.startswith("mlflow-artifacts:/")
    runs = client.search_runs([experiment.experiment_id])
    nested = {one.info.run_name: one for one in runs if "mlflow.parentRunId" in one.data.tags}
    (parent,) = [one for one in runs if "mlflow.parentRunId" not in one.data.tags]
    assert set(nested) == project.ran()
    assert {one.data.tags["mlflow.parentRunId"] for one in nested.values()} == {parent.info.run_id}
    assert {one.info.status for one in runs} == {"FINISHED"}
    assert client.get_metric_history(nested["mixed-0.3"].info.run_id, "loss")
    assert not (project.output / "mlflow").exists()
    assert deployed.database.sql("SELECT count(*) FROM runs") == str(len(runs))


def test_artifacts_pass_through_the_server_into_the_object_store(
    deployed: Deployed, finished: tuple[Project, str], client: Any, tmp_path: Path
) -> None:
    project, _ = finished
    experiment = client.get_experiment_by_name("mixtune").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`mixtune.step` = 'pipeline'")
    fetched = Path(client.download_artifacts(parent.info.run_id, "report", str(tmp_path)))
    assert (fetched / "report.json").read_bytes() == (project.output / "report" / "report.json").read_bytes()
    keys = [one["Key"] for one in deployed.s3.list_objects_v2(Bucket="mixtune")["Contents"]]
    assert all(key.startswith("mlflow/") for key in keys)
    assert any(key.endswith("report/report.json") for key in keys)
    assert not any(name.startswith("AWS_") for name in deployed.for_steps()), "steps have no key to the object store"


def test_the_selected_model_is_in_the_registry_and_can_be_fetched(
    finished: tuple[Project, str], client: Any, tmp_path: Path
) -> None:
    import mlflow

    project, _ = finished
    (version,) = client.search_model_versions("name = 'tiny'")
    assert version.tags["mixtune.candidate"] == project.report()["selected"]
    uri = f"models:/tiny/{version.version}"
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path), tracking_uri=client.tracking_uri))
    weights = (folder / "model" / "model.safetensors").read_bytes()
    assert weights == (project.output / "models" / "selected" / "model.safetensors").read_bytes()


def test_no_secret_is_written_anywhere(deployed: Deployed, finished: tuple[Project, str]) -> None:
    project, printed = finished
    assert not [secret for secret in deployed.all_secrets() if secret in printed]
    assert secrets_in(project.folder, deployed.all_secrets()) == []
    assert secrets_in(deployed.folder, deployed.all_secrets()) == []
    assert not [one for one in deployed.all_secrets() if one in (deployed.database.folder / "log").read_text()]
    listed = " ".join(" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))
    assert "--app-name=basic-auth" in listed
    assert not [secret for secret in deployed.all_secrets() if secret in listed], "in the list of processes"


def test_a_wrong_password_ends_the_run_at_once_with_status_4(deployed: Deployed, tmp_path: Path) -> None:
    wrong = made_up()
    project = Project(tmp_path)
    status, printed = run(project, deployed.for_steps() | {"MLFLOW_TRACKING_PASSWORD": wrong})
    assert status == 4, printed
    assert "turns these credentials away" in printed
    assert "Traceback" not in printed
    assert wrong not in printed
    assert secrets_in(tmp_path, [wrong]) == []
    assert secrets_in(deployed.folder, [wrong]) == []


def test_nobody_gets_in_without_an_account_or_by_another_name_of_the_server(deployed: Deployed) -> None:
    def asked(user: tuple[str, str] | None = None, host: str | None = None) -> int:
        address = f"{deployed.uri}/api/2.0/mlflow/experiments/search?max_results=1"
        headers = {"Host": host} if host else {}
        return requests.get(address, auth=user, headers=headers, timeout=10).status_code

    user = (STEPS_USER, deployed.steps_password)
    assert asked() == 401
    assert asked(user) == 200
    for name in ("mixtune-mlflow.mixtune.svc", "mixtune-mlflow.mixtune.svc.cluster.local"):
        assert asked(user, f"{name}:{deployed.port}") == 200
    assert asked(user, "elsewhere.example.com") == 403
    assert deployed.probe("readinessProbe") == deployed.probe("livenessProbe") == 200


def test_greek_letters_come_back_as_they_were(client: Any) -> None:
    text = "λ = 0.3, α = 0.5"
    run = client.create_run(client.create_experiment(text), run_name=text, tags={"mixtune.candidate": text}).info.run_id
    client.log_param(run, "schedule", text)
    found = client.get_run(run)
    assert found.info.run_name == found.data.tags["mixtune.candidate"] == found.data.params["schedule"] == text
    client.create_registered_model("greek", description=text)
    assert client.get_registered_model("greek").description == text


def test_every_text_is_cut_to_what_the_database_stores(
    deployed: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixtune.components.shared.tracking.connection import connect
    from mixtune.components.shared.tracking.tracker import Tracker

    for name, value in deployed.for_steps().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MIXTUNE_JOURNAL_DIR", str(tmp_path))
    text = "λ" * 100_000
    tracker = Tracker.open("compare", "compare", "long-texts")
    tracker.set_tags({"mixtune.headline": text})
    tracker.set_tags({"mixtune.headline": text}, parent=True)
    tracker.log_params({"labels": text})
    tracker.log_input("finetune", "d" * 64, text, "training")
    tracker.close_parent("FINISHED", text)
    tracker.close("FINISHED", {"kind": "done", "sentence": text})
    assert not list(tmp_path.rglob("*.jsonl")), "everything has arrived"

    client = connect(deployed.uri)
    run = client.get_run(tracker.run_id)
    texts = [run.data.tags["mixtune.headline"], run.data.params["labels"], run.inputs.dataset_inputs[0].dataset.source]
    client.update_run(tracker.run_id, name=text)
    texts.append(client.get_run(tracker.run_id).info.run_name)
    client.create_registered_model("long-texts")
    client.create_model_version("long-texts", source=f"runs:/{tracker.run_id}/model", run_id=tracker.run_id)
    client.update_model_version("long-texts", "1", text)
    client.set_model_version_tag("long-texts", "1", "mixtune.gate_reasons", text)
    version = client.get_model_version("long-texts", "1")
    texts += [version.description, version.tags["mixtune.gate_reasons"]]
    assert [len(one) for one in texts] == [5000, 6000, 65535, 250, 5000, 5000]
    assert all(one == f"{'λ' * (len(one) - 3)}..." for one in texts)


def test_two_runs_that_log_at_once_lose_nothing(deployed: Deployed, client: Any, tmp_path: Path) -> None:
    """Both make the same experiment, which neither has found."""
    both = [step(deployed, "mixed-0.3", f"at-once-{number}", "at-once", tmp_path / str(number)) for number in range(2)]
    for process in both:
        tell(process, 0, 1500)
    results = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both]
    assert len(client.search_runs([client.get_experiment_by_name("at-once").experiment_id])) == 4
    for number, result in enumerate(results):
        assert client.get_run(result["parent"]).data.tags["mixtune.run_id"] == f"at-once-{number}"
        history = client.get_metric_history(result["run"], "tokens")
        assert Counter(one.step for one in history) == Counter(range(1500))
        assert client.get_run(result["run"]).info.status == "FINISHED"


def test_a_database_that_goes_down_in_the_middle_costs_nothing(deployed: Deployed, client: Any, tmp_path: Path) -> None:
    process = step(deployed, "mixed-0.3", "restarted", "restarted", tmp_path)
    assert line(process) == "open"
    tell(process, 0, 400)
    assert line(process) == "logged 400"
    deployed.database.stop()
    try:
        assert deployed.database.probe("readinessProbe") != 0
        assert deployed.probe("livenessProbe") == 200, "a server without its database is not killed for it"
        started, said = time.monotonic(), list[str]()
        tell(process, 400, 800)
        assert line(process, said) == "logged 800"
        assert any("could not be delivered" in one for one in said), "or nothing was tried during the outage"
        assert time.monotonic() - started < 60, "the step does not wait for the database"
    finally:
        deployed.database.start()
    assert deployed.database.probe("readinessProbe") == 0
    tell(process, 800, 1000)
    result = json.loads(process.communicate(timeout=120)[0].splitlines()[-1])
    history = client.get_metric_history(result["run"], "loss")
    assert Counter(one.step for one in history) == Counter(range(1000))
    found = client.get_run(result["run"])
    assert found.data.tags["mixtune.got_to"] == "1000"
    assert found.info.status == "FINISHED"
    assert not list(tmp_path.glob("*.jsonl"))


def test_everybody_reads_everything_and_changes_what_is_their_own(deployed: Deployed, client: Any) -> None:
    run = client.create_run(client.create_experiment("of the steps")).info.run_id
    password = made_up()
    assert deployed.set_password("somebody", password).returncode == 0

    def ask(user: tuple[str, str], method: str, what: str, **values: str) -> int:
        where = {"params": values} if method == "GET" else {"json": values}
        address = f"{deployed.uri}/api/2.0/mlflow/{what}"
        return requests.request(method, address, auth=user, timeout=10, **where).status_code

    steps, somebody = (STEPS_USER, deployed.steps_password), ("somebody", password)
    for user, allowed in ((steps, 200), (somebody, 403)):
        assert ask(user, "GET", "runs/get", run_id=run) == 200
        assert ask(user, "POST", "runs/log-parameter", run_id=run, key="by", value=user[0]) == allowed
        assert ask(user, "POST", "users/create", username="third", password=made_up()) == 403
    assert client.get_run(run).data.params == {"by": STEPS_USER}
    assert ask(somebody, "POST", "experiments/create", name="of somebody") == 200


def test_passwords_can_be_changed_while_it_runs(deployed: Deployed, client: Any) -> None:
    other = "another-user"

    def can_log_in(user: str, password: str) -> bool:
        address = f"{deployed.uri}/api/2.0/mlflow/experiments/search?max_results=1"
        return bool(requests.get(address, auth=(user, password), timeout=10).ok)

    first, second = made_up(), made_up()
    assert "was made" in deployed.set_password(other, first).stdout
    assert can_log_in(other, first)
    assert "has a new password" in deployed.set_password(other, second).stdout
    short = deployed.set_password(other, "short")
    assert short.returncode == 1
    assert "12 characters" in short.stderr

    assert can_log_in(other, second)
    assert not can_log_in(other, first)

    admin = made_up()
    server = deployed.secrets["mixtune-mlflow-server"]
    assert not can_log_in("admin", admin)
    assert "has a new password" in deployed.set_password("admin", admin).stdout
    refused = deployed.set_password(other, made_up())
    assert refused.returncode == 1, "the secret has the old one still"
    assert "nothing was changed" in refused.stderr
    server["MLFLOW_AUTH_ADMIN_PASSWORD"] = admin
    assert "has a new password" in deployed.set_password(other, made_up()).stdout


def test_what_was_deleted_can_be_removed_for_good(deployed: Deployed, client: Any, tmp_path: Path) -> None:
    experiment = client.create_experiment("to be removed")
    runs = [client.create_run(experiment).info.run_id for _ in range(2)]
    (tmp_path / "note.txt").write_text("of a run")
    for one in runs:
        client.log_artifact(one, str(tmp_path / "note.txt"))
    client.delete_run(runs[0])
    guide = (ROOT / "docs" / "operations.md").read_text()
    (command,) = re.findall(r"sh -c '([^']*mlflow gc [^']*)'", guide)
    container = {**deployed.server_container(), "command": ["sh", "-c", command]}

    def left() -> tuple[set[str], set[str]]:
        known = deployed.database.sql(f"SELECT run_uuid FROM runs WHERE experiment_id = {experiment}").split()
        keys = [
            one["Key"]
            for one in deployed.s3.list_objects_v2(Bucket="mixtune", Prefix=f"mlflow/{experiment}/")["Contents"]
        ]
        return set(known), {key.split("/")[2] for key in keys}

    done = deployed.once(container)
    assert done.returncode == 0, done.stderr
    assert left() == (set(runs), set(runs)), "deleted a moment ago"
    deployed.database.sql(
        f"UPDATE runs SET deleted_time = deleted_time - 31 * 86400000::bigint WHERE run_uuid = '{runs[0]}'"
    )
    done = deployed.once(container)
    assert done.returncode == 0, done.stderr
    assert left() == ({runs[1]}, {runs[1]})


def test_a_backup_brings_everything_back(deployed: Deployed, finished: tuple[Project, str], client: Any) -> None:
    cron = find("base", "CronJob", "mixtune-backup")["spec"]["jobTemplate"]["spec"]["template"]
    restore = find("operations/restore", "Job", "mixtune-restore")["spec"]["template"]
    old = deployed.backups / "mlflow-20200101T000000Z.dump"
    old.write_bytes(b"of long ago")
    os.utime(old, (1e9, 1e9))
    done = deployed.job(cron)
    assert done.returncode == 0, done.stderr
    (dump,) = deployed.backups.iterdir()
    assert str(dump) in done.stdout
    assert dump.stat().st_mode & 0o077 == 0

    before = state(client)
    experiment = client.get_experiment_by_name("mixtune").experiment_id
    late = client.create_run(experiment, run_name="after the backup")
    deployed.stop_server()
    deployed.database.sql("DROP DATABASE mlflow WITH (FORCE)", "postgres")

    broken = deployed.backups / "broken.dump"
    broken.write_bytes(dump.read_bytes()[:2000])
    failed = deployed.job(restore, DUMP=str(broken))
    assert failed.returncode != 0
    broken.unlink()
    done = deployed.job(restore)
    assert done.returncode == 0, done.stdout + done.stderr
    # It comes back with another password of the database, too.
    password = made_up()
    deployed.database.change_password(password)
    assert deployed.job(cron).returncode != 0, "the old one is of no use any more"
    deployed.secrets["mixtune-postgres"]["PGPASSWORD"] = password
    deployed.migrate()
    deployed.start_server()
    assert state(client) == before
    assert late.info.run_id not in {one.info.run_id for one in client.search_runs([experiment])}

    # Once more with a database in place: it is kept aside.
    client.create_run(experiment, run_name="after the restore")
    deployed.stop_server()
    done = deployed.job(restore, DUMP=str(dump))
    assert done.returncode == 0, done.stdout + done.stderr
    assert deployed.database.sql(ACTIVE) == str(len(before["runs"]))
    names = deployed.database.sql("SELECT datname FROM pg_database", "postgres").split()
    (aside,) = [name for name in names if name.startswith("mlflow_before_")]
    found = deployed.database.sql("SELECT count(*) FROM runs WHERE name = 'after the restore'", aside)
    assert found == "1"


def state(client: Any) -> dict[str, Any]:
    """What the server knows of runs and models; steps' own account is needed to ask."""
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments, max_results=1000)
    versions = client.search_model_versions("name = 'tiny'")
    return {
        "runs": {one.info.run_id: (one.info.status, one.data.metrics, one.data.tags) for one in runs},
        "versions": {one.version: one.tags for one in versions},
    }
