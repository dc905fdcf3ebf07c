"""Runs an earlier run of a cluster again: from a step on, or one step alone.

`--from` takes the package of the earlier run as KFP has it and switches caching off for the step and for the tasks that
depend on it. KFP's cache key holds no caching options, and the executors stay as they are to the letter, so all other tasks
come from the cache. `--only` takes the step's inputs from its run in MLflow and runs the step's own pipeline on them, placed
as the earlier run was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from mixtune.components.config import HEADLINE, SECTIONS, Config, Fingerprints, Parts, assemble, load, parameters, parts
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.context import COMPILED
from mixtune.components.shared.runtime import STEPS as ALL_STEPS

from ..configuration import lay_over
from ..images import Images, images_named
from ..pipeline import NAME
from ..placement import Placer
from ..step_pipelines import STEPS
from .api import Api
from .records import StepRecord, read_record, steps_behind
from .runs import Package, Submitted, get_run, package_of, submit, upload

# Fixed in a compiled package. A step alone gets a package of its own.
_FIXED_IN_WHOLE = ("placement.", "mixed.start=", "tracking.offline_when_unreachable=")
_FIXED_IN_STEP = ("mixed.start=",)
_NOWHERE = Fingerprints("", "", "")


def rerun_from(api: Api, run_id: str, step: str, overrides: Sequence[str], run_key: str | None = None) -> Submitted:
    """Makes a new run with an earlier one's parameters and overrides. The step and what depends on it run for sure.

    Raises:
        RefusedError: where there is no such step, or an override is fixed in the package.
    """
    if step not in ALL_STEPS:
        raise RefusedError(f"--from: must be one of {', '.join(ALL_STEPS)}, found {step}")
    _refuse_fixed(overrides, _FIXED_IN_WHOLE)
    run = get_run(api, run_id)
    package, values = _package_and_values(api, run)
    if overrides:
        values |= parameters(_config(values, compiled_in(package[0]), overrides))
    version = upload(api, run_anew(package, step))
    note = f"{run_id} again from {step} on" + (f", with {', '.join(overrides)}" if overrides else "")
    return submit(
        api,
        version,
        str(values["name"]),
        values,
        run_key=run_key,
        description=note,
        experiment_id=run.experiment_id,
        service_account=run.service_account,
    )


def _refuse_fixed(overrides: Sequence[str], fixed: tuple[str, ...]) -> None:
    refused = [override for override in overrides if override.startswith(fixed)]
    if refused:
        raise RefusedError(
            *(
                f"--set {override}: is fixed in the compiled pipeline of that run; start a new run with `mixtune submit`"
                for override in refused
            )
        )


def _package_and_values(api: Api, run: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The documents of the package that a run ran, and all its parameters."""
    spec = run.pipeline_spec
    reference = run.pipeline_version_reference
    if not spec and reference:
        found = api.call(
            "show the version of the pipeline",
            api.pipelines.pipeline_service_get_pipeline_version,
            reference.pipeline_id,
            reference.pipeline_version_id,
        )
        spec = found.pipeline_spec
    if not spec:
        raise RefusedError(
            f"{run.run_id}: KFP has no package of this run any more; start a new one with `mixtune submit`"
        )
    documents = [spec["pipeline_spec"], spec["platform_spec"]] if "pipeline_spec" in spec else [spec]
    known = documents[0].get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    missing = [name for name in (*HEADLINE, *SECTIONS) if name not in known]
    if missing:
        raise RefusedError(f"{run.run_id}: is no run of the pipeline {NAME}; it has no parameter {missing[0]}")
    given = (run.runtime_config.parameters if run.runtime_config else None) or {}
    return documents, {name: one.get("defaultValue") for name, one in known.items()} | given


def _config(values: Mapping[str, Any], fixed: str, overrides: Sequence[str] = ()) -> Config:
    assembled = load(assemble(values, fixed)).model_dump(mode="json")
    for override in overrides:
        lay_over(assembled, override)
    return load(assembled)


def compiled_in(spec: Mapping[str, Any]) -> str:
    """Returns the options that are fixed in a package, as JSON: they stand in the environment of its `plan` task."""
    for executor in spec.get("deploymentSpec", {}).get("executors", {}).values():
        for variable in executor.get("container", {}).get("env", []):
            if variable["name"] == COMPILED:
                return str(variable["value"])
    return "{}"


def run_anew(documents: Sequence[dict[str, Any]], step: str, pipeline: str = NAME) -> Package:
    """Returns a package with caching switched off for a step and the tasks that depend on it, and nothing else changed.

    Args:
        documents: the package.
        step: the first step that is to run for sure.
        pipeline: name of the pipeline that it is a version of.
    """
    spec, *others = copy.deepcopy(list(documents))
    # KFP can have put its own reference in the place of the name; uploaded anew it makes that again.
    spec["pipelineInfo"]["name"] = str(spec["pipelineInfo"]["name"]).rsplit("/", 1)[-1]
    wanted = tasks_from(spec, step)
    for task, name, _ in _tasks(spec):
        if name in wanted:
            task["cachingOptions"] = {}
    text = yaml.safe_dump_all([spec, *others], sort_keys=True, allow_unicode=True)
    return Package(pipeline, text, note=f"runs {step} and what depends on it anew")


def _tasks(spec: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yields every task of every DAG, with its name and the name of its step, which is empty for a DAG."""
    for component in (spec["root"], *spec["components"].values()):
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            yield task, name, _step_of(spec, task)


def _step_of(spec: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    label = spec["components"][task["componentRef"]["name"]].get("executorLabel", "")
    return str(label).removeprefix("exec-").rstrip("-0123456789")


def tasks_from(spec: Mapping[str, Any], step: str) -> set[str]:
    """Returns the names of a step's tasks and of all tasks that depend on one of them.

    KFP numbers the tasks of a component across all DAGs of a pipeline, so that a name stands for one task.

    Args:
        spec: a compiled pipeline.
        step: name of a step, such as `mixed`.
    """
    names: set[str] = set()

    def visit(dag: Mapping[str, Any], depends: bool) -> bool:
        """Adds the tasks of a DAG; `depends` tells whether the DAG as a whole depends on the step."""
        touched: set[str] = set()
        tasks = dict(dag["tasks"])
        while tasks:
            ready = [name for name, task in tasks.items() if not set(task.get("dependentTasks", ())) & tasks.keys()]
            for name in ready:
                task = tasks.pop(name)
                after = depends or bool(touched & set(task.get("dependentTasks", ())))
                inner = spec["components"][task["componentRef"]["name"]].get("dag")
                inside = visit(inner, after) if inner else _step_of(spec, task) == step
                if after or inside:
                    touched.add(name)
        names.update(touched)
        return bool(touched)

    visit(spec["root"]["dag"], False)
    return names


def images_in(spec: Mapping[str, Any]) -> Images:
    """The images of a compiled package, which a step of it alone is to run in, too."""
    executors = spec.get("deploymentSpec", {}).get("executors", {})
    named = {}
    for label, executor in executors.items():
        if "container" in executor:
            named[label.removeprefix("exec-").rstrip("-0123456789")] = executor["container"]["image"]
    return images_named(named)


def rerun_only(
    api: Api, run_id: str, only: str, overrides: Sequence[str], run_key: str | None = None
) -> list[Submitted]:
    """Runs one step of an earlier run alone, on the artifacts that it had; every task of it where one is not named.

    Args:
        only: a step, such as `evaluate`, or one task of it, such as `evaluate mixed-0.3`.

    Raises:
        RefusedError: where it is not on record what the step was given.
    """
    step = step_of(only)
    _refuse_fixed(overrides, _FIXED_IN_STEP)
    run = get_run(api, run_id)
    documents, values = _package_and_values(api, run)
    in_images = images_in(documents[0])
    fixed = compiled_in(documents[0])
    before, after = _config(values, fixed), _config(values, fixed, overrides)
    place = _placement_parameters(values, before, after)
    record = read_record(run_id, with_report=False)
    if record is None:
        raise RefusedError(
            f"{run_id}: what its steps were given stands in MLflow, which has no record of it; set MLFLOW_TRACKING_URI to "
            "the address that the run writes to"
        )
    chosen = choose(only, steps_behind(record), run_id)
    jobs = []
    for one in chosen:
        config, uris, candidate = given_to(one.title, {
            name.removeprefix("mixtune.outcome.given."): text for name, text in one.tags.items()
        })  # fmt: skip
        config = with_overrides(one.title, step, config, before, after)
        jobs.append((one, config, uris, candidate))
    made = []
    for one, config, uris, candidate in jobs:
        package = package_of(after, step, uris, in_images)
        version = upload(api, run_anew(list(yaml.safe_load_all(package.text)), step, package.pipeline))
        arguments = {"config": config, **candidate, **{f"{name}_uri": uri for name, uri in uris.items()}}
        made.append(
            submit(
                api,
                version,
                f"{values['name']} {one.title}",
                arguments | place,
                run_key=f"{run_key} {one.title}" if run_key else None,
                description=f"{one.title} of {run_id} alone",
                experiment_id=run.experiment_id,
                service_account=run.service_account,
            )
        )
    return made


def _placement_parameters(values: Mapping[str, Any], before: Config, after: Config) -> dict[str, Any]:
    """Returns the run-time placement: that of the earlier run, but for what the overrides change."""
    old, new = (
        {name: default for name, (_, default, _) in Placer.cluster(config).parameters().items()}
        for config in (before, after)
    )
    return {name: values[name] if name in values and old.get(name) == new[name] else new[name] for name in new}


def step_of(only: str) -> str:
    """The step that `--only` names, by itself or by the title of a task.

    Raises:
        RefusedError: where there is no such step.
    """
    step = only.split(" ")[0]
    step = "mixed" if step.startswith("mixed-") else step
    if step not in STEPS:
        raise RefusedError(
            f'--only: must be one of {", ".join(STEPS)}, or a task such as "evaluate mixed-0.3", found {only}'
        )
    return step


def choose(only: str, steps: Mapping[str, StepRecord], run: str) -> list[StepRecord]:
    """The tasks that `--only` means.

    Raises:
        RefusedError: where the run has none on record.
    """
    step = step_of(only)
    found = [one for one in steps.values() if one.title == only or (only == step and one.step == step)]
    if not found:
        titles = ", ".join(sorted(steps)) or "none"
        raise RefusedError(f"--only: {run} has no {only} on record; it has {titles}")
    return found


def given_to(title: str, given: Mapping[str, str]) -> tuple[str, dict[str, str | list[str]], dict[str, str]]:
    """Configuration, artifact URIs and further parameters that a task was given.

    Raises:
        RefusedError: where they are not on record.
    """
    if not given.get("config") or not given.get("artifacts"):
        raise RefusedError(
            f"--only: what {title} was given is not on record (an older version of mixtune, or too long for a tag); "
            "run it by --from"
        )
    candidate = {"candidate": given["candidate"]} if given.get("candidate") else {}
    return given["config"], json.loads(given["artifacts"]), candidate


def with_overrides(title: str, step: str, config: str, before: Config, after: Config) -> str:
    """A task's part of the configuration, with what the overrides change in it.

    The fingerprints in it stay: they say which data it was, and only `plan` can find them out.
    """
    old, new = (_part(title, step, parts(one, _NOWHERE)) for one in (before, after))
    changed = {name: value for name, value in new.items() if value != old.get(name)}
    if not changed:
        return config
    return json.dumps(json.loads(config) | changed, ensure_ascii=False)


def _part(title: str, step: str, cut: Parts) -> dict[str, Any]:
    names = {
        "prepare pretrain": "prepare_pretrain", "prepare finetune": "prepare_finetune",
        "evaluate pretrained": "evaluate_pretrained", "evaluate finetuned": "evaluate",
        "evaluate interpolated": "interpolate",
    }  # fmt: skip
    name = names.get(title, "evaluate_mixed" if step == "evaluate" else step)
    return dict(json.loads(getattr(cut, name).to_json()))
