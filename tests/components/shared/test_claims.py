"""Data in volumes of a cluster: read where the pipeline has mounted them, refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from mixtune.components.prepare.config import PretrainData
from mixtune.components.shared.data.problems import Problems
from mixtune.components.shared.data.sources import check_source, fingerprint, named_sources, read
from mixtune.components.shared.data.tallies import Tallies
from mixtune.components.shared.errors import RefusedError

STREAM = PretrainData.model_validate(
    {"sources": [{"path": "pvc://corpora/web/*.jsonl"}], "dev_source": "pvc://own/a.txt"}
)


def test_a_mounted_claim_is_read_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTUNE_CLAIMS_DIR", str(tmp_path))
    (tmp_path / "corpora" / "web").mkdir(parents=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "corpora" / "web" / "1.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "own" / "a.txt").write_text("two\n")
    assert check_source(STREAM) == []
    problems = Problems()
    named = named_sources(STREAM)
    rows = [row for one in named for row in read(one.path, one.reading(STREAM, problems, Tallies()))]
    assert [row.values["text"] for row in rows] == ["one", "two"]
    before = fingerprint(STREAM)
    (tmp_path / "own" / "a.txt").write_text("three\n")
    assert fingerprint(STREAM) != before


def test_elsewhere_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "is in a volume of a cluster, which only a run on the cluster can read"
    for folder in ("", str(tmp_path)):  # here; on a cluster, in a package that was compiled for other claims
        monkeypatch.setenv("MIXTUNE_CLAIMS_DIR", folder)
        problems = check_source(STREAM)
        assert [problem.split(": ")[0] for problem in problems] == [
            "data.pretrain.sources.0.path",
            "data.pretrain.dev_source",
        ]
        assert all(said in problem for problem in problems)
        with pytest.raises(RefusedError, match=said):
            fingerprint(STREAM)


@pytest.mark.parametrize("source", ["pvc://", "pvc://claim", "pvc:///path", "pvc://Claim/path", "pvc://a_b/c"])
def test_what_names_no_claim(source: str) -> None:
    with pytest.raises(ValidationError, match="must look like pvc://claim/path"):
        PretrainData(source=source)
