"""Waits for a run on a cluster and shows its progress."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

from mixtune.components.shared.errors import MixtuneError, RefusedError

from ..ended import Ended
from .api import Api
from .failures import first_failure
from .kubernetes_api import SINGLE_USER_NAMESPACE
from .pods import RunOnCluster
from .progress import RunProgress, tree_of
from .results import result_of
from .runs import get_run
from .slow import Say
from .tasks import TaskStatus

ENDED = frozenset({"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"})
POLL_SECONDS = 10.0
# An update of the control plane can take minutes, for which a run of hours should not be abandoned.
OUTAGE_SECONDS = 900.0


class PendingTooLongError(MixtuneError):
    """A task was pending for longer than the limit. The run continues."""

    kind = "pending"
    verdict = "a task was pending for longer than --pending-timeout; the run continues"


class TimedOutError(MixtuneError):
    """The run did not end within the limit. It continues."""

    kind = "timed_out"
    verdict = "the run has not ended within --timeout; it continues"


def seconds_of(text: str, option: str = "--timeout") -> float:
    """Parses a duration such as `90s`, `30m`, `6h` or `1d` and returns seconds.

    Args:
        option: name of the option, for messages.

    Raises:
        RefusedError: if the text is not a duration.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not found or float(found.group(1)) <= 0:
        raise RefusedError(f"{option}: must be a time such as 90s, 30m, 6h or 1d, found {text}")
    return float(found.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found.group(2)]


def wait_for(
    api: Api,
    run_id: str,
    timeout: float | None,
    tell: Say,
    pending_timeout: float | None = None,
) -> Ended:
    """Waits for the end of a run.

    Args:
        timeout: maximum seconds to wait; None waits without limit.
        tell: shows a line.
        pending_timeout: maximum seconds that a task may be pending.

    Raises:
        TimedOutError: if the run has not ended in time.
        PendingTooLongError: if a task was pending for too long.
        UnreachableError: if KFP or MLflow does not answer for long.
        RefusedError: if there is no such run.
    """
    progress = RunProgress(run_id, tell)
    cluster = RunOnCluster(
        api.connection.namespace or api.connection.pod_namespace or SINGLE_USER_NAMESPACE, run_id, tell
    )
    started = time.monotonic()
    answered = False
    while True:
        run = get_run(api, run_id, OUTAGE_SECONDS if answered else None)
        answered = True
        ended = str(run.state) if run.state in ENDED else ""
        tree = tree_of(run, cluster.nodes())
        pods = cluster.pods()
        tasks = progress.show(tree, pods, "" if cluster.readable else cluster.command, ended)
        if ended:
            failed = {} if ended == "SUCCEEDED" else first_failure(tree, api, run_id, cluster)
            if not failed and run.error and str(run.error.message or "").strip():
                failed = {"": f"KFP: {run.error.message.strip().splitlines()[0][:300]}"}
            return result_of(api, run, failed)
        if pending_timeout is not None:
            _refuse_pending(tasks.values(), pending_timeout, api, run_id, cluster)
        left = None if timeout is None else timeout - (time.monotonic() - started)
        if left is not None and left <= 0:
            raise TimedOutError(
                f"{run_id}: is {str(run.state or 'pending').lower()} after {timeout:.0f} s and continues; {hint(api, run_id)}"
            )
        time.sleep(POLL_SECONDS if left is None else min(POLL_SECONDS, max(left, 0.05)))


def _refuse_pending(tasks: Iterable[TaskStatus], limit: float, api: Api, run_id: str, cluster: RunOnCluster) -> None:
    for task in tasks:
        seconds = task.pending_seconds
        if seconds is not None and seconds >= limit:
            why = task.message or f"see why: {cluster.command}"
            raise PendingTooLongError(
                f"{task.title}: has been pending for {seconds:.0f} s: {why}; the run continues; {hint(api, run_id)}"
            )


def hint(api: Api, run_id: str) -> str:
    """Returns the commands that wait for the run again or stop it."""
    host = f" --host {api.connection.host}"
    space = f" --namespace {api.connection.namespace}" if api.connection.namespace else ""
    return f"wait for it with `mixtune wait {run_id}{host}{space}`, stop it with `mixtune stop {run_id}{host}{space}`"
