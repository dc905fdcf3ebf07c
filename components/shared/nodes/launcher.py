"""Runs a training step on several nodes: creates its TrainJob, follows it, and takes its results.

A task has one TrainJob at a time, whose name follows from the task. An attempt whose pod was lost leaves it, and the next
attempt finds it again, also when it has ended meanwhile. Every other end of an attempt deletes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from ..checkpoints.store import CHECKPOINT_DIR, folder_of, remove
from ..errors import MixtuneError, RefusedError, UnreachableError
from ..outcome import EXIT_STATUS
from ..running.context import Context
from ..running.processes import raise_what_was_raised, read_done, write_order
from ..section import Section
from .exchange import JOB, Artifacts, fetch_results, prepare_folder
from .manifest import POD_NAME, POD_NAMESPACE, TASK, TRAINJOB, complete, task_key, trainjob_name
from .node import status_on_record
from .state import JobState, NodeFailure, Pod, failures_of, node_of, state_of
from .trainjobs import Pace, TrainJobs

PACE = Pace()
AGAIN_SECONDS = 600.0
"""A state that lasts is shown again after this long."""
LAST_LINES = 20
_SAME_SECOND = 2


def run_on_nodes(
    step: str,
    config: Section,
    context: Context,
    artifacts: Artifacts,
    parameters: Mapping[str, Any],
    outputs: tuple[str, ...],
    pace: Pace | None = None,
) -> None:
    """Runs a step's `run` in a TrainJob, and copies its outputs and the artifacts' metadata.

    Args:
        outputs: names of the outputs among the artifacts.

    Raises:
        RefusedError: if the training or the cluster refused.
        MixtuneError: if the training failed, or if its results are not whole.
        UnreachableError: if the cluster does not answer for a long time. The TrainJob goes on.
    """
    pace = pace or PACE
    run_id, root, compiled = context.run_id, os.environ.get(CHECKPOINT_DIR), json.loads(os.environ[TRAINJOB])
    if not run_id or not root:
        raise RefusedError(f"{TRAINJOB}: needs MIXTUNE_RUN_ID and {CHECKPOINT_DIR}; start the step in a pipeline run")
    inputs = {name: one for name, one in artifacts.items() if name not in outputs}
    key = task_key(run_id, step, config.to_json(), inputs, parameters)
    name = trainjob_name(step, key)
    folder = folder_of(root) / f"{JOB}{name}"
    folder.mkdir(parents=True, exist_ok=True)
    if status_on_record(folder) == EXIT_STATUS["refused"]:
        raise_what_was_raised(folder)  # an earlier attempt; it would be refused again
    jobs = TrainJobs(os.environ[POD_NAMESPACE], lambda line: context.say(f"{context.title}: {line}"), pace)
    following = _Following(jobs, name, key, context, pace)
    try:
        if not following.finds_its_own():
            seen = prepare_folder(folder.parent, folder, run_id, artifacts, outputs)
            write_order(folder, step, config, context, seen, parameters)
            owners = jobs.owners(os.environ[POD_NAME]) if POD_NAME in os.environ else []
            following.create(complete(compiled, name, key, context.title, run_id, folder, owners))
        state = following.until_it_ends()
        if state.kind == "failed":
            raise_what_was_raised(folder)
            raise following.explained(state)
        fetch_results(folder, artifacts, outputs, pace.settle)
        read_done(folder, artifacts, context)
    except UnreachableError:
        raise
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)  # SIGTERM was handled; do not interrupt the deletion
        if following.is_ours:
            if not isinstance(error, Exception):
                context.say(f"{context.title}: deleting the TrainJob {name}")
            with contextlib.suppress(MixtuneError):  # `finish` tries again
                jobs.delete(name)
        raise
    remove(folder)
    try:
        jobs.delete(name)
    except MixtuneError as error:  # the results are here, and `finish` tries again
        context.say(f"{context.title}: {error.problems[0]}")


def delete_trainjobs_of(run_id: str, context: Context, pace: Pace | None = None) -> None:
    """Deletes what a run has left of TrainJobs: KFP stops the pod that launched one without a signal."""
    try:
        jobs = TrainJobs(os.environ[POD_NAMESPACE], context.say, pace or PACE)
        for name in jobs.of_run(run_id):
            context.say(f"deleting the TrainJob {name}")
            jobs.delete(name)
    except MixtuneError as error:
        context.say(error.problems[0])


class _Following:
    """One TrainJob, from its creation to its end. Shows its states, the log of its first node, and failures of nodes."""

    def __init__(self, jobs: TrainJobs, name: str, key: str, context: Context, pace: Pace) -> None:
        self._jobs, self._name, self._key, self._context, self._pace = jobs, name, key, context, pace
        self.is_ours = False
        """Whether the TrainJob of this name is of this task, as far as is known."""
        self._shown: tuple[JobState | None, float] = (None, 0.0)
        self._failures: dict[str, NodeFailure] = {}
        self._last_line = ""
        self._last_look = time.monotonic()

    def finds_its_own(self) -> bool:
        """Waits until a TrainJob of this name that is being deleted is gone, and tells whether there is one of this task.

        Raises:
            RefusedError: if there is one of another task.
        """
        while (found := self._jobs.find(self._name)) is not None:
            if (found["metadata"].get("annotations") or {}).get(TASK) != self._key:
                self.is_ours = False
                raise RefusedError(
                    f"placement.nodes: the TrainJob {self._name} in {self._jobs.namespace} is not of this task; delete it"
                )
            if not found["metadata"].get("deletionTimestamp"):
                self._say(f"found the TrainJob {self._name} of an earlier attempt")
                self.is_ours = True
                return True
            self._show(JobState("waiting", "an earlier attempt's TrainJob is being deleted"))
            time.sleep(self._pace.look)
        return False

    def create(self, job: dict[str, Any]) -> None:
        """Creates the TrainJob. If an earlier request already did, whose answer was lost, that one is taken.

        Raises:
            RefusedError: if the cluster does not accept it, or drops a part of it.
        """
        self.is_ours = True
        while (made := self._jobs.create(job)) is None:
            if self.finds_its_own():
                return
        if not made["spec"].get("runtimePatches"):
            raise RefusedError(
                "placement.nodes: this cluster's Kubeflow Trainer ignores runtimePatches; install Kubeflow Trainer 2.2 or newer"
            )
        nodes = job["spec"]["trainer"]["numNodes"]
        self._say(f"created the TrainJob {self._name} with {nodes} nodes in {self._jobs.namespace}")

    def until_it_ends(self) -> JobState:
        """Follows the TrainJob.

        Raises:
            MixtuneError: if somebody deletes it.
            UnreachableError: if the cluster does not answer for a long time.
        """
        while True:
            job = self._jobs.find(self._name)
            if job is None or job["metadata"].get("deletionTimestamp"):
                raise MixtuneError(f"the TrainJob {self._name} was deleted while it ran; run again to go on")
            pods = self._jobs.pods(self._name)
            self._copy_log(pods)
            for failure in failures_of(pods):
                self._explain(failure)
            state = state_of(job, pods)
            self._show(state)
            if state.ended:
                return state
            time.sleep(self._pace.look)

    def explained(self, state: JobState) -> MixtuneError:
        """Returns the error of a TrainJob that failed without a record of its processes."""
        failures = list(self._failures.values())
        refused = next((one for one in failures if one.status == EXIT_STATUS["refused"] and one.message), None)
        if refused is not None:
            return RefusedError(refused.message)
        first = [f"{failures[0]}, and its last lines stand above"] if failures else []
        return MixtuneError(f"the TrainJob {self._name} failed: {'; '.join([*first, state.sentence])}")

    def _show(self, state: JobState) -> None:
        shown, at = self._shown
        if state != shown or time.monotonic() - at > AGAIN_SECONDS:
            self._shown = state, time.monotonic()
            self._say(f"the TrainJob {self._name}: {state.kind}: {state.sentence}")

    def _copy_log(self, pods: list[Pod]) -> None:
        """Prints what the first node has printed since the last look."""
        now, shown = time.monotonic(), self._last_line
        since = max(1, round(now - self._last_look)) + _SAME_SECOND if shown else None
        for pod in pods:
            if node_of(pod) != 0 or (pod.get("status") or {}).get("phase") in (None, "Pending"):
                continue
            options = {"since_seconds": since} if since else {}
            text = self._jobs.log(pod["metadata"]["name"], timestamps=True, **options)
            if text is None:
                continue
            self._last_look = now
            for line in text.splitlines():
                stamp, _, rest = line.partition(" ")
                if (at := _comparable(stamp)) > shown:
                    self._last_line = max(self._last_line, at)
                    self._context.say(rest)

    def _explain(self, failure: NodeFailure) -> None:
        """Prints the last lines of a node that failed, once: its pod is deleted when all nodes start again."""
        if failure.id in self._failures:
            return
        self._failures[failure.id] = failure
        self._say(f"{failure}{f': {failure.message}' if failure.message else ''}")
        text = self._jobs.log(failure.pod, tail_lines=LAST_LINES) if failure.status is not None else None
        for line in (text or "").splitlines():
            self._context.say(f"  node {failure.node}: {line}")

    def _say(self, line: str) -> None:
        self._context.say(f"{self._context.title}: {line}")


def _comparable(stamp: str) -> str:
    """Returns a time stamp whose order as text is that in time: Kubernetes leaves out zeros at the end of a fraction."""
    seconds, _, fraction = stamp.removesuffix("Z").partition(".")
    return f"{seconds}.{fraction:0<9}"
