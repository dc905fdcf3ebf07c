"""Relative paths: in a file relative to its folder, on the command line relative to the working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtune.components.config import Config
from mixtune.components.shared.section import Section, section_of
from mixtune.pipelines.configuration import annotated, init_values, read_config
from mixtune.pipelines.generate import configuration_page
from mixtune.pipelines.paths import RELATIVE, path_option, with_absolute_paths


def path_options(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if inner := section_of(field.annotation):
            yield from path_options(inner, f"{prefix}{name}.")
        elif path_option(field):
            yield f"{prefix}{name}"


OPTIONS = list(path_options(Config))


def nested(option: str, value: Any) -> Any:
    for name in reversed(option.split(".")):
        value = {name: value}
    return value


def value_of(config: Any, option: str) -> Any:
    for name in option.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration with relative paths, in a folder that is not the working directory."""
    folder = tmp_path / "project"
    for one in (folder / "models" / "base", tmp_path / "here" / "models" / "other"):
        one.mkdir(parents=True)
    values = {
        "model": {"base": "models/base"},
        "data": {
            "pretrain": {"source": "data/*.jsonl", "dev_source": "./dev.jsonl", "test_source": "../test.jsonl"},
            "finetune": {"source": "file://data/labelled.csv"},
        },
        "evaluate": {"champion": "models/old", "lm_eval": {"tasks_folder": "tasks"}},
        "placement": {"profiles_file": "pools.yaml"},
        "tracking": {"uri": "sqlite:///mlflow.db"},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_paths_in_a_file_are_relative_to_its_folder(project: Path) -> None:
    config = read_config(
        Path("../project/c.yaml"), ["data.finetune.dev_source=labelled.csv", "evaluate.champion=~/old"]
    )
    folder = Path.cwd() / ".." / "project"
    assert config.model.base == f"{folder}/models/base"
    pretrain = config.data.pretrain
    assert pretrain.source == f"{folder}/data/*.jsonl"
    assert (pretrain.dev_source, pretrain.test_source) == (f"{folder}/dev.jsonl", f"{folder}/../test.jsonl")
    assert config.data.finetune.source == f"file://{folder}/data/labelled.csv"
    assert config.evaluate.lm_eval.tasks_folder == f"{folder}/tasks"
    assert config.placement.profiles_file == f"{folder}/pools.yaml"
    assert config.tracking.uri == f"sqlite:///{folder}/mlflow.db"
    # Those on the command line are relative to the working directory.
    assert config.data.finetune.dev_source == f"{Path.cwd()}/labelled.csv"
    assert config.evaluate.champion == os.path.expanduser("~/old")  # noqa: PTH111
    assert read_config(project / "c.yaml", ["model.base=models/other"]).model.base == f"{Path.cwd()}/models/other"
    assert read_config(project / "c.yaml", ["model={base: ./x}"]).model.base == f"{Path.cwd()}/x"


def test_standard_input_and_pipes_are_relative_to_the_working_directory(project: Path) -> None:
    text = (project / "c.yaml").read_text()
    code = (
        "import sys; from pathlib import Path; from mixtune.pipelines.configuration import read_config\n"
        "print(read_config(Path(sys.argv[1])).data.pretrain.source)"
    )
    for name in ("-", "/dev/stdin"):
        with (project / "c.yaml").open() as file:
            for source in ({"input": text}, {"stdin": file}):
                done = subprocess.run(
                    [sys.executable, "-c", code, name], capture_output=True, text=True, check=True, **source
                )
                assert done.stdout == f"{Path.cwd()}/data/*.jsonl\n"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_path_option_becomes_absolute(option: str) -> None:
    made = with_absolute_paths(Config, nested(option, "./a/b"), Path("/folder"))
    assert value_of(made, option) == "/folder/a/b"
    made = with_absolute_paths(Config, nested(option, "/a/b"), Path("/folder"))
    assert value_of(made, option) == "/a/b"


def test_every_description_of_a_path_says_what_it_is_relative_to() -> None:
    words = " ".join(annotated(init_values("start", "classification")).replace("#", " ").split())
    assert words.count(RELATIVE) == len(OPTIONS)
    assert RELATIVE in configuration_page()


def test_which_options_are_paths() -> None:
    names = ("source", "dev_source", "test_source")
    others = [
        "model.base",
        "model.chat_template",
        "evaluate.champion",
        "evaluate.lm_eval.tasks_folder",
        "tracking.uri",
        "placement.profiles_file",
    ]
    assert sorted(OPTIONS) == sorted(
        [*others, *(f"data.{one}.{name}" for one in ("pretrain", "finetune") for name in names)]
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model.base", "scratch"), ("model.base", "owner/name"), ("model.base", "gpt2"),
        ("data.pretrain.source", "embedded"), ("data.pretrain.source", "hub:owner/name/config@main#train"),
        ("data.pretrain.source", "s3://bucket/text.jsonl"), ("data.pretrain.source", "https://x.org/a.csv"),
        ("data.pretrain.source", "simplecache::https://x.org/a.csv"), ("data.pretrain.source", "file:///data/a.csv"),
        ("evaluate.champion", "models:/name@alias"), ("evaluate.champion", "models:/name/3"),
        ("tracking.uri", "http://localhost:5000"), ("tracking.uri", "databricks"), ("tracking.uri", "databricks://profile"),
        ("tracking.uri", "sqlite:////data/mlflow.db"), ("tracking.uri", "file:///data/mlruns"), ("tracking.uri", None),
        ("data.pretrain.source", 3),
    ],
)  # fmt: skip
def test_names_and_addresses_are_left_alone(option: str, value: Any) -> None:
    assert with_absolute_paths(Config, nested(option, value), Path("/folder")) == nested(option, value)
