"""Shows the result of a run on a cluster to people, programs and job summaries."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kfp_server_api as kfp_api

from mixtune.components.shared.errors import RefusedError, UnreachableError, without_credentials

from ..ended import Ended
from .api import Api
from .progress import is_alone
from .records import conclude, correct_verdict, read_record
from .slow import report_if_slow
from .tasks import stopped_at


def result_of(api: Api, run: kfp_api.V2beta1Run, failed: Mapping[str, str]) -> Ended:
    """Determines the result of a run that has ended, from KFP's state and MLflow's records.

    Args:
        failed: sentences about failed tasks, from the platform, by the title of the task.
    """
    why, record = "MLFLOW_TRACKING_URI is not set here", None
    try:
        address = without_credentials(os.environ.get("MLFLOW_TRACKING_URI", ""))
        with report_if_slow(api.say, lambda: f"MLflow at {address} has not answered yet", "MLflow answers again"):
            record = read_record(run.run_id)
        if record is None and os.environ.get("MLFLOW_TRACKING_URI"):
            why = "MLflow at MLFLOW_TRACKING_URI has no record of the run; check that its steps use the same server"
    except UnreachableError as error:
        why = error.problems[0]
    # KFP reports stopped runs as FAILED.
    state = "CANCELED" if run.state == "FAILED" and stopped_at(run) else str(run.state)
    alone = is_alone(run)
    ended = conclude(run.run_id, state, record, failed, why, alone)
    # A step that runs alone ends its own record, unless it is killed.
    if record is not None and (not alone or record.status == "RUNNING"):
        try:
            correct_verdict(record, state)
        except UnreachableError as error:
            ended.problems += error.problems
    ended.links = {"run": api.connection.link(f"runs/details/{run.run_id}")}
    if record and record.link:
        ended.links["mlflow"] = record.link
    return ended


def summary(ended: Ended, name: str = "mixtune") -> str:
    """Renders the result as Markdown, for the summary page of a CI job."""
    words = {"done": "gate passed" if ended.report else "done", "interrupted": "stopped"}
    lines = [f"## {name}: {words.get(ended.outcome, ended.outcome.replace('_', ' '))}", ""]
    lines += [f"- {problem}" for problem in (*ended.problems, *ended.warnings, *ended.advice)]
    if ended.report:
        lines += ["", *_candidates(ended.report)]
    places = {"run": "Run in Kubeflow", "mlflow": "Run in MLflow"}
    lines += ["", " · ".join(f"[{places[kind]}]({address})" for kind, address in ended.links.items())]
    lines += ["", f"Run `{ended.run_id}`, exit status {ended.status}."]
    return "\n".join(lines) + "\n"


def _candidates(report: dict[str, Any]) -> list[str]:
    from mixtune.components.shared.value_text import value_text

    task = report["task"]["metric"]
    lines = [f"| candidate | λ | {task} | forgetting, bits per byte | |", "|---|---|---|---|---|"]
    for one in report["candidates"]:
        weight = "" if one.get("lambda") is None else f"{one['lambda']:g}"
        score = value_text(one["task_score"], signed=False)
        lost = "0" if one["kind"] == "pretrained" else value_text(one["delta_bpb"])
        mark = "**selected**" if report["gate"]["passed"] else "nearest"
        chosen = mark if one["id"] == report["selected"] else ""
        lines.append(f"| {one['id']} | {weight} | {score} | {lost} | {chosen} |")
    return lines


def append_summary(file: Path, text: str) -> None:
    """Appends text to a file. The steps of a GitHub job share one summary file.

    Raises:
        RefusedError: if the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise RefusedError(f"--summary: {file} cannot be written ({error.strerror or error})") from None


def show(ended: Ended, as_json: bool) -> None:
    """Prints the result: a table for people, or one JSON object for programs."""
    if as_json:
        print(json.dumps(ended.to_json(), ensure_ascii=False))
        return
    from rich.console import Console
    from rich.text import Text

    from ..display import print_candidates

    console = Console(soft_wrap=True)
    if ended.report:
        console.print()
        print_candidates(ended.report, console)
    colour = {"done": "green", "gate_not_met": "yellow"}.get(ended.outcome, "red")
    console.print(Text.assemble("\n", (ended.outcome.replace("_", " "), colour), f": {ended.verdict}"))
    for kind, address in ended.links.items():
        console.print(Text(f"{'MLflow' if kind == 'mlflow' else kind:<7} {address}"))
