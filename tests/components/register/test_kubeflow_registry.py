"""`register` also makes a version in Kubeflow's model registry, once, with the run that made the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.config import load, parts
from mixtune.components.register.config import RegisterStep
from mixtune.components.register.step import run
from mixtune.components.shared.artifacts import Artifact
from mixtune.components.shared.errors import RefusedError, TurnedAwayError, UnreachableError
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.connection import connect
from mixtune.components.shared.tracking.kubeflow_registry import register_in_kubeflow
from mixtune.components.shared.tracking.tracker import Tracker
from tests.components.evaluate.made import LABELS, write_model
from tests.stores import new_store

from .kubeflow_server import Registry, kubeflow_registry
from .made import write_report

ARGUMENTS: dict[str, Any] = {
    "name": "tiny", "version": "3", "uri": "s3://bucket/models/3", "tags": {"mixtune.candidate": "mixed-0.3"},
    "source": {"model_source_kind": "kfp", "model_source_id": "run-1"}, "card": "# tiny",
}  # fmt: skip


@pytest.fixture
def server() -> Iterator[tuple[str, Registry]]:
    with kubeflow_registry() as made:
        yield made


def test_a_registered_model_is_in_both_registries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Registry]
) -> None:
    address, registry = server
    uri = new_store(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = write_model(tmp_path / "model", "finetuned", "finetuned", LABELS, architecture="bert")
    write_report(tmp_path / "comparison", "finetuned", "classification")
    comparison = Artifact(str(tmp_path / "comparison"))
    for attempt in ("run-1", "run-2"):
        run(
            RegisterStep(registered_model="tiny", alias="candidate", max_length=16, kubeflow_registry=address),
            context=Context("register", Tracker.open("register", "register", attempt), attempt, quiet=True),
            selected=model, other=comparison, comparison=comparison, model=Artifact(str(tmp_path / "registered")),
        )  # fmt: skip
    held = registry.held
    assert [[one["name"] for one in held[kind]] for kind in held] == [["tiny"], ["1"], ["tiny"]], "each of them once"
    (version,), (files,) = held["model_versions"], held["artifacts"]
    assert version["description"].startswith("# tiny")
    assert version["customProperties"]["mixtune.candidate"]["string_value"] == "finetuned"
    assert files["uri"] == connect(uri).get_model_version_download_uri("tiny", "1")
    assert (files["modelFormatName"], files["modelSourceKind"], files["modelSourceId"]) == ("mlflow", "local", "run-1")


@pytest.mark.parametrize("fails_at", ["registered_models", "model_versions", "artifacts"])
def test_a_repeated_attempt_makes_what_is_missing(server: tuple[str, Registry], fails_at: str) -> None:
    address, registry = server
    registry.fails_at = fails_at
    with pytest.raises(UnreachableError, match=r"tracking\.kubeflow_registry: .* answers with status 500"):
        register_in_kubeflow(address, **ARGUMENTS)
    registry.fails_at = ""
    register_in_kubeflow(address, **ARGUMENTS)
    assert [len(registry.held[kind]) for kind in registry.held] == [1, 1, 1]


def test_a_registry_that_is_away_or_turns_the_step_away_is_told(server: tuple[str, Registry]) -> None:
    address, registry = server
    registry.status = 403
    with pytest.raises(TurnedAwayError, match=r"turns the step away \(status 403\); its service account needs access"):
        register_in_kubeflow(address, **ARGUMENTS)
    with pytest.raises(UnreachableError, match=r"no model registry answers at http://127\.0\.0\.1:1 "):
        register_in_kubeflow("http://127.0.0.1:1", **ARGUMENTS)


def test_the_token_goes_over_encrypted_connections_only(
    server: tuple[str, Registry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    address, registry = server
    register_in_kubeflow(address, **ARGUMENTS)
    assert set(registry.tokens) == {None}


def test_the_option_reaches_the_step_and_carries_no_password() -> None:
    stream = {"source": "embedded"}
    values: dict[str, Any] = {
        "model": {"base": "scratch"}, "pretrain": {"steps": 1}, "data": {"pretrain": stream, "finetune": stream}
    }  # fmt: skip
    from mixtune.components.config import Fingerprints

    given = load({**values, "tracking": {"kubeflow_registry": "https://registry.example/path"}})
    assert parts(given, Fingerprints("a", "b", "c")).register.kubeflow_registry == "https://registry.example/path"
    with pytest.raises(RefusedError, match=r"tracking\.kubeflow_registry: must be an address"):
        load({**values, "tracking": {"kubeflow_registry": "https://user:secret@registry.example"}})
