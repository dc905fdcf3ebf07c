"""Checks the whole configuration and splits it into the steps' parts. Fails early and reports all problems at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checks import find_problems, fingerprints
from ..config import Config, Parts, assemble, load, parts
from ..shared.errors import RefusedError
from ..shared.running.context import COMPILED, Context
from ..shared.runtime import launch
from ..text_per_step import few_text_tokens
from .config import PlanStep

PRETRAIN_PLACEMENT = ("pretrain_gpus", "pretrain_node_selector", "pretrain_tolerations", "pretrain_affinity")
NOT_ON_RECORD = (
    "MLFLOW_TRACKING_URI: is not set, so nothing would go on record or be registered; on a cluster it comes from the "
    "secret that the parameter mlflow_secret names"
)
PLACEMENT_INPUTS = ("gpus", "gpu_node_selector", "gpu_tolerations", "gpu_affinity", "cpu_affinity")


def run(
    config: PlanStep, *, context: Context, outputs: dict[str, str], gpu: dict[str, Any] | None = None
) -> list[dict[str, str]]:
    """Writes each step's part of the configuration and returns the candidates to train.

    Never cached: it reads the sources each time, and their fingerprints are part of the steps' configurations, so that they
    invalidate cached results of later steps.

    Args:
        outputs: maps the name of a part to the file to write.
        gpu: placement of GPU tasks: `gpus` (a count, as text), `gpu_node_selector`, `gpu_tolerations` and `gpu_affinity`, with
            the `cpu_affinity` of the other tasks; None in a local run.

    Returns:
        For each candidate the inputs of its tasks, each as JSON: `candidate`, `mixed` and `evaluate`. The loop item carries all
        of them, since KFP's local runner replaces any other parameter from a task with the loop item.

    Raises:
        RefusedError: if the configuration, the base model's folder or the sources have problems; names all of them.
    """
    gpus = int(gpu["gpus"]) if gpu and COMPILED in os.environ else None

    def check(given: Config) -> list[str]:
        on_record = not context.run_id or context.tracker.run_id is not None
        return find_problems(given, gpus) + ([] if on_record else [NOT_ON_RECORD])

    whole = load(assemble(config.configuration, os.environ.get(COMPILED, "{}")), check)
    cut = cut_into_parts(whole, context.tracker.reach, context.say)
    contents = part_texts(cut) | _pretrain_placement(whole, gpu)
    for name, file in outputs.items():
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents[name], encoding="utf-8")
    context.tracker.set_tags({"mixtune.name": whole.name}, parent=True)
    context.tracker.log_parent_params(whole.model_dump(mode="json", exclude={"tracking": {"uri"}}))
    if (few := few_text_tokens(whole)) is not None:
        context.say(few)
    context.say(f"{whole.name}: {len(cut.candidates)} candidates to train: " + ", ".join(c.id for c in cut.candidates))
    return [
        {"candidate": candidate.to_json(), "mixed": cut.mixed.to_json(), "evaluate": cut.evaluate_mixed.to_json()}
        for candidate in cut.candidates
    ]


def cut_into_parts(whole: Config, reach: Callable[[], Any], say: Callable[[str], None]) -> Parts:
    """Splits a configuration, with the fingerprints of all content that it names, and the version of the champion.

    Args:
        reach: returns a client of MLflow; None if nothing is tracked.
        say: shows a line to the user.

    Raises:
        RefusedError: if the registry has no such version of the champion.
        UnreachableError: if MLflow is needed and does not answer.
    """
    return parts(whole, fingerprints(whole), _champion(whole.evaluate.champion, reach, say))


def part_texts(cut: Parts) -> dict[str, str]:
    """Returns the parts as JSON, by their names."""
    return {field.name: getattr(cut, field.name).to_json() for field in fields(Parts) if field.name != "candidates"}


def _champion(given: str | None, reach: Callable[[], Any], say: Callable[[str], None]) -> str | None:
    """Resolves the champion's alias to its current version, which is recorded and becomes part of the cache key."""
    if given is None or not given.startswith("models:"):
        return None if given is None else str(Path(given).absolute())
    client = reach()
    if client is None:
        raise RefusedError(
            f"evaluate.champion: is {given}, but MLFLOW_TRACKING_URI is not set; set it or name a folder"
        )
    from ..shared.tracking.registry import version_behind

    version = version_behind(client, given)
    if version is None:
        say(f"evaluate.champion: there is no {given} yet, so nothing is compared with it")
    return version


def _pretrain_placement(whole: Config, gpu: dict[str, Any] | None) -> dict[str, str]:
    """Returns the placement of `pretrain`. If it trains nothing, it requests no GPU and avoids GPU nodes."""
    wanted = gpu if gpu and whole.pretrain.trains else {}
    return {
        "pretrain_gpus": str(wanted.get("gpus", "0")),
        "pretrain_node_selector": json.dumps(wanted.get("gpu_node_selector", {})),
        "pretrain_tolerations": json.dumps(wanted.get("gpu_tolerations", [])),
        "pretrain_affinity": json.dumps(
            wanted.get("gpu_affinity", {}) if wanted else (gpu or {}).get("cpu_affinity", {})
        ),
    }


def launch_with(given: dict[str, Any]) -> Any:
    """Runs the step in a KFP task.

    Args:
        given: arguments of the task, by name: parameters of the run, placement of GPU tasks, and a file for each output.
    """
    gpu = {name: given.pop(name) for name in PLACEMENT_INPUTS}
    parts_of = {field.name for field in fields(Parts)}
    outputs = {name: given[name] for name in given if name in parts_of or name.startswith(PRETRAIN_PLACEMENT)}
    configuration = {name: value for name, value in given.items() if name not in outputs}
    return launch("plan", PlanStep(configuration=configuration).to_json(), {}, outputs=outputs, gpu=gpu)
