"""Logs a step to MLflow: one parent run for each pipeline run, one nested run for each executed step.

The first step creates the parent run and the others find it by the pipeline run's id, so retries and single steps work in any
order. MLflow must answer when a step starts, unless MIXTUNE_TRACKING_OFFLINE=1. After that, everything is written to a
journal first and delivered from there, so that an outage of the server loses nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MixtuneError, TurnedAwayError, UnreachableError
from .connection import came_from_server, offline_allowed, to_deliver, unreachable
from .event_files import EventFiles
from .journal import LOCAL, Operation, step_runs
from .mlflow_runs import (
    RUN_ID,
    create_run,
    injected_run,
    open_step_run,
    parent_run,
    step_runs_of,
)
from .mlflow_store import MlflowStore, git_tags, step_tags, store_from_environment
from .mlflow_text import is_refused
from .outbox import Outbox, say
from .verdict import OUTCOME, RunStatus, StepRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

DELIVER_AT = 500
DELIVER_SECONDS = 15.0


class Tracker:
    """One MLflow run. Without a store, all methods do nothing.

    Attributes:
        run_id: the nested run of this step; None if nothing is tracked.
        parent_id: the parent run of the pipeline run, if there is one.
    """

    def __init__(
        self,
        store: MlflowStore | None,
        run_id: str | None,
        parent_id: str | None = None,
        *,
        title: str = "",
        pipeline_run: str | None = None,
        folder: Path | None = None,
        owns: bool = True,
    ) -> None:
        self.run_id, self.parent_id = run_id, parent_id
        self._pipeline_run = pipeline_run
        self._outbox = Outbox(store, title, pipeline_run, run_id, folder, owns) if store else None
        self._events = EventFiles.from_environment(title)

    @classmethod
    def off(cls, title: str = "") -> Tracker:
        """Returns a tracker that logs nothing to MLflow."""
        return cls(None, None, title=title)

    @classmethod
    def open(cls, step: str, title: str, pipeline_run_id: str | None) -> Tracker:
        """Opens the nested run of a step on the configured server, and ends the runs of killed attempts.

        Raises:
            UnreachableError: if the tracking server does not answer and offline tracking is not enabled.
            RefusedError: if this step of this pipeline run was refused before.
        """
        store = store_from_environment()
        if store is None:
            return cls.off(title)
        try:
            tracker = cls._open_online(store, step, title, pipeline_run_id)
        except UnreachableError as error:
            if not offline_allowed() or isinstance(error, TurnedAwayError):
                raise
            tracker = cls._open_offline(store, step, title, pipeline_run_id)
            say(f"{error.problems[0].partition(';')[0]}; going on without it")
        if tracker._outbox and not tracker._outbox.is_paused:
            tracker._outbox.deliver_leftovers()
        return tracker

    @classmethod
    def _open_online(cls, store: MlflowStore, step: str, title: str, pipeline_run: str | None) -> Tracker:
        try:
            with to_deliver():
                experiment, tags = store.experiment_id(), step_tags(step)
                if not pipeline_run:
                    run = create_run(store.client, experiment, title, tags)
                    return cls(store, run.info.run_id, title=title)
                parent = parent_run(
                    store.client, experiment, pipeline_run, _parent_name(pipeline_run), git_tags(), child=injected_run()
                ).info.run_id
                run_id = open_step_run(store.client, experiment, pipeline_run, parent, title, tags)
                return cls(store, run_id, parent, title=title, pipeline_run=pipeline_run)
        except MixtuneError:
            raise
        except Exception as error:
            if is_refused(error) or not came_from_server(error):
                raise
            raise unreachable(store.uri, error) from None

    @classmethod
    def _open_offline(cls, store: MlflowStore, step: str, title: str, pipeline_run: str | None) -> Tracker:
        """Starts a run with a local id. The id is replaced when the run is delivered to MLflow."""
        run = LOCAL + os.urandom(16).hex()
        tags = step_tags(step)
        parent = None
        if pipeline_run:
            parent = _local_parent(pipeline_run)
            tags |= {RUN_ID: pipeline_run, "mixtune.kfp_run": pipeline_run}
        injected = injected_run()
        tracker = cls(store, injected or run, parent, title=title, pipeline_run=pipeline_run)
        assert tracker._outbox is not None
        tracker._outbox.pause()
        tracker._add_parent()
        if injected:
            tracker._add({"op": "tags", "run": injected, "values": {"mlflow.runName": title, **tags}})
            return tracker
        tracker._add({"op": "run", "run": run, "parent": parent, "name": title, "tags": tags, "time": _now()})
        return tracker

    @classmethod
    def attach(cls, run_id: str | None, parent_id: str | None, folder: Path | None = None, title: str = "") -> Tracker:
        """Continues a run that another process of the same step opened and will close.

        Args:
            folder: folder of that process's journal.
        """
        store = store_from_environment()
        if store is None or run_id is None:
            return cls.off(title)
        pipeline_run = os.environ.get("MIXTUNE_RUN_ID")
        return cls(store, run_id, parent_id, title=title, pipeline_run=pipeline_run, folder=folder, owns=False)

    @property
    def journal_folder(self) -> Path | None:
        """Returns the folder for journals; None if nothing is tracked."""
        return self._outbox.folder if self._outbox else None

    def detach(self) -> None:
        """Delivers pending records without ending the run."""
        self._close_events()
        self._close_outbox()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs settings. Nested mappings become dotted names."""
        self._log_params(self.run_id, params, new_only=False)

    def log_parent_params(self, params: Mapping[str, Any]) -> None:
        """Logs settings of the whole pipeline run. Settings that a previous attempt logged are kept."""
        self._log_params(self.parent_id, params, new_only=True)

    def _log_params(self, target: str | None, params: Mapping[str, Any], new_only: bool) -> None:
        values = {name: str(value) for name, value in _flatten(params)}
        if target and values:
            self._add({"op": "params", "run": target, "values": values, "new_only": new_only})
            self._deliver()

    def log_metrics(self, metrics: Mapping[str, float | None], step: int | None = None) -> None:
        """Logs metrics. They are written to the journal at once and delivered in batches."""
        if self._events is not None and step is not None:
            self._events.add(metrics, step)
        self._log_metrics(self.run_id, metrics, step)
        outbox = self._outbox
        if outbox is None:
            return
        due = time.monotonic() - outbox.last_delivery >= DELIVER_SECONDS
        if due or outbox.num_pending * max(len(metrics), 1) >= DELIVER_AT:
            outbox.deliver()

    def log_parent_metrics(self, metrics: Mapping[str, float]) -> None:
        """Logs metrics of the whole pipeline run."""
        self._log_metrics(self.parent_id, metrics, None)
        self._deliver()

    def _log_metrics(self, target: str | None, metrics: Mapping[str, float | None], step: int | None) -> None:
        values = {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
        if target and values:
            self._add({"op": "metrics", "run": target, "values": values, "step": step or 0, "time": _now()})

    def set_tags(self, tags: Mapping[str, str], parent: bool = False) -> None:
        """Sets tags on this run or on the parent run."""
        target = self.parent_id if parent else self.run_id
        if target and tags:
            self._add({"op": "tags", "run": target, "values": dict(tags)})
            self._deliver()

    def log_artifact(self, path: str | Path, folder: str | None = None, parent: bool = False) -> None:
        """Logs a file to this run or to the parent run. It is copied only if it cannot be delivered."""
        target = self.parent_id if parent else self.run_id
        if self._outbox is None or target is None:
            return
        if self._deliver() and not target.startswith(LOCAL):
            try:
                with to_deliver():
                    self._outbox.store.client.log_artifact(target, str(path), folder)
                return
            except Exception as error:
                self._outbox.failed(error)
        try:
            copy = self._outbox.keep(Path(path))
        except OSError as error:
            say(f"{path} can neither be delivered nor kept ({error.strerror}); left out")
            return
        self._add({"op": "artifact", "run": target, "file": copy, "folder": folder})

    def log_input(self, name: str, digest: str, source: str, context: str) -> None:
        """Logs a data set that this run read, with its digest."""
        if self.run_id:
            what = {"name": name, "digest": digest, "source": source, "context": context}
            self._add({"op": "input", "run": self.run_id, **what})
            self._deliver()

    def link(self, runs: Mapping[str, str]) -> None:
        """Records on the parent run which earlier runs produced the cached results.

        Args:
            runs: maps the title of a step to the MLflow run that produced its outputs.
        """
        if self.parent_id and runs:
            self._add({"op": "link", "run": self.parent_id, "runs": dict(runs)})
            self._deliver()

    def close(self, status: RunStatus, outcome: Mapping[str, str] | None = None) -> None:
        """Ends the step's run with its outcome, delivers pending records and reports undelivered ones."""
        self._close_events()
        if self.run_id is None:
            return
        if outcome:
            values = {f"{OUTCOME}{name}": value for name, value in outcome.items()}
            self._add({"op": "tags", "run": self.run_id, "values": values})
        self._add({"op": "end", "run": self.run_id, "status": status, "time": _now()})
        self._close_outbox()

    def close_parent(self, status: RunStatus, verdict: str) -> None:
        """Ends the parent run with its verdict, and all runs that other steps left open."""
        if self.parent_id:
            own = {"own": self.run_id, "time": _now()}
            self._add({"op": "close", "run": self.parent_id, "status": status, "verdict": verdict, **own})
            self._deliver()

    def children(self) -> list[StepRun]:
        """Returns the nested runs of this pipeline run, oldest first. While MLflow is down, only the local ones."""
        if self._outbox is None or self.parent_id is None:
            return []
        if self._deliver() and (parent := self._known_parent()):
            try:
                with to_deliver():
                    client = self._outbox.store.client
                    experiment = client.get_run(parent).info.experiment_id
                    runs = step_runs_of(client, experiment, self._pipeline_run or "")
                return [StepRun(run.info.run_name, run.info.status, dict(run.data.tags)) for run in runs]
            except Exception as error:
                self._outbox.failed(error)
        return step_runs(self._outbox.operations())

    def parent_tags(self) -> dict[str, str]:
        """Returns the parent run's tags. While MLflow is down, only the local ones."""
        if self._outbox is None or self.parent_id is None:
            return {}
        tags: dict[str, str] = {}
        parents = {self.parent_id, _local_parent(self._pipeline_run or "")}
        if self._deliver() and (parent := self._known_parent()):
            try:
                with to_deliver():
                    tags = dict(self._outbox.store.client.get_run(parent).data.tags)
            except Exception as error:
                self._outbox.failed(error)
        for operation in self._outbox.operations():
            if operation["op"] == "tags" and operation["run"] in parents:
                tags |= operation["values"]
        return tags

    def reach(self) -> MlflowClient | None:
        """Returns a client after a check that the server answers; None if nothing is tracked.

        Raises:
            UnreachableError: if it does not answer.
        """
        if self._outbox is None:
            return None
        self._outbox.store.look()
        return self._outbox.store.client

    def register_model(self, folder: Path, files: Iterable[Path], **version: Any) -> str | None:
        """Registers a version of a model, unless one with the same weights, labels and tokenizer exists. Then sets the alias.

        Args:
            folder: model folder in Hugging Face format.
            files: files to log with the model, such as the report.
            version: further arguments of `registry.register`.

        Returns:
            The version, or None if nothing is tracked.

        Raises:
            UnreachableError: if the tracking server does not answer.
        """
        if self._outbox is None or self.run_id is None:
            return None
        store = self._outbox.store
        from .registry import register

        for file in files:
            self.log_artifact(file, "report")
        try:
            store.look()
            self._outbox.deliver_now()
            run_id = self._outbox.id_in_mlflow(self.run_id) or self.run_id
            return register(store.client, run_id, folder, **version)
        except MixtuneError:
            raise
        except Exception:
            store.look()  # raises UnreachableError if the server is down, the actual cause
            raise

    def _add(self, operation: Operation) -> None:
        if self._outbox:
            self._outbox.add(operation)

    def _deliver(self) -> bool:
        return self._outbox is not None and self._outbox.deliver()

    def _close_events(self) -> None:
        for file in self._events.close() if self._events else ():
            self.log_artifact(file, "tensorboard")

    def _close_outbox(self) -> None:
        if self._outbox:
            self._outbox.close()

    def _add_parent(self) -> None:
        if self.parent_id and self._pipeline_run:
            parent = {
                "run": self.parent_id,
                "pipeline_run": self._pipeline_run,
                "name": _parent_name(self._pipeline_run),
                "child": injected_run(),
            }
            self._add({"op": "parent", **parent, "tags": git_tags(), "time": _now()})

    def _known_parent(self) -> str | None:
        """Returns the parent run's id in MLflow; None if it is not delivered yet."""
        if self.parent_id is None or self._outbox is None or not self.parent_id.startswith(LOCAL):
            return self.parent_id
        return self._outbox.id_in_mlflow(self.parent_id)


def close_unfinished(
    uri: str, experiment: str, pipeline_run: str, status: RunStatus, verdict: str, folder: Path | None = None
) -> None:
    """Ends the parent run of a pipeline run if `finish` did not, and all runs that its steps left open.

    Args:
        folder: folder for the journal, which `mixtune sync` delivers later if the tracking server does not answer.
    """
    tracker = Tracker(
        MlflowStore(uri, experiment),
        None,
        _local_parent(pipeline_run),
        title="unfinished",
        pipeline_run=pipeline_run,
        folder=folder,
    )
    tracker._add_parent()
    tracker.close_parent(status, verdict)
    tracker._close_outbox()


def _local_parent(pipeline_run: str) -> str:
    return LOCAL + hashlib.sha256(pipeline_run.encode()).hexdigest()[:32]


def _parent_name(pipeline_run: str) -> str:
    return os.environ.get("MIXTUNE_RUN_NAME", pipeline_run)


def _now() -> int:
    return int(time.time() * 1000)


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
