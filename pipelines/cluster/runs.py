"""Manages pipelines and runs on a cluster: uploads versions, submits runs, retries and stops them.

Every run uses a version of the uploaded pipeline `mixtune`, not a package sent with the run: KFP's backend renames uploaded
pipelines (`pipeline/mixtune`), and its cache keys contain that name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api as kfp_api

from mixtune.components.config import Config, load
from mixtune.components.form import field_defaults, parameters
from mixtune.components.mixed.config import candidates
from mixtune.components.placement import GpuNodes
from mixtune.components.shared.errors import MixtuneError, RefusedError
from mixtune.components.shared.task_name import TaskName

from ..configuration import EMBEDDED_DEFAULT, ready_made
from ..images import Images
from .api import Api, is_missing

DEFAULT_EXPERIMENT = "mixtune"
# CI systems provide the commit in one of these variables.
_COMMIT_VARIABLES = ("MIXTUNE_GIT_COMMIT", "GITHUB_SHA", "CI_COMMIT_SHA", "GIT_COMMIT")


@dataclass(frozen=True)
class Package:
    """A compiled pipeline.

    Attributes:
        pipeline: name of the pipeline that the package is a version of.
        text: the package, YAML.
        title: what distinguishes it from other versions, for people, such as `profile nvidia`.
    """

    pipeline: str
    text: str
    title: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Version:
    """A pipeline version in KFP."""

    pipeline_id: str
    id: str
    name: str
    new: bool


@dataclass(frozen=True)
class Submitted:
    """A run in KFP.

    Attributes:
        id: id of the run.
        name: display name.
        found: whether an earlier submission with the same key created it.
    """

    id: str
    name: str
    found: bool


def neutral(config: Config) -> Config:
    """Returns the configuration that is compiled into the package: the default, with this one's placement and DAG shape.

    All other options are parameters of the run, so that runs with different values share one pipeline version.
    """
    values = ready_made(EMBEDDED_DEFAULT)
    whole = config.model_dump(mode="json")
    values["placement"] = whole["placement"]
    values.setdefault("mixed", {})["start"] = whole["mixed"]["start"]
    for name in ("offline_when_unreachable", "tensorboard"):
        values.setdefault("tracking", {})[name] = whole["tracking"][name]
    return load(values)


def package_of(
    config: Config,
    step: str | None = None,
    optional: Collection[str] = (),
    in_images: Images | None = None,
    nodes: GpuNodes | None = None,
) -> Package:
    """Compiles the whole pipeline or the pipeline of one step.

    Args:
        step: name of the step; None compiles the whole pipeline.
        optional: optional inputs that the step gets.
        in_images: images of the steps; by default those of `images.json`.
        nodes: placement of GPU tasks, instead of the profile's.
    """
    from ..pipeline import NAME, make_pipeline
    from ..placement import Placer
    from ..step_pipelines import make_step_pipeline
    from ..third_party.kfp import compile_to

    base = neutral(config)
    place = Placer.cluster(base, in_images)
    if nodes is not None:
        place.nodes = nodes
    whole = None if step else make_pipeline(base, place, field_defaults())
    pipeline = whole or make_step_pipeline(str(step), base, place, optional)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "package.yaml"
        compile_to(pipeline, file)
        title = f"profile {base.placement.profile}"
        return Package(f"{NAME}-{step}" if step else NAME, file.read_text(encoding="utf-8"), title)


def run_parameters(config: Config) -> dict[str, Any]:
    """Returns the values of the form for a run of the whole pipeline: those of the configuration, and the placement."""
    from ..placement import Placer

    place = {name: default for name, (_, default, _) in Placer.cluster(config).parameters().items()}
    return parameters(config) | place


def run_title(config: Config) -> str:
    """Returns what distinguishes a run from others, for people, such as `demo, 3 candidates`."""
    count = len(list(candidates(config.mixed)))
    return f"{config.name}, {count} candidate{'' if count == 1 else 's'}"


def _dated(title: str) -> str:
    return f"{title}, {time.strftime('%Y-%m-%d %H:%M')}"


def git_commit() -> str:
    """Returns the commit, from the environment or from git; `no-commit` if there is none."""
    for name in _COMMIT_VARIABLES:
        if os.environ.get(name):
            return os.environ[name][:12]
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "no-commit"
    return done.stdout.strip()[:12] if done.returncode == 0 and done.stdout.strip() else "no-commit"


def upload(api: Api, package: Package) -> Version:
    """Uploads a version, unless KFP has a version with the same content.

    Returns:
        The version. Its technical name contains the commit that first uploaded it and a digest of its content; people see
        the display name.
    """
    pipeline_id = _pipeline(api, package.pipeline)

    def same_content() -> kfp_api.V2beta1PipelineVersion | None:
        found = api.call(
            "list the versions of the pipeline",
            api.pipelines.pipeline_service_list_pipeline_versions,
            pipeline_id,
            page_size=10,
            filter=_where("name", package.digest, "IS_SUBSTRING"),
        )
        return next(iter(found.pipeline_versions or []), None)

    found = same_content()
    if found is not None:
        return Version(pipeline_id, found.pipeline_version_id, found.display_name, new=False)
    commit, shown = git_commit(), _dated(package.title)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{package.pipeline}.yaml"
        file.write_text(package.text, encoding="utf-8")
        made = api.call(
            "upload a version of the pipeline",
            api.uploads.upload_pipeline_version,
            str(file),
            name=f"{commit}-{package.digest}",
            display_name=shown,
            pipelineid=pipeline_id,
            description=f"Uploaded by mixtune. Commit: {commit}. Content: {package.digest}.",
            made_already=same_content,
        )
    return Version(pipeline_id, made.pipeline_version_id, made.display_name or shown, new=True)


def _pipeline(api: Api, name: str) -> str:
    """Finds or creates the pipeline, without a version."""

    def named() -> kfp_api.V2beta1Pipeline | None:
        found = api.call(
            "list the pipelines",
            api.pipelines.pipeline_service_list_pipelines,
            filter=_where("display_name", name),
            **_namespace(api),
        )
        return next(iter(found.pipelines or []), None)

    found = named()
    if found is None:
        wanted = kfp_api.V2beta1Pipeline(
            name=name,
            display_name=name,
            namespace=api.namespace,
            description="Fine-tune a language model on a labelled task without letting it forget what it knew.",
        )
        create = api.pipelines.pipeline_service_create_pipeline
        found = api.call("create the pipeline", create, wanted, made_already=named)
    return str(found.pipeline_id)


def submit(
    api: Api,
    version: Version,
    title: str,
    values: Mapping[str, Any],
    experiment: str = DEFAULT_EXPERIMENT,
    run_key: str | None = None,
    description: str = "",
    experiment_id: str | None = None,
    service_account: str | None = None,
) -> Submitted:
    """Creates a run, or finds the run that an earlier attempt or job created with the same key.

    Args:
        title: what distinguishes the run from others, for people; the time is appended.
        values: parameters of the run.
        run_key: identifies a job across its retries; None makes every submission a new run. It is in the description.
        experiment_id: existing experiment, instead of one by name.
        service_account: service account of the run's pods; None uses KFP's default.
    """
    experiment_id = experiment_id or _experiment(api, experiment)
    key = run_key or f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}"
    shown, line = _dated(title), f"key: {key}"

    def same_key() -> kfp_api.V2beta1Run | None:
        found = api.call(
            "list the runs",
            api.runs.run_service_list_runs,
            experiment_id=experiment_id,
            filter=_where("description", line, "IS_SUBSTRING"),
            sort_by="created_at desc",
            page_size=100,
            **_namespace(api),
        )
        # KFP also finds longer keys, and reads % and _ as wildcards.
        return next((run for run in found.runs or [] if line in (run.description or "").splitlines()), None)

    if run_key and (found := same_key()) is not None:
        return Submitted(found.run_id, found.display_name, found=True)
    reference = kfp_api.V2beta1PipelineVersionReference(pipeline_id=version.pipeline_id, pipeline_version_id=version.id)
    wanted = kfp_api.V2beta1Run(
        experiment_id=experiment_id,
        display_name=shown,
        description="\n".join([*([description] if description else []), line]),
        pipeline_version_reference=reference,
        service_account=service_account,
        runtime_config=kfp_api.V2beta1RuntimeConfig(parameters=dict(values)),
    )
    made = api.call("create a run", api.runs.run_service_create_run, wanted, made_already=same_key)
    if not made.run_id:
        raise MixtuneError(
            f"KFP at {api.connection.host} created a run without an id; look for {shown} in its list of runs"
        )
    return Submitted(made.run_id, shown, found=False)


def describe_alone(title: str, run_id: str) -> str:
    """Returns the description of a run of one task, on the inputs that it had in an earlier run."""
    return f"{title} of {run_id} alone"


def title_alone(description: str) -> str | None:
    """Returns the title in a description that begins with that of `describe_alone`; None for any other description."""
    found = re.fullmatch(r"(.+) of \S+ alone", description.partition("\n")[0])
    return found[1] if found and TaskName.parse(found[1]) else None


def _experiment(api: Api, name: str) -> str:
    def named() -> kfp_api.V2beta1Experiment | None:
        found = api.call(
            "list the experiments",
            api.experiments.experiment_service_list_experiments,
            filter=_where("display_name", name),
            **_namespace(api),
        )
        return next(iter(found.experiments or []), None)

    found = named()
    if found is None:
        wanted = kfp_api.V2beta1Experiment(display_name=name, namespace=api.namespace)
        create = api.experiments.experiment_service_create_experiment
        found = api.call("create the experiment", create, wanted, made_already=named)
    return str(found.experiment_id)


def _namespace(api: Api) -> dict[str, Any]:
    return {"namespace": api.namespace} if api.namespace else {}


def _where(key: str, value: str, operation: str = "EQUALS") -> str:
    """Returns a filter for KFP's API, as a query string value."""
    return json.dumps({"predicates": [{"operation": operation, "key": key, "stringValue": value}]})


def get_run(api: Api, run_id: str, seconds: float | None = None) -> kfp_api.V2beta1Run:
    """Returns the current state of a run.

    Raises:
        RefusedError: if there is no such run.
    """
    try:
        return api.call("get the run", api.runs.run_service_get_run, run_id, seconds=seconds)
    except RefusedError as error:
        if is_missing(error):
            raise RefusedError(
                f"{run_id}: KFP at {api.connection.host} has no such run; give the id that `mixtune submit` printed"
            ) from None
        raise


def retry(api: Api, run_id: str) -> None:
    """Retries the failed tasks in the same run, with KFP's own retry.

    Raises:
        RefusedError: if the run did not fail.
    """
    state = get_run(api, run_id).state
    if state not in ("FAILED", "CANCELED"):
        raise RefusedError(
            f"{run_id}: its state is {str(state).lower()}; KFP retries only runs that failed or were stopped"
        )

    def under_way() -> dict[str, Any] | None:
        return {} if get_run(api, run_id).state in ("PENDING", "RUNNING") else None

    api.call("retry the run", api.runs.run_service_retry_run, run_id, made_already=under_way)


def stop(api: Api, run_id: str) -> None:
    """Stops a run."""
    get_run(api, run_id)
    api.call("stop the run", api.runs.run_service_terminate_run, run_id)
