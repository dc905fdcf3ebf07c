"""Explains in one sentence why a run failed: the first failed task, and the reason that the platform reports."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from mixtune.components.shared.errors import MixtuneError

from .api import Api
from .pods import RunOnCluster, last_message
from .tasks import Failure, RunTree

LONGEST = 600
_ENDED = re.compile(r"(?:(?P<container>[\w-]+): )?(?P<reason>\w+) \(exit code \d+\)(?:: (?P<text>.*))?", re.DOTALL)
_PROGRESS = re.compile(r".*: \d+/\d+ \w+.*, \d+ s(?: left)?")
# Lines that KFP's launcher and Argo's executor add to a program's own output.
_FRAME = re.compile(r"[IWEF]\d{4} \S+ .*?\] ?(?P<text>.*)|time=\S+ level=\S+ .*|\[KFP Executor.*")


def first_failure(run: RunTree, api: Api, run_id: str, cluster: RunOnCluster) -> dict[str, str]:
    """Returns the title of the first failed task and a sentence with its reason; an empty dictionary if no task failed.

    Args:
        run: tasks of the run.
        run_id: id of the KFP run.
        cluster: pods of the run, if this user can access them.
    """
    failures = run.failures()
    if not failures:
        return {}
    first, others = failures[0], [one.title for one in failures[1:] if one.title]
    name = first.title or "the run"
    reason = reason_of(first, run, api, run_id, cluster)
    if not reason:
        reason = f"failed; see its log: {api.connection.link(f'runs/details/{run_id}')} or `{cluster.command}`"
    elif first.driver:
        reason = f"could not be started: {reason}"
    also = f" (also failed: {', '.join(others)})" if others else ""
    return {first.title: f"{name}: {reason}{also}"}


def reason_of(failure: Failure, run: RunTree, api: Api, run_id: str, cluster: RunOnCluster) -> str:
    """Returns the reason of a failure, from Argo, from the pod or from its log; empty if none of them has one."""
    if reason := from_argo(failure.message):
        return _shortened(reason)
    pod = cluster.pod_of(failure.pod_ids)
    if pod is not None and (reason := last_message(pod)):
        return _shortened(reason)
    log = cluster.log_of(pod.metadata.name) if pod is not None else ""
    return _shortened(last_words(log or _from_kfp(failure, run.workflow, api, run_id), failure.title))


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def from_argo(message: str) -> str:
    """Extracts the reason from a node's message, without Argo's standard text; empty if there is no more than that."""
    found = _ENDED.fullmatch(message.strip())
    if found is None:
        return message.strip()
    if found["text"]:
        return found["text"].strip()
    if found["reason"] == "OOMKilled":
        return "was killed because it ran out of memory; raise placement.memory or placement.gpu_memory"
    return ""


def _from_kfp(failure: Failure, workflow: str, api: Api, run_id: str) -> str:
    """Returns the log of the failed pod through KFP, which also has archived logs of deleted pods."""
    for pod in _pod_names(failure, workflow):
        try:
            text = api.log_of(run_id, pod)
        except MixtuneError:
            return ""
        if text is not None:
            return text
    return ""


def _pod_names(failure: Failure, workflow: str) -> Iterator[str]:
    """Yields the possible pod names of a node. KFP's template names depend on the metadata of a task."""
    if failure.driver:
        templates = ["system-dag-driver", "system-container-driver", "system-importer"]
    else:
        counts = itertools.product(range(2), range(4))
        kinds = [f"metadata-{annotations}-{labels}-" for annotations, labels in counts]
        templates = [f"{kind}{retry}system-container-impl" for kind in [*kinds, ""] for retry in ("", "retry-")]
    for pod_id in failure.pod_ids[:1]:
        for template in templates:
            yield f"{workflow}-{template}-{pod_id.rpartition('-')[2]}"


def last_words(log: str, title: str) -> str:
    """Extracts the reason from the end of a log: the step's own messages, else the last line that is not KFP's.

    Returns "" if the last line reports progress, since the program was then killed.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    own = [line for line in lines if not _FRAME.fullmatch(line)]
    if not own:
        framed = [found["text"] for line in lines if (found := _FRAME.fullmatch(line)) and found["text"]]
        return framed[-1] if framed else ""
    if _PROGRESS.fullmatch(own[-1]):
        return ""
    start = f"{title}: "
    messages = list(itertools.takewhile(lambda line: title and line.startswith(start), reversed(own)))
    words = [line.removeprefix(start) for line in reversed(messages) if not _PROGRESS.fullmatch(line)]
    return "; ".join(words) or own[-1]
