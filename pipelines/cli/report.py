"""`mixtune report`: compares several runs, from output folders on this machine or from MLflow."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtune.components.compare.names import metric_name
from mixtune.components.compare.report.several import KIND, RunReport, gate_words, name_runs, read_report, write
from mixtune.components.shared.artifacts import read_json
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.value_text import lambda_of

from .options import with_home

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 150
"""Minimum width of a table in characters, if the output is not a terminal."""
_MLFLOW_RUN = re.compile(r"[0-9a-f]{32}")


def report_and_show(places: Sequence[str], output: Path) -> None:
    """Writes one report of several runs, and prints its table, its notes and its path.

    Args:
        places: output folders, folders with a report.json, or ids of MLflow runs.
        output: folder to write to.

    Raises:
        RefusedError: if a place has no report, or if the folder to write to contains anything but such a report; names all
            problems.
        UnreachableError: if MLflow does not answer.
    """
    from rich.console import Console
    from rich.text import Text

    problems: list[str] = []
    if not _can_be_written(output):
        problems.append(f"--output: {output} was not written by `mixtune report`; choose another folder")
    runs = read_runs(places, problems)
    try:
        joined = write(runs, output)
    except OSError as error:
        raise RefusedError(f"--output: {output} cannot be written ({error.strerror or error})") from None
    console = Console(soft_wrap=True)
    Console(width=max(console.width, WIDTH) if not console.is_terminal else None).print(_table(joined))
    for run in joined["runs"]:
        gate = f"{run['selected']} selected" if run["gate"]["passed"] else "gate not met"
        console.print(Text(f"\n{run['name']}: base model {run['base']}; {gate}", end=""))
    console.print()
    for sentence in (*joined["not_comparable"], *joined["notes"]):
        console.print(Text(f"\n{sentence}"))
    console.print(Text(f"\nreport  {output / 'report.html'}"))


def _can_be_written(folder: Path) -> bool:
    """Tells whether a folder does not exist, is empty, or contains a report over several runs."""
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return True
        found = read_json(folder / "report.json", "a report over several runs")
    except (RefusedError, OSError):
        return False
    return isinstance(found, dict) and found.get("kind") == KIND


def read_runs(places: Sequence[str], problems: Sequence[str] = ()) -> list[RunReport]:
    """Reads the reports of runs.

    Args:
        problems: problems that were found before, to be named with those of the places.

    Raises:
        RefusedError: if a place has no report; names all of them.
        UnreachableError: if MLflow does not answer.
    """
    problems = list(problems)
    reports: list[tuple[str, dict[str, Any]]] = []
    for place in dict.fromkeys(_plain(place) for place in places):
        try:
            reports.append((place, _read(place)))
        except RefusedError as error:
            problems += error.problems
    if problems:
        raise RefusedError(*problems)
    return name_runs(reports)


def _plain(place: str) -> str:
    return with_home(place.rstrip("/") or place)


def _read(place: str) -> dict[str, Any]:
    path = Path(place)
    if not path.exists() and _MLFLOW_RUN.fullmatch(place):
        return _from_mlflow(place)
    for file in (path / "report" / "report.json", path / "report.json", path):
        if file.is_file() and file.name == "report.json":
            return read_report(file, place)
    raise RefusedError(
        f"{place}: contains no report; give the output folder of a finished run, such as runs/<name>, a folder with a "
        "report.json, or the id of a run in MLflow"
    )


def _from_mlflow(run: str) -> dict[str, Any]:
    """Reads the report of an MLflow run."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise RefusedError(f"{run}: is not a folder here; to look it up as an MLflow run, set MLFLOW_TRACKING_URI")
    from mixtune.components.shared.tracking.connection import download_artifact

    with tempfile.TemporaryDirectory() as folder:
        return read_report(download_artifact(uri, run, "report/report.json", Path(folder)), run)


def _table(joined: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from mixtune.components.shared.value_text import value_text

    title = Text("all candidates, on their test splits", style="table.title")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    with_divergence = any(row["kl_from_pretrained"] for row in joined["candidates"])
    divergence = ("KL, nats per token",) if with_divergence else ()
    values = ("task score", "forgetting, bits per byte", *divergence, "gate")
    for heading in ("run", "candidate", "λ", *values):
        table.add_column(heading, no_wrap=heading in values)
    for row in joined["candidates"]:
        score = value_text(row["task_score"], signed=False)
        table.add_row(
            Text(row["run"]),
            Text(row["id"]),
            "" if (weight := lambda_of(row)) is None else f"{weight:g}",
            Text(f"{metric_name(row['metric'])} {score}" if row["task_score"] else score),
            Text("0" if row["kind"] == "pretrained" else value_text(row["delta_bpb"])),
            *([Text(value_text(row["kl_from_pretrained"], signed=False))] if with_divergence else ()),
            Text(gate_words(row)),
            style="bold" if row["selected"] else None,
        )
    return table
