"""The workflows and the examples for users: they parse, ask for little, and use options that the command has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mixtune.pipelines.cli import app

ROOT = Path(__file__).parents[1]
GITHUB = [ROOT / ".github" / "workflows" / "ci.yaml", ROOT / "docs" / "examples" / "github-actions.yaml"]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.yaml"))
SCRIPT = ROOT / "k8s" / "e2e.sh"


@pytest.mark.parametrize("file", GITHUB, ids=lambda file: file.name)
def test_actions_are_pinned_by_commit_and_read_only(file: Path) -> None:
    workflow: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        assert "permissions" not in job
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]), step
            # What comes from outside goes through the environment, never into the text of a script.
            assert "${{" not in step.get("run", ""), step
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


def test_the_projects_checks_are_those_of_its_makefile() -> None:
    commands = re.findall(r"run: (?:make )?(\S+)", GITHUB[0].read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"test", ".ci/run", "images"} == set(commands)
    assert all(re.search(rf"^{name}:", makefile, re.M) for name in ("test", "images"))


@pytest.mark.parametrize("file", [*EXAMPLES, SCRIPT, ROOT / "docs" / "kubeflow.md"], ids=lambda file: file.name)
def test_options_that_are_used_are_there(file: Path) -> None:
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    if file.suffix == ".yaml":
        list(yaml.safe_load_all(text))
    help_of: dict[str, str] = {}
    # A folded line goes on in the next, more indented one.
    commands = r"mixtune (check|upload|submit|wait|retry|stop|rerun|compile)\b"
    options_of = re.compile(commands + r"([^`|>\n]*(?:\n {4,}--[^`|>\n]*)*)")
    for command, options in options_of.findall(text):
        if command not in help_of:
            environment = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
            help_of[command] = CliRunner().invoke(app, [command, "--help"], env=environment).output
        for option in re.findall(r"--[a-z-]+", options):
            assert re.search(rf"{option}\b", help_of[command]), (command, option)
