"""The verdict of a run: one rule, for the states that a real KFP backend was seen to give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixtune.components.shared.outcome import EXIT_STATUS, Outcome
from mixtune.components.shared.tracking.verdict import STOPPED_STATES, StepRun, exit_status, judge

RECORDINGS = Path(__file__).parents[2] / "recordings"


def step(title: str, kind: str | None = None, sentence: str = "", status: str = "FINISHED", **tags: str) -> StepRun:
    record = {"mixtune.outcome.kind": kind, "mixtune.outcome.sentence": sentence} if kind else {}
    return StepRun(title, status, record | tags)


PASSED = {"mixtune.gate": "passed", "mixtune.selected": "mixed-0.3"}
REFUSED = step("prepare finetune", "refused", "data.finetune: there is no column label", "FAILED")


@pytest.mark.parametrize(
    ("recording", "kind"),
    [
        ("run-succeeded", "done"),
        ("run-cached", "done"),
        ("run-retried", "done"),
        ("run-bad-data", "failed"),
        ("run-platform-failure", "failed"),
        ("run-stopped", "failed"),
    ],
)
def test_states_of_recorded_runs(recording: str, kind: str) -> None:
    state = json.loads((RECORDINGS / f"{recording}.json").read_text())["state"]
    assert judge([step("compare", "done")], PASSED, state).kind == kind


def test_of_several_attempts_the_last_one_counts() -> None:
    attempts = [step("register", "failed", "500", "FAILED"), step("register", "done")]
    assert judge(attempts, PASSED, "SUCCEEDED").sentence == "gate passed: mixed-0.3"
    assert judge(attempts[::-1], PASSED, "SUCCEEDED").sentence == "failed: register: 500"


@pytest.mark.parametrize("state", ["COMPLETE", "FAILED", "SUCCEEDED"])
def test_a_recorded_refusal_decides_whatever_kfp_says(state: str) -> None:
    verdict = judge([REFUSED], {}, state)
    assert (verdict.kind, verdict.status) == ("refused", "FAILED")
    assert verdict.problems == ("prepare finetune: data.finetune: there is no column label",)


def test_a_gate_that_ends_the_run_is_no_failure_of_a_step() -> None:
    compare = step("compare", "gate_not_met", "forgets too much", "FAILED")
    verdict = judge([compare], {"mixtune.gate": "not met", "mixtune.gate_reasons": "forgets too much"}, "FAILED")
    assert (verdict.kind, verdict.sentence) == ("gate_not_met", "gate not met: forgets too much")


def test_the_gate_is_known_from_the_record_of_compare_where_the_parent_run_did_not_get_it() -> None:
    tags = {"mixtune.outcome.gate": "passed", "mixtune.outcome.selected": "mixed-0.6"}
    assert judge([step("compare", "done", **tags)], {}, "COMPLETE").sentence == "gate passed: mixed-0.6"
    on_disk = Outcome(title="compare", kind="done", facts={"gate": "passed", "selected": "mixed-0.6"})
    assert judge([StepRun.from_outcome(on_disk)], {}, "COMPLETE").sentence == "gate passed: mixed-0.6"


@pytest.mark.parametrize("state", sorted(STOPPED_STATES))
def test_a_stopped_run(state: str) -> None:
    verdict = judge([REFUSED], PASSED, state)
    assert (verdict.kind, verdict.status) == ("interrupted", "KILLED")


def test_finish_counts_only_in_a_failed_run() -> None:
    steps = [step("compare", "done"), step("finish", "unreachable", "no MLflow", "FAILED")]
    verdict = judge(steps, PASSED, "FAILED")
    assert (verdict.kind, verdict.problems) == ("unreachable", ("finish: no MLflow",))
    # KFP does not run finish again if a retry repairs the run.
    assert judge(steps, PASSED, "SUCCEEDED").sentence == "gate passed: mixed-0.3"
    assert judge([step("finish", status="RUNNING")], PASSED, "COMPLETE").kind == "done"


def test_a_platform_failure_is_told_in_kfps_words_where_it_has_some() -> None:
    assert judge([], {}, "FAILED", "Task plan failed.").sentence == "failed: Task plan failed."
    assert judge([], {}, "FAILED").sentence == "failed: KFP says FAILED"


def test_exit_statuses() -> None:
    assert {kind: exit_status(kind) for kind in EXIT_STATUS} == EXIT_STATUS
    assert exit_status(judge([step("plan", "done")], {}, "COMPLETE").kind) == EXIT_STATUS["unreachable"]
