"""`mixtune deploy`: writes the manifest that serves a registered model."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from mixtune.components.shared.artifacts import read_json
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.tracking.connection import connect

from ..cluster.serving import Serving, inference_service
from ..configuration import read_config
from ..local.moving import marker_of
from ..local.run import tracking_uri
from .options import with_home


def deploy_and_show(run: str, serving: Serving, output: Path | None, dry_run: bool) -> None:
    """Writes or prints the manifest of a service for what a run registered. Nothing is applied.

    Args:
        run: output folder, id of a run, or `models:/name@alias`.
        output: file to write to; None prints the manifest.
        dry_run: must be true.

    Raises:
        RefusedError: if there is no such model, or if KServe cannot fetch it.
        GateNotMetError: if the run registered nothing.
        UnreachableError: if MLflow does not answer.
    """
    if not dry_run:
        raise RefusedError(
            "deploy: applies nothing by itself; give --dry-run, look at the manifest, and kubectl apply it"
        )
    uri, wanted = _store_and_model(run)
    client = connect(uri)
    from mixtune.components.shared.tracking.registered import registered_by, registered_version

    if not wanted.startswith("models:/"):
        wanted = registered_by(client, wanted)
    manifest = inference_service(registered_version(client, wanted), serving)
    text = yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True)
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RefusedError(f"--output: {output} cannot be written ({error.strerror or error})") from None
    print(f"wrote {output}; kubectl apply --filename {output}")


def _store_and_model(run: str) -> tuple[str, str]:
    """Returns the tracking address, and the id of a run or the URI of a registered model."""
    folder = Path(with_home(run))
    if not run.startswith("models:") and folder.is_dir():
        if not marker_of(folder).is_file():
            raise RefusedError(f"{run}: is not the output folder of a mixtune run; give one, such as runs/<name>")
        uri = tracking_uri(read_config(folder / "config.yaml"), folder)
        return uri, str(read_json(folder / ".mixtune" / "last_run.json", "the folder of a run that has begun")["id"])
    if not run.startswith("models:/") and ("/" in run or run.startswith((".", "models:"))):
        raise RefusedError(f"{run}: no such folder; give an output folder, the id of a run, or models:/name@alias")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise RefusedError(f"MLFLOW_TRACKING_URI: is not set; give the address of the MLflow server that has {run}")
    return uri, run
