"""The command: what it prints, what it refuses, and its exit statuses."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner, Result

from mixtune.components.config import Config
from mixtune.components.shared.task_kinds import TASK_KINDS
from mixtune.components.shared.tracking.journal import sync_command
from mixtune.pipelines.cli import app
from mixtune.pipelines.cli.commands import _mlflow_hint
from mixtune.pipelines.configuration import read_config
from tests.components.shared.tiny import tiny_tokenizer, write_data
from tests.conftest import sentences

NEEDED = "model: {base: scratch}\ndata: {pretrain: {source: embedded}, finetune: {source: embedded}}\n"


def mixtune(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="mixtune")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `mixtune init` expects: data/text.jsonl and data/labelled.jsonl, and a model folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    rows: list[dict[str, Any]] = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(sentences(40))]
    for name in ("text", "labelled"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("task", TASK_KINDS)
@pytest.mark.parametrize("name", ["start", "demo"])
def test_init_prints_a_configuration_that_reads_as_what_it_started_from(tmp_path: Path, task: str, name: str) -> None:
    result = mixtune("init", "--task", task, "--from", name)
    if (name, task) == ("demo", "question_answering"):
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(
            "mixtune: data.finetune.task: is question_answering, which a Llama from scratch has"
        )
        return
    printed = result.stdout
    config = Config.model_validate(yaml.safe_load(printed))
    assert config.data.finetune.task == task
    jsonschema.validate(yaml.safe_load(printed), json.loads(mixtune("schema").stdout))
    # Every option stands there, with its default where it is a comment.
    uncommented = "\n".join(
        line.replace("# ", "", 1) if line.lstrip().startswith("# ") and ": " in line and line.count("# ") == 1 else line
        for line in printed.splitlines()
    )
    for option in (
        "replay_share",
        "max_forgetting_share",
        "head_learning_rate",
        "registered_model",
        "gradient_checkpointing",
    ):
        assert f"{option}: " in uncommented


def test_help_of_init_names_all_tasks() -> None:
    shown = " ".join(mixtune("init", "--help").output.replace("│", " ").split())
    assert f"Kind of task: {', '.join(TASK_KINDS)}." in shown


def test_version() -> None:
    shown = mixtune("--version")
    assert (shown.exit_code, shown.stdout) == (0, f"mixtune {version('mixtune')}\n")


@pytest.mark.parametrize("arguments", [("schema",), ("--help",), ("init",), ("check",), ("init", "--help")])
def test_a_full_disk_and_a_reader_that_ends_are_no_tracebacks(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "mixtune.pipelines.cli", *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "mixtune: the output: cannot be written (no space left on device); free space, or choose another folder, and run "
        "again\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_brackets_without_end_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(NEEDED + "finetune: " + "[" * 10_000)
    result = mixtune("check", str(tmp_path / "c.yaml"))
    assert (result.exit_code, result.stderr) == (
        2, f"mixtune: {tmp_path}/c.yaml: has too many brackets or levels inside each other; correct the file\n",
    )  # fmt: skip
    result = mixtune("check", "--set", f"finetune.steps={'[' * 10_000}")
    assert (result.exit_code, result.stderr) == (
        2, "mixtune: --set finetune.steps: has too many brackets or levels inside each other\n",
    )  # fmt: skip


def test_commands_to_paste_have_quotes_where_paths_have_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "my runs" / "one"
    hint = _mlflow_hint(f"sqlite:///{folder}/mlflow/mlflow.db", folder)
    assert shlex.split(hint)[-2:] == ["--backend-store-uri", f"sqlite:///{folder}/mlflow/mlflow.db"]
    assert shlex.split(sync_command(folder / ".mixtune" / "journal")) == ["mixtune", "sync", str(folder)]


def test_init_then_check(data: Path) -> None:
    (data / "mixtune.yaml").write_text(mixtune("init").stdout)
    result = mixtune("check", "mixtune.yaml")
    assert result.exit_code == 0, result.output
    assert "the configuration is valid" in result.stdout


def test_check_names_all_problems_at_once(data: Path) -> None:
    (data / "data" / "text.jsonl").unlink()
    (data / "mixtune.yaml").write_text(mixtune("init").stdout)
    overrides = ("data.finetune.label_column=nope", "model.base=./nowhere")
    result = mixtune("check", "mixtune.yaml", *(part for one in overrides for part in ("--set", one)))
    assert result.exit_code == 2
    for word in ("text.jsonl", "nope", "nowhere"):
        assert word in result.stderr
    assert all(line.startswith("mixtune: ") for line in result.stderr.splitlines())


@pytest.mark.parametrize("command", ["check", "run"])
def test_types_ranges_rules_overrides_and_files_are_told_in_one_pass(data: Path, command: str) -> None:
    (data / "data" / "text.jsonl").unlink()
    (data / "mixtune.yaml").write_text(mixtune("init").stdout)
    overrides = (
        "seed=many", "gate.interval=2", "mixed.lambda=[0.1]", "evaluate.metric=bleu", "data.finetune.task=classify",
        "data.finetune.dev_source=none.jsonl", "model.base=./nowhere", "model.max_length=0", "nonsense",
        "evaluate.champion=nobody",
    )  # fmt: skip
    result = mixtune(command, "mixtune.yaml", *(part for one in overrides for part in ("--set", one)))
    assert result.exit_code == 2
    told = [line.removeprefix("mixtune: ").split(":")[0] for line in result.stderr.splitlines()]
    assert sorted(told) == sorted(
        ["--set nonsense", "seed", "gate.interval", "mixed.lambda", "data.finetune.task", "model.base", "model.max_length",
         "data.pretrain.source", "data.finetune.dev_source", "evaluate.champion"]
    )  # fmt: skip
    assert not (data / "runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("- a list", "must hold sections"),
        ("a: [1, 2\nb: 3", "line 2"),
        ("mixed: {lambdas: [0.1, 7]}", "mixed.lambdas.1"),
        (
            "name: a\npretrain: {steps: 1}\nseed: 3\npretrain: {steps: 2}",
            "line 4: is not valid YAML (the key pretrain appears",
        ),
        ("pretrain:\n  steps: 1\n  steps: 2", "line 3"),
        ("name: 2001-99-99", "cannot be read"),
        ("? [a, b]\n: 1", "line 1"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    result = mixtune("check", str(file))
    assert result.exit_code == 2
    assert words in result.stderr


def test_the_same_key_in_two_sections_is_no_duplicate(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(NEEDED + "pretrain: &same {steps: 1}\nfinetune: {<<: *same, steps: 2}\nmixed: {steps: 3}")
    config = read_config(file)
    assert (config.pretrain.steps, config.finetune.steps, config.mixed.steps) == (1, 2, 3)


def test_an_override_into_a_section_that_holds_only_comments(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(NEEDED + "pretrain:\n  # steps: 100\n")
    assert read_config(file, ["pretrain.steps=10"]).pretrain.steps == 10


@pytest.mark.parametrize("name", ["none.json", "x" * 300, ".", ""])
def test_a_step_whose_configuration_cannot_be_read(name: str) -> None:
    result = mixtune("step", "pretrain", "--config", name)
    assert result.exit_code == 2
    assert result.stderr.startswith("mixtune: --config: ")
    assert "cannot be read" in result.stderr


@pytest.mark.parametrize("name", ["plan", "finish"])
def test_steps_that_need_a_whole_run_are_refused(name: str) -> None:
    result = mixtune("step", name)
    assert result.exit_code == 2
    assert "run only as part of a whole run" in result.stderr
    assert f"{name}," not in mixtune("step", "dance").stderr


def test_paths_that_are_too_long_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = str(tmp_path / ("x" * 300))
    for arguments in (("check", path), ("run", "--output", path), ("compile", "--output", f"{path}.yaml")):
        result = mixtune(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.startswith("mixtune: ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = mixtune("check", str(tmp_path / "none.yaml"))
    assert result.exit_code == 2
    assert "no such file" in result.stderr


@pytest.mark.parametrize("override", ["nonsense", "=1", "name.inner=1", "mixed.lambdas=[", "mixed.nothing=1"])
def test_overrides_that_make_no_sense(override: str) -> None:
    result = mixtune("check", "--set", override)
    assert result.exit_code == 2
    assert result.stderr.startswith("mixtune: ")


def test_the_embedded_default_is_good() -> None:
    assert mixtune("check").exit_code == 0


def test_schema_is_json_schema_with_descriptions() -> None:
    schema = json.loads(mixtune("schema").stdout)
    assert schema["$defs"]["Mixed"]["properties"]["replay_share"]["description"]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--output", "pipeline.txt"), "must end in .yaml"),
        (("--output", "p.yaml", "--format", "json"), "--format"),
        (("--output", "p.yaml", "--step", "finish"), "--step"),
        (("--output", "p.yaml", "--set", "placement.profile=moon"), "placement.profile"),
        (("--output", "p.yaml", "--set", "placement.gpus=1"), "has no GPUs"),
    ],
)
def test_compile_refuses_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = mixtune("compile", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_can_stand_in_paths(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(data))
    (data / "config.yaml").write_text(
        NEEDED.replace("source: embedded", "source: ~/data/text.jsonl", 1) + "pretrain: {steps: 1}\n"
    )
    checked = mixtune("check", "~/config.yaml")
    assert checked.exit_code == 0, checked.stderr
    (data / "config.yaml").write_text(NEEDED + "pretrain: {steps: 1}\n")
    compiled = mixtune("compile", "~/config.yaml", "--output=~/p.yaml", "--step", "compare")
    assert compiled.exit_code == 0, compiled.stderr
    assert (data / "p.yaml").is_file()
    assert mixtune("report", "~/data").stderr.startswith(f"mixtune: {data}/data: contains no report")
    assert not (data / "~").exists()


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_has_its_exit_status_wherever_it_comes(number: str, status: int) -> None:
    """Here in a command, before its own code catches errors: while it imports, for example."""
    program = (
        "import os, signal, sys\n"
        "import mixtune.pipelines.cli.main\n"
        "main = sys.modules['mixtune.pipelines.cli.main']\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"main.app.command('now')(lambda: os.kill(os.getpid(), signal.{number}))\n"
        "sys.argv = ['mixtune', 'now']\n"
        "main.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, "")


def test_compile_for_gitops(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    assert mixtune("compile", "--output", str(file), "--format", "kubernetes").exit_code == 0
    assert [one["kind"] for one in yaml.safe_load_all(file.read_text())] == ["Pipeline", "PipelineVersion"]


@pytest.mark.parametrize("format", ["ir", "kubernetes"])
def test_compile_replaces_only_what_it_has_written(tmp_path: Path, format: str) -> None:
    file = tmp_path / "config.yaml"
    arguments = ("compile", "--output", str(file), "--step", "compare", "--format", format)
    file.write_text("name: mine\n")
    refused = mixtune(*arguments)
    said = f"mixtune: --output: {file} was not written by `mixtune compile`; choose another file\n"
    assert (refused.exit_code, refused.stderr) == (2, said)
    assert file.read_text() == "name: mine\n"
    file.unlink()
    assert mixtune(*arguments).exit_code == 0
    assert mixtune(*arguments).exit_code == 0, "again"


def test_one_step_from_a_shell(tmp_path: Path) -> None:
    write_data(tmp_path / "text", "pretrain", None)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    part = {
        "seed": 0,
        "model": {"base": "scratch", "max_length": 32, "scratch": {"hidden_size": 16, "layers": 1, "heads": 2}},
        "pretrain": {"steps": 2, "batch_size": 2, "precision": "float32"},
        "fingerprint": "x",
    }
    (tmp_path / "part.json").write_text(json.dumps(part))
    folders = {"data": "text", "tokenizer": "tokenizer", "model": "model", "metrics": "metrics.json"}
    arguments = [word for name, path in folders.items() for word in ("--artifact", f"{name}={tmp_path / path}")]
    command = ("-m", "mixtune.pipelines.cli", "step", "pretrain", "--config", str(tmp_path / "part.json"))
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pretrain: 2/2 steps" in done.stdout
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "metrics.json").read_text())["tokens_pretrain"] > 0


def test_a_step_says_what_it_is_missing() -> None:
    result = mixtune("step", "pretrain", "--artifact", "nonsense=x", "--artifact", "data=y")
    assert result.exit_code == 2
    assert "nonsense: the step pretrain has no such argument" in result.stderr
    for word in ("tokenizer", "model", "metrics"):
        assert f"{word}: is required by the step pretrain" in result.stderr
    assert mixtune("step", "dance").exit_code == 2


def test_tasks_of_the_harness_where_it_is_not_installed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check says so, since the steps may run elsewhere; a run on this machine is refused before it starts."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (data / "m.yaml").write_text(NEEDED + "evaluate: {lm_eval: {tasks: [hellaswag]}}\npretrain: {steps: 1}\n")
    checked = mixtune("check", "m.yaml")
    assert checked.exit_code == 0, checked.output
    assert "a run on this machine would be refused: evaluate.lm_eval.tasks: needs the package lm_eval" in checked.output
    refused = mixtune("run", "m.yaml")
    assert refused.exit_code == 2
    assert "mixtune: evaluate.lm_eval.tasks: needs the package lm_eval" in refused.output
    assert not (data / "runs").exists()
