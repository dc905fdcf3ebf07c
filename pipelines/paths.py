"""Makes relative paths in a configuration absolute, so that it means the same in every working directory."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from mixtune.components.shared.config import EMBEDDED, SCRATCH, PathOption
from mixtune.components.shared.data.data_sets import HUB
from mixtune.components.shared.section import Section, section_of

RELATIVE = "A relative path is relative to the folder of the configuration file."
NAMES = (SCRATCH, EMBEDDED, "databricks", "databricks-uc", "uc")
"""Values that are no paths: of data sources, of base models, and MLflow's names of tracking servers."""
_WITH_PATH = re.compile(r"(?:sqlite:///|file://|file:)(?=[^/])")
"""Beginning of an address that holds a relative path."""
_ADDRESS = re.compile(rf"{HUB}|models:|file:|\w[\w+.-]*:(?://|:)")


def with_absolute_paths(section: type[Section], values: Any, folder: Path) -> Any:
    """Returns options, not validated yet, with absolute paths.

    Args:
        section: class of the section that the options are in.
        folder: absolute folder that relative paths start at.
    """
    if not isinstance(values, dict):
        return values
    found = dict(values)
    for name, field in section.model_fields.items():
        inner, option = section_of(field.annotation), path_option(field)
        of_list = next((kind for one in get_args(field.annotation) if (kind := section_of(one))), None)
        if inner is not None and name in found:
            found[name] = with_absolute_paths(inner, found[name], folder)
        elif of_list is not None and isinstance(found.get(name), list):
            found[name] = [with_absolute_paths(of_list, one, folder) for one in found[name]]
        elif option is not None and isinstance(found.get(name), str):
            found[name] = _absolute(found[name], folder, option)
    return found


def local_folders(section: Section) -> list[str]:
    """Returns the folders that hold the files and folders which a configuration names, the longest first."""
    found: set[str] = set()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Section):
                found.update(local_folders(inner))
        if isinstance(value, str) and path_option(field) is not None and value.startswith("/"):
            found.add(str(Path(value).parent))
    return sorted(found - {"/"}, key=lambda folder: (-len(folder), folder))


def path_option(field: FieldInfo) -> PathOption | None:
    """Returns the mark of an option that can be a path."""
    inner = [mark for one in get_args(field.annotation) for mark in getattr(one, "__metadata__", ())]
    return next((mark for mark in (*field.metadata, *inner) if isinstance(mark, PathOption)), None)


def _absolute(value: str, folder: Path, option: PathOption) -> str:
    if address := _WITH_PATH.match(value):
        return f"{address[0]}{folder / value[address.end() :]}"
    if not value or value in NAMES or _ADDRESS.match(value):
        return value
    path = folder / os.path.expanduser(value)  # noqa: PTH111 - Path.expanduser fails if there is no such user
    if option.can_be_name and not value.startswith((".", "~")) and not path.exists():
        return value
    return str(path)
