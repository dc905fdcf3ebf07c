"""Checks the whole configuration and cuts it into the steps' parts; fails early, naming every problem at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checks import find_problems, fingerprints
from ..config import Parts, assemble, load, parts
from ..shared.context import Context
from ..shared.errors import RefusedError
from ..shared.runtime import launch
from .config import PlanStep


def run(config: PlanStep, *, context: Context, outputs: dict[str, str]) -> list[dict[str, str]]:
    """Writes each step's part of the configuration and returns the candidates to train.

    Never cached: it looks at the sources each time, and their fingerprints, as part of what it hands on, decide
    whether the later steps' results are still good.

    Args:
        outputs: name of a part -> file to write it to.

    Returns:
        For each λ what its tasks read, each as JSON: `candidate`, `mixed` and `evaluate`. The loop carries all of it, since
        KFP's local runner puts the loop's item in place of any other parameter that comes from a task.

    Raises:
        RefusedError: naming every problem of the configuration, of the base model's folder and of the sources.
    """
    whole = load(assemble(config.configuration))
    problems = find_problems(whole)
    if context.run_id and context.tracker.run_id is None:
        problems.append(
            "MLFLOW_TRACKING_URI: is not set, so nothing would go on record or be registered; on a cluster it comes from the "
            "secret that the parameter mlflow_secret names"
        )
    if problems:
        raise RefusedError(*problems)
    cut = parts(whole, fingerprints(whole))
    for name, file in outputs.items():
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(getattr(cut, name).to_json(), encoding="utf-8")
    context.tracker.set_tags({"mixtune.name": whole.name}, parent=True)
    context.tracker.log_parent_params(whole.model_dump(mode="json", exclude={"tracking": {"uri"}}))
    context.say(f"{whole.name}: {len(cut.candidates)} values of λ: " + ", ".join(c.id for c in cut.candidates))
    return [
        {"candidate": candidate.to_json(), "mixed": cut.mixed.to_json(), "evaluate": cut.evaluate.to_json()}
        for candidate in cut.candidates
    ]


def launch_with(given: dict[str, Any]) -> Any:
    """Runs the step in a KFP task.

    Args:
        given: the task's arguments, by name: parameters of the run, and a file for each part.
    """
    outputs = {field.name: given[field.name] for field in fields(Parts) if field.name in given}
    configuration = {name: value for name, value in given.items() if name not in outputs}
    return launch("plan", PlanStep(configuration=configuration).to_json(), {}, outputs=outputs)
