"""The page on air-gapped clusters names every image and every setting that there is."""

from __future__ import annotations

import re
from pathlib import Path

from mixtune.components.placement import Placement
from mixtune.components.shared.task_name import STEPS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "air-gapped.md").read_text(encoding="utf-8")


def test_every_image_is_named() -> None:
    images = {f"mixtune-{step}" for step in STEPS}
    for file in (ROOT / "k8s").rglob("*.yaml"):
        images |= set(re.findall(r"^\s+(?:- )?image: (\S+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    for file in (ROOT / "docker").rglob("Dockerfile"):
        images |= set(re.findall(r"^ARG BASE_IMAGE=(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(images) > len(STEPS) + 2
    assert [image for image in images if f"`{image}`" not in PAGE] == []


def test_every_setting_is_named() -> None:
    settings = [name for name in Placement.model_fields if name.startswith(("image_", "proxy_", "ca_"))]
    assert len(settings) == 4
    assert [name for name in settings if f"`placement.{name}" not in PAGE] == []
    options = re.findall(r"`(--[a-z-]+)`", PAGE)
    command = (ROOT / "docs" / "command.md").read_text(encoding="utf-8") + (
        ROOT / "docker" / "build_images.py"
    ).read_text()
    assert [one for one in options if one not in command and one not in ("--executor-image", "--network")] == []
