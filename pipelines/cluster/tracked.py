"""Reads MLflow's state of a running pipeline: started and ended tasks, and the last metrics of the trainings."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixtune.components.shared.errors import MixtuneError, without_credentials
from mixtune.components.shared.tracking.connection import to_look
from mixtune.components.shared.tracking.mlflow_runs import step_runs_of
from mixtune.components.shared.value_text import losses_text

from .slow import Say, report_if_slow

REST_SECONDS = 60.0


@dataclass(frozen=True)
class Attempt:
    """The last attempt at a task in MLflow."""

    title: str
    status: str
    run_id: str
    started: datetime.datetime | None
    ended: datetime.datetime | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)


class TrackedRun:
    """A pipeline run in MLflow at MLFLOW_TRACKING_URI. Returns no data if that is not set, or while MLflow does not answer.

    Args:
        run_id: id of the pipeline run.
        say: shows a line.
    """

    def __init__(self, run_id: str, say: Say) -> None:
        self._run_id, self._say = run_id, say
        self._uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        self._client: Any = None
        self._experiments: list[str] = []
        self._rest_until = 0.0
        self._away = False

    def attempts(self) -> dict[str, Attempt]:
        """Returns the last attempt at each task, by title."""
        return self._ask(self._attempts) or {}

    def training_line(self, attempt: Attempt) -> str | None:
        """Describes the progress of a training in one line; None before its first metrics."""
        if "loss" not in attempt.metrics:
            return None
        history = self._ask(lambda client: client.get_metric_history(attempt.run_id, "loss"))
        if not history:
            return None
        step = max(one.step for one in history)
        rate = attempt.metrics.get("tokens_per_second")
        speed = f", {rate:,.0f} tokens/s" if rate else ""
        return f"step {step}{_of_steps(attempt.params)}, {losses_text(attempt.metrics)}{speed}"

    def _ask(self, question: Any) -> Any:
        if not self._uri or time.monotonic() < self._rest_until:
            return None
        address = without_credentials(self._uri)
        try:
            with (
                to_look(),
                report_if_slow(self._say, lambda: f"MLflow at {address} has not answered yet", "MLflow answers again"),
            ):
                if self._client is None:
                    from mixtune.components.shared.tracking.connection import connect

                    self._client = connect(self._uri)
                answer = question(self._client)
        except Exception as error:
            self._rest_until = time.monotonic() + REST_SECONDS
            if not self._away:
                why = f"; {error.problems[0]}" if isinstance(error, MixtuneError) else ""
                self._say(f"MLflow at {address} does not answer, so the progress of trainings is not shown{why}")
            self._away = True
            return None
        self._away = False
        return answer

    def _attempts(self, client: Any) -> dict[str, Attempt]:
        experiments = self._experiments or [one.experiment_id for one in client.search_experiments()]
        runs = [run for one in experiments for run in step_runs_of(client, one, self._run_id)]
        self._experiments = list({run.info.experiment_id for run in runs})
        return {
            run.info.run_name: Attempt(
                run.info.run_name,
                run.info.status,
                run.info.run_id,
                _time(run.info.start_time),
                _time(run.info.end_time),
                run.data.metrics,
                run.data.params,
            )
            for run in runs
        }


def _of_steps(params: Mapping[str, str]) -> str:
    for step in ("pretrain", "finetune", "mixed"):
        by_other = any(params.get(f"{step}.{name}", "None") != "None" for name in ("epochs", "max_tokens"))
        if (steps := params.get(f"{step}.steps", "")).isdigit() and not by_other:
            return f"/{steps}"
    return ""


def _time(milliseconds: int | None) -> datetime.datetime | None:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC) if milliseconds else None
