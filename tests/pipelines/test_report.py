"""`mixtune report` over reports that `compare` wrote: what stands side by side, and what cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mixtune.components.shared.artifacts import read_json, write_json
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.tracker import Tracker
from mixtune.pipelines.cli import app
from mixtune.pipelines.local.folder import claim
from tests.components.compare.made import INTERPOLATED, MIXED, Made, compare, write_all
from tests.stores import new_store

OTHER = Made("mixed-0.5", "mixed", forgets=0.2, right=0.64, mix_weight=0.5)


def report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """Puts an output folder with a report below another folder."""
    folder = tmp_path_factory.mktemp("made")
    runs: dict[str, dict[str, Any]] = {
        "one": {"candidates": [MIXED]},
        "seeds": {"candidates": [MIXED, replace(MIXED, id="mixed-0.3-seed-1", seed=1, right=0.95)]},
        "two": {"candidates": [replace(OTHER, divergence=0.25), replace(MIXED, right=0.5)]},
        "f1": {"candidates": [MIXED], "metric": "macro_f1"},
        "regression": {"candidates": [MIXED], "kind": "regression", "metric": "pearson"},
        "masked": {"candidates": [MIXED], "likelihood": "fixed-mask pseudo-likelihood"},
        "text": {"candidates": [MIXED], "documents": 50},
        "labels": {"candidates": [MIXED], "examples": 200},
    }
    for name, how in runs.items():
        candidates = how.pop("candidates")
        inputs = write_all(folder / name, *candidates, alphas=(INTERPOLATED,), **how)
        done = compare(folder / name, inputs)
        shutil.copytree(done.folder, folder / name / "report")
        path = folder / name / "report" / "report.json"
        found = read_json(path, "a report")
        for row in found["candidates"]:
            row["base"] = f"base-of-{name}"
        write_json(path, {**found, "name": name})

    def put(target: Path, name: str) -> Path:
        shutil.copytree(folder / name / "report", target / name / "report")
        return target / name

    return put


def test_all_candidates_of_all_runs_in_one_table(tmp_path: Path, made: Callable[[Path, str], Path]) -> None:
    one, two = made(tmp_path, "one"), made(tmp_path, "two")
    done = report(one, two / "report", "--output", tmp_path / "joint")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "joint" / "report.json").read_text(encoding="utf-8"))
    assert (found["schema_version"], found["kind"]) == (1, "runs")
    assert [run["name"] for run in found["runs"]] == ["one", "two"]
    assert [(row["run"], row["id"]) for row in found["candidates"]] == [
        ("one", "pretrained"), ("one", "finetuned"), ("one", "mixed-0.3"), ("one", "interpolated-0.5"),
        ("two", "pretrained"), ("two", "finetuned"), ("two", "mixed-0.3"), ("two", "mixed-0.5"), ("two", "interpolated-0.5"),
    ]  # fmt: skip
    assert found["not_comparable"] == []
    assert found["groups"] == [["one", "two"]]
    # The front is a joint one: what another run beats is not on it.
    front = {(row["run"], row["id"]) for row in found["candidates"] if row["pareto"]}
    assert ("two", "mixed-0.5") in front
    assert ("two", "mixed-0.3") not in front
    for word in ("one", "two", "mixed-0.5", "base-of-two", "met, selected", str(tmp_path / "joint" / "report.html")):
        assert word in done.output
    assert "no paired difference" in done.output
    page, twin = ((tmp_path / "joint" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    for text in (page, twin, done.output):
        assert "own pretrained model" in text  # the base models differ
        assert "overlap" in text
    assert len([line for line in twin.splitlines() if line.startswith("|")]) == 2 + 2 + 2 + 9
    assert page.count("<svg") == 1
    assert found["seeds"] == []
    assert "Over several seeds" not in page + twin
    assert (tmp_path / "joint" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert page.count("<table") == page.count("<caption")
    (of_other,) = [row for row in found["candidates"] if row["id"] == "mixed-0.5"]
    assert of_other["kl_from_pretrained"]["value"] == 0.25
    head, *rows = [
        [cell.strip() for cell in line.split("|")]
        for line in twin.split("## Candidates")[1].splitlines()
        if "|" in line
    ]
    column = head.index("KL from pretrained, nats per token")
    assert {len(row) for row in rows} == {len(head)}
    assert [row[column][:5] for row in rows if row[2] in ("mixed-0.5", "interpolated-0.5")] == ["–", "0.250", "–"]
    assert page.count("KL from pretrained") == 1
    assert "KL, nats per token" in done.output
    assert "0.250" in next(line for line in done.output.splitlines() if "mixed-0.5" in line)


def test_of_several_seeds_the_mean_is_told_and_the_first_is_drawn(
    tmp_path: Path, made: Callable[[Path, str], Path]
) -> None:
    seeds = made(tmp_path, "seeds")
    done = report(seeds, made(tmp_path, "one"), "--output", tmp_path / "joint")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "joint" / "report.json").read_text(encoding="utf-8"))
    (alone,) = json.loads((seeds / "report" / "report.json").read_text(encoding="utf-8"))["seeds"]
    assert found["seeds"] == [{"run": "seeds", **alone}]
    page, twin = ((tmp_path / "joint" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    mean = f"{alone['task_score']['mean']:.3f} ± {alone['task_score']['sd']:.3f}"
    assert f"<td>{mean}</td>" in page
    assert f"| seeds | mixed-0.3 | 2 | {mean} |" in twin
    # The better seed beats all others, and is a row only.
    (further,) = [row for row in found["candidates"] if row["seed"] is not None]
    assert (further["id"], further["seed"], further["pareto"]) == ("mixed-0.3-seed-1", 1, False)
    assert any(row["pareto"] for row in found["candidates"] if row["id"] == "mixed-0.3")
    figure = (tmp_path / "joint" / "pareto.svg").read_text(encoding="utf-8")
    assert "mixed-0.3" in figure
    assert "seed-1" not in figure


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("f1", "task scores cannot be compared, since the metrics differ (accuracy, macro-F1)"),
        ("regression", "task scores cannot be compared, since the tasks differ (classification, regression)"),
        ("labels", "task scores cannot be compared, since the held-out examples differ ("),
        ("text", "bits per byte and forgetting cannot be compared, since the held-out text differs ("),
        ("masked", "the losses are not the same measure (causal, fixed-mask pseudo-likelihood)"),
    ],
)
def test_what_cannot_be_compared_is_said_and_drawn_apart(
    tmp_path: Path, made: Callable[[Path, str], Path], other: str, said: str
) -> None:
    done = report(made(tmp_path, "one"), made(tmp_path, other), "--output", tmp_path / "joint")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "joint" / "report.json").read_text(encoding="utf-8"))
    assert all(sentence.startswith(f"one and {other}: ") for sentence in found["not_comparable"])
    assert sum(said in sentence for sentence in found["not_comparable"]) == 1
    # The made examples change with the number of documents.
    assert len(found["not_comparable"]) == (2 if other == "text" else 1)
    assert said in (tmp_path / "joint" / "report.html").read_text(encoding="utf-8")
    assert found["groups"] == [["one"], [other]]
    assert "KL" not in (tmp_path / "joint" / "report.md").read_text(encoding="utf-8") + done.output
    assert sorted(file.name for file in (tmp_path / "joint").glob("*.svg")) == ["pareto-1.svg", "pareto-2.svg"]


def test_another_tokenizer_on_the_same_text_can_be_compared(tmp_path: Path, made: Callable[[Path, str], Path]) -> None:
    one, two = made(tmp_path, "one"), made(tmp_path, "two")
    path = two / "report" / "report.json"
    found = read_json(path, "a report")
    found["data"]["pretrain"]["digest"] = "e" * 64  # holds the tokens as well
    write_json(path, found)
    assert report(one, two, "--output", tmp_path / "joint").exit_code == 0
    assert read_json(tmp_path / "joint" / "report.json", "a report")["not_comparable"] == []


def test_runs_of_one_name_are_told_apart_and_names_cannot_become_markup(
    tmp_path: Path, made: Callable[[Path, str], Path]
) -> None:
    one, two = made(tmp_path, "one"), made(tmp_path, "two")
    for folder in (one, two):
        path = folder / "report" / "report.json"
        write_json(path, {**read_json(path, "a report"), "name": "<i>模型 $a$ | b</i>"})
    done = report(one, two, "--output", tmp_path / "joint")
    assert done.exit_code == 0, done.output
    page, twin = ((tmp_path / "joint" / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert "<i>" not in page + twin
    assert f"&lt;i&gt;模型 $a$ | b&lt;/i&gt; ({one})" in page
    assert "模型 $a$ \\| b" in twin


def test_one_run_alone_and_a_report_again(tmp_path: Path, made: Callable[[Path, str], Path]) -> None:
    one, two, text = (made(tmp_path, name) for name in ("one", "two", "text"))
    assert report(one, text, "--output", tmp_path / "joint").exit_code == 0
    assert report(one, "--output", tmp_path / "joint").exit_code == 0
    assert sorted(file.name for file in (tmp_path / "joint").glob("*.svg")) == ["pareto.svg"]
    # A run given twice stands there once.
    assert report(one, f"{one}/", two, "--output", tmp_path / "joint").exit_code == 0
    assert len(read_json(tmp_path / "joint" / "report.json", "a report")["runs"]) == 2


def test_places_without_a_report_are_all_named(tmp_path: Path, made: Callable[[Path, str], Path]) -> None:
    one, missing = made(tmp_path, "one"), tmp_path / "missing"
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text("{")
    write_json(tmp_path / "old" / "report.json", {"schema_version": 0})
    assert report(one, "--output", tmp_path / "joint").exit_code == 0
    places = [tmp_path / name for name in ("empty", "broken", "old", "joint")]
    done = report(one, missing, *places, "--output", tmp_path / "refused")
    assert done.exit_code == 2
    lines = [line for line in done.output.splitlines() if line]
    assert len(lines) == 5
    assert lines[0].startswith(f"mixtune: {missing}: contains no report; give the output folder of a finished run")
    assert lines[1].startswith(f"mixtune: {tmp_path / 'empty'}: contains no report")
    assert lines[2].startswith(f"mixtune: {tmp_path / 'broken' / 'report.json'}: cannot be read")
    assert "not of version 1" in lines[3]
    assert lines[4] == f"mixtune: {tmp_path / 'joint'}: is a report over several runs; give the runs themselves"
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("where", ["one/report", "one", "two", "of-the-user", "file"])
def test_what_the_command_has_not_written_is_not_overwritten(
    tmp_path: Path, made: Callable[[Path, str], Path], where: str
) -> None:
    one = made(tmp_path, "one")
    claim(tmp_path / "two", "two").release()
    (tmp_path / "of-the-user").mkdir()
    (tmp_path / "of-the-user" / "report.json").write_text("[]")
    (tmp_path / "file").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    done = report(one, tmp_path / "missing", "--output", tmp_path / where)
    assert done.exit_code == 2
    said, missing = done.output.splitlines()
    assert said == f"mixtune: --output: {tmp_path / where} was not written by `mixtune report`; choose another folder"
    assert "contains no report" in missing, "all problems at once"
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_run_and_a_report_do_not_share_a_folder(
    tmp_path: Path, made: Callable[[Path, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = made(tmp_path, "one")
    assert report(one).exit_code == 0
    with pytest.raises(RefusedError, match="runs/report is not empty and contains no mixtune run"):
        claim(Path("runs/report"), "report")


def test_runs_on_record_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = "0" * 32
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    done = report(unknown, "--output", tmp_path / "joint")
    assert (done.exit_code, "set MLFLOW_TRACKING_URI" in done.output) == (2, True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow" / "mlflow.db"))
    tracker = Tracker.open("compare", "compare", "a-run")
    compare(tmp_path, write_all(tmp_path, MIXED), Context("compare", tracker, "a-run", quiet=True))
    tracker.close("FINISHED", {})
    done = report(tracker.parent_id or "", "--output", tmp_path / "joint")
    assert done.exit_code == 0, done.output
    assert read_json(tmp_path / "joint" / "report.json", "a report")["runs"][0]["place"] == tracker.parent_id
    done = report(unknown, "--output", tmp_path / "joint")
    assert done.exit_code == 2
    assert done.output.startswith(f"mixtune: {unknown}: has no report/report.json in MLflow at sqlite")
    assert "Traceback" not in done.output
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert report(unknown, "--output", tmp_path / "joint").exit_code == 4


def test_help_and_reports_of_folders_need_neither_torch_nor_mlflow(
    tmp_path: Path, made: Callable[[Path, str], Path]
) -> None:
    heavy = "[name for name in ('torch', 'mlflow', 'transformers') if name in sys.modules]"
    for arguments in (["--help"], ["report", str(made(tmp_path, "one")), "--output", str(tmp_path / "joint")]):
        script = (
            f"import sys\nsys.argv = ['mixtune', *{arguments!r}]\nfrom mixtune.pipelines.cli import main\n"
            f"try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\nprint('heavy', {heavy})\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith("heavy []")
