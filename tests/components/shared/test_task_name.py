"""Names of tasks: titles, display names, tasks of a package, and what `launch` reads from a task's inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtune.components.shared.artifacts import Artifact, ModelCard
from mixtune.components.shared.runtime import task_name
from mixtune.components.shared.task_name import STEPS, TaskName, file_name

NAMES = {
    "prepare pretrain": TaskName("prepare", stream="pretrain"),
    "prepare finetune": TaskName("prepare", stream="finetune"),
    "mixed-0.3": TaskName("mixed", candidate="mixed-0.3"),
    "mixed-linear-0.1-0.9-seed-2": TaskName("mixed", candidate="mixed-linear-0.1-0.9-seed-2"),
    "evaluate mixed-1e-05": TaskName("evaluate", candidate="mixed-1e-05"),
    "evaluate interpolated": TaskName("evaluate", candidate="interpolated"),
    **{step: TaskName(step) for step in STEPS},
}


@pytest.mark.parametrize("title", NAMES)
def test_titles_are_built_and_parsed(title: str) -> None:
    assert str(NAMES[title]) == title
    assert TaskName.parse(title) == NAMES[title]


@pytest.mark.parametrize("title", ["pipeline", "", "candidate 2", "prepares finetune", "mixedbread"])
def test_other_texts_are_no_titles(title: str) -> None:
    assert TaskName.parse(title) is None


def test_which_tasks_train() -> None:
    trainings = {title for title, name in NAMES.items() if name.trains}
    assert trainings == {"pretrain", "finetune", "mixed", "mixed-0.3", "mixed-linear-0.1-0.9-seed-2"}


@pytest.mark.parametrize(
    ("task", "candidate", "title"),
    [
        ("evaluate", "mixed-0.3", "evaluate mixed-0.3"),
        ("mixed", "mixed-0.3", "mixed-0.3"),
        ("mixed", "candidate 2", "candidate 2"),
        ("evaluate", None, "evaluate (mixed)"),
        ("evaluate-3", None, "evaluate finetuned"),
        ("register", None, "register"),
        ("prepare-portions", None, "prepare pretrain portions"),
        ("prepare-portions-2", None, "prepare finetune portions"),
    ],
)
def test_tasks_of_a_package(task: str, candidate: str | None, title: str) -> None:
    assert str(TaskName.of_package_task(task, candidate)) == title


def test_tasks_of_the_loops_over_portions_are_told_apart_by_their_number() -> None:
    for task, title in (
        ("prepare-portion", "prepare pretrain portion 3"),
        ("prepare-portion-2", "prepare finetune portion 3"),
    ):
        name = TaskName.of_package_task(task, candidate="mixed-0.3", iteration=2)
        assert str(name) == title
        assert name == TaskName.parse(title)
        assert TaskName.step_of_component(task.removesuffix("-2")) == "prepare"


@pytest.mark.parametrize("task", ["importer", "for-loop-1", "prepare-driver", "condition-2", "root"])
def test_other_nodes_of_a_package_are_no_tasks(task: str) -> None:
    assert TaskName.of_package_task(task) is None


def test_names_of_files_stay_in_their_folder() -> None:
    assert file_name("evaluate mixed-1e-05") == "evaluate-mixed-1e-05"
    assert TaskName("mixed", candidate="mixed-../../x").file_name == "mixed-..-..-x"


def test_what_launch_reads_from_a_tasks_inputs(tmp_path: Path) -> None:
    ModelCard(id="mixed-0.3", kind="mixed").save(tmp_path)
    model = Artifact(str(tmp_path))
    candidate = json.dumps({"name": "mixed", "id": "mixed-0.3"})
    tasks: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
        ("prepare", {"stream": "finetune"}, {}, {}, "prepare finetune"),
        ("mixed", {}, {}, {"candidate": candidate}, "mixed-0.3"),
        ("evaluate", {}, {"model": model, "other": None}, {}, "evaluate mixed-0.3"),
        ("evaluate", {}, {"model": model, "other": model}, {}, "evaluate interpolated"),
        ("pretrain", {}, {}, {}, "pretrain"),
        # Inputs that the step refuses.
        ("prepare", {}, {}, {}, "prepare"),
        ("mixed", {}, {}, {"candidate": "{"}, "mixed"),
        ("evaluate", {}, {"model": Artifact(str(tmp_path / "none"))}, {}, "evaluate"),
    ]
    for step, config, artifacts, parameters, title in tasks:
        assert str(task_name(step, json.dumps(config), artifacts, parameters)) == title
