"""Runs one step in a KFP task, in a container or in a shell. Steps contain only their own work."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from .artifacts import Artifact, ArtifactLike, ModelCard, write_json
from .ascii_text import spell_in_output
from .errors import GateNotMetError, MixtuneError, RefusedError, Terminated, cannot_be_written, is_out_of_memory
from .model.device import pick_device, requested_gpus
from .nodes.manifest import runs_on_nodes
from .outcome import EXIT_STATUS, Outcome, load_outcome
from .running.context import ALONE, Context, note_progress, take_tracking_secret
from .running.processes import is_main, num_processes, run_in_processes
from .section import Section
from .startup import quick_imports
from .task_name import PORTIONS, TaskName
from .tracking.mlflow_text import TAG_CHARACTERS
from .tracking.tracker import Tracker
from .tracking.verdict import status_of

OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "prepare": ("train", "heldout", "tokenizer", "report"),
    "prepare.portion": ("rows",),
    "pretrain": ("model", "metrics"),
    "finetune": ("model", "metrics"),
    "mixed": ("model", "metrics"),
    "evaluate": ("evaluation", "metrics", "classification"),
    "compare": ("report", "summary", "metrics", "comparison"),
    "register": ("model",),
}
"""Outputs of each step, and of each further module of a step that has some. All other artifacts are read only."""
AGAIN_SECONDS = 5.0
TERMINATION_LOG = Path("/dev/termination-log")
TERMINATION_BYTES = 4096


def launch(
    step: str,
    config: str,
    artifacts: Mapping[str, ArtifactLike | list[ArtifactLike] | None],
    module: str = "step",
    **parameters: Any,
) -> Any:
    """Runs a step and writes its outcome record. The body of every KFP component calls this function.

    Args:
        step: name of the step.
        config: the step's part of the configuration, as JSON.
        artifacts: the step's inputs and outputs, by the names of `run`'s arguments.
        module: module of the step that has `run`.
        parameters: further arguments of `run`.

    Returns:
        The return value of `run`.

    Raises:
        SystemExit: if the step failed. Its messages have been printed and recorded.
    """
    package = __package__.rsplit(".", 1)[0]
    started = time.monotonic()
    spell_in_output()
    take_tracking_secret()
    # A rerun of a step alone runs the whole step.
    given = _given(step, config, artifacts, parameters) if module == "step" else {}
    with _own_log(step, config, artifacts, parameters) as (title, log):
        parsed: Section | None = None
        tracker = Tracker.off()
        staged: StagedOutputs | None = None
        note_progress(title)
        try:
            _raise_on_sigterm()
            with quick_imports():
                section: type[Section] = getattr(
                    importlib.import_module(f"{package}.{step}.config"), f"{step.capitalize()}Step"
                )
                parsed = section.from_json(config)
                run_id = os.environ.get("MIXTUNE_RUN_ID")
                if is_main():
                    _refuse_again(title, run_id)
                    tracker = Tracker.open(step, title, run_id)
                if requested_gpus():
                    pick_device()  # fail before loading anything if the requested GPUs are missing
                tracker.log_params(parsed.model_dump(mode="json"))
                context = Context(title=title, tracker=tracker, run_id=run_id, quiet=not is_main())
                staged = StagedOutputs(step if module == "step" else f"{step}.{module}", artifacts, clean=is_main())
                on_nodes = runs_on_nodes(step, parsed)
                count = 0 if on_nodes else num_processes(step, parsed)
                code = importlib.import_module(f"{package}.{step}.{module}") if count == 1 else None
            value = missed = None
            if on_nodes:
                from .nodes.launcher import run_on_nodes

                run_on_nodes(step, parsed, context, staged.artifacts, parameters, OUTPUTS[step])
            elif code is None:
                run_in_processes(count, step, parsed, context, staged.artifacts, parameters)
            else:
                try:
                    value = code.run(parsed, context=context, **staged.artifacts, **parameters)
                except GateNotMetError as error:
                    missed = error
            if is_main():
                for name in ("metrics", "classification"):
                    _write_metrics(staged.artifacts.get(name))
                staged.publish()
            if missed:
                raise missed
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)  # SIGTERM was handled; do not interrupt the cleanup
            if staged and is_main():
                staged.discard()  # frees space for the record if the disk is full
            outcome = _outcome_of(error, title, log, time.monotonic() - started, tracker.run_id)
            outcome = outcome.model_copy(update={"given": given})
            if is_out_of_memory(error) and (batch_size := getattr(parsed, "batch_size", 1)) > 1:
                advice = f"out of memory; set {step}.batch_size to {batch_size // 2}, or use more memory"
                outcome = outcome.model_copy(update={"sentences": [advice]})
            if isinstance(error, GateNotMetError):
                outcome = outcome.model_copy(update={"facts": context.facts, "artifacts": _uris(artifacts)})
            _leave(outcome, tracker)
            if is_main():
                _tell_kubernetes(outcome)
            for sentence in outcome.sentences:
                print(f"{title}: {sentence}", file=sys.stderr, flush=True)
            raise SystemExit(outcome.exit_status) from None
        seconds = time.monotonic() - started
        done = Outcome(
            title=title,
            kind="done",
            log=log,
            seconds=round(seconds, 3),
            mlflow_run=tracker.run_id,
            facts=context.facts,
            artifacts=_uris(artifacts),
            given=given,
        )
        _leave(done, tracker)
        return value


class StagedOutputs:
    """Redirects a step's outputs to temporary paths and moves them to their final paths when the step succeeds.

    An output is therefore complete or does not exist, whenever the step is killed. An earlier output stays until then.

    Args:
        step: key of `OUTPUTS`.
        artifacts: inputs and outputs of the step.
        clean: whether to remove partial outputs of an earlier attempt.
    """

    def __init__(
        self, step: str, artifacts: Mapping[str, ArtifactLike | list[ArtifactLike] | None], clean: bool
    ) -> None:
        self._pairs: list[tuple[Path, Path]] = []
        self.artifacts = dict(artifacts)
        """The given artifacts; outputs have temporary paths."""
        for name in OUTPUTS.get(step, ()):
            output: Any = artifacts.get(name)
            if output is None:
                continue
            target = Path(output.path)
            part = target.with_name(f"{target.name}.part")
            self._pairs.append((part, target))
            self.artifacts[name] = Artifact(str(part), output.uri, output.metadata)
            if clean:
                _remove(part)

    def publish(self) -> None:
        """Moves all outputs to their final paths."""
        for part, target in self._pairs:
            if not part.exists():
                continue
            before = target.with_name(f"{target.name}.before")
            _remove(before)
            if target.exists():
                target.rename(before)
            part.rename(target)
            _remove(before)

    def discard(self) -> None:
        """Removes unpublished outputs. Errors of the file system are ignored."""
        for part, _ in self._pairs:
            with contextlib.suppress(OSError):
                _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _refuse_again(title: str, run_id: str | None) -> None:
    """Fails a retry of a step that was refused in this pipeline run: with the same inputs it would be refused again."""
    folder = os.environ.get("MIXTUNE_OUTCOME_DIR")
    earlier = load_outcome(folder, title) if folder and run_id else None
    if earlier is not None and earlier.kind == "refused":
        raise RefusedError(*earlier.sentences)


def _write_metrics(metrics: Any) -> None:
    """Writes the metrics to a file too: KFP's local cache treats an artifact without a file as missing."""
    if metrics is not None:
        write_json(Path(metrics.path), metrics.metadata)


def _uris(artifacts: Mapping[str, Any]) -> dict[str, str]:
    return {name: one.uri for name, one in artifacts.items() if hasattr(one, "uri")}


def _given(step: str, config: str, artifacts: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a rerun of this step alone needs. Output paths are left out, since they are new in each run."""
    if step not in OUTPUTS:
        return {}
    # Alone, `prepare` reads the files itself, with the same result.
    left_out = {*OUTPUTS[step], "portions"}
    inputs = {name: one for name, one in artifacts.items() if one is not None and name not in left_out}
    uris = {name: [i.uri for i in one] if isinstance(one, list) else one.uri for name, one in inputs.items()}
    candidate = {"candidate": str(parameters["candidate"])} if "candidate" in parameters else {}
    return {"config": config, "artifacts": json.dumps(uris), **candidate}


def _outcome_of(error: BaseException, title: str, log: str | None, seconds: float, run: str | None) -> Outcome:
    kind: Any = "failed"
    if isinstance(error, MixtuneError):
        kind, sentences = error.kind, error.problems
    elif isinstance(error, KeyboardInterrupt):
        kind, sentences = "interrupted", ["interrupted"]
    elif isinstance(error, Terminated) or (isinstance(error, SystemExit) and error.code == EXIT_STATUS["terminated"]):
        kind, sentences = "terminated", ["ended by SIGTERM"]
    elif is_out_of_memory(error):
        sentences = ["out of memory; use more memory"]
        traceback.print_exc()
    elif isinstance(error, OSError) and (sentence := cannot_be_written(error)):
        sentences = [sentence]
    else:
        traceback.print_exc()
        first = str(error).strip().splitlines()
        sentences = [f"{type(error).__name__}: {first[0] if first else 'no message'}"]
    return Outcome(title=title, kind=kind, sentences=sentences, log=log, seconds=round(seconds, 3), mlflow_run=run)


def _leave(outcome: Outcome, tracker: Tracker) -> None:
    folder = os.environ.get("MIXTUNE_OUTCOME_DIR")
    if folder and is_main():
        outcome.save(folder)
    # Values that exceed the length limit of a tag are omitted: a truncated value would be useless.
    given = {f"given.{name}": text for name, text in outcome.given.items() if len(text) <= TAG_CHARACTERS}
    told = {"kind": outcome.kind, "sentence": "; ".join(outcome.sentences), **outcome.facts}
    if os.environ.get(ALONE):
        # A step that runs as its own pipeline has no `finish` step, so it ends the parent run itself.
        ended = "ended well" if outcome.kind == "done" else "; ".join(outcome.sentences)
        tracker.close_parent(status_of(outcome.kind), f"{outcome.title} alone: {ended}")
    tracker.close(status_of(outcome.kind), told | given)


def _tell_kubernetes(outcome: Outcome) -> None:
    """Writes the messages to the container's termination log, which Kubernetes and Argo show as the reason of the failure."""
    if not os.environ.get("KUBERNETES_SERVICE_HOST") or not os.access(TERMINATION_LOG, os.W_OK):
        return
    text = "; ".join(outcome.sentences).encode()[:TERMINATION_BYTES]
    with contextlib.suppress(OSError):
        TERMINATION_LOG.write_bytes(text.decode(errors="ignore").encode())


def _raise_on_sigterm() -> None:
    """Ends the step on SIGTERM. Raises again after some seconds, since an exception raised during an import can get lost."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        raise SystemExit(EXIT_STATUS["terminated"])

    with contextlib.suppress(ValueError):  # only the main thread can install signal handlers
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGALRM, stop)


def task_name(step: str, config: str, artifacts: Mapping[str, Any], parameters: Mapping[str, Any]) -> TaskName:
    """Returns the name of the task, with the stream or the candidate that `plan` gave it."""
    with contextlib.suppress(Exception):  # the step itself reports invalid inputs
        if step == "prepare":
            number = json.loads(parameters["portion"])["number"] if "portion" in parameters else None
            portion = PORTIONS if "workers" in parameters else f"portion {number}" if number else None
            return TaskName(step, stream=str(json.loads(config)["stream"]), portion=portion)
        if step == "mixed":
            return TaskName(step, candidate=str(json.loads(parameters["candidate"])["id"]))
        if step == "evaluate":
            mixed_here = artifacts.get("other") is not None
            return TaskName(
                step, candidate="interpolated" if mixed_here else ModelCard.load(artifacts["model"].path).id
            )
    return TaskName(step)


@contextlib.contextmanager
def _own_log(
    step: str, config: str, artifacts: Mapping[str, Any], parameters: Mapping[str, Any]
) -> Iterator[tuple[str, str | None]]:
    """Redirects all output to a log file per step if the environment names a folder. Parallel steps then do not interleave."""
    name = task_name(step, config, artifacts, parameters)
    folder = os.environ.get("MIXTUNE_LOG_DIR")
    if not folder:
        yield str(name), None
        return
    path = Path(folder) / f"{name.file_name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with (
        path.open("a", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        # Redirect the file descriptors too: native libraries write to them directly.
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield str(name), str(path)
        finally:
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
