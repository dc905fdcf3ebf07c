"""Names of the steps' images, from `images.json`, which the build writes, or from the command's options.

KFP's cache keys contain these names. A mutable name such as `latest` would return cached results of older code.
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
from mixtune.components.shared.task_name import STEPS

_PREFIX = re.compile(r"[a-z0-9][a-z0-9._-]*(:\d+)?(/[a-z0-9][a-z0-9._-]*)*/")
_TAG = re.compile(r"\w[\w.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Images(BaseModel):
    """The images of the steps.

    Attributes:
        prefix: registry and folder, with a trailing slash; empty for local images.
        tag: tag of all images.
        digests: digests of images in a registry, by step; they replace the tag.
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
            raise RefusedError(
                "--tag: latest is a moving tag, so KFP would reuse results of older images; give a version"
            )
        if not _TAG.fullmatch(self.tag):
            raise RefusedError(f"--tag: must be letters, digits, dots, dashes and underscores, found {self.tag}")
        for step, digest in self.digests.items():
            if step not in STEPS or not _DIGEST.fullmatch(digest):
                raise RefusedError(
                    f"images.json: {step}: {digest} is not the digest of a step's image; build the images again"
                )
        return self

    def of(self, step: str) -> str:
        """Returns the full name of a step's image."""
        name = f"{self.prefix}mixtune-{step}"
        return f"{name}@{self.digests[step]}" if step in self.digests else f"{name}:{self.tag}"

    def save(self, file: Path) -> None:
        """Writes the file that `images` reads."""
        file.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")


def images(prefix: str | None = None, tag: str | None = None) -> Images:
    """Returns the images of `images.json`, with the given values in place of the file's.

    Args:
        prefix: registry and folder; None uses the file's. A missing trailing slash is added.
        tag: tag of all images; None uses the file's.

    Raises:
        RefusedError: if a value is not a valid name, or is mutable.
    """
    built = Images.model_validate_json(resources.files(__package__).joinpath("images.json").read_text(encoding="utf-8"))
    if prefix is None and tag is None:
        return built
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    return Images(prefix=built.prefix if prefix is None else prefix, tag=built.tag if tag is None else tag)


def images_named(names: Mapping[str, str]) -> Images:
    """Returns the images that a compiled package names.

    Args:
        names: full name of each step's image, as returned by `Images.of`.

    Raises:
        RefusedError: if a name has another form.
    """
    prefix, tag, digests = "", "unknown", {}
    for step, name in names.items():
        prefix, found, version = name.partition(f"mixtune-{step}")
        if not found or version[:1] not in ("@", ":"):
            raise RefusedError(
                f"the package of that run has the image {name} for {step}, which is not one of mixtune's"
            )
        if version.startswith("@"):
            digests[step] = version[1:]
        else:
            tag = version[1:]
    return Images(prefix=prefix, tag=tag, digests=digests)


def source_digest() -> str:
    """Returns a digest of the code of all steps. Images store the digest of their code in the label `mixtune.code`."""
    return code_digest(["."])[:16]
