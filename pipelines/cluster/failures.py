"""Why a run failed, in one sentence: the first task that failed, and the reason that the platform gives for it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from mixtune.components.shared.errors import MixtuneError

from .api import Api
from .pods import RunOnCluster, last_message
from .tasks import Failure, Run

LONGEST = 600
_ENDED = re.compile(r"(?:(?P<container>[\w-]+): )?(?P<reason>\w+) \(exit code \d+\)(?:: (?P<text>.*))?", re.DOTALL)
_PROGRESS = re.compile(r".*: \d+/\d+ \w+.*, \d+ s(?: left)?")
# What KFP's launcher and Argo's executor write around a program's own output.
_FRAME = re.compile(r"[IWEF]\d{4} \S+ .*?\] ?(?P<text>.*)|time=\S+ level=\S+ .*|\[KFP Executor.*")


def sentences(run: Run, api: Api, run_id: str, cluster: RunOnCluster) -> list[str]:
    """A sentence about the first task that failed, with its reason; none where no task did.

    Args:
        run: the run's tasks.
        run_id: id of the KFP run.
        cluster: its pods, as far as they can be seen.
    """
    failures = run.failures()
    if not failures:
        return []
    first, others = failures[0], [one.title for one in failures[1:] if one.title]
    name = first.title or "the run"
    reason = reason_of(first, run, api, run_id, cluster)
    if not reason:
        reason = f"failed; look at its log: {api.connection.link(f'runs/details/{run_id}')} or `{cluster.command}`"
    elif first.driver:
        reason = f"could not be started: {reason}"
    also = f" (failed as well: {', '.join(others)})" if others else ""
    return [f"{name}: {reason}{also}"]


def reason_of(failure: Failure, run: Run, api: Api, run_id: str, cluster: RunOnCluster) -> str:
    """The reason of a failure, from Argo, from the pod or from its log; empty where none of them tells."""
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
    """The reason in a node's message, without the frame that Argo puts around it; empty where it says only that it failed."""
    found = _ENDED.fullmatch(message.strip())
    if found is None:
        return message.strip()
    if found["text"]:
        return found["text"].strip()
    if found["reason"] == "OOMKilled":
        return "was killed because its memory was used up; raise placement.memory or placement.gpu_memory"
    return ""


def _from_kfp(failure: Failure, workflow: str, api: Api, run_id: str) -> str:
    """The log of the pod that failed, through KFP, which has it as well where the pod is gone and logs are archived."""
    for pod in _pod_names(failure, workflow):
        try:
            text = api.log_of(run_id, pod)
        except MixtuneError:
            return ""
        if text is not None:
            return text
    return ""


def _pod_names(failure: Failure, workflow: str) -> Iterator[str]:
    """The names that the pods of a node can have: KFP's templates are named by what metadata a task has."""
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
    """Why a program ended, from the end of its log: the step's own sentences, else the last line that is not KFP's.

    Empty where the last line is one of progress: then the program was killed.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    own = [line for line in lines if not _FRAME.fullmatch(line)]
    if not own:
        framed = [found["text"] for line in lines if (found := _FRAME.fullmatch(line)) and found["text"]]
        return framed[-1] if framed else ""
    if _PROGRESS.fullmatch(own[-1]):
        return ""
    start = f"{title}: "
    told = list(itertools.takewhile(lambda line: title and line.startswith(start), reversed(own)))
    words = [line.removeprefix(start) for line in reversed(told) if not _PROGRESS.fullmatch(line)]
    return "; ".join(words) or own[-1]
