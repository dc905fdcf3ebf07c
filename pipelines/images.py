"""Names of the steps' images: from `images.json`, which the build writes, or as the command's options say.

KFP's cache goes by these names, so that one that moves, such as `latest`, would bring results of older code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mixtune.components.shared.code_digest import code_digest
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.runtime import STEPS

_PREFIX = re.compile(r"[a-z0-9][a-z0-9._-]*(:\d+)?(/[a-z0-9][a-z0-9._-]*)*/")
_TAG = re.compile(r"\w[\w.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Images(BaseModel):
    """Which image each step runs in.

    Attributes:
        prefix: registry and folder, with a slash at its end; empty for images on this machine alone.
        tag: tag of all of them.
        digests: of those that a registry has, by step; they identify the image in place of the tag.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: str = ""
    tag: str
    digests: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_that_stay(self) -> Self:
        if self.prefix and not _PREFIX.fullmatch(self.prefix):
            raise RefusedError(
                f"--image-prefix: must be a registry and a folder with a slash at the end, found {self.prefix}"
            )
        if self.tag == "latest":
            raise RefusedError("--tag: latest moves, and KFP's cache would take it for the same image; give a version")
        if not _TAG.fullmatch(self.tag):
            raise RefusedError(f"--tag: must be letters, digits, dots, dashes and underscores, found {self.tag}")
        for step, digest in self.digests.items():
            if step not in STEPS or not _DIGEST.fullmatch(digest):
                raise RefusedError(f"images.json: {step}: {digest} is no digest of a step's image; build them anew")
        return self

    def of(self, step: str) -> str:
        """Full name of a step's image."""
        name = f"{self.prefix}mixtune-{step}"
        return f"{name}@{self.digests[step]}" if step in self.digests else f"{name}:{self.tag}"

    def save(self, file: Path) -> None:
        """Writes what `images` reads."""
        file.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")


def images(prefix: str | None = None, tag: str | None = None) -> Images:
    """The images to use: `images.json`, and in place of what it says what was given.

    Args:
        prefix: registry and folder; None is that of the file. A slash at its end is added where it is missing.
        tag: None is that of the file.

    Raises:
        RefusedError: if what was given is no name, or one that moves.
    """
    built = Images.model_validate_json(resources.files(__package__).joinpath("images.json").read_text(encoding="utf-8"))
    if prefix is None and tag is None:
        return built
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    return Images(prefix=built.prefix if prefix is None else prefix, tag=built.tag if tag is None else tag)


def images_named(names: Mapping[str, str]) -> Images:
    """The images that a compiled package names.

    Args:
        names: full name of each step's image, as `Images.of` gives it.

    Raises:
        RefusedError: if one is named otherwise.
    """
    prefix, tag, digests = "", "unknown", {}
    for step, name in names.items():
        prefix, found, version = name.partition(f"mixtune-{step}")
        if not found or version[:1] not in ("@", ":"):
            raise RefusedError(f"the package of that run has the image {name} for {step}, which is none of mixtune's")
        if version.startswith("@"):
            digests[step] = version[1:]
        else:
            tag = version[1:]
    return Images(prefix=prefix, tag=tag, digests=digests)


def source_digest() -> str:
    """Identifies the code of all steps; an image carries that of the code in it as the label `mixtune.code`."""
    return code_digest(["."])[:16]
