"""Private and undocumented names of KFP."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kfp import dsl
from kfp.compiler.compiler_utils import additional_input_name_for_pipeline_channel


def inputs_of(component: Any) -> dict[str, Any]:
    """Returns a component's inputs by name, each with `type`, `description` and `is_artifact_list`."""
    return component.component_spec.inputs or {}


def set_variable_at_run_time(task: dsl.PipelineTask, name: str, parameter: Any) -> None:
    """Sets an environment variable to the value of a pipeline parameter.

    KFP resolves parameters in a task's command, but not in its environment variables. The cache key contains the command with
    the placeholder, not with the value.
    """
    assert task.container_spec is not None
    placeholder = f"{{{{$.inputs.parameters['{additional_input_name_for_pipeline_channel(parameter)}']}}}}"
    task.container_spec.command = ["env", f"{name}={placeholder}", *task.container_spec.command]


def take_input(task: dsl.PipelineTask, parameter: Any) -> None:
    """Makes a pipeline parameter an input of a task, to which placeholders in its command can refer. It enters the cache key.

    KFP does so by itself with what a task's arguments, resources and image contain.
    """
    task.inputs[additional_input_name_for_pipeline_channel(parameter)] = parameter
    task.register_pipeline_channels([parameter])


def compile_to(pipeline: Any, file: Path, **options: Any) -> None:
    """Compiles a pipeline for a cluster. The same pipeline always gives the same bytes.

    KFP writes the defaults of parameters into comments, dicts among them with their keys in an order that differs from process
    to process. And it lists every producer of an input as a dependency, which the UI draws as an edge of its own, beside that
    from the output. KFP's backend derives those dependencies from the inputs.
    """
    from kfp import compiler

    spec = pipeline.pipeline_spec
    for component in (spec.root, *spec.components.values()):
        _drop_implied_dependencies(component.dag.tasks)
    compiler.Compiler().compile(pipeline, str(file), **options)
    text = file.read_text(encoding="utf-8")
    file.write_text(_DICT_IN_COMMENT.sub(lambda found: f"{found[1]}{_in_order(found[2])}]", text), encoding="utf-8")


def offer_choices(pipeline: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Limits text parameters of a pipeline to some values, which the UI of KFP 2.17 offers in a list.

    KFP's format has them, but its SDK cannot set them.
    """
    for name, parameter in pipeline.pipeline_spec.root.input_definitions.parameters.items():
        for choice in choices.get(name, ()):
            parameter.literals.add(string_value=choice)


def producers_of(task: Any) -> set[str]:
    """Returns the tasks whose outputs are inputs of a task of a pipeline spec."""
    found = {one.task_output_parameter.producer_task for one in task.inputs.parameters.values()}
    return (found | {one.task_output_artifact.producer_task for one in task.inputs.artifacts.values()}) - {""}


def _drop_implied_dependencies(tasks: Any) -> None:
    """Leaves those dependencies of the tasks of a DAG that no input implies, directly or through other tasks."""
    before = {name: {*task.dependent_tasks, *producers_of(task)} for name, task in tasks.items()}

    def ancestors(name: str) -> set[str]:
        return before[name].union(*map(ancestors, before[name]))

    for name, task in tasks.items():
        if task.trigger_policy.strategy:
            continue  # an exit task, whose input is the status of a task and none of its outputs
        inherited = set().union(*map(ancestors, before[name]))
        left = sorted(set(task.dependent_tasks) - producers_of(task) - inherited)
        del task.dependent_tasks[:]
        task.dependent_tasks.extend(left)


_DICT_IN_COMMENT = re.compile(r"^(#    \w+: dict \[Default: )(\{.*\})\]$", re.MULTILINE)


def _in_order(text: str) -> str:
    return json.dumps(ast.literal_eval(text), sort_keys=True, ensure_ascii=False)


def run_containers_with(function: Callable[..., int]) -> None:
    """Replaces the function with which KFP's local DockerRunner runs a container, in this process.

    KFP's own function ignores a container's exit status and treats a container that ends very quickly as successful.
    """
    from kfp.local import docker_task_handler

    docker_task_handler.run_docker_container = function


def key_cache_without(root: str, folders: Sequence[str]) -> None:
    """Makes the keys of KFP's local cache independent of where folders are, in this process.

    The keys contain the URIs of a task's input artifacts, and its parameters with the paths of sources and models. A folder
    that was moved would start anew. The parameters also identify the content of sources and models.

    Args:
        root: folder of all artifacts.
        folders: folders of sources and models.
    """
    from kfp.local.cache import LocalCache

    plain = LocalCache._serialize_value_for_key

    def without_folders(value: Any) -> Any:
        made = plain(value)
        if isinstance(value, dsl.Artifact):
            return {**made, "uri": value.uri.removeprefix(root)}
        if isinstance(value, str):
            for folder in folders:
                made = made.replace(f"{folder}/", "")
        return made

    LocalCache._serialize_value_for_key = staticmethod(without_folders)


def tell_cache_hits(tell: Callable[[str, dict[str, Any]], None]) -> None:
    """Makes KFP's local cache call a function for each task whose results it has, in this process.

    Args:
        tell: takes the name of the task in the package, such as `evaluate-2`, and the task's arguments.
    """
    from kfp.local.cache import LocalCache

    compute_key, get = LocalCache.compute_key, LocalCache.get
    asked: dict[str, tuple[str, dict[str, Any]]] = {}

    def noted_key(self: LocalCache, component_name: str, *args: Any, **kwargs: Any) -> str:
        key = compute_key(self, component_name, *args, **kwargs)
        asked[key] = component_name.removeprefix("comp-"), kwargs["arguments"]
        return key

    def told_get(self: LocalCache, key: str) -> dict[str, Any] | None:
        found = get(self, key)
        if found is not None:
            tell(*asked[key])
        return found

    LocalCache.compute_key, LocalCache.get = noted_key, told_get


def run_commands_with(function: Callable[[list[str], dict[str, str] | None], int]) -> None:
    """Replaces the function with which KFP's local SubprocessRunner runs a task's command, in this process.

    Args:
        function: takes the command and additional environment variables, and returns the exit status.
    """
    from kfp.local import subprocess_task_handler

    subprocess_task_handler.run_local_subprocess = function


def parts_of_command(command: list[str]) -> tuple[str, list[str]]:
    """Returns the component's source code and the arguments of KFP's executor from a task's command."""
    # sh -c SCRIPT SOURCE --executor_input JSON --function_to_execute STEP
    return command[3], command[4:]
