"""The `mixtune` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from mixtune.components.shared.ascii_text import spell_in_output
from mixtune.components.shared.errors import Terminated
from mixtune.components.shared.task_kinds import TASK_KINDS

from . import cluster as cluster_cli
from .errors import plain_errors
from .options import ConfigFile, ImagePrefix, ImageTag, Overrides, Server, UploadData, expanded, with_option_groups

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model on a labelled task without letting it forget what it knew.",
    epilog="Exit status: 0 done; 1 a step failed; 2 wrong configuration, data or usage; 3 the gate was not met; "
    "4 the cluster or the tracking server could not be reached; 5 a task was pending for too long; 6 the wait timed out; "
    "130 interrupted; 143 ended by SIGTERM.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mixtune {version('mixtune')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def init(
    task: Annotated[str, typer.Option(help=f"Kind of task: {', '.join(TASK_KINDS)}.")] = "classification",
    config: Annotated[str, typer.Option("--from", help="Ready-made configuration to start from.")] = "start",
) -> None:
    """Print an annotated configuration: mixtune init > mixtune.yaml."""
    from ..configuration import annotated, init_values

    with plain_errors():
        typer.echo(annotated(init_values(config, task)), nl=False)


@app.command()
@with_option_groups
def check(
    config: ConfigFile = None,
    overrides: Overrides = [],
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Also check that the cluster has what a run needs.")
    ] = False,
    *,
    server: Server,
) -> None:
    """Check a configuration, its data sources and its base model: all problems at once, without training."""
    from .commands import check_and_show

    with plain_errors():
        if not cluster:
            check_and_show(config, overrides)
            return
        from .cluster_commands import check_cluster_and_show

        raise typer.Exit(check_cluster_and_show(server, config, overrides))


@app.command()
def run(
    config: ConfigFile = None,
    overrides: Overrides = [],
    output: Annotated[
        Path | None, typer.Option(callback=expanded, help="Output folder (default: runs/<name>).")
    ] = None,
    runner: Annotated[
        str, typer.Option(help="subprocess, or docker, which runs each step in its image.")
    ] = "subprocess",
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Run every step again, even if its result is cached.")
    ] = False,
    memory: Annotated[str | None, typer.Option(help="Memory limit of each container, such as 4g.")] = None,
    network: Annotated[str | None, typer.Option(help="Docker network of the containers (default: host).")] = None,
    image_prefix: ImagePrefix = None,
    tag: ImageTag = None,
) -> None:
    """Run the whole pipeline on this machine, without a cluster."""
    from .commands import run_and_show

    with plain_errors():
        containers = {"memory": memory, "network": network, "image_prefix": image_prefix, "tag": tag}
        raise typer.Exit(run_and_show(config, overrides, output, runner, use_cache=not no_cache, **containers))


@app.command()
def plan(
    output: Annotated[Path, typer.Option(callback=expanded, help="Folder to write the parts to.")],
    config: ConfigFile = None,
    overrides: Overrides = [],
) -> None:
    """Write the part of the configuration that each step takes, for mixtune step."""
    from .plan import plan_and_write

    with plain_errors():
        plan_and_write(config, overrides, output)


@app.command()
def step(
    name: Annotated[str, typer.Argument(help="prepare, pretrain, finetune, mixed, evaluate, compare or register.")],
    config: Annotated[
        str,
        typer.Option(
            help="The step's part of the configuration: JSON, or a file with JSON, as mixtune plan writes it."
        ),
    ] = "{}",
    artifacts: Annotated[
        list[str],
        typer.Option("--artifact", metavar="NAME=PATH", help="Path of an input or output. Repeat a name for a list."),
    ] = [],
    parameters: Annotated[
        list[str], typer.Option("--parameter", metavar="NAME=VALUE", help="A further argument of the step.")
    ] = [],
) -> None:
    """Run one step, from a shell or a container."""
    from .commands import run_step

    with plain_errors():
        run_step(name, config, artifacts, parameters)


@app.command("compile")
def compile_(
    output: Annotated[Path, typer.Option(callback=expanded, help="File to write.")],
    config: ConfigFile = None,
    overrides: Overrides = [],
    step: Annotated[str | None, typer.Option(help="Compile the pipeline of this step only.")] = None,
    format: Annotated[str, typer.Option(help="ir for a pipeline package, kubernetes for manifests (GitOps).")] = "ir",
    image_prefix: ImagePrefix = None,
    tag: ImageTag = None,
    upload_data: UploadData = None,
) -> None:
    """Compile the pipeline for a cluster. The configuration sets the defaults of its parameters."""
    from .commands import compile_pipeline

    with plain_errors():
        compile_pipeline(config, overrides, output, step, format, image_prefix, tag, upload_data)
        typer.echo(f"wrote {output}")


@app.command()
def sync(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FOLDER]", callback=expanded, help="Output folder of a run. Without it, all runs in ./runs."
        ),
    ] = None,
) -> None:
    """Deliver records to MLflow that it has not received yet."""
    from ..local.sync import sync_and_show

    with plain_errors():
        raise typer.Exit(sync_and_show(folder))


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Output folders, folders with a report.json, or MLflow run ids."),
    ],
    output: Annotated[Path, typer.Option(callback=expanded, help="Folder to write the report to.")] = Path(
        "runs/report"
    ),
) -> None:
    """Compare several runs in one report: base models, λ values, versions of the data."""
    from .report import report_and_show

    with plain_errors():
        report_and_show(runs, output)


@app.command()
def deploy(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Output folder, id of a run, or models:/name@alias. Except for a folder, MLFLOW_TRACKING_URI must be set.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only write the manifest. Needed: mixtune applies nothing by itself.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(callback=expanded, help="File to write (default: standard output).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the service (default: of the registered model).")] = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace of the service.")] = None,
    storage_uri: Annotated[
        str | None,
        typer.Option(help="Address of the model for KServe, such as s3://bucket/path (default: as MLflow has it)."),
    ] = None,
    service_account: Annotated[
        str | None, typer.Option(help="Service account with the credentials of the object store.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Image of the container (default: of KServe's runtime).")] = None,
    cpu: Annotated[str, typer.Option(help="CPUs of the container.")] = "2",
    memory: Annotated[str, typer.Option(help="Memory of the container.")] = "8Gi",
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of the container.")] = 0,
) -> None:
    """Write a KServe InferenceService for the model that a run registered, past the gate."""
    from ..cluster.serving import Serving
    from .deploy import deploy_and_show

    with plain_errors():
        serving = Serving(name, namespace, storage_uri, service_account, image, cpu, memory, gpus)
        deploy_and_show(run, serving, output, dry_run)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from mixtune.components.config import Config

    with plain_errors():
        typer.echo(json.dumps(Config.model_json_schema(), indent=2, ensure_ascii=False))


cluster_cli.add_to(app)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGTERM, _terminate)
    spell_in_output()
    with plain_errors():  # also what typer prints itself, such as the help
        app(prog_name="mixtune")


if __name__ == "__main__":
    main()
