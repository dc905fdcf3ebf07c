"""Implements the commands that run on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtune.components.shared.errors import RefusedError

from ..configuration import read_config
from .options import with_home

if TYPE_CHECKING:
    from mixtune.components.config import Config

WHOLE_RUN_STEPS = ("plan", "finish")
_COMPILED = (b"# PIPELINE DEFINITION", b"apiVersion: pipelines.kubeflow.org/")
"""How a file that KFP's compiler wrote begins, as a package and as manifests."""


def check_and_show(config_file: Path | None, overrides: Sequence[str]) -> None:
    """Checks a configuration, its data sources and its base model, and prints the candidates.

    Raises:
        RefusedError: if there are problems; names all of them.
    """
    from mixtune.components.base_model import notes
    from mixtune.components.checks import few_control_documents, find_problems, missing_here
    from mixtune.components.evaluation_size import costly_watch, few_examples
    from mixtune.components.memory import memory_note
    from mixtune.components.mixed.config import candidates
    from mixtune.components.text_per_step import few_text_tokens

    parsed = read_config(config_file, overrides, find_problems)
    names = ", ".join(candidate.id for candidate in candidates(parsed.mixed))
    print(f"{parsed.name}: the configuration is valid; base model {parsed.model.base}, candidates {names}")
    found = (
        few_examples(parsed),
        few_control_documents(parsed),
        few_text_tokens(parsed),
        costly_watch(parsed),
        memory_note(parsed),
    )
    more = filter(None, found)
    for sentence in [*notes(parsed, _folder_of(config_file)), *more]:
        print(f"note: {sentence}")
    for sentence in missing_here(parsed):  # irrelevant if the steps run in images
        print(f"a run on this machine would be refused: {sentence}")


def _folder_of(config_file: Path | None) -> Path:
    return config_file.parent if config_file else Path()


def run_and_show(
    config_file: Path | None,
    overrides: Sequence[str],
    output: Path | None,
    runner: str,
    use_cache: bool,
    **containers: str | None,
) -> int:
    """Runs the DAG on this machine, prints the candidates, and returns the exit status.

    Args:
        runner: `subprocess` or `docker`.
        containers: arguments of `Containers`, for the runner `docker`.
    """
    from rich.console import Console
    from rich.text import Text

    from mixtune.components.base_model import notes
    from mixtune.components.checks import find_problems, missing_here

    from ..display import Display, print_candidates, titles_of
    from ..local.run import run_local, tracking_uri

    if runner not in ("subprocess", "docker"):
        raise RefusedError(f"--runner: must be subprocess or docker, found {runner}")
    given = {name: value for name, value in containers.items() if value is not None}
    if given and runner != "docker":
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise RefusedError(f"{options}: valid only with --runner docker")

    def check(given: Config) -> list[str]:
        # Images contain all that steps need.
        return find_problems(given) + (missing_here(given) if runner == "subprocess" else [])

    config = read_config(config_file, overrides, check)
    for sentence in notes(config, _folder_of(config_file)):
        print(f"mixtune: {sentence}", file=sys.stderr)
    folder = output or Path("runs") / config.name
    console = Console(soft_wrap=True)
    console.print(Text(f"{config.name}: running in {folder}"))
    in_containers = None
    if runner == "docker":
        from ..local.containers import Containers

        in_containers = Containers(**given)
    ended = run_local(config, folder, use_cache, Display(console, titles_of(config)), in_containers)

    if ended.report is not None:
        console.print()
        print_candidates(ended.report, console)
        _print_verdict(console, ended.report)
        for line in ended.advice:
            console.print(Text(line))
        console.print(Text(f"\nreport  {folder / 'report' / 'report.html'}"))
        console.print(Text(f"models  {folder / 'models'}"))
        console.print(Text(f"MLflow  {_mlflow_hint(tracking_uri(config, folder), folder)}"))
        if (folder / "tensorboard").is_dir() and config.tracking.tensorboard:
            console.print(Text(f"curves  tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}"))
    for line in (*ended.warnings, *ended.problems, *ended.notes):
        print(f"mixtune: {line}", file=sys.stderr)
    said = [{130: "interrupted", 143: "ended by SIGTERM"}.get(ended.status, "")]
    if ended.kept and (said[0] or ended.status == 1):
        said.append("finished steps are kept; run the same command again to continue")
    if any(said):
        print(f"mixtune: {'; '.join(filter(None, said))}", file=sys.stderr)
    return ended.status


def _print_verdict(console: Any, report: dict[str, Any]) -> None:
    from rich.text import Text

    gate = report["gate"]
    verdict, words = ("gate passed", "is selected") if gate["passed"] else ("gate not met", "comes closest")
    colour = "green" if gate["passed"] else "yellow"
    console.print(Text.assemble("\n", (verdict, colour), f": {report['selected']} {words}; on the dev split"))
    for reason in gate["reasons"]:
        console.print(Text(f"  {reason}"))
    for one in report["candidates"]:
        budget = one.get("forgetting_budget")
        if budget and not budget["kept"]:
            console.print(Text(f"  forgetting budget: {budget['sentence']}"))


def _mlflow_hint(uri: str, folder: Path) -> str:
    from mixtune.components.shared.errors import without_credentials

    if uri.endswith(str(folder / "mlflow" / "mlflow.db")):
        # Relative, like the given folder: short enough to copy.
        store = f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"
        return f"mlflow ui --backend-store-uri {shlex.quote(store)}"
    return without_credentials(uri)


def run_step(name: str, config: str, artifacts: Sequence[str], parameters: Sequence[str]) -> None:
    """Runs one step on local paths.

    Args:
        config: JSON, or the name of a file with JSON.
        artifacts: `NAME=PATH` of each input and output; a name that is repeated becomes a list.
        parameters: `NAME=VALUE` of each further argument of the step.

    Raises:
        RefusedError: if an argument is missing or unknown.
        SystemExit: with the exit status of the step, if it failed.
    """
    import inspect
    from importlib import import_module

    from mixtune.components.shared.artifacts import Artifact
    from mixtune.components.shared.runtime import launch
    from mixtune.components.shared.task_name import STEPS

    if name in WHOLE_RUN_STEPS:
        raise RefusedError("plan and finish run only as part of a whole run; use `mixtune plan` or `mixtune run`")
    if name not in STEPS:
        steps = [one for one in STEPS if one not in WHOLE_RUN_STEPS]
        raise RefusedError(f"there is no step {name}; the steps are {', '.join(steps)}")
    text = config if config.lstrip().startswith("{") else _read_text(Path(with_home(config)))
    given: dict[str, Any] = {}
    for item in artifacts:
        key, path = _pair("--artifact", item)
        given.setdefault(key, []).append(Artifact(with_home(path)))
    values = dict(_pair("--parameter", item) for item in parameters)

    wanted = inspect.signature(import_module(f"mixtune.components.{name}.step").run).parameters
    names = [one for one in wanted if one not in ("config", "context")]
    unknown = [one for one in (*given, *values) if one not in names]
    missing = [
        one for one in names if one not in given and one not in values and "None" not in str(wanted[one].annotation)
    ]
    problems = [f"{one}: the step {name} has no such argument; its arguments are {', '.join(names)}" for one in unknown]
    problems += [f"{one}: is required by the step {name}; give it as --artifact {one}=PATH" for one in missing]
    if problems:
        raise RefusedError(*problems)
    lists = {one for one in names if "list[" in str(wanted[one].annotation)}
    inputs = {one: given.get(one) if one in lists else (given[one][0] if one in given else None) for one in names}
    launch(name, text, {one: value for one, value in inputs.items() if one not in values}, **values)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RefusedError(f"--config: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _pair(option: str, item: str) -> tuple[str, str]:
    key, separator, value = item.partition("=")
    if not separator or not key or not value:
        raise RefusedError(f"{option} {item}: must look like NAME=VALUE")
    return key, value


def compile_pipeline(
    config_file: Path | None,
    overrides: Sequence[str],
    output: Path,
    step: str | None,
    format: str,
    image_prefix: str | None = None,
    tag: str | None = None,
    upload_data: str | None = None,
) -> None:
    """Writes the compiled pipeline, or the pipeline of one step.

    The form has the values of the configuration; if neither a file nor an option besides the placement is given, the schema's
    defaults.
    """
    from kfp import compiler

    from mixtune.components.form import PLACEMENT, field_defaults

    from ..cluster.local_paths import read_for_cluster
    from ..images import images
    from ..pipeline import NAME, make_pipeline
    from ..placement import Placer
    from ..step_pipelines import make_step_pipeline
    from ..third_party.kfp import compile_to

    if format not in ("ir", "kubernetes"):
        raise RefusedError(f"--format: must be ir or kubernetes, found {format}")
    if output.suffix not in (".yaml", ".yml"):
        raise RefusedError(f"--output: must end in .yaml, found {output}")
    config = read_for_cluster(config_file, overrides, upload_data)
    place = Placer.cluster(config, images(image_prefix, tag))
    neutral = config_file is None and all(override.startswith(f"{PLACEMENT}.") for override in overrides)
    values = field_defaults() if neutral else None
    pipeline = make_step_pipeline(step, config, place) if step else make_pipeline(config, place, values)
    name = f"{NAME}-{step}" if step else NAME
    manifests = {}
    if format == "kubernetes":
        options = compiler.KubernetesManifestOptions(
            pipeline_name=name, pipeline_display_name=name, include_pipeline_manifest=True
        )
        manifests = {"kubernetes_manifest_options": options, "kubernetes_manifest_format": True}
    try:
        if output.exists() and not output.read_bytes().startswith(_COMPILED):
            raise RefusedError(f"--output: {output} was not written by `mixtune compile`; choose another file")
        output.parent.mkdir(parents=True, exist_ok=True)
        compile_to(pipeline, output, **manifests)
    except OSError as error:
        raise RefusedError(f"--output: {output} cannot be written ({error.strerror or error})") from None
