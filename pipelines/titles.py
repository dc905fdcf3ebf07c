"""Titles of tasks, shared by local runs, runs on a cluster and MLflow."""

from __future__ import annotations

import re

from mixtune.components.shared.runtime import STEPS

# KFP numbers the tasks of a component in the order of the calls in `pipeline.py`.
_OF_WHOLE_RUN = {
    "prepare": "prepare pretrain",
    "prepare-2": "prepare finetune",
    "evaluate-2": "evaluate pretrained",
    "evaluate-3": "evaluate finetuned",
    "evaluate-4": "evaluate interpolated",
}
_TASK = re.compile(rf"({'|'.join(STEPS)})(-\d+)?")
TRAINING = re.compile(r"pretrain|finetune|mixed.*")
"""Titles of the tasks that train."""


def step_of_task(task: str) -> str | None:
    """Returns the step that a package's task runs; None for drivers, importers and groups."""
    found = _TASK.fullmatch(task)
    return found[1] if found else None


def title_of(task: str, candidate: str | None = None) -> str:
    """Returns the title of a task of the whole pipeline.

    Args:
        task: name of the task in the package, such as `evaluate-2`.
        candidate: id of the candidate, for a task of the loop over candidates.
    """
    if candidate is None:
        return _OF_WHOLE_RUN.get(task, "evaluate (mixed)" if task == "evaluate" else task)
    step = step_of_task(task)
    return candidate if step == "mixed" else f"{step or task} {candidate}"
