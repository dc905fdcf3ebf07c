"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


def with_home(path: str) -> str:
    """Replaces `~` by the home folder: a shell leaves it as it is in `--output=~/run`."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser fails if there is no such user, and changes URLs


def expanded(path: Path | None) -> Path | None:
    """Replaces `~` by the home folder in a path."""
    return path and Path(with_home(str(path)))


ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CONFIG]",
        callback=expanded,
        help="YAML file; - is standard input. Without it, the embedded configuration is used.",
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="Override an option; a relative path starts at the working directory. Can be repeated.",
    ),
]
ImagePrefix = Annotated[
    str | None, typer.Option(help="Registry and folder of the images (default: as in images.json).")
]
ImageTag = Annotated[
    str | None,
    typer.Option("--tag", help="Tag of the images; latest is refused (default: as in images.json)."),
]
UploadData = Annotated[
    str | None,
    typer.Option(
        "--upload-data",
        metavar="URL",
        help="Upload data files of this machine to this folder of an object store, such as s3://bucket/data.",
    ),
]


@dataclass(frozen=True)
class Server:
    """The options that connect to KFP."""

    host: Annotated[
        str | None,
        typer.Option(
            help="Address of KFP (default: KF_PIPELINES_ENDPOINT, else the service of the cluster that this runs in)."
        ),
    ] = None
    namespace: Annotated[str | None, typer.Option(help="Your namespace, if KFP runs in multi-user mode.")] = None
    token_file: Annotated[
        Path | None,
        typer.Option(
            callback=expanded,
            help="File with a bearer token (default: MIXTUNE_KFP_TOKEN, else MIXTUNE_KFP_TOKEN_FILE, else the pod's own).",
        ),
    ] = None
    ca: Annotated[
        Path | None,
        typer.Option(
            callback=expanded, help="File with the certificate authority of the address (default: MIXTUNE_KFP_CA)."
        ),
    ] = None


@dataclass(frozen=True)
class Waiting:
    """The options of a command that waits for a run and shows its result."""

    timeout: Annotated[
        str | None, typer.Option(help="How long to wait: 90s, 30m, 6h or 1d (default: until the run has ended).")
    ] = None
    pending_timeout: Annotated[
        str | None,
        typer.Option(
            help="How long a task may be pending, such as 15m. After that, stop waiting with status 5; the run continues."
        ),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; progress goes to standard error.")] = (
        False
    )
    summary: Annotated[
        Path | None, typer.Option(callback=expanded, help="Append the result to this file, as Markdown.")
    ] = None

    @property
    def waits(self) -> bool:
        """Tells whether to wait for the end of the run."""
        return True

    @property
    def seconds(self) -> float | None:
        """Returns the time limit.

        Raises:
            RefusedError: if it is not a duration.
        """
        return _seconds(self.timeout, "--timeout")

    @property
    def pending_seconds(self) -> float | None:
        """Returns the time limit for pending tasks.

        Raises:
            RefusedError: if it is not a duration.
        """
        return _seconds(self.pending_timeout, "--pending-timeout")

    def check(self) -> None:
        """Checks the time limits before a run is created.

        Raises:
            RefusedError: if one of them is not a duration.
        """
        _ = self.seconds, self.pending_seconds

    def tell(self, line: str) -> None:
        """Shows a line; with `--json` on standard error."""
        print(line, file=sys.stderr if self.as_json else sys.stdout, flush=True)


@dataclass(frozen=True)
class MaybeWaiting(Waiting):
    """The options of a command that starts a run and waits for it on request."""

    wait: Annotated[bool, typer.Option("--wait", help="Wait until the run has ended.")] = False

    @property
    def waits(self) -> bool:
        """Tells whether to wait for the end of the run. A time limit implies it."""
        return self.wait or bool(self.timeout or self.pending_timeout)


def _seconds(text: str | None, option: str) -> float | None:
    from ..cluster.waiting import seconds_of

    return seconds_of(text, option) if text else None


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces each parameter whose type is a dataclass of options by the fields of the dataclass, which typer can read."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            groups[name] = kind
            own = get_type_hints(kind, include_extras=True)
            parameters += [
                inspect.Parameter(one.name, parameter.KEYWORD_ONLY, default=one.default, annotation=own[one.name])
                for one in dataclasses.fields(kind)
            ]
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=kind))

    @functools.wraps(command)
    def expanded(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{one.name: given.pop(one.name) for one in dataclasses.fields(kind)})
        command(**given)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {one.name: one.annotation for one in parameters}
    return expanded
