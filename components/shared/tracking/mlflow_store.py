"""MLflow's tracking store: connects to it and delivers what journals hold.

Everything goes through `MlflowClient` with explicit run ids: no global state, and a lone `MLFLOW_RUN_ID` in the environment
cannot redirect a nested run.

Every delivery may be made twice (the process can die before it notes that it delivered), so each is harmless the second
time: MLflow's store drops a metric value that it has, equal settings are accepted, tags and ends say the same again, and
a run that began without MLflow is found again by a tag.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import write_json
from ..errors import MixtuneError, TurnedAwayError, UnreachableError, first_line, without_credentials
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
_OURS: set[str] = set()


@contextlib.contextmanager
def patience(seconds: int, retries: int) -> Iterator[None]:
    """How long MLflow's client waits for an answer, and how often it asks again; what the user set in the environment holds."""
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        # Or a server that says "come back in an hour" would hold up the step for that hour.
        "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    }
    ours = {name: value for name, value in wanted.items() if name not in os.environ or name in _OURS}
    before = {name: os.environ.get(name) for name in ours}
    _OURS.update(ours)
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                _OURS.discard(name)
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def to_look() -> contextlib.AbstractContextManager[None]:
    """Patience for finding out whether a server answers."""
    return patience(4, 1)


def to_deliver() -> contextlib.AbstractContextManager[None]:
    """Patience for a server that answered before."""
    return patience(10, 1)


def connect(uri: str) -> MlflowClient:
    """A client for a tracking address whose server answers.

    Raises:
        UnreachableError: where nothing answers, also where an address swallows what is sent to it.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import logging

    # urllib3 warns of every try of its own, and MLflow prints what it raises as well; what matters is said once, in words.
    levels = {"mlflow.store": logging.WARNING, "mlflow.store.db.utils": logging.CRITICAL, "alembic": logging.WARNING}
    for name, level in {**levels, "urllib3.connectionpool": logging.ERROR}.items():
        logging.getLogger(name).setLevel(level)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    client = MlflowClient(uri, registry_uri=uri)
    try:
        with to_look():
            client.search_experiments(max_results=1)
    except Exception as error:
        raise unreachable(uri, error) from None
    return client


def unreachable(uri: str, error: Exception) -> UnreachableError:
    """The sentence for a server that does not answer, or not to these credentials."""
    if re.search(r"error code 40[13]\b", str(error)):
        return TurnedAwayError(
            f"MLFLOW_TRACKING_URI: the server at {without_credentials(uri)} turns these credentials away; correct "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if found := re.search(r"database or disk is full|attempt to write a readonly database", str(error)):
        return UnreachableError(
            f"MLFLOW_TRACKING_URI: {without_credentials(uri)} cannot be written ({found[0]}); make room and run again"
        )
    return UnreachableError(
        f"MLFLOW_TRACKING_URI: no MLflow server answers at {without_credentials(uri)} ({first_line(error)}); "
        "start it or correct the address"
    )


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Finds or makes the experiment; a SQLite store keeps its artifacts next to the database."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise MixtuneError(f"tracking.experiment: {name} is deleted in MLflow; restore it or choose another name")
        return found.experiment_id
    location = None
    if uri.startswith("sqlite:///"):
        location = str((Path(uri.removeprefix("sqlite:///")).parent / "artifacts").absolute())
    try:
        return client.create_experiment(name, artifact_location=location)
    except Exception:
        # Another step of the same run can have been faster.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


def came_from_server(error: Exception) -> bool:
    """Whether an error is of MLflow's or of the way to it, and not of this program's making."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException | OSError)


class Store:
    """A tracking address, and what is delivered there. Connects when it is first needed.

    Attributes:
        uri: the address, with what credentials it carries.
        experiment: name of the experiment.
    """

    def __init__(self, uri: str, experiment: str, client: MlflowClient | None = None) -> None:
        self.uri, self.experiment = uri, experiment
        self._client = client

    @property
    def address(self) -> str:
        """The address as it may be shown and kept."""
        return without_credentials(self.uri)

    @property
    def client(self) -> MlflowClient:
        """A client.

        Raises:
            UnreachableError: where nothing answers.
        """
        if self._client is None:
            self._client = connect(self.uri)
        return self._client

    def look(self) -> None:
        """Finds out in a few seconds whether the server answers.

        Raises:
            UnreachableError: where it does not.
        """
        client = self.client
        try:
            with to_look():
                client.search_experiments(max_results=1)
        except Exception as error:
            raise unreachable(self.uri, error) from None

    def experiment_id(self) -> str:
        """Returns the experiment's id: that of KFP's plugin, or by name; makes it where there is none."""
        if injected_run():
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        return experiment_id(self.client, self.experiment, self.uri)

    def deliver(self, journal: Journal) -> Counter[str]:
        """Delivers what is pending in a journal, oldest first.

        Returns:
            What was delivered.

        Raises:
            Exception: where something could not be delivered; it and what came after it are still pending.
        """
        done: Counter[str] = Counter()
        # Of a batch that is refused each operation is tried by itself, so that only the wrong one is left out.
        alone = 0
        with to_deliver():
            while journal.pending:
                count = 1 if alone else _how_many_at_once(journal.pending)
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
                        self.look()  # a server that is away rejects no text
                    if not self._sent_in_ascii(operations[0], journal.path.parent):
                        if not is_refused(error):
                            raise
                        what = operations[0]["op"]
                        print(f"tracking: MLflow refuses {what} ({first_line(error)}); left out")  # noqa: T201
                journal.advance(count)
                alone = max(0, alone - count)
        return done

    def deliver_leftovers(self, folder: Path) -> Counter[str]:
        """Delivers what steps left behind that ended or were killed; what another process is at is left to it.

        Raises:
            Exception: where something could not be delivered; it is still there.
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
                store = Store(self.uri, journal.owner.experiment, self.client)
                done += store.deliver(journal)
                store._end_killed(journal)
            except BaseException as error:
                journal.release()
                if not isinstance(error, Exception):
                    raise
                self.look()  # where the server is away, the others need not be tried
                problem = problem or error
            else:
                journal.close()
        if problem is not None:
            raise problem
        return done

    def _end_killed(self, journal: Journal) -> None:
        """Ends the run of a step that died without a word."""
        own = journal.owner.run
        if own is None or journal.ended:
            return
        run_id = known_runs(journal.path.parent).get(own, own)
        if not run_id.startswith(LOCAL) and self.client.get_run(run_id).info.status == "RUNNING":
            self.client.set_terminated(run_id, "KILLED", end_time=journal.last_time)

    def _carry_out(self, operations: list[Operation], folder: Path) -> None:
        """Delivers one operation, or several with metrics of one run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        one = operations[0]
        if one["op"] in ("parent", "run"):
            self._make_run(one, folder)
            return
        client, run = self.client, self._real(one["run"], folder)
        match one["op"]:
            case "metrics":
                self._log_metrics(run, operations)
            case "params":
                known = client.get_run(run).data.params if one["new_only"] else {}
                self._log(run, "params", {name: text for name, text in one["values"].items() if name not in known})
            case "tags":
                self._log(run, "tags", one["values"])
            case "artifact":
                client.log_artifact(run, str(folder / one["file"]), one["folder"])
            case "input":
                data = Dataset(one["name"], one["digest"], source_type="mixtune", source=one["source"])
                client.log_inputs(run, [DatasetInput(data, [InputTag("mlflow.data.context", one["context"])])])
            case "link":
                self._link(run, one["runs"], folder)
            case "end":
                client.set_terminated(run, one["status"], end_time=one["time"])
            case "close":
                close_pipeline_run(client, run, one["status"], one["verdict"], one["own"], one["time"])

    def _sent_in_ascii(self, one: Operation, folder: Path) -> bool:
        """Sends the texts of a rejected operation one by one, in ASCII where they are rejected again; else leaves them out.

        Returns:
            Whether the operation is one with texts, and so is done with.
        """
        match one["op"]:
            case "tags":
                run = self._real(one["run"], folder)
                for name, value in one["values"].items():
                    set_tag(self.client, run, name, value)
            case "params":
                run = self._real(one["run"], folder)
                known = self.client.get_run(run).data.params if one["new_only"] else {}
                for name in one["values"].keys() - known.keys():
                    log = partial(self.client.log_param, run, name)
                    send_text(log, one["values"][name], f"the parameter {name}")
            case "input":
                try:
                    self._carry_out([in_ascii(one)], folder)
                except Exception as error:
                    if not is_rejected(error):
                        raise
                    print(f"tracking: MLflow does not take the input {one['name']} ({first_line(error)}); left out")  # noqa: T201
            case _:
                return False
        return True

    def _log_metrics(self, run: str, operations: list[Operation]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, one["time"], one["step"]) for one in operations for name, value in one["values"].items()
        ]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self.client.log_batch(run, metrics=metrics[start : start + METRICS_AT_ONCE])

    def _log(self, run: str, what: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        entries = [(RunTag if what == "tags" else Param)(name, value) for name, value in values.items()]
        for start in range(0, len(entries), ENTRIES_AT_ONCE):
            self.client.log_batch(run, **{what: entries[start : start + ENTRIES_AT_ONCE]})

    def _link(self, parent: str, runs: Mapping[str, str], folder: Path) -> None:
        """Notes on a parent run which earlier runs made what came from the cache."""
        from mlflow.exceptions import MlflowException

        known = known_runs(folder)
        for title, first_id in runs.items():
            run_id = known.get(first_id, first_id)
            try:
                made_by = self.client.get_run(run_id).data.tags.get(PARENT)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                made_by = None  # made under another tracking store; the id alone still says which run it was
            if made_by != parent:
                self.client.set_tag(parent, f"mixtune.cached.{_tag_name(title)}", run_id)

    def _make_run(self, one: Operation, folder: Path) -> None:
        """Makes the run that a step or a pipeline run began without MLflow, or finds the one that was made of it."""
        with locked(folder):
            known = known_runs(folder)
            if one["run"] in known:
                return
            experiment = self.experiment_id()
            if one["op"] == "parent":
                made = parent_run(
                    self.client,
                    experiment,
                    one["pipeline_run"],
                    one["name"],
                    one["tags"],
                    time=one["time"],
                    child=one.get("child"),
                )
            else:
                made = self._make_nested(one, experiment, folder)
            write_json(folder / "runs.json", {**known, one["run"]: made.info.run_id})

    def _make_nested(self, one: Operation, experiment: str, folder: Path) -> Run:
        found = self.client.search_runs([experiment], f"tags.`{LOCAL_ID}` = '{one['run']}'", max_results=1)
        if found:
            return found[0]
        tags = {**one["tags"], LOCAL_ID: one["run"]}
        if one["parent"] is None:
            return create_run(self.client, experiment, one["name"], tags, one["time"])
        tags[PARENT] = self._real(one["parent"], folder)
        run = create_run(self.client, experiment, one["name"], tags, one["time"])
        replace_earlier(self.client, run, step_runs_of(self.client, experiment, tags[RUN_ID], one["name"]))
        return run

    @staticmethod
    def _real(run: str, folder: Path) -> str:
        """The id that MLflow knows a run by."""
        if not run.startswith(LOCAL):
            return run
        known = known_runs(folder)
        if run not in known:
            raise NotSentYetError("the run that this belongs to is not in MLflow yet")
        return known[run]


def _how_many_at_once(pending: list[Operation]) -> int:
    """Metrics of one run go together, as many as MLflow takes at once; anything else goes alone."""
    first, values = pending[0], 0
    for count, one in enumerate(pending):
        values += len(one.get("values", ()))
        if count and (one["op"] != "metrics" or one["run"] != first["run"] or values > METRICS_AT_ONCE):
            return count
        if one["op"] != "metrics":
            return 1
    return len(pending)


def _tag_name(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9_. /-]", "_", title).replace(" ", ".")


def store_from_environment() -> Store | None:
    """The tracking store that the environment names."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return Store(uri, os.environ.get("MLFLOW_EXPERIMENT_NAME", "mixtune")) if uri else None


def store_at(address: str, experiment: str = "mixtune") -> Store:
    """The store at an address that a journal names, with the credentials of the environment, if it is the same."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return Store(given if without_credentials(given) == address else address, experiment)


def step_tags(step: str) -> dict[str, Any]:
    """Tags of a step's run."""
    return {STEP: step, **git_tags()}


def git_tags() -> dict[str, str]:
    """The commit, where the environment names it."""
    commit = os.environ.get("MIXTUNE_GIT_COMMIT")
    return {"mlflow.source.git.commit": commit, "mixtune.git_commit": commit} if commit else {}
