"""Checks the whole configuration and splits it into the steps' parts. Fails early and reports all problems at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checks import find_problems, fingerprints
from ..config import Config, Parts, parts
from ..evaluation_size import auto_examples, auto_tokens
from ..form import ADVANCED, FIELDS, PLACEMENT, read_form
from ..placement import GpuNodes
from ..shared.errors import RefusedError
from ..shared.running.context import COMPILED, NODES, Context
from ..shared.runtime import launch
from ..shared.section import read_section
from ..text_per_step import few_text_tokens
from .config import PlanStep

NOT_ON_RECORD = (
    "MLFLOW_TRACKING_URI: is not set, so nothing would go on record or be registered; on a cluster it comes from the "
    "secret that placement.mlflow_secret names"
)
_IDLE = {"gpus": "0", "node_selector": "{}", "tolerations": "[]"}
"""Placement of `pretrain` if it trains nothing, besides the node affinity."""


def run(config: PlanStep, *, context: Context, outputs: dict[str, str]) -> list[dict[str, str]]:
    """Writes each step's part of the configuration and returns the candidates to train.

    Never cached: it reads the sources each time, and their fingerprints are part of the steps' configurations, so that they
    invalidate cached results of later steps.

    Args:
        outputs: maps the name of a part, or of a value of the placement, to the file to write.

    Returns:
        For each candidate the inputs of its tasks, each as JSON: `candidate`, `mixed` and `evaluate`. The loop item carries all
        of them, since KFP's local runner replaces any other parameter from a task with the loop item.

    Raises:
        RefusedError: if the form, the base model's folder or the sources have problems; names all of them.
    """
    on_cluster = NODES in os.environ
    profile = json.loads(os.environ.get(NODES, "{}"))
    nodes, problems = _gpu_nodes(config.form.get(PLACEMENT), profile.get("gpu", {})) if on_cluster else (GpuNodes(), [])

    def check(given: Config) -> list[str]:
        gpus = vars(nodes).get("gpus") if on_cluster else None  # left out if it is invalid
        found = problems + find_problems(given, gpus)
        on_record = not context.run_id or context.tracker.run_id is not None
        return found + ([] if on_record else [NOT_ON_RECORD])

    whole = read_form(config.form, os.environ.get(COMPILED, "{}"), check)
    cut = cut_into_parts(whole, context.tracker.reach, context.say)
    contents = part_texts(cut) | _placement(nodes, profile.get("other", {}), whole.pretrain.trains)
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
        {"candidate": one.to_json(), "mixed": trained.to_json(), "evaluate": measured.to_json()}
        for one in cut.candidates
        for trained, measured in (cut.of_loop(one),)
    ]


def _gpu_nodes(given: Any, profile: dict[str, Any]) -> tuple[GpuNodes, list[str]]:
    """Reads the field `placement`. What is left out has the value of the profile."""
    if not isinstance(given or {}, dict):
        return GpuNodes(), [f"{PLACEMENT}: must be a section with options, found {json.dumps(given)}"]
    nodes, problems = read_section(GpuNodes, profile | (given or {}))
    return nodes, [f"{PLACEMENT}.{problem}" for problem in problems]


def cut_into_parts(whole: Config, reach: Callable[[], Any], say: Callable[[str], None]) -> Parts:
    """Splits a configuration, with the fingerprints of all content that it names, and the version of the champion.

    Args:
        reach: returns a client of MLflow; None if nothing is tracked.
        say: shows a line to the user.

    Raises:
        RefusedError: if the registry has no such version of the champion.
        UnreachableError: if MLflow is needed and does not answer.
    """
    champion = _champion(whole.evaluate.champion, reach, say)
    return parts(whole, fingerprints(whole), champion, auto_tokens(whole), auto_examples(whole))


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


def _placement(nodes: GpuNodes, affinity_of_others: dict[str, Any], pretrain_trains: bool) -> dict[str, str]:
    """Returns the placement of the GPU tasks. If `pretrain` trains nothing, it requests no GPU and avoids GPU nodes."""
    gpu = {name: json.dumps(value) for name, value in nodes.model_dump().items()} | {"gpu_type": nodes.gpu_type}
    pretrain = gpu if pretrain_trains else {**_IDLE, "affinity": json.dumps(affinity_of_others)}
    return gpu | {f"pretrain_{name}": pretrain[name] for name in (*_IDLE, "affinity")}


def launch_with(given: dict[str, Any]) -> Any:
    """Runs the step in a KFP task.

    Args:
        given: arguments of the task, by name: the fields of the form, and a file for each output.
    """
    form = {name: given.pop(name) for name in (*FIELDS, ADVANCED, PLACEMENT)}
    return launch("plan", PlanStep(form=form).to_json(), {}, outputs=given)
