"""The known tasks of lm-evaluation-harness. Does not import torch: `mixtune check` and `plan` use it before any heavy work."""

from __future__ import annotations

import difflib
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..shared.errors import RefusedError, first_line
from .config import LmEval

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

NOT_INSTALLED = (
    "evaluate.lm_eval.tasks: needs the package lm_eval, which is not installed here; install mixtune with the extra lm-eval "
    "(pip install 'mixtune[torch,lm-eval]'), or leave the tasks out"
)
SHOWN_NAMES = 3


def installed() -> bool:
    """Tells whether lm-evaluation-harness is installed, without importing it."""
    return importlib.util.find_spec("lm_eval") is not None


def known_tasks(settings: LmEval) -> TaskManager:
    """Returns the tasks of the user's own folder and those of the harness. The user's tasks take precedence.

    Raises:
        RefusedError: if the harness is not installed, or if tasks are unknown; names all of them.
    """
    if not installed():
        raise RefusedError(NOT_INSTALLED)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RefusedError(
            f"evaluate.lm_eval.tasks: lm_eval is installed but cannot be imported ({first_line(error)})"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)  # problems are raised instead

    folder, path = settings.tasks_folder, None
    own: list[str] = []
    if folder is not None:
        if not Path(folder).is_dir():
            raise RefusedError(f"evaluate.lm_eval.tasks_folder: there is no folder {folder}")
        path = Path(folder).absolute()
        manager = TaskManager(include_path=path, include_defaults=False)
        own = manager.all_tasks
        # Reading the harness's thousands of files takes seconds and is skipped if the user's files suffice.
        if set(settings.tasks) | _members_of_groups(manager) <= set(own):
            return manager
    manager = TaskManager(include_path=path)
    problems = [
        _unknown(name, manager.all_tasks, folder, own) for name in settings.tasks if name not in manager.all_tasks
    ]
    if problems:
        raise RefusedError(*problems)
    return manager


def _members_of_groups(manager: TaskManager) -> set[str]:
    """Returns the members of the groups in the user's folder, which can include the harness's tasks."""
    groups = (manager.task_index[name].cfg or {} for name in manager.all_groups)
    members = [member for group in groups for member in group.get("task") or []]
    return {
        str(member.get("task") or member.get("group")) if isinstance(member, dict) else member for member in members
    }


def _unknown(name: str, known: list[str], folder: str | None, own: list[str]) -> str:
    near = difflib.get_close_matches(name, known, SHOWN_NAMES)
    hint = f"; near it are {', '.join(near)}" if near else ""
    if folder is not None:
        there = ", ".join(own[:SHOWN_NAMES]) + (" and others" if len(own) > SHOWN_NAMES else "") or "no task"
        hint += f"; {folder} defines {there}"
    return f"evaluate.lm_eval.tasks: lm-evaluation-harness knows no task {name}{hint}"
