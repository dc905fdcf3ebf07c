"""Runs the DAG on this machine with KFP's local runner, and shows its progress.

The runner works in a child process with its output in a file: KFP's log is long and would interleave with the steps' lines.
Steps write their own logs, progress and outcome records, from which this process shows a few lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mixtune.components.config import Config
from mixtune.components.shared.artifacts import write_json
from mixtune.components.shared.code_digest import CACHED_STEPS, code_digest
from mixtune.components.shared.errors import Terminated
from mixtune.components.shared.outcome import Outcome, load_outcomes
from mixtune.components.shared.running.context import started_titles
from mixtune.components.shared.startup import MALLOC_TUNABLES
from mixtune.components.shared.tracking.journal import in_words, sync_command, undelivered
from mixtune.components.shared.tracking.verdict import ENDED_WITHOUT_RECORD, GATE_NOT_MET, StepRun, Verdict, judge

from ..configuration import to_yaml
from ..display import Display
from ..ended import Ended
from .folder import Run, claim
from .last_run import begin_record, close_killed_run, end_record
from .publishing import publish
from .unchanged import LastResults, forget_results

if TYPE_CHECKING:
    from .containers import Containers

SHOWN_CHARACTERS = 200
# Packages that affect results: a new version must not use results that another version cached.
_RESULT_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "scipy", "scikit-learn")


def run_local(
    config: Config, output: Path, use_cache: bool, display: Display, containers: Containers | None = None
) -> Ended:
    """Runs the whole DAG, publishes its results in the output folder, and returns how it ended.

    Runs nothing if the results in the output folder are those of the same run. See `LastResults`.

    Args:
        containers: runs the steps in their images; None runs them as processes.

    Raises:
        RefusedError: if the output folder cannot be used.
    """
    output = output.absolute()
    code = f"docker-{containers.check()}" if containers else cache_key()
    lock = claim(output, config.name)
    try:
        close_killed_run(output)
        last = LastResults(config, code, output) if _keeps_its_own_records(config, output) else None
        if last is not None and use_cache and (repeated := last.repeated()) is not None:
            repeated.notes.append(
                f"nothing has changed since run {repeated.run_id}, whose results these are; --no-cache runs every step again"
            )
            return repeated
        run = Run(time.strftime("%Y%m%d-%H%M%S-") + os.urandom(2).hex(), output)
        for folder in (run.logs, run.outcomes, run.progress.parent):
            folder.mkdir(parents=True, exist_ok=True)
        run.progress.touch()
        (output / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        forget_results(output)
        begin_record(run, tracking_uri(config, output), config.tracking.experiment)
        if not use_cache:
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="mixtune-", ignore_cleanup_errors=True) as scratch:
            child = _start(config, run, code if use_cache else None, containers, Path(scratch))
            stopped = _watch(child, run, display)
        ended = _conclude(run, config, stopped)
        end_record(output)
        if not ended.problems and stopped is None:
            # Also deletes checkpoints of killed trainings that were never resumed.
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        notes = _notes(run)
        complete = (
            ended.outcome in ("done", GATE_NOT_MET) and not ended.problems and not undelivered(run.journal).counts
        )
        if last is not None and complete:
            last.remember(ended, notes)
        ended.notes += notes
        kept = (run.state / "cache" / code, run.checkpoints)
        ended.kept = use_cache and any(any(folder.glob("*")) for folder in kept)
        return ended
    except OSError as error:
        error.filename = error.filename or str(output)  # errors of write calls contain no file name
        raise
    finally:
        lock.release()


def environment_of_steps(config: Config, run: Run) -> dict[str, str]:
    """Returns the environment of the steps of a local run, in addition to the caller's."""
    environment = {
        **os.environ,
        "MIXTUNE_RUN_ID": run.id,
        "MIXTUNE_RUN_NAME": f"{config.name} {run.id}",
        "MIXTUNE_LOG_DIR": str(run.logs),
        "MIXTUNE_OUTCOME_DIR": str(run.outcomes),
        "MIXTUNE_PROGRESS_FILE": str(run.progress),
        "MIXTUNE_CHECKPOINT_DIR": os.environ.get("MIXTUNE_CHECKPOINT_DIR") or str(run.checkpoints),
        "MLFLOW_TRACKING_URI": tracking_uri(config, run.output),
        "MLFLOW_EXPERIMENT_NAME": config.tracking.experiment,
        "MIXTUNE_JOURNAL_DIR": str(run.journal),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a file in the working directory, such as queue.py, must not hide a module
    }
    environment.setdefault("MIXTUNE_GIT_COMMIT", _git_commit())
    environment.setdefault("GLIBC_TUNABLES", MALLOC_TUNABLES)
    if config.tracking.offline_when_unreachable:
        environment["MIXTUNE_TRACKING_OFFLINE"] = "1"
    if config.tracking.tensorboard:
        environment["MIXTUNE_TENSORBOARD_DIR"] = str(run.output / "tensorboard")
    return environment


def _start(
    config: Config, run: Run, code: str | None, containers: Containers | None, scratch: Path
) -> subprocess.Popen[bytes]:
    environment = environment_of_steps(config, run)
    # KFP creates a temporary folder for each task, and torch for each launch, and neither deletes them.
    environment["TMPDIR"] = str(scratch)
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(run.state / "compiled"))
    spec = {
        "parent": os.getpid(),
        "config": config.model_dump(mode="json"),
        "pipeline_root": str(run.state / "artifacts"),
        "cache_root": str(run.state / "cache" / code) if code else None,
        "containers": containers.spec(config, run.output, environment) if containers else None,
    }
    spec_file = run.state / "spec.json"
    write_json(spec_file, spec)
    with (run.logs / "kfp.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "mixtune.pipelines.local.child", str(spec_file)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends the child's process group
        )


def tracking_uri(config: Config, output: Path) -> str:
    """Returns the tracking address: the configuration's, else the environment's, else the store in the output folder."""
    return (
        config.tracking.uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{output.absolute() / 'mlflow' / 'mlflow.db'}"
    )


def _keeps_its_own_records(config: Config, output: Path) -> bool:
    """Tells whether MLflow's store is in the output folder, so that nothing outside of it records the run."""
    return tracking_uri(config, output).startswith(f"sqlite:///{output}/")


def _watch(child: subprocess.Popen[bytes], run: Run, display: Display) -> Literal["interrupted", "terminated"] | None:
    """Shows progress until the child ends. Returns by which signal the run was stopped; None if it was not."""
    try:
        with display.following(run.progress, run.outcomes):
            while child.poll() is None:
                display.refresh()
                time.sleep(0.2)
            display.refresh()
    except (KeyboardInterrupt, Terminated) as signalled:
        _stop(child)
        return "terminated" if isinstance(signalled, Terminated) else "interrupted"
    except BaseException:
        _signal_group(child, signal.SIGKILL)
        raise
    _signal_group(child, signal.SIGKILL)  # steps that are left if the child was killed
    return None


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Stops the runner and its steps: first with a signal that lets them write their records, then by force."""
    for number, seconds in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 5.0)):
        _signal_group(child, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            child.poll()
            try:
                os.killpg(child.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        return


def _conclude(run: Run, config: Config, stopped: Literal["interrupted", "terminated"] | None) -> Ended:
    outcomes = load_outcomes(run.outcomes)
    done = {outcome.title: outcome for outcome in outcomes if outcome.kind in ("done", GATE_NOT_MET)}
    has_records = any(outcome.mlflow_run for outcome in outcomes)
    report: dict[str, Any] | None = None
    notes: list[str] = []
    if stopped is None:
        outcomes += _without_record(run, outcomes)
        if "compare" in done:
            published = publish(run, config, done["compare"], done.get("register"))
            report, notes = published.report, published.notes
            if published.problems:
                outcomes.append(Outcome(title="models", kind="refused", sentences=published.problems))
    state = "CANCELED" if stopped else "SUCCEEDED" if "finish" in done and report is not None else "FAILED"
    log = run.logs / "kfp.log"
    early = f"the pipeline ended early{_last_line(log)}; see {log}"
    verdict = judge(map(StepRun.from_outcome, outcomes), {}, state, early)
    if stopped or ("finish" not in done and has_records):
        _close_on_record(config, run, verdict)
    failed = {step.title for step in verdict.failed}
    # The user knows why the steps of a stopped run have ended.
    ended = [outcome for outcome in outcomes if outcome.kind not in ("interrupted", "terminated") or not stopped]
    causes = [outcome for outcome in ended if outcome.title in failed]
    told = [outcome.sentences for outcome in causes if outcome.title != "finish"]
    # `finish` can fail for the same reason as the step before it.
    causes = [outcome for outcome in causes if outcome.title != "finish" or outcome.sentences not in told]
    problems = [line for outcome in causes for line in _lines(outcome)]
    if verdict.kind == "failed":
        problems = problems or list(verdict.problems)
    return Ended(run.id, state, stopped or verdict.kind, verdict.sentence, problems, report, notes=notes)


def _last_line(log: Path) -> str:
    """Returns the last line of a log in brackets: the error, if a program ended with one."""
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" ({last[:SHOWN_CHARACTERS]})" if last else ""


def _lines(outcome: Outcome) -> list[str]:
    log = [f"its log is {outcome.log}"] if outcome.log else []
    return [f"{outcome.title}: {sentence}" for sentence in (*outcome.sentences, *log)]


def _notes(run: Run) -> list[str]:
    """Returns messages about records that MLflow has not received, and how to deliver them."""
    recorded = load_outcomes(run.outcomes)
    notes = [outcome.facts["not_registered"] for outcome in recorded if "not_registered" in outcome.facts]
    notes += [f"{one.title}: {'; '.join(one.sentences)}" for one in recorded if one.kind == GATE_NOT_MET]
    left = undelivered(run.journal)
    if left.counts:
        where = " and ".join(left.addresses)
        notes.append(
            f"not delivered to MLflow at {where}: {in_words(left.counts)}; deliver it with `{sync_command(run.journal)}`"
        )
    return notes


def _without_record(run: Run, outcomes: list[Outcome]) -> list[Outcome]:
    """Returns a failure for each step without an outcome record, which was killed, for example for lack of memory."""
    recorded = {outcome.title: outcome for outcome in outcomes}
    started = started_titles(run.progress)
    consequence = {}
    if "compare" in recorded and recorded["compare"].facts.get("gate") == "passed":
        started.append("register")
        consequence["register"] = ", so nothing was registered"
    log = str(run.logs / "kfp.log")
    return [
        Outcome(title=title, kind="failed", log=log, sentences=[f"{ENDED_WITHOUT_RECORD}{consequence.get(title, '')}"])
        for title in dict.fromkeys(started)
        if title not in recorded
    ]


def _close_on_record(config: Config, run: Run, verdict: Verdict) -> None:
    """Ends the MLflow parent run if `finish` did not run; while MLflow is down, `mixtune sync` does this later."""
    from mixtune.components.shared.tracking.tracker import close_unfinished

    uri, experiment = tracking_uri(config, run.output), config.tracking.experiment
    with contextlib.redirect_stdout(io.StringIO()):  # undelivered records are reported at the end of the run
        close_unfinished(uri, experiment, run.id, verdict.status, verdict.sentence, run.journal)


def cache_key() -> str:
    """Returns a digest of what affects cached results besides their inputs: the steps' code and its packages."""
    digest = hashlib.sha256(code_digest(CACHED_STEPS).encode())
    for package in _RESULT_PACKAGES:
        try:
            digest.update(f"{package}=={version(package)}".encode())
        except PackageNotFoundError:
            continue
    return digest.hexdigest()[:16]


def _git_commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
