"""What the launcher reads from TrainJobs and pods, held to what a real Trainer and JobSet answered."""

from __future__ import annotations

from typing import Any

import pytest

from mixtune.components.shared.nodes.state import CRASHES, failures_of, node_of, state_of
from tests.trainer_server import pod, recorded, refused_pods, running


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("complete", "complete", "AllJobsCompleted: jobset completed successfully"),
        ("evicted", "complete", "AllJobsCompleted"),
        ("refused", "failed", "ReachedMaxRestarts: jobset failed due to reaching max number of restarts"),
        ("suspended", "waiting", "is suspended; a queue admits it when there is room"),
        ("unschedulable", "waiting", "0 of 2 nodes run"),
        ("crash-loop", "waiting", "0 of 2 nodes run"),
    ],
)
def test_recorded_trainjobs_without_their_pods(name: str, kind: str, told: str) -> None:
    state = state_of(recorded(f"trainjob-{name}"), [])
    assert state.kind == kind
    assert told in state.sentence
    assert state.ended == (kind in ("complete", "failed"))


def test_a_trainjob_that_kueue_admits_again_is_no_longer_suspended() -> None:
    job = recorded("trainjob-suspended")
    job["status"]["conditions"][0] |= {"status": "False", "reason": "Resumed"}
    assert state_of(job, running()).kind == "running"


def unschedulable(node: int) -> dict[str, Any]:
    """A pod as Kubernetes shows one that fits no node."""
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/2 nodes are available",
    }
    return pod(f"p{node}", node, phase="Pending", conditions=[condition])


def test_the_pods_tell_why_a_job_waits() -> None:
    job = recorded("trainjob-unschedulable")
    state = state_of(job, [unschedulable(0), unschedulable(1)])
    assert (state.kind, state.sentence) == ("waiting", "0 of 2 nodes run (2 pods: 0/2 nodes are available)")
    state = state_of(job, [running()[0], unschedulable(1)])
    assert state.sentence == "1 of 2 nodes run (1 pod: 0/2 nodes are available)"
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
    pulling = pod("p", 0, phase="Pending", containerStatuses=[{"name": "node", "state": waiting}])
    assert "1 pod: ImagePullBackOff: not found" in state_of(job, [pulling]).sentence
    assert state_of(job, running()).kind == "running"


def crashing(status: int, restarts: int) -> dict[str, Any]:
    """A pod whose container starts again in place, which a TrainingRuntime without a restart policy has it do."""
    ended = {"terminated": {"exitCode": status, "reason": "Error", "finishedAt": "2026-11-26T12:42:37Z"}}
    container = {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": ended, "restartCount": restarts}
    return pod("p", 1, phase="Running", containerStatuses=[container])


def test_a_crash_loop_ends_although_the_trainjob_says_nothing() -> None:
    job = recorded("trainjob-crash-loop")
    assert state_of(job, [crashing(1, CRASHES - 1)]).kind == "waiting"
    state = state_of(job, [crashing(1, CRASHES)])
    assert (state.kind, state.sentence) == ("failed", f"node 1 ended with exit status 1, {CRASHES} times")
    state = state_of(job, [crashing(2, 1)])  # a refusal is refused again
    assert (state.kind, state.sentence) == ("failed", "node 1 ended with exit status 2")


def test_failures_of_recorded_pods() -> None:
    first, second = failures_of(refused_pods())
    assert (first.pod, first.node, first.status) == ("refused-node-0-0-65bxm", 0, 2)
    assert (second.pod, second.node, second.message) == ("refused-node-0-1-ncrlc", 1, "finetune: one sentence")
    assert str(second) == "node 1 ended with exit status 2"
    assert node_of(recorded("trainjob-pod")) == 0


def test_how_pods_were_lost_is_told() -> None:
    def terminated(node: int, status: int, reason: str, at: str) -> dict[str, Any]:
        state = {"terminated": {"exitCode": status, "reason": reason, "finishedAt": at}}
        return pod(f"p{node}", node, phase="Failed", containerStatuses=[{"state": state}])

    evicted = pod("e", 2, phase="Failed", reason="Evicted", message="The node was low on resource: memory.")
    disrupted = pod(
        "d", 3, phase="Running", conditions=[{
            "type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "preempting",
            "lastTransitionTime": "2026-11-26T12:00:02Z",
        }],
    )  # fmt: skip
    pods = [
        *running(), terminated(0, 3, "Error", "2026-11-26T12:00:09Z"),
        terminated(1, 137, "OOMKilled", "2026-11-26T12:00:01Z"), evicted, disrupted,
    ]  # fmt: skip
    assert [str(one) for one in failures_of(pods)] == [
        "node 2 was removed (Evicted)",
        "node 1 ran out of memory (OOMKilled)",
        "node 3 was removed (PreemptionByScheduler)",
        "node 0 ended with exit status 3",
    ]
