"""The commands of the page on single steps, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import yaml

from mixtune.components.shared.artifacts import ModelCard

from .forked import start
from .project import Project

PAGE = Path(__file__).parents[2] / "docs" / "one-step.md"


def test_the_documented_commands_run_as_they_stand(fresh: Project) -> None:
    stages = {name: fresh.config[name] | {"steps": 2} for name in ("pretrain", "finetune", "mixed")}
    (fresh.folder / "mixtune.yaml").write_text(yaml.safe_dump(fresh.config | stages))
    commands = re.findall(r"^\$ (.*)$", PAGE.read_text(encoding="utf-8").replace("\\\n", " "), re.M)
    log = fresh.folder / "log.txt"
    for command in commands:
        program, *arguments = shlex.split(command)
        words = [
            re.sub(r"\$\(cat (.*)\)", lambda found: (fresh.folder / found[1]).read_text().strip(), one)
            for one in arguments
        ]
        process = start(words, fresh.folder, {}, log)
        process.join(300)
        assert (program, process.exitcode) == ("mixtune", 0), log.read_text()
    assert [command.split()[1:3] for command in commands][:3] == [["plan", "mixtune.yaml"], *[["step", "prepare"]] * 2]
    evaluation = json.loads((fresh.folder / "work" / "evaluation" / "evaluation.json").read_text())
    assert [one["id"] for one in evaluation["candidates"]] == ["mixed-0.3"]
    assert (fresh.folder / "work" / "evaluation" / "mixed-0.3" / "test.examples.jsonl").is_file()
    assert ModelCard.load(fresh.folder / "work" / "mixed-0.3").mix_weight == 0.3
    # The folder is written again, and no other is.
    again = start(["plan", "mixtune.yaml", "--output", "parts"], fresh.folder, {}, log)
    other = start(["plan", "mixtune.yaml", "--output", "work"], fresh.folder, {}, log)
    again.join(60)
    other.join(60)
    assert (again.exitcode, other.exitcode) == (0, 2)
    assert "--output: work was not written by `mixtune plan`; choose another folder" in log.read_text()
