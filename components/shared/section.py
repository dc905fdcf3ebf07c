"""The base class of all groups of options, and the sentences about what is wrong with their values.

Options are checked in one pass. An option with an invalid value is left out of the result of `read_section`; a check that
reads it ends with `InvalidOptionError` and is skipped, all other checks run.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from .errors import RefusedError
from .value_problems import VALID_TEXTS, of_alternatives, sentence

PLACEHOLDER = "{{$"
"""Beginning of the placeholders that KFP replaces in constants, file names and parameters."""
_STAND_IN = "-"
_RULES_LATER = {"rules": "later"}

Rule = TypeVar("Rule", bound=Callable[[Any], Iterator[str]])
AnySection = TypeVar("AnySection", bound="Section")


class InvalidOptionError(AttributeError):
    """A check read an option whose value is invalid, which has been told already."""


def rule(method: Rule) -> Rule:
    """Marks a method of a section that compares its options and yields a sentence for each problem."""
    method.is_rule = True  # type: ignore[attr-defined]
    return method


def matching(pattern: str, valid: str) -> StringConstraints:
    """Limits a text to a regular expression.

    Args:
        valid: what is valid, for people: the end of a sentence that begins with "must".
    """
    VALID_TEXTS[pattern] = valid
    return StringConstraints(pattern=pattern)


class Section(BaseModel):
    """A group of options: immutable, and unknown keys are refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    replaced_options: ClassVar[dict[str, str]] = {}
    """For each option that the section no longer has, what to write instead."""

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, values: Any) -> Any:
        """Treats a section whose options are all commented out, which YAML reads as null, as its defaults."""
        if not isinstance(values, dict):
            return values
        # Null is null where it is a value: `LambdaSchedule | None`.
        sections = {
            name for name, field in cls.model_fields.items() if section_of(field.annotation) is field.annotation
        }
        return {name: {} if value is None and name in sections else value for name, value in values.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses values that pydantic or Kubeflow would silently change."""
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, str) and PLACEHOLDER in part for part in parts):
            raise ValueError(f"must not contain {PLACEHOLDER}, which Kubeflow replaces")
        # Python's booleans are numbers: `learning_rate: yes` would be 1.0.
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else None
        if any(isinstance(part, bool) for part in parts) and not _takes_bool(annotation):
            raise ValueError("must not be true or false (in YAML also yes, no, on, off)")
        return value

    @model_validator(mode="after")
    def _keeps_its_rules(self, info: ValidationInfo) -> Self:
        if info.context != _RULES_LATER and (problems := list(self._broken_rules())):
            raise PydanticCustomError("rule", "{sentence}", {"sentence": "; ".join(problems)})
        return self

    def _broken_rules(self) -> Iterator[str]:
        for kind in type(self).__mro__:
            for method in vars(kind).values():
                if not getattr(method, "is_rule", False):
                    continue
                with contextlib.suppress(ValidationError):  # it made a section of one that breaks its own rules
                    yield from known(functools.partial(method, self))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise InvalidOptionError(name)
            return super().__getattr__(name)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Returns the JSON Schema, in which null stands for a section of defaults, as `_empty_section` reads it."""
        made = handler(schema)
        if not any(field.is_required() for field in cls.model_fields.values()):
            handler.resolve_ref_schema(made)["type"] = ["object", "null"]
        return made

    def to_json(self) -> str:
        """Returns canonical JSON: equal configurations give equal strings, so that caches can compare them."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads the JSON that `to_json` returned.

        Raises:
            RefusedError: if fields are invalid; names all of them.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RefusedError(*describe_problems(error, cls)) from None


def known(check: Callable[[], Iterable[str]]) -> list[str]:
    """Returns the problems that a check finds, until it reads an option whose value is invalid."""
    found: list[str] = []
    with contextlib.suppress(InvalidOptionError):
        found.extend(check())
    return found


def section_of(annotation: Any) -> type[Section] | None:
    """Returns the section class of a field's type; None if it is no section."""
    for one in _types_of(annotation):
        if isinstance(one, type) and issubclass(one, Section):
            return one
    return None


def read_section(kind: type[AnySection], values: Mapping[str, Any]) -> tuple[AnySection, list[str]]:
    """Validates as much of a section as possible.

    Returns:
        The section, without the options whose values are invalid, and a sentence for each problem.

    Raises:
        RefusedError: if nothing of it can be read.
    """
    left = copy.deepcopy(dict(values))
    invalid: list[tuple[str, ...]] = []
    problems: list[str] = []
    while True:
        try:
            section = kind.model_validate(left, context=_RULES_LATER)
            break
        except ValidationError as error:
            problems += describe_problems(error, kind, told=invalid)
            places = {_option_at(kind, item["loc"]) for item in error.errors(include_url=False, include_input=False)}
            changed = [_replace(kind, left, place) for place in places]
            if not any(changed):
                raise RefusedError(*problems) from None
            invalid += places
    for place in invalid:
        _leave_out(section, place)
    return section, problems + list(_broken_rules_below(section, ""))


def _option_at(kind: type[Section], location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Returns the option in which a problem is, without the part of its value."""
    place: list[str] = []
    inner: type[Section] | None = kind
    for part in map(str, location):
        if inner is None:
            break
        place.append(part)
        field = inner.model_fields.get(part)
        inner = section_of(field.annotation) if field else None
    return tuple(place)


def _replace(kind: type[Section], values: dict[str, Any], place: tuple[str, ...]) -> bool:
    """Deletes an invalid value, or replaces it if one is required. Returns whether this changed anything."""
    *parents, last = place
    for parent in parents:
        inner = section_of(kind.model_fields[parent].annotation)
        assert inner is not None
        kind = inner
        values[parent] = values = values.get(parent) or {}
    field = kind.model_fields.get(last)
    if field and field.is_required():
        before, values[last] = values.get(last), {} if section_of(field.annotation) else _STAND_IN
        return bool(before != values[last])
    return values.pop(next((key for key in values if str(key) == last), last), values) is not values


def _leave_out(section: Section, place: tuple[str, ...]) -> None:
    for name in place[:-1]:
        if name not in section.__dict__:
            return
        section = section.__dict__[name]
    section.__dict__.pop(place[-1], None)


def _broken_rules_below(section: Section, path: str) -> Iterator[str]:
    yield from (f"{path}: {problem}" if path else problem for problem in section._broken_rules())
    for name, value in section.__dict__.items():
        below = f"{path}.{name}" if path else name
        parts = [(f"{below}.{n}", one) for n, one in enumerate(value)] if isinstance(value, list) else [(below, value)]
        for where, part in parts:
            if isinstance(part, Section):
                yield from _broken_rules_below(part, where)


def _takes_bool(annotation: Any) -> bool:
    return annotation is bool or isinstance(annotation, bool) or any(map(_takes_bool, get_args(annotation)))


def describe_problems(error: ValidationError, kind: type[BaseModel], told: Iterable[tuple[str, ...]] = ()) -> list[str]:
    """Returns a sentence for each problem that pydantic found: the field, the value, and what is valid.

    Args:
        kind: what was validated.
        told: options whose problems are known and left out.
    """
    items = [
        item
        for item in error.errors(include_url=False)
        if not any(tuple(map(str, item["loc"]))[: len(place)] == place for place in told)
    ]
    problems: list[tuple[tuple[int | str, ...], str]] = []
    for depth, group in itertools.groupby(items, key=lambda item: _alternatives_at(kind, item["loc"])):
        if depth:
            problems += of_alternatives(list(group), depth[0])
            continue
        for item in group:
            if item["type"] == "extra_forbidden":
                told_of = f"there is no such option; {_instead_of(tuple(map(str, item['loc'])), kind)}"
            else:
                told_of = sentence(item["type"], item["msg"], item.get("ctx", {}), item["input"])
            problems.append((item["loc"], told_of))
    return [": ".join(filter(None, (".".join(map(str, place)), told_of))) for place, told_of in problems]


def _alternatives_at(
    kind: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[int, tuple[int | str, ...]] | None:
    """Returns depth and place of the option in which a problem is, if several types are valid there; else None."""
    section: type[BaseModel] | None = kind
    for depth, part in enumerate(location, start=1):
        field = section.model_fields.get(str(part)) if section else None
        if field is None:
            return None
        section = section_of(field.annotation)
        types = [one for one in _types_of(field.annotation) if one is not NoneType]
        if section is None and len(types) > 1:
            return (depth, location[:depth]) if len(location) > depth else None
    return None


def _types_of(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _instead_of(location: tuple[str, ...], kind: type[BaseModel]) -> str:
    """Returns what to do about an unknown option: the nearest name in its section, else the same name in another one."""
    *parents, last = location
    section: Any = kind
    for name in parents:
        section = section and _below(section).get(name)
    replaced = getattr(section, "replaced_options", {})  # a placement profile is no section
    if last in replaced:
        return str(replaced[last])
    near = difflib.get_close_matches(last, section.model_fields if section else (), n=1)
    if near:
        return f"did you mean {'.'.join([*parents, near[0]])}?"
    elsewhere = [path for path in option_paths(kind) if path.rpartition(".")[2] == last]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else "remove it or correct its name"


def _below(kind: type[BaseModel]) -> dict[str, type[Section] | None]:
    return {name: section_of(field.annotation) for name, field in kind.model_fields.items()}


def option_paths(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields the paths of all sections and options below a section."""
    for name, inner in _below(kind).items():
        yield prefix + name
        if inner:
            yield from option_paths(inner, f"{prefix}{name}.")
