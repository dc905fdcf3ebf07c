"""Running an earlier run of a cluster again: from a step on, or one step alone.

`--from` takes the package of the earlier run as KFP has it and switches caching off for the steps that are to run. KFP's
cache key holds no caching options, and the executors stay as they are to the letter, so the steps before come from the
cache. `--only` takes what the step was given from its run in MLflow, and hands it to the step's own pipeline.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from mixtune.components.config import HEADLINE, SECTIONS, Config, Fingerprints, Parts, assemble, load, parameters, parts
from mixtune.components.shared.errors import RefusedError

from .client import Package, Submitted, get_run, package_of, submit, upload
from .configuration import lay_over
from .images import Images, images_named
from .kfp_api import Api
from .pipeline import NAME
from .placement import Placer, steps_from
from .records import StepRecord, read_record, steps_behind
from .steps import STEPS

# Fixed in a compiled package.
_COMPILED_IN = ("placement.", "mixed.start=", "tracking.offline_when_unreachable=")
_NOWHERE = Fingerprints("", "", "")


def rerun_from(api: Api, run_id: str, step: str, overrides: Sequence[str], run_key: str | None = None) -> Submitted:
    """A new run with an earlier one's parameters, laid over: steps before come from the cache, the others run for sure.

    Raises:
        RefusedError: where there is no such step, or an override is fixed in the package.
    """
    steps_from(step)
    _refuse_compiled_in(overrides)
    run = get_run(api, run_id)
    package, values = _package_and_values(api, run)
    values |= _laid_over(values, overrides)
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


def _refuse_compiled_in(overrides: Sequence[str]) -> None:
    fixed = [one for one in overrides if one.startswith(_COMPILED_IN)]
    if fixed:
        raise RefusedError(
            *(
                f"--set {one}: is fixed in the compiled pipeline of that run; start a new run with `mixtune submit`"
                for one in fixed
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


def _laid_over(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    return parameters(_config(values, overrides)) if overrides else {}


def _config(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    assembled = load(assemble(values)).model_dump(mode="json")
    for override in overrides:
        lay_over(assembled, override)
    return load(assembled)


def run_anew(documents: Sequence[dict[str, Any]], step: str, pipeline: str = NAME) -> Package:
    """A package with caching switched off for a step and those after it, and nothing else changed.

    Args:
        documents: the package.
        step: the first step that is to run for sure.
        pipeline: name of the pipeline that it is a version of.
    """
    spec, *others = copy.deepcopy(list(documents))
    # KFP can have put its own reference in the place of the name; uploaded anew it makes that again.
    spec["pipelineInfo"]["name"] = str(spec["pipelineInfo"]["name"]).rsplit("/", 1)[-1]
    wanted = set(steps_from(step))
    for task, name in _tasks(spec):
        if name in wanted:
            task["cachingOptions"] = {}
    text = yaml.safe_dump_all([spec, *others], sort_keys=True, allow_unicode=True)
    return Package(pipeline, text, note=f"runs {step} and what comes after it anew")


def _tasks(spec: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every task that runs a container, and its step."""
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel", "")
            yield task, label.removeprefix("exec-").rstrip("-0123456789")


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
    _refuse_compiled_in(overrides)
    run = get_run(api, run_id)
    documents, values = _package_and_values(api, run)
    in_images = images_in(documents[0])
    before, after = _config(values), _config(values, overrides)
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
    place = {name: values[name] for name in Placer.cluster(before).parameters() if name in values}
    for one, config, uris, candidate in jobs:
        package = package_of(before, step, uris, in_images)
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
