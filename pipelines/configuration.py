"""Reads, overrides and writes configuration files."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from mixtune.components.config import Config, load
from mixtune.components.shared.config import Task
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.section import Section, section_of

from .paths import RELATIVE, path_option, with_absolute_paths

EMBEDDED_DEFAULT = "demo"
STANDARD_INPUT = Path("-")


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys in a section. YAML would silently drop the first one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"the key {key.value} appears twice, first in line {seen[key.value]}; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen[key.value] = key.start_mark.line + 1
        return node


def read_config(
    path: Path | None, overrides: Sequence[str] = (), check: Callable[[Config], list[str]] = lambda _: []
) -> Config:
    """Reads a YAML file (or the embedded default) and applies overrides of the form `a.b=c`.

    Relative paths start at the folder of the file, those in overrides at the working directory.

    Args:
        path: the file; `-` is standard input.
        check: finds further problems, as in `load`.

    Raises:
        RefusedError: if there are problems; names all of them.
    """
    values = ready_made(EMBEDDED_DEFAULT) if path is None else _read_file(path)
    problems = []
    for override in overrides:
        try:
            lay_over(values, override)
        except RefusedError as error:
            problems += error.problems
    return load(values, check, problems)


def ready_made(name: str) -> dict[str, Any]:
    """Returns a configuration that comes with mixtune."""
    text = resources.files(__package__).joinpath("configs", f"{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def _read_file(path: Path) -> dict[str, Any]:
    values, file = _read_yaml(path), path.absolute()
    # Standard input, pipes and /dev/fd are in no folder of the user.
    has_folder = file.is_file() and file.parts[1] not in ("dev", "proc")
    return dict(with_absolute_paths(Config, values, file.parent if has_folder else Path.cwd()))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if path == STANDARD_INPUT else path.read_text(encoding="utf-8-sig")
        values = yaml.load(text, _Loader)
    except FileNotFoundError:
        raise RefusedError(f"{path}: no such file; `mixtune init > mixtune.yaml` writes one") from None
    except IsADirectoryError:
        raise RefusedError(f"{path}: is a folder, not a configuration file") from None
    except RecursionError:
        raise RefusedError(f"{path}: has too many brackets or levels inside each other; correct the file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RefusedError(f"{path}{where}: is not valid YAML ({getattr(error, 'problem', None) or error})") from None
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: cannot be read ({error})") from None
    if values is None:
        raise RefusedError(f"{path}: is empty")
    if not isinstance(values, dict):
        raise RefusedError(f"{path}: must hold sections with options, found {type(values).__name__}")
    return values


def lay_over(values: dict[str, Any], override: str) -> None:
    """Sets one option from a `--set` argument: `section.option=value`. Relative paths start at the working directory.

    Raises:
        RefusedError: if the argument does not have this form.
    """
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise RefusedError(f"--set {override}: must look like section.option=value, for example mixed.lambdas=[0.2]")
    *parents, last = path.split(".")
    for parent in parents:
        if values.get(parent) is None:  # also for sections that contain only comments
            values[parent] = {}
        if not isinstance(values[parent], dict):
            raise RefusedError(f"--set {override}: {parent} is an option, not a section")
        values = values[parent]
    try:
        given = {last: yaml.load(text, _Loader)}
    except (yaml.YAMLError, ValueError):
        raise RefusedError(f"--set {override}: {text} is not a valid YAML value") from None
    except RecursionError:
        raise RefusedError(f"--set {path}: has too many brackets or levels inside each other") from None
    for parent in reversed(parents):
        given = {parent: given}
    given = with_absolute_paths(Config, given, Path.cwd())
    for parent in parents:
        given = given[parent]
    values[last] = given[last]


def to_yaml(config: Config) -> str:
    """Returns the resolved configuration as YAML, to be stored with a run."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def annotated(values: Mapping[str, Any]) -> str:
    """Returns a configuration file with all options and their descriptions. Defaults are written as comments.

    Args:
        values: options to set. All other options are written as comments with their defaults.
    """
    lines = ["# A mixtune configuration. Options that stand as comments have the value shown.", ""]
    _annotate(Config, values, "", lines)
    return "\n".join(lines) + "\n"


def _annotate(section: type[Section], values: Mapping[str, Any], indent: str, lines: list[str]) -> None:
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        description = described(field) or " ".join(((inner and inner.__doc__) or "").split())
        lines += textwrap.wrap(description, 110 - len(indent), initial_indent=f"{indent}# ",
                               subsequent_indent=f"{indent}# ")  # fmt: skip
        if inner is not None:
            lines.append(f"{indent}{name}:")
            _annotate(inner, values.get(name) or {}, indent + "  ", lines)
            if not indent:
                lines.append("")
            continue
        given = name in values
        value = values[name] if given else field.get_default(call_default_factory=True)
        # In double quotes a text with line ends takes one line.
        style = '"' if isinstance(value, str) and "\n" in value else None
        text = yaml.safe_dump(
            value, default_flow_style=True, default_style=style, width=float("inf"), allow_unicode=True
        )
        text = text.removesuffix("...\n").strip()
        lines.append(f"{indent}{'' if given else '# '}{name}: {text}")


def described(field: FieldInfo) -> str:
    """Returns the description of an option in one line, with what is true of all paths."""
    words = (field.description or "").split()
    return " ".join([*words, *([RELATIVE] if path_option(field) else [])])


def items_of(annotation: Any) -> type[Section] | None:
    """Returns the section class of a list's items; None if they are no sections."""
    return section_of(get_args(annotation)[0]) if get_origin(annotation) is list else None


def init_values(name: str, task: str) -> dict[str, Any]:
    """Returns the configuration that `mixtune init` writes: a ready-made one, adapted to a task.

    Raises:
        RefusedError: if there is no such configuration or task, or the two do not go together.
    """
    known = sorted(
        file.name.removesuffix(".yaml") for file in resources.files(__package__).joinpath("configs").iterdir()
    )
    if name not in known:
        raise RefusedError(f"--from: must be one of {', '.join(known)}, found {name}")
    tasks = get_args(Task)
    if task not in tasks:
        raise RefusedError(f"--task: must be one of {', '.join(tasks)}, found {task}")
    values = ready_made(name)
    values["data"]["finetune"]["task"] = task
    load(values)
    return values
