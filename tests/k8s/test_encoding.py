"""The encoding of MLflow's database: set by the manifests, checked before the server starts, mended by a restore."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .deployed import Deployed
from .manifests import Manifest, buildable, find

TEXT = "λ = 0.3, α = 0.5"
# PostgreSQL takes the locale C with any encoding.
OTHERS = ["SQL_ASCII", "LATIN1"]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """A database as the manifest makes it; no MLflow and no object store."""
    deployed = Deployed(tmp_path_factory.mktemp("deployed"))
    try:
        deployed.database.make()
        yield deployed
    finally:
        deployed.database.remove()


def first_init_container() -> Manifest:
    first: Manifest = find("base", "Deployment", "mixtune-mlflow")["spec"]["template"]["spec"]["initContainers"][0]
    return first


def check(deployed: Deployed, **extra: str) -> subprocess.CompletedProcess[str]:
    return deployed.once(first_init_container(), **extra)


def make_database(deployed: Deployed, name: str, encoding: str) -> None:
    deployed.database.sql(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'", "postgres")


def test_a_new_database_is_in_utf8_and_takes_lambda(deployed: Deployed) -> None:
    for name in ("mlflow", "template1"):
        assert deployed.database.sql("SHOW server_encoding", name) == "UTF8"
    assert deployed.database.sql("SHOW data_checksums") == "on"
    deployed.database.sql("CREATE TABLE texts (text varchar)")
    deployed.database.sql(f"INSERT INTO texts VALUES ('{TEXT}')")
    # lower() knows letters beyond ASCII only with the locale that the manifest sets.
    assert deployed.database.sql("SELECT lower('Λ') = 'λ' AND text = lower(text) FROM texts") == "t"
    done = check(deployed)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the database mlflow has the encoding UTF8\n"


@pytest.mark.parametrize("encoding", OTHERS)
def test_the_server_does_not_start_on_another_encoding(deployed: Deployed, encoding: str) -> None:
    name = f"in_{encoding.lower()}"
    make_database(deployed, name, encoding)
    done = check(deployed, PGDATABASE=name)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert f"the database {name} has the encoding {encoding}, and MLflow needs UTF8" in sentence
    assert "docs/operations.md" in sentence
    assert deployed.secrets["mixtune-postgres"]["PGPASSWORD"] not in done.stdout + done.stderr


def test_a_database_that_does_not_answer_is_one_sentence(deployed: Deployed) -> None:
    deployed.database.stop("fast")
    try:
        done = check(deployed)
    finally:
        deployed.database.start()
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert "the database mlflow does not answer" in sentence
    assert check(deployed).returncode == 0


@pytest.mark.parametrize("name", ["base", *(name for name in buildable() if name.startswith("overlays/"))])
def test_the_check_runs_before_the_migrations(name: str) -> None:
    spec = find(name, "Deployment", "mixtune-mlflow")["spec"]["template"]["spec"]
    names = [container["name"] for container in spec["initContainers"]]
    assert names == ["check-encoding", "migrate", "migrate-accounts"]


def test_the_sentence_of_the_check_reaches_the_pods_status() -> None:
    assert first_init_container()["terminationMessagePolicy"] == "FallbackToLogsOnError"
    files = find("base", "ConfigMap", "mixtune-mlflow-files")["data"]
    assert Path(first_init_container()["command"][-1]).name in files


@pytest.mark.parametrize(("encoding", "code", "text"), [("SQL_ASCII", 97, "a"), ("LATIN1", 233, "é")])
def test_backup_and_restore_turn_another_encoding_into_utf8(
    deployed: Deployed, encoding: str, code: int, text: str
) -> None:
    cron = find("base", "CronJob", "mixtune-backup")["spec"]["jobTemplate"]["spec"]["template"]
    restore = find("operations/restore", "Job", "mixtune-restore")["spec"]["template"]
    name = f"old_{encoding.lower()}"
    make_database(deployed, name, encoding)
    deployed.database.sql("CREATE TABLE texts (text varchar)", name)
    deployed.database.sql(f"INSERT INTO texts VALUES (chr({code}))", name)
    for job in (cron, restore):
        done = deployed.job(job, PGDATABASE=name)
        assert done.returncode == 0, done.stdout + done.stderr
    assert deployed.database.sql("SHOW server_encoding", name) == "UTF8"
    assert deployed.database.sql("SELECT text FROM texts", name) == text
    deployed.database.sql(f"INSERT INTO texts VALUES ('{TEXT}')", name)
    assert check(deployed, PGDATABASE=name).returncode == 0
