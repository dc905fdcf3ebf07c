"""Implements the commands that use a cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from mixtune.components.shared.errors import RefusedError, Terminated
from mixtune.components.shared.outcome import EXIT_STATUS

from ..cluster import runs as client
from ..cluster.api import Api, Connection
from ..cluster.local_paths import read_for_cluster
from ..cluster.results import append_summary, show, summary
from ..cluster.waiting import PendingTooLongError, TimedOutError, hint, wait_for
from ..ended import Ended
from ..images import Images
from .options import Server, Waiting, with_home


def _api(server: Server, waiting: Waiting | None = None) -> Api:
    """Connects to the KFP API. It reports calls that take long; without `waiting`, on standard error."""
    return Api(Connection.find(*astuple(server)), say=(waiting or Waiting(as_json=True)).tell)


def upload_and_show(
    server: Server,
    config: Path | None,
    overrides: Sequence[str],
    step: str | None,
    in_images: Images,
    upload_data: str | None,
) -> None:
    """Uploads the pipeline and prints its version."""
    wanted = read_for_cluster(config, overrides, upload_data)
    api = _api(server)
    package = client.package_of(wanted, step, in_images=in_images)
    version = client.upload(api, package)
    print(f"{package.pipeline}, version {version.name}: {'uploaded' if version.new else 'already uploaded'}")
    print(api.connection.link(f"pipelines/details/{version.pipeline_id}/version/{version.id}"))


def submit_and_show(
    server: Server,
    config: Path | None,
    overrides: Sequence[str],
    experiment: str,
    run_key: str | None,
    in_images: Images,
    service_account: str | None,
    upload_data: str | None,
    waiting: Waiting,
) -> int:
    """Starts a run, waits for it on request, and returns the exit status."""
    waiting.check()
    wanted = read_for_cluster(config, overrides, upload_data)
    api = _api(server, waiting)
    version = client.upload(api, client.package_of(wanted, in_images=in_images))
    waiting.tell(f"pipeline mixtune, version {version.name}{'' if version.new else ' (already uploaded)'}")
    title, values = client.run_title(wanted), client.run_parameters(wanted)
    made = client.submit(api, version, title, values, experiment, run_key, service_account=service_account)
    return follow(api, made, waiting)


def follow(api: Api, made: client.Submitted, waiting: Waiting) -> int:
    """Prints the run's id and link, waits for the run on request, and returns the exit status."""
    waiting.tell(f"run {made.id} ({made.name}){': found by its key, not created again' if made.found else ''}")
    waiting.tell(api.connection.link(f"runs/details/{made.id}"))
    if waiting.waits:
        return _wait(api, made.id, waiting)
    if waiting.as_json:
        link = {"run": api.connection.link(f"runs/details/{made.id}")}
        print(json.dumps({"run_id": made.id, "name": made.name, "found": made.found, "links": link}))
    else:
        waiting.tell(hint(api, made.id))
    return 0


def _wait(api: Api, run_id: str, waiting: Waiting) -> int:
    try:
        ended = wait_for(api, run_id, waiting.seconds, waiting.tell, waiting.pending_seconds)
    except (KeyboardInterrupt, Terminated) as signalled:
        print(f"\nmixtune: the run continues; {hint(api, run_id)}", file=sys.stderr)
        return EXIT_STATUS["terminated" if isinstance(signalled, Terminated) else "interrupted"]
    except (TimedOutError, PendingTooLongError) as error:
        link = {"run": api.connection.link(f"runs/details/{run_id}")}
        ended = Ended(run_id, "RUNNING", error.kind, error.verdict, error.problems, links=link)
    show(ended, waiting.as_json)
    for problem in (*ended.warnings, *ended.advice, *ended.problems):
        print(f"mixtune: {problem}", file=sys.stderr)
    if waiting.summary:
        append_summary(waiting.summary, summary(ended, ended.report["name"] if ended.report else "mixtune"))
    return ended.status


def wait_and_show(server: Server, run_id: str, waiting: Waiting) -> int:
    """Waits for a run and returns its exit status."""
    waiting.check()
    return _wait(_api(server, waiting), run_id, waiting)


def retry_and_show(server: Server, run_id: str, waiting: Waiting) -> int:
    """Retries a run, waits for it on request, and returns the exit status."""
    waiting.check()
    api = _api(server, waiting)
    client.retry(api, run_id)
    return follow(api, client.Submitted(run_id, "retried", found=False), waiting)


def stop_and_show(server: Server, run_id: str) -> None:
    """Stops a run."""
    client.stop(_api(server), run_id)
    print(f"{run_id}: KFP was asked to stop it")


def rerun_and_show(
    server: Server,
    run: str,
    run_from: str | None,
    only: str | None,
    overrides: Sequence[str],
    run_key: str | None,
    waiting: Waiting,
) -> int:
    """Reruns a KFP run or the run in a local output folder, and returns the exit status."""
    from ..cluster import rerun

    if (run_from is None) == (only is None):
        raise RefusedError(
            "--from, --only: give one of them; --from STEP runs the step and all later steps, --only STEP just the step"
        )
    waiting.check()
    run = with_home(run)
    if Path(run).is_dir():
        from ..local.rerun import forget_from, run_only
        from .commands import run_and_show

        folder = Path(run)
        if only is not None:
            return run_only(folder, only, overrides)
        assert run_from is not None
        file = forget_from(folder, run_from, overrides)
        return run_and_show(file, overrides, folder, "subprocess", use_cache=True)
    if "/" in run or run.startswith("."):
        raise RefusedError(f"{run}: no such folder; give the output folder of `mixtune run`, or the id of a KFP run")
    api = _api(server, waiting)
    if run_from is not None:
        return follow(api, rerun.rerun_from(api, run, run_from, overrides, run_key), waiting)
    assert only is not None
    status = 0
    for made in rerun.rerun_only(api, run, only, overrides, run_key):
        status = max(status, follow(api, made, waiting))
    return status


def check_cluster_and_show(server: Server, config: Path | None, overrides: Sequence[str]) -> int:
    """Lists what the cluster has and lacks for a configuration, and returns the exit status.

    Paths that do not exist on this machine are not checked, since they can be in images or volumes.
    """
    from ..cluster.preflight import check_cluster

    wanted = read_for_cluster(config, overrides)
    try:
        connection, why = Connection.find(*astuple(server)), ""
    except RefusedError as error:
        connection, why = None, "; ".join(error.problems)
    findings = check_cluster(wanted, connection, why)
    marks = {"ok": "ok", "missing": "MISSING", "unreachable": "NO REPLY", "unknown": "?", "note": ""}
    for finding in findings:
        print(f"{marks[finding.kind]:<8} {finding.sentence}")
    kinds = {finding.kind for finding in findings}
    if kinds & {"missing", "unreachable"}:
        count = sum(1 for finding in findings if finding.kind in ("missing", "unreachable"))
        print(f"mixtune: {count} of these must be fixed before a run can succeed", file=sys.stderr)
    return 2 if "missing" in kinds else 4 if "unreachable" in kinds else 0
