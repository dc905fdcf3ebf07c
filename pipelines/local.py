"""Runs the DAG on this machine by KFP's local runner, and shows it.

The runner works in a child process, whose output goes to a file: KFP's log is long, and the steps' lines would interleave
in it. Steps write logs, progress and outcome records of their own, which this process turns into a few lines for a
person. An output folder belongs to one run at a time.

    <output>/.mixtune/          artifacts, cache, outcome records; remove it and the next run starts from nothing
    <output>/logs/<run>/        one log for each step, and KFP's own
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mixtune.components.config import Config, load
from mixtune.components.shared.artifacts import read_json, write_json
from mixtune.components.shared.errors import MixtuneError, RefusedError
from mixtune.components.shared.outcome import EXIT_STATUS, Outcome, load_outcomes

from .configuration import to_yaml
from .display import Display

GATE_NOT_MET = 3
# What changes a step's results besides its inputs: a new version must not take results from an old one's cache.
_RESULT_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "scipy", "scikit-learn")


@dataclass(frozen=True)
class Run:
    """One local run.

    Attributes:
        id: unlike any other run's.
        output: the output folder.
    """

    id: str
    output: Path

    @property
    def state(self) -> Path:
        return self.output / ".mixtune"

    @property
    def logs(self) -> Path:
        return self.output / "logs" / self.id

    @property
    def outcomes(self) -> Path:
        return self.state / "outcomes" / self.id

    @property
    def progress(self) -> Path:
        return self.state / "progress" / f"{self.id}.jsonl"


@dataclass
class Ended:
    """How a local run ended.

    Attributes:
        status: exit status of design: 0, 1, 2, 3, 4 or 130.
        failures: outcome records of the steps that did not end well.
        report: what `report.json` holds, where the run got that far.
        cached: tasks that came from the cache.
    """

    status: int
    failures: list[Outcome] = field(default_factory=list)
    report: dict[str, Any] | None = None
    cached: list[str] = field(default_factory=list)


def claim(output: Path, name: str) -> FileLock:
    """Takes an output folder for one run.

    Raises:
        RefusedError: where it holds something that is no mixtune run, or another run is using it.
    """
    marker = output / ".mixtune" / "folder.json"
    if output.exists() and not output.is_dir():
        raise RefusedError(f"--output: {output} is a file; choose another folder")
    if output.is_dir() and any(output.iterdir()) and not marker.is_file():
        raise RefusedError(f"--output: {output} is not empty and is no mixtune run; choose another folder")
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(f"--output: {output} cannot be made ({error.strerror})") from None
    lock = FileLock(marker.parent / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RefusedError(f"--output: another run is using {output}; wait for it or choose another folder") from None
    if not marker.is_file():
        write_json(marker, {"format": "mixtune-run/1", "name": name})
    return lock


def run_local(config: Config, output: Path, use_cache: bool, display: Display) -> Ended:
    """Runs the whole DAG, publishes its results in the output folder, and says how it ended.

    Raises:
        RefusedError: where the output folder cannot be used.
    """
    output = output.absolute()
    lock = claim(output, config.name)
    try:
        run = Run(time.strftime("%Y%m%d-%H%M%S-") + os.urandom(2).hex(), output)
        for folder in (run.logs, run.outcomes, run.progress.parent):
            folder.mkdir(parents=True, exist_ok=True)
        run.progress.touch()
        _keep_history(output)
        (output / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        write_json(run.state / "last_run.json", {"id": run.id})
        interrupted = _watch(_start(config, run, use_cache), run, config, display)
        return _conclude(run, config, interrupted, display)
    finally:
        lock.release()


def _start(config: Config, run: Run, use_cache: bool) -> subprocess.Popen[bytes]:
    spec = {
        "config": config.model_dump(mode="json"),
        "pipeline_root": str(run.state / "artifacts"),
        "cache_root": str(run.state / "cache" / code_digest()) if use_cache else None,
    }
    spec_file = run.state / "spec.json"
    write_json(spec_file, spec)
    environment = {
        **os.environ,
        "MIXTUNE_RUN_ID": run.id,
        "MIXTUNE_RUN_NAME": f"{config.name} {run.id}",
        "MIXTUNE_LOG_DIR": str(run.logs),
        "MIXTUNE_OUTCOME_DIR": str(run.outcomes),
        "MIXTUNE_PROGRESS_FILE": str(run.progress),
        "MLFLOW_TRACKING_URI": tracking_uri(config, run.output),
        "MLFLOW_EXPERIMENT_NAME": config.tracking.experiment,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    environment.setdefault("MIXTUNE_GIT_COMMIT", _git_commit())
    with (run.logs / "kfp.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "mixtune.pipelines.local", str(spec_file)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process, which then ends the child's whole group
        )


def tracking_uri(config: Config, output: Path) -> str:
    """The configuration's tracking address, the environment's, or the store in the output folder."""
    return (
        config.tracking.uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{output.absolute() / 'mlflow' / 'mlflow.db'}"
    )


def _watch(child: subprocess.Popen[bytes], run: Run, config: Config, display: Display) -> bool:
    """Shows progress until the child ends; True where the user interrupted it."""
    try:
        with display.following(run.progress, run.outcomes, run.logs / "kfp.log"):
            while child.poll() is None:
                display.refresh()
                time.sleep(0.2)
            display.refresh()
    except KeyboardInterrupt:
        _stop(child)
        return True
    except BaseException:
        _signal_group(child, signal.SIGKILL)
        raise
    return False


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ends the runner and its steps: politely, so that they leave their records, then for sure."""
    for number, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
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


def _conclude(run: Run, config: Config, interrupted: bool, display: Display) -> Ended:
    outcomes = load_outcomes(run.outcomes)
    failures = [outcome for outcome in outcomes if outcome.kind != "done"]
    cached = list(display.cached)
    if interrupted:
        _close_on_record(config, run)
        return Ended(EXIT_STATUS["interrupted"], failures, cached=cached)
    done = {outcome.title: outcome for outcome in outcomes if outcome.kind == "done"}
    report = publish(run.output, done["compare"], done.get("register")) if "compare" in done else None
    if failures:
        first = failures[0]
        return Ended(first.exit_status if first.kind in ("refused", "unreachable") else 1, failures, report, cached)
    if "finish" not in done or report is None:
        problem = f"the pipeline ended early without a word; see {run.logs / 'kfp.log'}"
        return Ended(1, [Outcome(title="pipeline", kind="failed", sentences=[problem])], report, cached)
    return Ended(0 if report["gate"]["passed"] else GATE_NOT_MET, [], report, cached)


def _close_on_record(config: Config, run: Run) -> None:
    """Ends the MLflow parent run of an interrupted run, since `finish` never came to it."""
    from mixtune.components.shared.tracking import close_interrupted

    try:
        close_interrupted(tracking_uri(config, run.output), config.tracking.experiment, run.id)
    except MixtuneError:
        return  # the server is away; the run stays open there, and the user has the exit status


def publish(output: Path, compared: Outcome, registered: Outcome | None) -> dict[str, Any]:
    """Puts report and models where people look for them. Files are linked, so nothing is copied or lost.

    Args:
        compared: record of `compare`, which knows where every candidate's model is.
        registered: record of `register`, which alone writes out an interpolated model.
    """
    comparison = Path(compared.artifacts["comparison"])
    report: dict[str, Any] = read_json(comparison / "report.json", "a comparison made by mixtune")
    _replace(output / "report", comparison)
    models = read_json(comparison / "models.json", "a comparison made by mixtune")
    if registered is not None and report["selected"] not in models:
        models = {**models, report["selected"]: registered.artifacts["model"]}
    target = output / "models"
    target.mkdir(exist_ok=True)
    for stale in target.iterdir():
        if stale.is_symlink():
            stale.unlink()
        elif stale.name not in models:
            shutil.rmtree(stale)
    for candidate, uri in models.items():
        if Path(uri).is_dir():
            _replace(target / candidate, Path(uri))
    if (target / report["selected"]).is_dir():
        (target / "selected").symlink_to(report["selected"])
    return report


def _replace(target: Path, source: Path) -> None:
    aside = target.with_name(target.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, copy_function=_link_or_copy)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _keep_history(output: Path) -> None:
    """Keeps configuration and report of the run before this one."""
    last = output / ".mixtune" / "last_run.json"
    if last.is_file() and (output / "report" / "report.json").is_file():
        kept = output / "history" / read_json(last, "a mixtune run")["id"]
        if not kept.exists():
            shutil.copytree(output / "report", kept / "report")
            shutil.copy2(output / "config.yaml", kept / "config.yaml")


def code_digest() -> str:
    """Identifies the code of the steps and the packages that their results depend on."""
    import mixtune.components.config as anchor

    digest = hashlib.sha256()
    root = Path(anchor.__file__).parent
    for file in sorted(root.rglob("*")):
        if file.suffix in {".py", ".j2"}:
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
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


def _run_in_this_process(spec_file: str) -> None:
    """The child: KFP's local runner on the one DAG."""
    import logging

    from kfp import local

    from .pipeline import make_pipeline
    from .placement import Placer

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    # Without this the runner does not tell what it takes from its cache.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=spec["pipeline_root"],
        raise_on_error=False,
        enable_caching=spec["cache_root"] is not None,
        cache_root=spec["cache_root"],
    )
    make_pipeline(load(spec["config"]), Placer.local())()


def _end_with_parent(parent: int) -> None:
    """Ends this process and the steps when the command is gone (kill -9): the folder is free then for another run."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGTERM)


if __name__ == "__main__":
    try:
        _run_in_this_process(sys.argv[1])
    except MixtuneError as error:
        raise SystemExit("; ".join(error.problems)) from None
