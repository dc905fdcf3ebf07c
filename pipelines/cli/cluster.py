"""The commands that use a cluster. Each imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .errors import plain_errors
from .options import (
    ConfigFile,
    ImagePrefix,
    ImageTag,
    MaybeWaiting,
    Overrides,
    Server,
    UploadData,
    Waiting,
    with_option_groups,
)

Experiment = Annotated[str, typer.Option(help="KFP experiment. It is created if it does not exist.")]
RunKey = Annotated[
    str | None,
    typer.Option(help="Identifies a job across its retries: a run that has this key already is used again."),
]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="Id of a KFP run.")]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    for command in (upload, submit, wait, retry, stop, rerun):
        app.command()(with_option_groups(command))


def upload(
    config: ConfigFile = None,
    overrides: Overrides = [],
    step: Annotated[str | None, typer.Option(help="Upload the pipeline of this step only.")] = None,
    image_prefix: ImagePrefix = None,
    tag: ImageTag = None,
    upload_data: UploadData = None,
    *,
    server: Server,
) -> None:
    """Upload the pipeline as a new version, unless KFP has the same content already."""
    from ..images import images
    from .cluster_commands import upload_and_show

    with plain_errors():
        upload_and_show(server, config, overrides, step, images(image_prefix, tag), upload_data)


def submit(
    config: ConfigFile = None,
    overrides: Overrides = [],
    experiment: Experiment = "mixtune",
    run_key: RunKey = None,
    image_prefix: ImagePrefix = None,
    tag: ImageTag = None,
    service_account: Annotated[
        str | None,
        typer.Option(help="Service account of the run's pods (default: KFP's own)."),
    ] = None,
    upload_data: UploadData = None,
    *,
    server: Server,
    waiting: MaybeWaiting,
) -> None:
    """Run the pipeline on a cluster: compile it, upload it if its content is new, and start a run."""
    from ..images import images
    from .cluster_commands import submit_and_show

    with plain_errors():
        chosen = images(image_prefix, tag)
        raise typer.Exit(
            submit_and_show(
                server, config, overrides, experiment, run_key, chosen, service_account, upload_data, waiting
            )
        )


def wait(run: RunId, *, server: Server, waiting: Waiting) -> None:
    """Wait for a run on a cluster, show its result, and exit with its status."""
    from .cluster_commands import wait_and_show

    with plain_errors():
        raise typer.Exit(wait_and_show(server, run, waiting))


def retry(run: RunId, *, server: Server, waiting: MaybeWaiting) -> None:
    """Retry the failed tasks of a run, in the same run."""
    from .cluster_commands import retry_and_show

    with plain_errors():
        raise typer.Exit(retry_and_show(server, run, waiting))


def stop(run: RunId, *, server: Server) -> None:
    """Stop a run on a cluster."""
    from .cluster_commands import stop_and_show

    with plain_errors():
        stop_and_show(server, run)


def rerun(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of a KFP run, or output folder of a local run.")],
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STEP",
            help="Run this step and all later steps again; results of earlier steps come from the cache.",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="STEP", help='Run only this step, such as evaluate, or one of its tasks, "evaluate mixed-0.3".'
        ),
    ] = None,
    overrides: Overrides = [],
    run_key: RunKey = None,
    *,
    server: Server,
    waiting: MaybeWaiting,
) -> None:
    """Run an earlier run again, from a step on or one step only. --set changes options."""
    from .cluster_commands import rerun_and_show

    with plain_errors():
        raise typer.Exit(rerun_and_show(server, run, from_, only, overrides, run_key, waiting))
