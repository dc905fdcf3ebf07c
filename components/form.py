"""The form of a run in Kubeflow's user interface: which options have a field of their own, and how all others are given.

KFP sorts the fields by name and shows no descriptions, so the names explain themselves and begin with their group. All options
without a field are in one dict, `advanced`, with the configuration's own keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from .config import Config, describe, load
from .shared.errors import RefusedError
from .shared.section import option_paths, section_of

FIELDS = {
    "data_labelled": "data.finetune.source",
    "data_task": "data.finetune.task",
    "data_text": "data.pretrain.source",
    "gate_max_forgetting_share": "gate.max_forgetting_share",
    "gate_max_score_drop": "gate.max_score_drop",
    "mix_forgetting_budgets": "mixed.forgetting_budgets",
    "mix_lambdas": "mixed.lambdas",
    "mix_learning_rate": "mixed.learning_rate",
    "mix_steps": "mixed.steps",
    "model_base": "model.base",
    "model_max_length": "model.max_length",
    "name": "name",
    "pretrain_steps": "pretrain.steps",
    "seed": "seed",
}
"""Maps the fields of the form to the options of the configuration. `plan` takes the same names."""
ADVANCED = "advanced"
"""The field with all other options, in sections as in a configuration file."""
PLACEMENT = "placement"
"""The field with the placement of the GPU tasks, `GpuNodes`."""
ADVANCED_MEANING = (
    'All other options, in sections as in a configuration file, such as `{"finetune": {"batch_size": 32}}`. An option with a '
    'field of its own is refused here, except for null, which a field cannot hold. Null is null or `"null"`.'
)
NULL = "null"
"""Stands for null in `advanced`: KFP has no null in the defaults of a dict."""

EMPTY = ""
"""A text field that is empty stands for null, where null is the option's default."""
_MISSING = object()
_COMPILED = "is fixed in the compiled pipeline; set it in the configuration file and use `mixtune submit`"
_LOCAL = "is for runs on one machine; remove it"
NOT_IN_FORM = {
    "placement": _COMPILED,
    "mixed.start": _COMPILED,
    "tracking.offline_when_unreachable": _COMPILED,
    "tracking.tensorboard": _COMPILED,
    "tracking.uri": "comes from a Kubernetes secret; remove it",
    "tracking.experiment": "comes from a Kubernetes secret; remove it",
    "run": _LOCAL,
}
"""Sections and options that a run on a cluster cannot set, with what to do instead."""


def option(path: str) -> FieldInfo:
    """Returns the option of the schema with this path, such as `mixed.lambdas`."""
    *parents, last = path.split(".")
    section: Any = Config
    for name in parents:
        section = section_of(section.model_fields[name].annotation)
    found: FieldInfo = section.model_fields[last]
    return found


def field_type(name: str) -> Any:
    """Returns the Python type of a field of the form, from the schema."""
    return _plain(option(FIELDS[name]).annotation)


def field_meaning(name: str) -> str:
    """Returns what a field of the form means, from the schema: with its section, if other sections have the same option."""
    path = FIELDS[name]
    section, _, last = path.rpartition(".")
    shared = section and any(other.rpartition(".")[2] == last and other != path for other in option_paths(Config))
    return f"{describe(section)} {describe(path)}" if shared else describe(path)


def field_choices(name: str) -> tuple[str, ...]:
    """Returns the values that a field of the form can have; empty if they cannot be listed."""
    annotation = option(FIELDS[name]).annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _plain(annotation: Any) -> Any:
    """Removes null and limits from a type; one of several words is a text."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(one for one in get_args(annotation) if one is not type(None))
    if get_origin(annotation) is Literal:
        return str
    if get_origin(annotation) is list:
        return list[_plain(get_args(annotation)[0])]  # type: ignore[misc]
    return _plain(get_args(annotation)[0]) if hasattr(annotation, "__metadata__") else annotation


def field_defaults() -> dict[str, Any]:
    """Returns the schema's defaults of the fields. Required options have none."""
    options = {name: option(path) for name, path in FIELDS.items()}
    found = {name: one.get_default(call_default_factory=True) for name, one in options.items() if not one.is_required()}
    return {name: EMPTY if value is None else value for name, value in found.items()} | {ADVANCED: {}}


def _empty_is_null(name: str) -> bool:
    one = option(FIELDS[name])
    return not one.is_required() and one.get_default(call_default_factory=True) is None


def parameters(config: Config) -> dict[str, Any]:
    """Returns the values of the form for a configuration. `advanced` has those options that differ from their defaults."""
    values = config.model_dump(mode="json")
    advanced = config.model_dump(mode="json", exclude_defaults=True)
    form = field_defaults()
    for path in NOT_IN_FORM:
        _take(advanced, path)
    for name, path in FIELDS.items():
        value = _get(values, path)
        if value is not None or _empty_is_null(name):
            _take(advanced, path)
            form[name] = EMPTY if value is None else value
    form[ADVANCED] = _replaced({name: value for name, value in advanced.items() if value != {}}, None, NULL)
    return form


def read_form(
    given: Mapping[str, Any], compiled_in: str = "{}", check: Callable[[Config], list[str]] = lambda _: []
) -> Config:
    """Returns the configuration from the values of the form. The inverse of `parameters`.

    Args:
        given: the values. Other parameters of the run are ignored.
        compiled_in: options that are fixed in the package, as JSON: `{section: {option: value}}`.
        check: finds further problems, as in `load`.

    Raises:
        RefusedError: if there are problems; names all of them.
    """
    advanced = given.get(ADVANCED) or {}
    if not isinstance(advanced, Mapping):
        raise RefusedError(f"{ADVANCED}: must be a section with options, found {json.dumps(advanced, default=str)}")
    values = _replaced(advanced, NULL, None)
    problems = [f"{ADVANCED}.{path}: {words}" for path, words in NOT_IN_FORM.items() if _take(values, path)]
    for name, path in FIELDS.items():
        if _has(values, path):
            if _get(values, path) is None:
                continue
            problems.append(f"{ADVANCED}.{path}: has the field {name} in the form; set it there and remove it here")
        value = given.get(name, _MISSING)
        _set(values, path, None if value == EMPTY and _empty_is_null(name) else value)
    for section, options in json.loads(compiled_in).items():
        for key, value in options.items():
            _set(values, f"{section}.{key}", value)
    return load(values, check, problems)


def _replaced(value: Any, old: Any, new: Any) -> Any:
    """Returns a copy with another value for the old one, at any depth."""
    if isinstance(value, Mapping):
        return {name: _replaced(inner, old, new) for name, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, old, new) for inner in value]
    return new if value == old else value


def _parents(values: Mapping[str, Any], path: str) -> Iterator[Any]:
    yield values
    for key in path.split(".")[:-1]:
        values = values.get(key) if isinstance(values, Mapping) else None  # type: ignore[assignment]
        yield values


def _holder(values: Mapping[str, Any], path: str) -> Any:
    """Returns the section that an option is in; None if it is not there."""
    *_, holder = _parents(values, path)
    return holder if isinstance(holder, Mapping) and path.rpartition(".")[2] in holder else None


def _has(values: Mapping[str, Any], path: str) -> bool:
    return _holder(values, path) is not None


def _get(values: Mapping[str, Any], path: str) -> Any:
    return _holder(values, path)[path.rpartition(".")[2]]


def _take(values: dict[str, Any], path: str) -> bool:
    """Removes an option, and the sections that are empty without it. Returns whether it was there."""
    holder = _holder(values, path)
    if holder is None:
        return False
    del holder[path.rpartition(".")[2]]
    parent = path.rpartition(".")[0]
    if parent and not holder:
        _take(values, parent)
    return True


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    """Sets an option. A section that is no section stays as it is, for the schema to refuse it.

    For a missing value only its sections are created, so that the schema tells which option is required.
    """
    *parents, last = path.split(".")
    for key in parents:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            return
    if value is not _MISSING:
        values[last] = value
