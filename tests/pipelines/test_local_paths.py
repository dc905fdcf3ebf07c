"""Paths that only this machine has are refused for a cluster, or their data is uploaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from typer.testing import CliRunner, Result

from mixtune.components.config import load
from mixtune.components.shared.data.sources import fingerprint
from mixtune.components.shared.errors import RefusedError, UnreachableError
from mixtune.pipelines.cli.main import app
from mixtune.pipelines.cluster.local_paths import read_for_cluster
from tests.s3_server import s3_server


def mixtune(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture
def store(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for variable, value in server.items():
        monkeypatch.setenv(variable, value)
    files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    if not files.exists("bucket"):
        files.mkdir("bucket")
    return files


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with a folder of texts, one file of labels, and a test file that matches a pattern."""
    for name in ("a", "b"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "text.txt").write_text(f"a text in {name}\n")
    for name in ("labels", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a text", "label": "good"}\n')
    finetune = {"source": str(tmp_path / "labels.jsonl"), "test_source": str(tmp_path / "te*.jsonl")}
    values = {
        "model": {"base": "scratch"},
        "data": {"pretrain": {"source": str(tmp_path / "texts")}, "finetune": finetune},
        "pretrain": {"steps": 10},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize(
    "command",
    [["compile", "--output", "OUT/pipeline.yaml"], ["upload"], ["submit"], ["check", "--cluster"]],
    ids=lambda one: one[0],
)
def test_commands_for_a_cluster_refuse_all_local_paths_at_once(
    config: Path, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "base").mkdir()
    arguments = [one.replace("OUT", str(tmp_path)) for one in command]
    done = mixtune(*arguments, config, "--set", f"model.base={tmp_path / 'base'}", "--set", "pretrain.steps=0")
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    assert [line.split()[1] for line in lines] == [
        "data.pretrain.source:", "data.finetune.source:", "data.finetune.test_source:", "model.base:",
    ]  # fmt: skip
    assert all("is on this machine, where pods cannot see it; give" in line for line in lines)
    assert not (tmp_path / "pipeline.yaml").exists()


def test_what_pods_can_have_is_accepted() -> None:
    known = ["data.pretrain.source=s3://bucket/text", "data.finetune.source=/data/in/the/image.jsonl"]
    assert read_for_cluster(None, known).data.pretrain.source == "s3://bucket/text"
    assert read_for_cluster(None).data.finetune.source == "embedded"


def test_data_is_uploaded_once_and_reads_as_before(config: Path, store: Any) -> None:
    made = read_for_cluster(config, [], "s3://bucket/data/")
    before, after = load(yaml.safe_load(config.read_text())).data, made.data
    assert before.pretrain.source
    assert after.pretrain.source
    assert after.finetune.source
    assert after.pretrain.source.startswith("s3://bucket/data/")
    assert after.finetune.source.endswith("/labels.jsonl")
    uploaded = store.find("bucket/data", detail=True)
    names = sorted(name.rpartition("/")[2] for name in uploaded)
    assert names == ["labels.jsonl", "test.jsonl", "text.txt", "text.txt"]
    local = Path(before.pretrain.source)
    assert {store.cat(name) for name in uploaded if name.endswith(".txt")} == {
        (local / name / "text.txt").read_bytes() for name in ("a", "b")
    }
    assert len(fingerprint(after.finetune)) == 64, "the sources can be read"
    assert read_for_cluster(config, [], "s3://bucket/data") == made
    assert store.find("bucket/data", detail=True) == uploaded, "nothing was uploaded again"
    (local / "a" / "text.txt").write_text("another text\n")
    assert read_for_cluster(config, [], "s3://bucket/data").data.pretrain.source != after.pretrain.source


def test_a_store_that_cannot_be_written_is_said_in_a_sentence(config: Path, store: Any) -> None:
    found = r"^--upload-data: data.pretrain.source cannot be uploaded to s3://nowhere-at-all/x/"
    with pytest.raises(UnreachableError, match=found):
        read_for_cluster(config, [], "s3://nowhere-at-all/x")
    with pytest.raises(RefusedError, match=r"^--upload-data: nonsense://x/\w+ cannot be used .*; give a URL such as"):
        read_for_cluster(config, [], "nonsense://x")
