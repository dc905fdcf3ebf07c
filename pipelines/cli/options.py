"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file; the embedded default without one.")
]
Overrides = Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="Override an option; can be repeated.")]
ImagePrefix = Annotated[
    str | None,
    typer.Option(help="Registry and folder of the images; as in images.json without it."),
]
ImageTag = Annotated[
    str | None,
    typer.Option("--tag", help="Tag of the images, never latest; as in images.json without it."),
]
