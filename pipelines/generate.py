"""Generates files from the code: compiled pipelines and reference documentation. A test checks that they are up to date.

python -m mixtune.pipelines.generate [FOLDER]      FOLDER: the checkout, by default the working directory
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mixtune.components.config import Config
from mixtune.components.form import FIELDS, PLACEMENT, field_defaults
from mixtune.components.placement import GpuNodes
from mixtune.components.shared.section import Section, section_of

from .configuration import described, items_of


def generate(folder: Path) -> list[Path]:
    """Generates all files below a checkout and returns their paths."""
    written = [_write(folder / "docs" / "configuration.md", configuration_page())]
    schema = json.dumps(Config.model_json_schema(), indent=2, ensure_ascii=False) + "\n"
    written.append(_write(folder / "docs" / "configuration.schema.json", schema))
    written.append(_write(folder / "docs" / "command.md", command_page()))
    written.append(_write(folder / "docs" / "form.md", form_page()))
    return written + compile_all(folder / "pipelines" / "compiled")


def compile_all(folder: Path) -> list[Path]:
    """Compiles the whole pipeline and every step, with the default configuration's values as defaults."""
    from .cli.commands import compile_pipeline
    from .step_pipelines import STEPS

    targets: dict[str, str | None] = {"mixtune": None} | {f"mixtune-{step}": step for step in STEPS}
    for name, step in targets.items():
        compile_pipeline(None, (), folder / f"{name}.yaml", step, "ir")
    return [folder / f"{name}.yaml" for name in targets]


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def configuration_page() -> str:
    """Returns the reference of all options, generated from the schema."""
    lines = [
        "# Configuration",
        "",
        "One YAML file. `mixtune init` writes one with every option, `mixtune check` checks it, `mixtune schema` prints its",
        "JSON Schema for editors ([configuration.schema.json](configuration.schema.json)). Unknown keys are refused.",
        "This page is generated from the schema.",
        "",
        "Relative paths in a file are relative to its folder; those given with `--set`, and those in a file that is read from",
        "standard input (`mixtune run -`), to the working directory. `~` is the home folder. The stored configuration,",
        "`config.yaml` in the output folder, holds absolute paths.",
        "",
    ]
    lines += [*_table("", Config.model_fields), ""]
    for path, section in _sections(Config, ""):
        lines += [f"## `{path}`", "", " ".join((section.__doc__ or "").split()), ""]
        lines += [*_table(path, section.model_fields), ""]
    return "\n".join(lines) + "\n"


def form_page() -> str:
    """Returns the reference of the form in Kubeflow's UI, generated from the schema."""
    from .pipeline import REQUIRED, form_fields
    from .placement import Placer, profiles

    place = Placer(profiles()["cpu"])
    lines = [
        "# The form in Kubeflow's UI",
        "",
        "The fields of a run, in the order in which the UI shows them. [kubeflow.md](kubeflow.md#from-the-ui) walks through",
        "them. This page is generated from the schema.",
        "",
        "| field | type | default | meaning | option |",
        "|---|---|---|---|---|",
    ]
    for name, field in form_fields(place, field_defaults()).items():
        default = "required" if field.default is REQUIRED else f"`{_shown(field.default)}`"
        path = f"`{FIELDS[name]}`" if name in FIELDS else ""
        if name == PLACEMENT:
            default = "of the profile"
        meaning = field.meaning.replace("|", "\\|")
        kind = ", ".join(f"`{one}`" for one in field.choices) or _type_in_words(field.type)
        lines.append(f"| `{name}` | {kind} | {default} | {meaning} | {path} |")
    lines += ["", f"## `{PLACEMENT}`", "", " ".join((GpuNodes.__doc__ or "").split()), ""]
    return "\n".join([*lines, *_table(PLACEMENT, GpuNodes.model_fields)]) + "\n"


def _type_in_words(kind: Any) -> str:
    words = {str: "text", int: "whole number", float: "number", dict: "dict"}
    return words.get(kind) or f"list of {_type_in_words(get_args(kind)[0])}s"


def _sections(section: type[Section], prefix: str) -> Iterator[tuple[str, type[Section]]]:
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield f"{prefix}{name}", inner
            yield from _sections(inner, f"{prefix}{name}.")
        each = items_of(field.annotation)
        if each is not None:
            yield f"{prefix}{name}[]", each


def _table(path: str, fields: Mapping[str, FieldInfo]) -> list[str]:
    rows = []
    for name, field in fields.items():
        if section_of(field.annotation) is not None:
            continue
        default = "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
        text = described(field).replace("|", "\\|")
        limits = ", ".join(_limits(field))
        rows.append(f"| `{name}` | {default} | {text}{f' ({limits})' if limits else ''} |")
    return ["| option | default | |", "|---|---|---|", *rows] if rows else []


def _shown(value: Any) -> str:
    return "null" if value in (None, PydanticUndefined) else json.dumps(value, ensure_ascii=False)


def _limits(field: FieldInfo) -> Iterator[str]:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for metadata in field.metadata:
        for name, word in words.items():
            if getattr(metadata, name, None) is not None:
                yield f"{word} {getattr(metadata, name)}"


def command_page() -> str:
    """Returns the reference of the command, generated from its help."""
    from typer.testing import CliRunner

    from .cli.main import app

    runner = CliRunner()
    environment = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    names = [
        command.name or (command.callback.__name__ if command.callback else "") for command in app.registered_commands
    ]
    lines = ["# The command", "", "This page is generated from `mixtune --help`.", ""]
    for arguments in ([], *[[name] for name in names]):
        result = runner.invoke(app, [*arguments, "--help"], prog_name="mixtune", env=environment)
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        lines += [f"## `{' '.join(['mixtune', *arguments])}`", "", "```", text, "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    for written_path in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd()):
        print(written_path)
