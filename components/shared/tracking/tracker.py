"""What a step tells MLflow: one parent run for each pipeline run, one nested run for each step that ran.

The parent is found by the pipeline run's id or made, by whichever step comes first, so that retries and single steps
need no order. MLflow has to answer when a step begins (or MIXTUNE_TRACKING_OFFLINE=1 lets it go on without); from then on
everything is written into a journal first and delivered from there, so that a server that goes away costs nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Task
from ..errors import MixtuneError, TurnedAwayError, UnreachableError, first_line
from .journal import (
    LOCAL,
    Journal,
    Operation,
    Owner,
    folder_from_environment,
    in_words,
    known_runs,
    operations_of,
    step_runs,
    sync_command,
    undelivered,
)
from .mlflow_runs import (
    PARENT,
    RUN_ID,
    adopt_run,
    create_run,
    injected_run,
    parent_run,
    refuse_again,
    replace_earlier,
    step_runs_of,
)
from .mlflow_store import (
    Store,
    came_from_server,
    connect,
    git_tags,
    step_tags,
    store_from_environment,
    to_deliver,
    unreachable,
)
from .mlflow_text import is_refused
from .verdict import OUTCOME, RunStatus, StepRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["PARENT", "StepRun", "Tracker", "close_unfinished", "connect"]

OFFLINE = "MIXTUNE_TRACKING_OFFLINE"
DELIVER_AT = 500
DELIVER_SECONDS = 15.0
FIRST_REST = 5.0
LONGEST_REST = 300.0


class Tracker:
    """One MLflow run. With no store it does nothing, so that steps need not ask.

    Attributes:
        run_id: the nested run of this step; None where nothing is tracked.
        parent_id: the parent run of the pipeline run, where there is one.
    """

    def __init__(
        self,
        store: Store | None,
        run_id: str | None,
        parent_id: str | None = None,
        *,
        title: str = "",
        pipeline_run: str | None = None,
        folder: Path | None = None,
        owns: bool = True,
    ) -> None:
        self.run_id, self.parent_id = run_id, parent_id
        self._store, self._title, self._pipeline_run, self._owns = store, title, pipeline_run, owns
        self._given_folder = folder or folder_from_environment()
        self._own_folder: tempfile.TemporaryDirectory[str] | None = None
        self._begun: Journal | None = None
        self._rest = self._rest_until = 0.0
        self._last_delivery = time.monotonic()
        self._disk_full = False

    @classmethod
    def off(cls) -> Tracker:
        """Tracks nothing."""
        return cls(None, None)

    @classmethod
    def open(cls, step: str, title: str, pipeline_run_id: str | None) -> Tracker:
        """Starts the nested run of one step, as the environment says, and ends those of its killed attempts.

        Raises:
            UnreachableError: where the tracking server does not answer and the environment does not let it go on without.
            RefusedError: where this step of this pipeline run was refused before.
        """
        store = store_from_environment()
        if store is None:
            return cls.off()
        try:
            tracker = cls._open_online(store, step, title, pipeline_run_id)
        except UnreachableError as error:
            if not offline_allowed() or isinstance(error, TurnedAwayError):
                raise
            tracker = cls._open_offline(store, step, title, pipeline_run_id)
            tracker._say(f"{error.problems[0].partition(';')[0]}; going on without it")
        if not tracker._rest:
            tracker._deliver_leftovers()
        return tracker

    @classmethod
    def _open_online(cls, store: Store, step: str, title: str, pipeline_run: str | None) -> Tracker:
        client = store.client
        try:
            with to_deliver():
                experiment = store.experiment_id()
                tags = step_tags(step)
                if not pipeline_run:
                    run = create_run(client, experiment, title, tags)
                    return cls(store, run.info.run_id, title=title)
                injected = injected_run()
                parent = parent_run(
                    client, experiment, pipeline_run, _parent_name(pipeline_run), git_tags(), child=injected
                ).info.run_id
                attempts = step_runs_of(client, experiment, pipeline_run, title)
                refuse_again(attempts)
                tags |= {RUN_ID: pipeline_run, "mixtune.kfp_run": pipeline_run}
                if injected:
                    adopt_run(client, injected, title, tags)
                    run = client.get_run(injected)
                else:
                    run = create_run(client, experiment, title, tags | {PARENT: parent})
                replace_earlier(client, run, attempts)
                return cls(store, run.info.run_id, parent, title=title, pipeline_run=pipeline_run)
        except MixtuneError:
            raise
        except Exception as error:
            if is_refused(error) or not came_from_server(error):
                raise
            raise unreachable(store.uri, error) from None

    @classmethod
    def _open_offline(cls, store: Store, step: str, title: str, pipeline_run: str | None) -> Tracker:
        """Begins a run that MLflow does not know yet, under an id that is exchanged when it is delivered."""
        run = LOCAL + os.urandom(16).hex()
        tags = step_tags(step)
        parent = None
        if pipeline_run:
            parent = _local_parent(pipeline_run)
            tags |= {RUN_ID: pipeline_run, "mixtune.kfp_run": pipeline_run}
        injected = injected_run()
        tracker = cls(store, injected or run, parent, title=title, pipeline_run=pipeline_run)
        tracker._begin_rest()
        tracker._add_parent()
        if injected:
            tracker._add({"op": "tags", "run": injected, "values": {"mlflow.runName": title, **tags}})
            return tracker
        tracker._add({"op": "run", "run": run, "parent": parent, "name": title, "tags": tags, "time": _now()})
        return tracker

    @classmethod
    def attach(cls, run_id: str | None, parent_id: str | None, folder: Path | None = None, title: str = "") -> Tracker:
        """Goes on with a run that another process of the same step opened and will close.

        Args:
            folder: where that process keeps its journal.
        """
        store = store_from_environment()
        if store is None or run_id is None:
            return cls.off()
        pipeline_run = os.environ.get("MIXTUNE_RUN_ID")
        return cls(store, run_id, parent_id, title=title, pipeline_run=pipeline_run, folder=folder, owns=False)

    @property
    def journal_folder(self) -> Path | None:
        """Where what is not delivered is kept; without a folder in the environment one that goes with the process."""
        if self._store is None:
            return None
        if self._given_folder is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="mixtune-undelivered-", ignore_cleanup_errors=True)
            self._given_folder = Path(self._own_folder.name)
        return self._given_folder

    def detach(self) -> None:
        """Delivers what is left, without ending the run."""
        self._end()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings; nested mappings become dotted names, long values are cut."""
        self._log_params(self.run_id, params, new_only=False)

    def log_parent_params(self, params: Mapping[str, Any]) -> None:
        """Settings of the whole pipeline run. A retry finds them there already and leaves them."""
        self._log_params(self.parent_id, params, new_only=True)

    def _log_params(self, target: str | None, params: Mapping[str, Any], new_only: bool) -> None:
        values = {name: str(value)[:6000] for name, value in _flatten(params)}
        if target and values:
            self._add({"op": "params", "run": target, "values": values, "new_only": new_only})
            self._deliver()

    def log_metrics(self, metrics: Mapping[str, float | None], step: int | None = None) -> None:
        """Numbers: written down at once, delivered in batches."""
        self._log_metrics(self.run_id, metrics, step)
        waiting = len(self._begun.pending) if self._begun else 0
        if waiting * max(len(metrics), 1) >= DELIVER_AT or time.monotonic() - self._last_delivery >= DELIVER_SECONDS:
            self._deliver()

    def log_parent_metrics(self, metrics: Mapping[str, float]) -> None:
        """Numbers of the whole pipeline run."""
        self._log_metrics(self.parent_id, metrics, None)
        self._deliver()

    def _log_metrics(self, target: str | None, metrics: Mapping[str, float | None], step: int | None) -> None:
        values = {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
        if target and values:
            self._add({"op": "metrics", "run": target, "values": values, "step": step or 0, "time": _now()})

    def set_tags(self, tags: Mapping[str, str], parent: bool = False) -> None:
        """Labels of this run, or of the pipeline's parent run."""
        target = self.parent_id if parent else self.run_id
        if target and tags:
            values = {name: value[:5000] for name, value in tags.items()}
            self._add({"op": "tags", "run": target, "values": values})
            self._deliver()

    def log_artifact(self, path: str | Path, folder: str | None = None, parent: bool = False) -> None:
        """A file, kept with this run or with the pipeline's parent run. It is copied only where it cannot be delivered."""
        target = self.parent_id if parent else self.run_id
        if self._store is None or target is None:
            return
        if self._deliver() and not target.startswith(LOCAL):
            try:
                with to_deliver():
                    self._store.client.log_artifact(target, str(path), folder)
                return
            except Exception as error:
                self._could_not(error)
        try:
            kept = self._journal().keep(Path(path))
        except OSError as error:
            self._say(f"{path} can neither be delivered nor kept ({error.strerror}); left out")
            return
        self._add({"op": "artifact", "run": target, "file": kept, "folder": folder})

    def log_input(self, name: str, digest: str, source: str, context: str) -> None:
        """A data set that this run read, by its digest."""
        if self.run_id:
            what = {"name": name, "digest": digest[:36], "source": source, "context": context}
            self._add({"op": "input", "run": self.run_id, **what})
            self._deliver()

    def link(self, runs: Mapping[str, str]) -> None:
        """Notes on the parent run which earlier runs made what came from the cache.

        Args:
            runs: title of a step -> MLflow run that made its outputs.
        """
        if self.parent_id and runs:
            self._add({"op": "link", "run": self.parent_id, "runs": dict(runs)})
            self._deliver()

    def close(self, status: RunStatus, outcome: Mapping[str, str] | None = None) -> None:
        """Ends the step's run with its outcome, delivers what is left and says what could not be delivered."""
        if self.run_id is None:
            return
        if outcome:
            values = {f"{OUTCOME}{name}": value[:5000] for name, value in outcome.items()}
            self._add({"op": "tags", "run": self.run_id, "values": values})
        self._add({"op": "end", "run": self.run_id, "status": status, "time": _now()})
        self._end()

    def close_parent(self, status: RunStatus, verdict: str) -> None:
        """Ends the pipeline's parent run with its verdict, and the runs that other steps left open."""
        if self.parent_id:
            own = {"own": self.run_id, "time": _now()}
            self._add({"op": "close", "run": self.parent_id, "status": status, "verdict": verdict, **own})
            self._deliver()

    def children(self) -> list[StepRun]:
        """The nested runs of this pipeline run, oldest first; while MLflow is away those that are known here."""
        if self._store is None or self.parent_id is None:
            return []
        if self._deliver() and (parent := self._known_parent()):
            try:
                with to_deliver():
                    experiment = self._store.client.get_run(parent).info.experiment_id
                    found = step_runs_of(self._store.client, experiment, self._pipeline_run or "")
                return [StepRun(run.info.run_name, run.info.status, dict(run.data.tags)) for run in found]
            except Exception as error:
                self._could_not(error)
        return step_runs(self._written_down())

    def parent_tags(self) -> dict[str, str]:
        """Tags of the pipeline's parent run; while MLflow is away those that are known here."""
        if self._store is None or self.parent_id is None:
            return {}
        tags: dict[str, str] = {}
        parents = {self.parent_id, _local_parent(self._pipeline_run or "")}
        if self._deliver() and (parent := self._known_parent()):
            try:
                with to_deliver():
                    tags = dict(self._store.client.get_run(parent).data.tags)
            except Exception as error:
                self._could_not(error)
        for one in self._written_down():
            if one["op"] == "tags" and one["run"] in parents:
                tags |= one["values"]
        return tags

    def reach(self) -> MlflowClient | None:
        """A client whose server answers, for what cannot wait until later; None where nothing is tracked.

        Raises:
            UnreachableError: where it does not answer.
        """
        if self._store is None:
            return None
        self._store.look()
        return self._store.client

    def register_model(
        self, folder: Path, name: str, alias: str, kind: Task, tags: Mapping[str, str], files: Iterable[Path], card: str
    ) -> str | None:
        """Makes a version of a registered model, unless the same weights, labels and tokenizer made one; sets the alias.

        Args:
            folder: model folder in Hugging Face format.
            name: registered model.
            alias: alias that will point to the version.
            kind: what the model is for.
            tags: lineage of the version.
            files: what goes along with the model on this run, such as the report.
            card: the model card, Markdown.

        Returns:
            The version, or None where nothing is tracked.

        Raises:
            UnreachableError: where the tracking server does not answer.
        """
        if self._store is None or self.run_id is None:
            return None
        from .registry import register

        for file in files:
            self.log_artifact(file, "report")
        try:
            self._store.look()
            if self._begun and self._begun.pending:
                self._store.deliver(self._begun)
            run_id = known_runs(self.journal_folder or Path()).get(self.run_id, self.run_id)
            return register(self._store.client, run_id, folder, name, alias, kind, tags, card)
        except MixtuneError:
            raise
        except Exception:
            self._store.look()  # raises where the server is away, which is then what went wrong
            raise

    def _journal(self) -> Journal:
        if self._begun is None:
            assert self._store is not None
            own = self.run_id if self._owns else None
            owner = Owner(self._store.address, self._store.experiment, self._title, self._pipeline_run, own)
            folder = self.journal_folder
            assert folder is not None
            try:
                self._begun = Journal.start(folder, owner)
            except OSError as error:
                self._say(f"{folder} cannot be written ({error.strerror}); a temporary folder takes its place")
                self._given_folder = None
                self._begun = Journal.start(Path(self.journal_folder or folder), owner)
        return self._begun

    def _add(self, operation: Operation) -> None:
        if self._store is None:
            return
        try:
            self._journal().append(operation)
        except OSError as error:
            if not self._disk_full:
                self._say(f"what MLflow has not got cannot be written down ({error.strerror or error}); going on")
            self._disk_full = True

    def _add_parent(self) -> None:
        if self.parent_id and self._pipeline_run:
            parent = {
                "run": self.parent_id,
                "pipeline_run": self._pipeline_run,
                "name": _parent_name(self._pipeline_run),
                "child": injected_run(),
            }
            self._add({"op": "parent", **parent, "tags": git_tags(), "time": _now()})

    def _deliver(self, last: bool = False) -> bool:
        """Delivers what is pending, unless the server did not answer a moment ago; whether nothing is pending."""
        if self._store is None or (time.monotonic() < self._rest_until and not last):
            return False
        self._last_delivery = time.monotonic()
        try:
            if self._rest:
                self._store.look()
            if self._begun:
                self._store.deliver(self._begun)
        except Exception as error:
            self._could_not(error)
            return False
        if self._rest:
            self._say("MLflow answers again")
        self._rest = self._rest_until = 0.0
        return True

    def _could_not(self, error: Exception) -> None:
        if not self._rest:
            self._say(f"something could not be delivered ({first_line(error)}); going on, it is kept and tried again")
        self._begin_rest()

    def _begin_rest(self) -> None:
        """Leaves a server alone for a while that does not answer, longer each time: waiting for it costs the training time."""
        self._rest = min(max(2 * self._rest, FIRST_REST), LONGEST_REST)
        self._rest_until = time.monotonic() + self._rest

    def _deliver_leftovers(self) -> bool:
        folder = self._given_folder
        if self._store is None or folder is None:
            return True
        try:
            self._store.deliver_leftovers(folder)
        except Exception as error:
            self._could_not(error)
            return False
        return True

    def _end(self) -> None:
        """The last attempt to deliver, and a line that says what is left."""
        if self._store is None or self._begun is None:
            return
        if self._deliver(last=True):
            self._deliver_leftovers()
        folder = self._begun.path.parent
        self._begun.close()
        self._begun = None
        if not self._owns:
            return  # the process that opened the run delivers what is left, and says what is not
        kept = undelivered(folder).counts
        if self._own_folder is not None:
            if kept:
                self._say(
                    f"not delivered to MLflow at {self._store.address}: {in_words(kept)}; it is lost with this process, "
                    "since MIXTUNE_JOURNAL_DIR names no folder to keep it in"
                )
            self._own_folder.cleanup()
        elif kept:
            self._say(
                f"not delivered to MLflow at {self._store.address}: {in_words(kept)}; it is kept in {folder}; "
                f"deliver it with `{sync_command(folder)}`"
            )

    def _known_parent(self) -> str | None:
        """The id that MLflow knows the parent run by, if it does."""
        folder = self.journal_folder
        if self.parent_id is None or folder is None or not self.parent_id.startswith(LOCAL):
            return self.parent_id
        return known_runs(folder).get(self.parent_id)

    def _written_down(self) -> list[Operation]:
        """What the journals of this pipeline run hold."""
        folder = self.journal_folder
        return list(operations_of(folder, self._pipeline_run)) if folder else []

    @staticmethod
    def _say(line: str) -> None:
        print(f"tracking: {line}", flush=True)  # noqa: T201


def close_unfinished(
    uri: str, experiment: str, pipeline_run: str, status: RunStatus, verdict: str, folder: Path | None = None
) -> None:
    """Ends the parent run of a pipeline run that `finish` did not end, and the steps that could not do so themselves.

    Args:
        folder: where that is written down for `mixtune sync`, should the tracking server not answer.
    """
    tracker = Tracker(
        Store(uri, experiment),
        None,
        _local_parent(pipeline_run),
        title="unfinished",
        pipeline_run=pipeline_run,
        folder=folder,
    )
    tracker._add_parent()
    tracker.close_parent(status, verdict)
    tracker._end()


def offline_allowed() -> bool:
    """Whether a step may go on without a tracking server that does not answer."""
    return os.environ.get(OFFLINE) == "1"


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
