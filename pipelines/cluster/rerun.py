"""Reruns an earlier run on a cluster: from a given step on, or one step only.

`--from` takes the earlier run's package from KFP and disables caching for the step and the tasks that depend on it. KFP's cache
key does not contain caching options, and the executors are unchanged, so all other tasks are cached. `--only` reads the
step's inputs from its MLflow run and runs the step's own pipeline on them, with the placement of the earlier run.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import yaml

from mixtune.components.config import Config, Fingerprints, Parts, load, parts
from mixtune.components.form import ADVANCED, FIELDS, PLACEMENT, parameters, read_form
from mixtune.components.mixed.config import candidates
from mixtune.components.placement import GpuNodes
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.context import COMPILED
from mixtune.components.shared.task_name import LOOP_PREFIXES, TaskName
from mixtune.components.shared.task_name import STEPS as ALL_STEPS

from ..configuration import lay_over
from ..images import Images, images_named
from ..pipeline import NAME
from ..placement import Placer
from ..step_pipelines import STEPS, URI_NAMES
from .api import Api
from .local_paths import refuse_local_paths
from .records import StepRecord, read_record, steps_behind
from .runs import Package, Submitted, describe_alone, get_run, package_of, run_title, submit, upload

# These options are fixed in a compiled package. A step that runs alone gets its own package.
_FIXED_IN_WHOLE = ("placement.", "mixed.start=", "tracking.offline_when_unreachable=", "tracking.tensorboard=")
_GPUS = "placement.gpus="
"""The one option of the placement that is also in the form."""
_FIXED_IN_STEP = ("mixed.start=",)
_NOWHERE = Fingerprints("", "", "")
_PART_OF_EVALUATION = {
    "pretrained": "evaluate_pretrained", "finetuned": "evaluate", "interpolated": "interpolate",
}  # fmt: skip


def rerun_from(api: Api, run_id: str, step: str, overrides: Sequence[str], run_key: str | None = None) -> Submitted:
    """Creates a run with the parameters of an earlier run and overrides. The step and its dependents are not cached.

    Raises:
        RefusedError: if there is no such step, or if an override is fixed in the package.
    """
    if step not in ALL_STEPS:
        raise RefusedError(f"--from: must be one of {', '.join(ALL_STEPS)}, found {step}")
    _refuse_fixed(overrides, _FIXED_IN_WHOLE)
    run = get_run(api, run_id)
    package, values = _package_and_values(api, run)
    config = _config(values, compiled_in(package[0]), overrides)
    if overrides:
        values |= parameters(config)
    if any(override.startswith(_GPUS) for override in overrides):
        values[PLACEMENT] = {**values[PLACEMENT], "gpus": config.placement.gpus}
    version = upload(api, run_anew(package, step))
    note = f"{run_id} again from {step} on" + (f", with {', '.join(overrides)}" if overrides else "")
    return submit(
        api,
        version,
        f"{run_title(config)}, again from {step}",
        values,
        run_key=run_key,
        description=note,
        experiment_id=run.experiment_id,
        service_account=run.service_account,
    )


def _refuse_fixed(overrides: Sequence[str], fixed: tuple[str, ...]) -> None:
    refused = [override for override in overrides if override.startswith(fixed) and not override.startswith(_GPUS)]
    if refused:
        raise RefusedError(
            *(
                f"--set {override}: is fixed in the compiled pipeline of that run; start a new run with `mixtune submit`"
                for override in refused
            )
        )


def _package_and_values(api: Api, run: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the documents of a run's package, and all its parameters."""
    spec = run.pipeline_spec
    reference = run.pipeline_version_reference
    if not spec and reference:
        found = api.call(
            "get the version of the pipeline",
            api.pipelines.pipeline_service_get_pipeline_version,
            reference.pipeline_id,
            reference.pipeline_version_id,
        )
        spec = found.pipeline_spec
    if not spec:
        raise RefusedError(
            f"{run.run_id}: KFP no longer has the package of this run; start a new run with `mixtune submit`"
        )
    documents = [spec["pipeline_spec"], spec["platform_spec"]] if "pipeline_spec" in spec else [spec]
    name = str(documents[0]["pipelineInfo"]["name"]).rsplit("/", 1)[-1]
    if name != NAME:
        raise RefusedError(f"{run.run_id}: is a run of the pipeline {name}, not of {NAME}; give the id of such a run")
    known = documents[0].get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    wanted = {*FIELDS, ADVANCED, PLACEMENT}
    if set(known) != wanted:
        differs = min(wanted ^ set(known))
        raise RefusedError(
            f"{run.run_id}: was made by another version of mixtune, whose form has other fields ({differs} is in one of them "
            "only); start a new run with `mixtune submit`"
        )
    given = (run.runtime_config.parameters if run.runtime_config else None) or {}
    defaults = {name: one["defaultValue"] for name, one in known.items() if "defaultValue" in one}
    return documents, defaults | given


def _config(values: Mapping[str, Any], fixed: str, overrides: Sequence[str] = ()) -> Config:
    whole = read_form(values, fixed).model_dump(mode="json")
    for override in overrides:
        lay_over(whole, override)
    changed = load(whole)
    refuse_local_paths(changed)
    return changed


def compiled_in(spec: Mapping[str, Any]) -> str:
    """Returns the options that are fixed in a package, as JSON, from the environment of its `plan` task."""
    for executor in spec.get("deploymentSpec", {}).get("executors", {}).values():
        for variable in executor.get("container", {}).get("env", []):
            if variable["name"] == COMPILED:
                return str(variable["value"])
    return "{}"


def run_anew(documents: Sequence[dict[str, Any]], step: str, pipeline: str = NAME) -> Package:
    """Returns a package without caching for a step and the tasks that depend on it, otherwise unchanged.

    Args:
        documents: documents of the package.
        step: the first step to run without caching.
        pipeline: name of the pipeline that the package is a version of.
    """
    spec, *others = copy.deepcopy(list(documents))
    # KFP may have replaced the name with its own reference. It creates that again when the package is uploaded.
    spec["pipelineInfo"]["name"] = str(spec["pipelineInfo"]["name"]).rsplit("/", 1)[-1]
    wanted = tasks_from(spec, step)
    for task, name, _ in _tasks(spec):
        if name in wanted:
            task["cachingOptions"] = {}
    text = yaml.safe_dump_all([spec, *others], sort_keys=True, allow_unicode=True)
    return Package(pipeline, text, f"{step} and what depends on it without the cache")


def _tasks(spec: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yields every task of every DAG, with its name and the name of its step (empty for a DAG)."""
    for component in (spec["root"], *spec["components"].values()):
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            yield task, name, _step_of(spec, task)


def _step_of(spec: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    label = spec["components"][task["componentRef"]["name"]].get("executorLabel", "")
    return TaskName.step_of_component(str(label).removeprefix("exec-").rstrip("-0123456789"))


def tasks_from(spec: Mapping[str, Any], step: str) -> set[str]:
    """Returns the names of a step's tasks and of all tasks that depend on them.

    KFP numbers the tasks of a component across all DAGs of a pipeline, so task names are unique.

    Args:
        spec: a compiled pipeline.
        step: name of a step, such as `mixed`.
    """
    names: set[str] = set()

    def visit(dag: Mapping[str, Any], depends: bool) -> bool:
        """Adds the tasks of a DAG. `depends` states whether the DAG as a whole depends on the step."""
        touched: set[str] = set()
        tasks = dict(dag["tasks"])
        while tasks:
            ready = [name for name, task in tasks.items() if not _before(task) & tasks.keys()]
            for name in ready:
                task = tasks.pop(name)
                after = depends or bool(touched & _before(task))
                inner = spec["components"][task["componentRef"]["name"]].get("dag")
                inside = visit(inner, after) if inner else _step_of(spec, task) == step
                if after or inside:
                    touched.add(name)
        names.update(touched)
        return bool(touched)

    visit(spec["root"]["dag"], False)
    return names


def _before(task: Mapping[str, Any]) -> set[str]:
    """Returns the tasks that a task waits for: those that are named, and those whose outputs it reads."""
    inputs = task.get("inputs", {})
    sources = [one.get("taskOutputParameter") for one in inputs.get("parameters", {}).values()]
    sources += [one.get("taskOutputArtifact") for one in inputs.get("artifacts", {}).values()]
    return {*task.get("dependentTasks", ()), *(one["producerTask"] for one in sources if one)}


def images_in(spec: Mapping[str, Any]) -> Images:
    """Returns the images of a compiled package, so that a single step can run in the same images."""
    executors = spec.get("deploymentSpec", {}).get("executors", {})
    named = {}
    for label, executor in executors.items():
        if "container" in executor:
            step = TaskName.step_of_component(label.removeprefix("exec-").rstrip("-0123456789"))
            named[step] = executor["container"]["image"]
    return images_named(named)


def rerun_only(
    api: Api, run_id: str, only: str, overrides: Sequence[str], run_key: str | None = None
) -> list[Submitted]:
    """Reruns one step of an earlier run on the same artifacts; all its tasks if no task is named.

    Args:
        only: a step, such as `evaluate`, or one of its tasks, such as `evaluate mixed-0.3`.

    Raises:
        RefusedError: if the inputs of the step are not recorded.
    """
    step = step_of(only)
    _refuse_fixed(overrides, _FIXED_IN_STEP)
    run = get_run(api, run_id)
    documents, values = _package_and_values(api, run)
    in_images = images_in(documents[0])
    fixed = compiled_in(documents[0])
    before, after = _config(values, fixed), _config(values, fixed, overrides)
    place = Placer.cluster(after)
    place.nodes = _gpu_nodes(values, before, after)
    placed = {name: default for name, (_, default, _) in place.parameters(step).items()}
    record = read_record(run_id, with_report=False)
    if record is None:
        raise RefusedError(
            f"{run_id}: MLflow has no record of the inputs of its steps; set MLFLOW_TRACKING_URI to "
            "the server that the run uses"
        )
    chosen = choose(only, steps_behind(record), run_id, before)
    jobs = []
    for one in chosen:
        config, uris, candidate = given_to(one.title, {
            name.removeprefix("mixtune.outcome.given."): text for name, text in one.tags.items()
        })  # fmt: skip
        config = with_overrides(one.title, step, config, before, after)
        jobs.append((one, config, uris, candidate))
    made = []
    for one, config, uris, candidate in jobs:
        package = package_of(after, step, uris, in_images, place.nodes)
        version = upload(api, run_anew(list(yaml.safe_load_all(package.text)), step, package.pipeline))
        uri_of = URI_NAMES[step]
        arguments = {"config": config, **candidate, **{uri_of[name]: uri for name, uri in uris.items()}}
        made.append(
            submit(
                api,
                version,
                f"{before.name}, {one.title} alone",
                arguments | placed,
                run_key=f"{run_key} {one.title}" if run_key else None,
                description=describe_alone(one.title, run_id),
                experiment_id=run.experiment_id,
                service_account=run.service_account,
            )
        )
    return made


def _gpu_nodes(values: Mapping[str, Any], before: Config, after: Config) -> GpuNodes:
    """Returns the run-time placement of the earlier run with the overrides applied."""
    old, new = (Placer.cluster(config).nodes.model_dump() for config in (before, after))
    of_run = old | (values.get(PLACEMENT) or {})
    return GpuNodes.model_validate({name: of_run[name] if old[name] == new[name] else new[name] for name in new})


def step_of(only: str) -> str:
    """Returns the step that `--only` names, directly or by the title of a task.

    Raises:
        RefusedError: if there is no such step.
    """
    name = TaskName.parse(only)
    if name is None or name.step not in STEPS:
        raise RefusedError(
            f'--only: must be one of {", ".join(STEPS)}, or a task such as "evaluate mixed-0.3", found {only}'
        )
    return name.step


def choose(only: str, steps: Mapping[str, StepRecord], run: str, config: Config) -> list[StepRecord]:
    """Returns the tasks that `--only` selects. Mixed candidates that the run's configuration does not have are left out.

    Raises:
        RefusedError: if the run has no such task on record.
    """
    step = step_of(only)
    known = {candidate.id for candidate in candidates(config.mixed)}
    steps = {title: one for title, one in steps.items() if _is_of(title, known)}
    found = [one for one in steps.values() if one.title == only or (only == step and one.step == step)]
    if not found:
        titles = ", ".join(sorted(steps)) or "none"
        raise RefusedError(f"--only: {run} has no record of {only}; it has records of {titles}")
    return found


def _is_of(title: str, mixed: Collection[str]) -> bool:
    """Tells whether a task is a whole one and belongs to a run with these mixed candidates."""
    name = TaskName.parse(title) or TaskName("")
    candidate = name.candidate or ""
    return name.portion is None and (candidate in mixed or not candidate.startswith(LOOP_PREFIXES))


def given_to(title: str, given: Mapping[str, str]) -> tuple[str, dict[str, str | list[str]], dict[str, str]]:
    """Returns the configuration, the artifact URIs and the further parameters of a task.

    Raises:
        RefusedError: if they are not recorded.
    """
    if not given.get("config") or not given.get("artifacts"):
        raise RefusedError(
            f"--only: the inputs of {title} are not recorded (an older version of mixtune, or too long for a tag); "
            "use --from"
        )
    candidate = {"candidate": given["candidate"]} if given.get("candidate") else {}
    return given["config"], json.loads(given["artifacts"]), candidate


def with_overrides(title: str, step: str, config: str, before: Config, after: Config) -> str:
    """Applies overrides to a task's part of the configuration.

    Its fingerprints are kept: they identify the data that was used, and only `plan` can compute them.
    """
    old, new = (_part(title, step, parts(one, _NOWHERE)) for one in (before, after))
    changed = {name: value for name, value in new.items() if value != old.get(name)}
    if not changed:
        return config
    return json.dumps(json.loads(config) | changed, ensure_ascii=False)


def _part(title: str, step: str, cut: Parts) -> dict[str, Any]:
    task = TaskName.parse(title) or TaskName(step)
    if step == "prepare":
        name = f"prepare_{task.stream}"
    elif step == "evaluate":
        name = _PART_OF_EVALUATION.get(task.candidate or "", "evaluate_mixed")
    elif (task.candidate or "").startswith("finetuned-"):
        name = "finetuned_again"
    else:
        name = step
    return dict(json.loads(getattr(cut, name).to_json()))
