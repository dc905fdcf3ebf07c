"""The commands that talk to a cluster: they parse, call the library, print. Imports what a command needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import plain_errors
from .options import ConfigFile, ImagePrefix, ImageTag, Overrides

Host = Annotated[
    str | None,
    typer.Option(
        help="Address of KFP; without it KF_PIPELINES_ENDPOINT, or the service of the cluster that this runs in."
    ),
]
Namespace = Annotated[str | None, typer.Option(help="Your namespace, on a cluster with several users.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        help="File with a bearer token; without it MIXTUNE_KFP_TOKEN, MIXTUNE_KFP_TOKEN_FILE, or the pod's own."
    ),
]
Authority = Annotated[
    Path | None,
    typer.Option("--ca", help="File with the certificate authority of the address; without it MIXTUNE_KFP_CA."),
]
Timeout = Annotated[str | None, typer.Option(help="How long to wait: 90s, 30m, 6h, 1d. As long as it takes without.")]
PendingTimeout = Annotated[
    str | None,
    typer.Option(help="How long a task may be pending: 15m. Then the wait ends with status 5, and the run goes on."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to the error output.")]
Summary = Annotated[Path | None, typer.Option(help="Add the result to this file, as Markdown.")]
Experiment = Annotated[str, typer.Option(help="KFP experiment; it is made if it is not there.")]
RunKey = Annotated[
    str | None,
    typer.Option(help="What a job and its repetition have in common: a run with this key is found and not made again."),
]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="Id of a KFP run.")]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    for command in (upload, submit, wait, retry, stop, rerun):
        app.command()(command)


def upload(
    config: ConfigFile = None,
    overrides: Overrides = [],
    step: Annotated[str | None, typer.Option(help="One step as a pipeline of its own.")] = None,
    image_prefix: ImagePrefix = None,
    tag: ImageTag = None,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca: Authority = None,
) -> None:
    """Upload the pipeline as a version, if its content is new."""
    from ..images import images
    from .cluster_commands import upload_and_show

    with plain_errors():
        upload_and_show((host, namespace, token_file, ca), config, overrides, step, images(image_prefix, tag))


def submit(
    config: ConfigFile = None,
    overrides: Overrides = [],
    host: Host = None,
    namespace: Namespace = None,
    experiment: Experiment = "mixtune",
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    timeout: Timeout = None,
    pending_timeout: PendingTimeout = None,
    run_key: RunKey = None,
    image_prefix: ImagePrefix = None,
    tag: ImageTag = None,
    service_account: Annotated[
        str | None,
        typer.Option(help="Account that the run's pods run as; KFP's own choice without it."),
    ] = None,
    as_json: AsJson = False,
    summary: Summary = None,
    token_file: TokenFile = None,
    ca: Authority = None,
) -> None:
    """Run the pipeline on a cluster: compiles, uploads a version if it is new, and starts a run."""
    from ..images import images
    from .cluster_commands import Showing, submit_and_show

    with plain_errors():
        showing = Showing(wait or bool(timeout or pending_timeout), timeout, as_json, summary, pending_timeout)
        where, chosen = (host, namespace, token_file, ca), images(image_prefix, tag)
        raise typer.Exit(
            submit_and_show(where, config, overrides, experiment, run_key, chosen, service_account, showing)
        )


def wait(
    run: RunId,
    host: Host = None,
    namespace: Namespace = None,
    timeout: Timeout = None,
    pending_timeout: PendingTimeout = None,
    as_json: AsJson = False,
    summary: Summary = None,
    token_file: TokenFile = None,
    ca: Authority = None,
) -> None:
    """Wait for a run on a cluster; ends with its result and its exit status."""
    from .cluster_commands import Showing, wait_and_show

    with plain_errors():
        showing = Showing(True, timeout, as_json, summary, pending_timeout)
        raise typer.Exit(wait_and_show((host, namespace, token_file, ca), run, showing))


def retry(
    run: RunId,
    host: Host = None,
    namespace: Namespace = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    timeout: Timeout = None,
    pending_timeout: PendingTimeout = None,
    as_json: AsJson = False,
    summary: Summary = None,
    token_file: TokenFile = None,
    ca: Authority = None,
) -> None:
    """Let KFP run again what failed in a run, in the same run."""
    from .cluster_commands import Showing, retry_and_show

    with plain_errors():
        showing = Showing(wait or bool(timeout or pending_timeout), timeout, as_json, summary, pending_timeout)
        raise typer.Exit(retry_and_show((host, namespace, token_file, ca), run, showing))


def stop(
    run: RunId,
    host: Host = None,
    namespace: Namespace = None,
    token_file: TokenFile = None,
    ca: Authority = None,
) -> None:
    """Stop a run on a cluster."""
    from .cluster_commands import stop_and_show

    with plain_errors():
        stop_and_show((host, namespace, token_file, ca), run)


def rerun(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of a KFP run, or the output folder of a local one.")],
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STEP", help="Run this step and those after it anew; those before come from the cache."
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="STEP", help='Run this step alone, such as evaluate, or one task of it, "evaluate mixed-0.3".'
        ),
    ] = None,
    overrides: Overrides = [],
    host: Host = None,
    namespace: Namespace = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    timeout: Timeout = None,
    pending_timeout: PendingTimeout = None,
    run_key: RunKey = None,
    as_json: AsJson = False,
    summary: Summary = None,
    token_file: TokenFile = None,
    ca: Authority = None,
) -> None:
    """Run an earlier run again, from a step on or one step alone, with other values where --set gives them."""
    from .cluster_commands import Showing, rerun_and_show

    with plain_errors():
        showing = Showing(wait or bool(timeout or pending_timeout), timeout, as_json, summary, pending_timeout)
        address = (host, namespace, token_file, ca)
        raise typer.Exit(rerun_and_show(address, run, from_, only, overrides, run_key, showing))
