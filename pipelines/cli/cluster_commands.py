"""What the commands for a cluster do once they have parsed their arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.outcome import EXIT_STATUS

from ..cluster import runs as client
from ..cluster.api import Api, Connection
from ..cluster.results import append_summary, show, summary
from ..cluster.waiting import PendingTooLongError, TimedOutError, hint, seconds_of, wait_for
from ..configuration import read_config
from ..ended import Ended
from ..images import Images

Address = tuple[str | None, str | None, Path | None, Path | None]
"""Host, namespace, token file and certificate authority, as the options give them."""


@dataclass(frozen=True)
class Showing:
    """What to do once a run is under way.

    Attributes:
        wait: follow it to its end.
        timeout: how long, in words.
        pending_timeout: how long a task may be pending, in words.
        as_json: print one JSON object.
        summary: file that the result is added to.
    """

    wait: bool = False
    timeout: str | None = None
    as_json: bool = False
    summary: Path | None = None
    pending_timeout: str | None = None

    @property
    def seconds(self) -> float | None:
        return seconds_of(self.timeout) if self.timeout else None

    @property
    def pending_seconds(self) -> float | None:
        return seconds_of(self.pending_timeout, "--pending-timeout") if self.pending_timeout else None

    def check(self) -> None:
        """Refuses a wrong time, before anything is made.

        Raises:
            RefusedError: where one is wrong.
        """
        _ = self.seconds, self.pending_seconds

    @property
    def tell(self) -> Callable[[str], None]:
        """Shows a line; beside the JSON object on the error output."""
        out = sys.stderr if self.as_json else sys.stdout
        return lambda line: print(line, file=out, flush=True)


def _api(address: Address, showing: Showing | None = None) -> Api:
    """The KFP API, which says so while it does not answer."""
    say = showing.tell if showing else Showing(as_json=True).tell
    return Api(Connection.find(*address), say=say)


def upload_and_show(
    address: Address, config: Path | None, overrides: Sequence[str], step: str | None, in_images: Images
) -> None:
    """Uploads the pipeline and says which version it is."""
    api = _api(address)
    package = client.package_of(read_config(config, overrides), step, in_images=in_images)
    version = client.upload(api, package)
    words = "uploaded" if version.new else "is there already"
    print(f"{package.pipeline} {version.name}: {words}")
    print(api.connection.link(f"pipelines/details/{version.pipeline_id}/version/{version.id}"))


def submit_and_show(
    address: Address,
    config: Path | None,
    overrides: Sequence[str],
    experiment: str,
    run_key: str | None,
    in_images: Images,
    service_account: str | None,
    showing: Showing,
) -> int:
    """Starts a run, follows it where asked, and returns the exit status."""
    showing.check()
    api = _api(address, showing)
    wanted = read_config(config, overrides)
    version = client.upload(api, client.package_of(wanted, in_images=in_images))
    showing.tell(f"pipeline mixtune, version {version.name}{'' if version.new else ' (there already)'}")
    made = client.submit(
        api, version, wanted.name, client.run_parameters(wanted), experiment, run_key, service_account=service_account
    )
    return follow(api, made, showing)


def follow(api: Api, made: client.Submitted, showing: Showing) -> int:
    """Says which run it is, and follows it where asked."""
    showing.tell(f"run {made.id} ({made.name}){': found by its key, not made again' if made.found else ''}")
    showing.tell(api.connection.link(f"runs/details/{made.id}"))
    if showing.wait:
        return _wait(api, made.id, showing)
    if showing.as_json:
        link = {"run": api.connection.link(f"runs/details/{made.id}")}
        print(json.dumps({"run_id": made.id, "name": made.name, "found": made.found, "links": link}))
    else:
        showing.tell(hint(api, made.id))
    return 0


def _wait(api: Api, run_id: str, showing: Showing) -> int:
    try:
        ended = wait_for(api, run_id, showing.seconds, showing.tell, showing.pending_seconds)
    except KeyboardInterrupt:
        print(f"\nmixtune: the run goes on; {hint(api, run_id)}", file=sys.stderr)
        return EXIT_STATUS["interrupted"]
    except (TimedOutError, PendingTooLongError) as error:
        link = {"run": api.connection.link(f"runs/details/{run_id}")}
        ended = Ended(run_id, "RUNNING", error.kind, "the run goes on", error.problems, links=link)
    show(ended, showing.as_json)
    for problem in ended.problems:
        print(f"mixtune: {problem}", file=sys.stderr)
    if showing.summary:
        append_summary(showing.summary, summary(ended, ended.report["name"] if ended.report else "mixtune"))
    return ended.status


def wait_and_show(address: Address, run_id: str, showing: Showing) -> int:
    """Follows a run and returns its exit status."""
    showing.check()
    return _wait(_api(address, showing), run_id, showing)


def retry_and_show(address: Address, run_id: str, showing: Showing) -> int:
    """Lets KFP retry a run, and follows it where asked."""
    showing.check()
    api = _api(address, showing)
    client.retry(api, run_id)
    return follow(api, client.Submitted(run_id, "retried", found=False), showing)


def stop_and_show(address: Address, run_id: str) -> None:
    """Stops a run."""
    client.stop(_api(address), run_id)
    print(f"{run_id}: is told to stop")


def rerun_and_show(
    address: Address,
    run: str,
    run_from: str | None,
    only: str | None,
    overrides: Sequence[str],
    run_key: str | None,
    showing: Showing,
) -> int:
    """Runs an earlier run again: a KFP run, or the one in a local output folder."""
    from ..cluster import rerun

    if (run_from is None) == (only is None):
        raise RefusedError(
            "--from, --only: give one of them: --from STEP runs it and all after it, --only STEP it alone"
        )
    showing.check()
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
        raise RefusedError(
            f"{run}: there is no such folder; give the output folder of `mixtune run`, or the id of a KFP run"
        )
    api = _api(address, showing)
    if run_from is not None:
        return follow(api, rerun.rerun_from(api, run, run_from, overrides, run_key), showing)
    assert only is not None
    status = 0
    for made in rerun.rerun_only(api, run, only, overrides, run_key):
        status = max(status, follow(api, made, showing))
    return status


def check_cluster_and_show(address: Address, config: Path | None, overrides: Sequence[str]) -> int:
    """Lists what the cluster has and lacks for a configuration, and returns the exit status.

    Folders and files in the configuration are not checked, since they are on the cluster.
    """
    from ..cluster.preflight import check_cluster

    wanted = read_config(config, overrides)
    try:
        connection, why = Connection.find(*address), ""
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
