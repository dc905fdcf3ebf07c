"""Waiting for a run on a cluster: progress by step, then what came of it, for people, for programs and for job summaries."""

from __future__ import annotations

import datetime
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kfp_server_api as kfp_api

from mixtune.components.shared.errors import MixtuneError, RefusedError, UnreachableError

from .client import get_run
from .kfp_api import Api
from .records import Ended, conclude, correct_verdict, read_record

ENDED = frozenset({"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"})
POLL_SECONDS = 10.0
# A control plane that is being updated is away for minutes, and a run of hours should not be given up for that.
OUTAGE_SECONDS = 900.0
# KFP's own tasks, and groups.
_NOT_SHOWN = re.compile(r"root|.*-driver|executor.*|importer.*|condition-\d+|for-loop-\d+|exit-handler-\d+|iteration.*")
_WORDS = {
    "RUNNING": "running", "SUCCEEDED": "done", "FAILED": "failed", "SKIPPED": "skipped", "CANCELED": "stopped",
    "CACHED": "from the cache",
}  # fmt: skip


class TimedOutError(MixtuneError):
    """The run has not ended in the time that was given; it goes on."""


def seconds_of(text: str) -> float:
    """A time such as `90s`, `30m`, `6h` or `1d`.

    Raises:
        RefusedError: where it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not found or float(found.group(1)) <= 0:
        raise RefusedError(f"--timeout: must be a time such as 90s, 30m, 6h or 1d, found {text}")
    return float(found.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found.group(2)]


def wait_for(
    api: Api,
    run_id: str,
    timeout: float | None,
    tell: Callable[[str], None],
    poll: float = POLL_SECONDS,
) -> Ended:
    """Follows a run to its end.

    Args:
        timeout: seconds; None waits as long as it takes.
        tell: shows one line.

    Raises:
        TimedOutError: where it has not ended by then.
        UnreachableError: where KFP or MLflow is away for long.
        RefusedError: where there is no such run.
    """
    shown: dict[str, str] = {}
    started = time.monotonic()
    answered = False
    while True:
        run = get_run(api, run_id, OUTAGE_SECONDS if answered else None)
        answered = True
        for title, state in _tasks(run).items():
            if shown.get(title) != state and state in _WORDS:
                shown[title] = state
                tell(f"  {title:<28} {_WORDS[state]}")
        if run.state in ENDED:
            return result_of(api, run)
        left = None if timeout is None else timeout - (time.monotonic() - started)
        if left is not None and left <= 0:
            raise TimedOutError(
                f"{run_id}: is {str(run.state or 'pending').lower()} after {timeout:.0f} s and goes on; {hint(api, run_id)}"
            )
        time.sleep(poll if left is None else min(poll, max(left, 0.05)))


def hint(api: Api, run_id: str) -> str:
    """How to wait for the run again, or stop it."""
    host = f" --host {api.connection.host}"
    space = f" --namespace {api.connection.namespace}" if api.connection.namespace else ""
    return f"wait for it with `mixtune wait {run_id}{host}{space}`, stop it with `mixtune stop {run_id}{host}{space}`"


def _tasks(run: kfp_api.V2beta1Run) -> dict[str, str]:
    details = run.run_details.task_details if run.run_details else None
    states: dict[str, str] = {}
    for task in sorted(details or [], key=_start):
        title = str(task.display_name or "")
        if title and not _NOT_SHOWN.fullmatch(title) and task.state:
            states[title] = str(task.state)
    return states


def _start(task: kfp_api.V2beta1PipelineTaskDetail) -> float:
    when = task.start_time or task.create_time
    return when.timestamp() if isinstance(when, datetime.datetime) else 0.0


def result_of(api: Api, run: kfp_api.V2beta1Run) -> Ended:
    """What came of a run that has ended: KFP's state, MLflow's records."""
    why, record = "MLFLOW_TRACKING_URI is not set here", None
    try:
        record = read_record(run.run_id)
        if record is None and os.environ.get("MLFLOW_TRACKING_URI"):
            why = "MLflow at MLFLOW_TRACKING_URI has no record of it; is that the one that its steps write to?"
    except UnreachableError as error:
        why = error.problems[0]
    values = (run.runtime_config.parameters if run.runtime_config else None) or {}
    # A step's own pipeline takes its part of the configuration; the whole one has none of that name.
    ended = conclude(run.run_id, str(run.state), record, _failed(run), why, alone="config" in values)
    # A step alone ends its own record, unless it is killed.
    if record is not None and ("config" not in values or record.status == "RUNNING"):
        try:
            correct_verdict(record, str(run.state))
        except UnreachableError as error:
            ended.problems += error.problems
    ended.links = {"run": api.connection.link(f"runs/details/{run.run_id}")}
    if record and record.link:
        ended.links["mlflow"] = record.link
    return ended


def _failed(run: kfp_api.V2beta1Run) -> list[str]:
    sentences = [
        f"{task.display_name}: {task.error.message.strip().splitlines()[0][:300] if _has_words(task) else 'failed'}"
        for task in (run.run_details.task_details if run.run_details else None) or []
        if task.state == "FAILED" and not _NOT_SHOWN.fullmatch(str(task.display_name or ""))
    ]
    if not sentences and run.error and run.error.message:
        sentences = [run.error.message.strip().splitlines()[0][:300]]
    return sentences


def _has_words(task: kfp_api.V2beta1PipelineTaskDetail) -> bool:
    return bool(task.error and task.error.message and task.error.message.strip())


def summary(ended: Ended, name: str = "mixtune") -> str:
    """The result as Markdown, for the summary page of a CI job."""
    words = {"done": "gate passed" if ended.report else "done", "interrupted": "stopped"}
    lines = [f"## {name}: {words.get(ended.outcome, ended.outcome.replace('_', ' '))}", ""]
    lines += [f"- {problem}" for problem in ended.problems]
    if ended.report:
        lines += ["", *_candidates(ended.report)]
    places = {"run": "Run in Kubeflow", "mlflow": "Run in MLflow"}
    lines += ["", " · ".join(f"[{places[kind]}]({address})" for kind, address in ended.links.items())]
    lines += ["", f"Run `{ended.run_id}`, exit status {ended.status}."]
    return "\n".join(lines) + "\n"


def _candidates(report: dict[str, Any]) -> list[str]:
    from .display import shown_value

    task = report["task"]["metric"]
    lines = [f"| candidate | λ | {task} | forgetting, bits per byte | |", "|---|---|---|---|---|"]
    for one in report["candidates"]:
        weight = "" if one.get("lambda") is None else f"{one['lambda']:g}"
        score = shown_value(one["task_score"], signed=False)
        lost = "0" if one["kind"] == "pretrained" else shown_value(one["delta_bpb"])
        chosen = "**selected**" if one["id"] == report["selected"] else ""
        lines.append(f"| {one['id']} | {weight} | {score} | {lost} | {chosen} |")
    return lines


def append_summary(file: Path, text: str) -> None:
    """Adds to the file: GitHub's summary file is shared by the steps of a job.

    Raises:
        RefusedError: where it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise RefusedError(f"--summary: {file} cannot be written ({error.strerror or error})") from None


def show(ended: Ended, as_json: bool) -> None:
    """Prints the result: a table for people, one JSON object for programs."""
    if as_json:
        print(json.dumps(ended.to_json(), ensure_ascii=False))  # noqa: T201
        return
    from rich.console import Console
    from rich.text import Text

    from .display import candidates_table

    console = Console(soft_wrap=True)
    if ended.report:
        console.print()
        Console(width=max(console.width, 120) if not console.is_terminal else None).print(
            candidates_table(ended.report)
        )
    colour = {"done": "green", "gate_not_met": "yellow"}.get(ended.outcome, "red")
    console.print(Text.assemble("\n", (ended.outcome.replace("_", " "), colour), f": {ended.verdict}"))
    for kind, address in ended.links.items():
        console.print(Text(f"{'MLflow' if kind == 'mlflow' else kind:<7} {address}"))
