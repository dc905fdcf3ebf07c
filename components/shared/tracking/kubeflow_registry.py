"""Kubeflow's model registry: the version that MLflow has, with its address and the run that made it.

The package `model-registry` is an extra. Every call looks for what an interrupted attempt left, so that a version is made once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import RefusedError, TurnedAwayError, UnreachableError, first_line

TOKEN_PATH = "KF_PIPELINES_SA_TOKEN_PATH"
ACCOUNT_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"
SECONDS = 120
FORMAT, FORMAT_VERSION = "mlflow", "3"
OWNER = "mixtune"


def register_in_kubeflow(
    address: str, *, name: str, version: str, uri: str, tags: Mapping[str, str], source: Mapping[str, str], card: str
) -> None:
    """Registers a version, unless the registry has it already.

    Args:
        address: address of the registry.
        name: name of the registered model.
        version: version in MLflow's registry, which is its name in this one.
        uri: address of the model's files.
        tags: lineage of the version.
        source: the run that made the model: `model_source_kind` and so on.
        card: model card in Markdown.

    Raises:
        RefusedError: if the package is not installed.
        UnreachableError: if the registry does not answer, or turns the step away.
    """
    try:
        import aiohttp
        from model_registry.core import ModelRegistryAPIClient
        from model_registry.types import ModelArtifact, ModelVersion, RegisteredModel
        from mr_openapi import Configuration
        from mr_openapi.exceptions import ApiException
    except ImportError:
        raise RefusedError(
            "tracking.kubeflow_registry: needs the package model-registry where `register` runs; install "
            "mixtune[kubeflow-registry] there, or leave the option out"
        ) from None

    async def registered() -> None:
        api = ModelRegistryAPIClient(
            Configuration(
                host=address.rstrip("/"), access_token=_token(address), ssl_ca_cert=os.environ.get("SSL_CERT_FILE")
            )
        )
        model = await api.get_registered_model_by_params(name)
        model = model or await api.upsert_registered_model(RegisteredModel(name=name, owner=OWNER))
        made = await api.get_model_version_by_params(model.id, version)
        if made is None:
            asked = ModelVersion(name=version, author=OWNER, description=card, custom_properties=dict(tags))
            made = await api.upsert_model_version(asked, model.id)
        if not await api.get_model_version_artifacts(made.id):
            files = ModelArtifact(
                name=name, uri=uri, model_format_name=FORMAT, model_format_version=FORMAT_VERSION, **source
            )
            await api.upsert_model_version_artifact(files, made.id)

    try:
        asyncio.run(asyncio.wait_for(registered(), SECONDS))
    except ApiException as error:
        if error.status in (401, 403):
            raise TurnedAwayError(
                f"tracking.kubeflow_registry: {address} turns the step away (status {error.status}); its service account "
                "needs access to the registry"
            ) from None
        raise UnreachableError(
            f"tracking.kubeflow_registry: {address} answers with status {error.status} ({first_line(error)})"
        ) from None
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise UnreachableError(
            f"tracking.kubeflow_registry: no model registry answers at {address} ({first_line(error)}); MLflow has the "
            "version, and a repeated step makes it here"
        ) from None


def _token(address: str) -> str | None:
    """Returns the token of the service account, which goes over an encrypted connection only."""
    if not address.startswith("https://"):
        return None
    file = Path(os.environ.get(TOKEN_PATH, ACCOUNT_TOKEN))
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None
