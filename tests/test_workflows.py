"""The workflows and the examples for users: they parse, ask for little, and use options that the command has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mixtune.components.shared.task_name import STEPS
from mixtune.pipelines.cli import app
from tests.k8s.tools import zizmor

ROOT = Path(__file__).parents[1]
CI, RELEASE = (ROOT / ".github" / "workflows" / f"{name}.yaml" for name in ("ci", "release"))
GITHUB = [CI, RELEASE, ROOT / "docs" / "examples" / "github-actions.yaml"]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.yaml"))
SCRIPT = ROOT / "k8s" / "e2e.sh"
OWNERS = ("actions", "anchore", "pypa", "sigstore")
WRITES = {
    "test": set(), "wheel": {"id-token", "attestations"}, "images": {"packages"},
    "sign": {"packages", "id-token", "attestations"}, "index": {"id-token"}, "draft": {"contents"},
}  # fmt: skip
"""What each job of a release may write."""


def loaded(file: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("file", GITHUB, ids=lambda file: file.name)
def test_actions_are_pinned_by_commit(file: Path) -> None:
    for job in loaded(file)["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(rf"({'|'.join(OWNERS)})/[a-z-]+@[0-9a-f]{{40}}", step["uses"]), step
            # What comes from outside goes through the environment, never into the text of a script.
            assert "${{" not in step.get("run", ""), step
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


def test_workflows_write_no_more_than_they_must() -> None:
    for file in (CI, GITHUB[-1]):
        assert loaded(file)["permissions"] == {"contents": "read"}
        assert not any("permissions" in job for job in loaded(file)["jobs"].values())
    assert loaded(RELEASE)["permissions"] == {}
    found = {
        name: {what for what, how in job["permissions"].items() if how == "write"}
        for name, job in loaded(RELEASE)["jobs"].items()
    }
    assert found == WRITES


def test_a_release_tests_first_and_signs_every_image_before_the_index_has_the_wheel() -> None:
    jobs = loaded(RELEASE)["jobs"]
    assert {name: job.get("needs") for name, job in jobs.items()} == {
        "test": None, "wheel": "test", "images": "test", "sign": "images", "index": ["wheel", "sign"], "draft": "index",
    }  # fmt: skip
    assert jobs["sign"]["strategy"]["matrix"] == {"variant": ["cpu", "cuda"], "step": list(STEPS)}
    used = [step["uses"].partition("@")[0] for step in jobs["sign"]["steps"] if "uses" in step]
    assert used.index("anchore/scan-action") < used.index("sigstore/cosign-installer")
    assert {"actions/attest-build-provenance", "actions/attest-sbom"} <= set(used)
    assert {name for name, job in jobs.items() if "environment" in job} == {"images", "index"}, "a person agrees first"
    assert "--draft" in jobs["draft"]["steps"][-1]["run"]


def test_the_tag_of_a_release_must_be_the_version(tmp_path: Path) -> None:
    steps = loaded(RELEASE)["jobs"]["test"]["steps"]
    (command,) = [step["run"] for step in steps if step.get("name") == "The tag is the version"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for tag, accepted in ((f"v{version}", True), (f"v{version}1", False), ("v9.9.9", False)):
        environment = {**os.environ, "GITHUB_REF_NAME": tag}
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, check=False)
        assert (done.returncode == 0) == accepted, tag


@pytest.mark.parametrize("file", [CI, RELEASE], ids=lambda file: file.name)
def test_the_commands_are_those_of_the_makefile(file: Path) -> None:
    runs = [step["run"] for job in loaded(file)["jobs"].values() for step in job["steps"] if "run" in step]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {name for run in runs for line in re.findall(r"make ([a-z -]+)", run) for name in line.split()}
    assert targets
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in targets)
    assert ".ci/run" in runs


def test_zizmor_finds_nothing() -> None:
    command: list[str | Path]
    command = [zizmor(), "--offline", "--no-config", "--persona=pedantic", "--min-severity=medium", CI, RELEASE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_actionlint_finds_nothing() -> None:
    if (program := shutil.which("actionlint")) is None:
        pytest.skip("actionlint is not installed")
    done = subprocess.run([program, *GITHUB], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", [*EXAMPLES, SCRIPT, ROOT / "docs" / "kubeflow.md"], ids=lambda file: file.name)
def test_options_that_are_used_are_there(file: Path) -> None:
    text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    if file.suffix == ".yaml":
        list(yaml.safe_load_all(text))
    help_of: dict[str, str] = {}
    # A folded line goes on in the next, more indented one.
    commands = r"mixtune (check|upload|submit|wait|retry|stop|rerun|compile|deploy)\b"
    options_of = re.compile(commands + r"([^`|>\n]*(?:\n {4,}--[^`|>\n]*)*)")
    for command, options in options_of.findall(text):
        if command not in help_of:
            environment = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
            help_of[command] = CliRunner().invoke(app, [command, "--help"], env=environment).output
        for option in re.findall(r"--[a-z-]+", options):
            assert re.search(rf"{option}\b", help_of[command]), (command, option)
