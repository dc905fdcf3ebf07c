"""MLflow's tracking store: connects to it and delivers the content of journals.

Everything goes through `MlflowClient` with explicit run ids: there is no global state, and MLFLOW_RUN_ID in the environment
cannot redirect a nested run.

Operations can be delivered twice, since the process can die before it records a delivery. Every operation is therefore
idempotent: MLflow's store drops duplicate metric values, equal settings are accepted, tags and ends are overwritten with the
same values, and a run that started without MLflow is found again by a tag.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import write_json
from ..errors import first_line, without_credentials
from .connection import connect, experiment_id, to_deliver, to_look, unreachable
from .journal import LOCAL, Journal, NotSentYetError, Operation, count_of, journals, known_runs, locked
from .mlflow_runs import (
    PARENT,
    RUN_ID,
    STEP,
    close_pipeline_run,
    create_run,
    injected_run,
    parent_run,
    replace_earlier,
    set_tag,
    step_runs_of,
)
from .mlflow_text import in_ascii, is_refused, is_rejected, send_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LOCAL_ID = "mixtune.local_id"
METRICS_AT_ONCE = 1000
ENTRIES_AT_ONCE = 100


class MlflowStore:
    """A tracking address and the delivery to it. Connects at first use.

    Attributes:
        uri: the address, including credentials if it contains any.
        experiment: name of the experiment.
    """

    def __init__(self, uri: str, experiment: str, client: MlflowClient | None = None) -> None:
        self.uri, self.experiment = uri, experiment
        self._client = client

    @property
    def address(self) -> str:
        """Returns the address without credentials, to be shown and stored."""
        return without_credentials(self.uri)

    @property
    def client(self) -> MlflowClient:
        """Returns a connected client.

        Raises:
            UnreachableError: if the server does not answer.
        """
        if self._client is None:
            self._client = connect(self.uri)
        return self._client

    def look(self) -> None:
        """Checks within a few seconds whether the server answers.

        Raises:
            UnreachableError: if it does not.
        """
        client = self.client
        try:
            with to_look():
                client.search_experiments(max_results=1)
        except Exception as error:
            raise unreachable(self.uri, error) from None

    def experiment_id(self) -> str:
        """Returns the id of the experiment, from KFP's plugin or else by name. Creates the experiment if needed."""
        if injected_run():
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        return experiment_id(self.client, self.experiment, self.uri)

    def deliver(self, journal: Journal) -> Counter[str]:
        """Delivers the pending operations of a journal, oldest first.

        Returns:
            Counts of what was delivered, by kind.

        Raises:
            Exception: if a delivery failed. The failed operation and those after it stay pending.
        """
        done: Counter[str] = Counter()
        # The operations of a rejected batch are sent individually, so that only the invalid one is omitted.
        alone = 0
        with to_deliver():
            while journal.pending:
                count = 1 if alone else _batch_size(journal.pending)
                operations = journal.pending[:count]
                try:
                    self._carry_out(operations, journal.path.parent)
                    done += count_of(operations)
                except Exception as error:
                    if not is_rejected(error):
                        raise
                    if count > 1:
                        alone = count
                        continue
                    if not is_refused(error):
                        self.look()  # raises if the server is down: then the text was not the problem
                    if not self._sent_in_ascii(operations[0], journal.path.parent):
                        if not is_refused(error):
                            raise
                        what = operations[0]["op"]
                        print(f"tracking: MLflow refuses {what} ({first_line(error)}); left out")
                journal.advance(count)
                alone = max(0, alone - count)
        return done

    def deliver_leftovers(self, folder: Path) -> Counter[str]:
        """Delivers the journals of steps that ended or were killed. Skips journals that other processes use.

        Raises:
            Exception: if a delivery failed. The undelivered operations stay in their journals.
        """
        done: Counter[str] = Counter()
        problem: Exception | None = None
        for path in journals(folder):
            journal = Journal.take(path)
            if journal is None:
                continue
            if journal.owner.address != self.address:
                journal.release()
                continue
            try:
                store = MlflowStore(self.uri, journal.owner.experiment, self.client)
                done += store.deliver(journal)
                store._end_killed(journal)
            except BaseException as error:
                journal.release()
                if not isinstance(error, Exception):
                    raise
                self.look()  # if the server is down, skip the other journals
                problem = problem or error
            else:
                journal.close()
        if problem is not None:
            raise problem
        return done

    def _end_killed(self, journal: Journal) -> None:
        """Ends the run of a step that was killed before it could end it."""
        own = journal.owner.run
        if own is None or journal.ended:
            return
        run_id = known_runs(journal.path.parent).get(own, own)
        if not run_id.startswith(LOCAL) and self.client.get_run(run_id).info.status == "RUNNING":
            self.client.set_terminated(run_id, "KILLED", end_time=journal.last_time)

    def _carry_out(self, operations: list[Operation], folder: Path) -> None:
        """Delivers one operation, or several metrics operations of one run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        operation = operations[0]
        if operation["op"] in ("parent", "run"):
            self._make_run(operation, folder)
            return
        client, run = self.client, self._id_in_mlflow(operation["run"], folder)
        match operation["op"]:
            case "metrics":
                self._log_metrics(run, operations)
            case "params":
                known = client.get_run(run).data.params if operation["new_only"] else {}
                self._log(
                    run, "params", {name: text for name, text in operation["values"].items() if name not in known}
                )
            case "tags":
                self._log(run, "tags", operation["values"])
            case "artifact":
                client.log_artifact(run, str(folder / operation["file"]), operation["folder"])
            case "input":
                data = Dataset(
                    operation["name"], operation["digest"], source_type="mixtune", source=operation["source"]
                )
                client.log_inputs(run, [DatasetInput(data, [InputTag("mlflow.data.context", operation["context"])])])
            case "link":
                self._link(run, operation["runs"], folder)
            case "end":
                client.set_terminated(run, operation["status"], end_time=operation["time"])
            case "close":
                close_pipeline_run(
                    client, run, operation["status"], operation["verdict"], operation["own"], operation["time"]
                )

    def _sent_in_ascii(self, operation: Operation, folder: Path) -> bool:
        """Sends the texts of a rejected operation individually, then in ASCII, and omits those that are still rejected.

        Returns:
            False if the operation contains no such texts, else True: it is completed.
        """
        match operation["op"]:
            case "tags":
                run = self._id_in_mlflow(operation["run"], folder)
                for name, value in operation["values"].items():
                    set_tag(self.client, run, name, value)
            case "params":
                run = self._id_in_mlflow(operation["run"], folder)
                known = self.client.get_run(run).data.params if operation["new_only"] else {}
                for name in operation["values"].keys() - known.keys():
                    log = partial(self.client.log_param, run, name)
                    send_text(log, operation["values"][name], f"the parameter {name}")
            case "input":
                try:
                    self._carry_out([in_ascii(operation)], folder)
                except Exception as error:
                    if not is_rejected(error):
                        raise
                    print(
                        f"tracking: MLflow does not take the input {operation['name']} ({first_line(error)}); left out"
                    )
            case _:
                return False
        return True

    def _log_metrics(self, run: str, operations: list[Operation]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, operation["time"], operation["step"])
            for operation in operations
            for name, value in operation["values"].items()
        ]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self.client.log_batch(run, metrics=metrics[start : start + METRICS_AT_ONCE])

    def _log(self, run: str, what: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        entries = [(RunTag if what == "tags" else Param)(name, value) for name, value in values.items()]
        for start in range(0, len(entries), ENTRIES_AT_ONCE):
            self.client.log_batch(run, **{what: entries[start : start + ENTRIES_AT_ONCE]})

    def _link(self, parent: str, runs: Mapping[str, str], folder: Path) -> None:
        """Records on a parent run which earlier runs produced the cached results."""
        from mlflow.exceptions import MlflowException

        known = known_runs(folder)
        for title, first_id in runs.items():
            run_id = known.get(first_id, first_id)
            try:
                made_by = self.client.get_run(run_id).data.tags.get(PARENT)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                made_by = None  # unknown to this tracking store; the id still identifies the run
            if made_by != parent:
                self.client.set_tag(parent, f"mixtune.cached.{_tag_name(title)}", run_id)

    def _make_run(self, operation: Operation, folder: Path) -> None:
        """Creates the MLflow run for a step or pipeline run that started without MLflow, unless it exists already."""
        with locked(folder):
            known = known_runs(folder)
            if operation["run"] in known:
                return
            experiment = self.experiment_id()
            if operation["op"] == "parent":
                made = parent_run(
                    self.client,
                    experiment,
                    operation["pipeline_run"],
                    operation["name"],
                    operation["tags"],
                    time=operation["time"],
                    child=operation.get("child"),
                )
            else:
                made = self._make_nested(operation, experiment, folder)
            write_json(folder / "runs.json", {**known, operation["run"]: made.info.run_id})

    def _make_nested(self, operation: Operation, experiment: str, folder: Path) -> Run:
        runs = self.client.search_runs([experiment], f"tags.`{LOCAL_ID}` = '{operation['run']}'", max_results=1)
        if runs:
            return runs[0]
        tags = {**operation["tags"], LOCAL_ID: operation["run"]}
        if operation["parent"] is None:
            return create_run(self.client, experiment, operation["name"], tags, operation["time"])
        tags[PARENT] = self._id_in_mlflow(operation["parent"], folder)
        run = create_run(self.client, experiment, operation["name"], tags, operation["time"])
        replace_earlier(self.client, run, step_runs_of(self.client, experiment, tags[RUN_ID], operation["name"]))
        return run

    @staticmethod
    def _id_in_mlflow(run: str, folder: Path) -> str:
        """Returns the id of a run in MLflow."""
        if not run.startswith(LOCAL):
            return run
        known = known_runs(folder)
        if run not in known:
            raise NotSentYetError("the run that this belongs to is not in MLflow yet")
        return known[run]


def _batch_size(pending: list[Operation]) -> int:
    """Returns how many operations to send together: metrics of one run up to MLflow's limit, else one."""
    first, values = pending[0], 0
    for count, operation in enumerate(pending):
        values += len(operation.get("values", ()))
        if count and (operation["op"] != "metrics" or operation["run"] != first["run"] or values > METRICS_AT_ONCE):
            return count
        if operation["op"] != "metrics":
            return 1
    return len(pending)


def _tag_name(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9_. /-]", "_", title).replace(" ", ".")


def store_from_environment() -> MlflowStore | None:
    """Returns the tracking store that the environment names; None if it names none."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return MlflowStore(uri, os.environ.get("MLFLOW_EXPERIMENT_NAME", "mixtune")) if uri else None


def store_at(address: str, experiment: str = "mixtune") -> MlflowStore:
    """Returns the store at a journal's address. Uses the credentials in the environment if they are for the same address."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return MlflowStore(given if without_credentials(given) == address else address, experiment)


def step_tags(step: str) -> dict[str, Any]:
    """Returns the tags of a step's run."""
    return {STEP: step, **git_tags()}


def git_tags() -> dict[str, str]:
    """Returns tags for the git commit, if the environment names it."""
    commit = os.environ.get("MIXTUNE_GIT_COMMIT")
    return {"mlflow.source.git.commit": commit, "mixtune.git_commit": commit} if commit else {}
