"""Accounts and their rights: what the code calls, and nothing else; the guide's table says the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from .manifests import ROOT, build, find

ANY = "*"


class Right(NamedTuple):
    """One thing that an account may do.

    Attributes:
        verb: such as `get`.
        resource: with its API group, such as `runs.pipelines.kubeflow.org`; without one it is Kubernetes' core.
        name: the one object that it is about, `*` for any.
    """

    verb: str
    resource: str
    name: str = ANY


KFP = "pipelines.kubeflow.org"
# To say why a task does not start or was killed. The command asks for each of these where it may, and goes on where it may not.
LOOKS = {
    *((verb, kind) for kind in ("pods", "events") for verb in ("get", "list")),
    ("get", "pods/log"),
    *((verb, kind) for kind in ("workflows.argoproj.io", "workloads.kueue.x-k8s.io") for verb in ("get", "list")),
}
KFP_CALL = re.compile(r"\b(experiment|pipeline|run)_service_([a-z]+)_[a-z_]+|\b(upload)_pipeline")
CORE_CALL = re.compile(
    r"\.(read|list|create|patch|delete)_(?:namespaced_(?!custom_object)([a-z_]+)|(node|namespace|persistent_volume)\b)"
)
CUSTOM_CALL = re.compile(
    r"\.(get|list|create|delete)_namespaced_custom_object\(\s*\"([^\"]+)\",\s*[^,]+,\s*[\w.]+,\s*\"([^\"]+)\""
)


def granted(role: dict[str, Any]) -> Iterator[Right]:
    """The rights of a role, one by one."""
    for rule in role["rules"]:
        assert ANY not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]], role["metadata"]["name"]
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    for name in rule.get("resourceNames", [ANY]):
                        yield Right(verb, f"{resource}.{group}".rstrip("."), name)


def rights_of(account: str) -> set[Right]:
    """What the bindings give an account, with what trainings on several nodes need."""
    found: set[Right] = set()
    for one in build("overlays/trainer"):
        if one["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            subjects = {subject["name"] for subject in one["subjects"]}
            if account in subjects:
                found |= set(granted(find("overlays/trainer", one["roleRef"]["kind"], one["roleRef"]["name"])))
    return found


def rights_in_the_guide(account: str) -> set[Right]:
    """The rows of the guide's table: | account | verbs | resource | object | what for |."""
    found = set()
    for row in (ROOT / "docs" / "cluster.md").read_text().splitlines():
        cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
        if len(cells) == 5 and cells[0] == f"`{account}`":
            names = re.findall(r"`([^`]+)`", cells[3]) or [ANY]
            found |= {Right(verb, cells[2].strip("`"), name) for verb in cells[1].split(", ") for name in names}
    return found


def calls_in(source: str) -> set[tuple[str, str]]:
    """Verb and resource of every call of KFP's and of Kubernetes' API.

    KFP's server asks for the first word of a method's name as the verb, and for pipelines where it is about their versions.
    """
    found = set()
    for service, verb, upload in KFP_CALL.findall(source):
        found.add(("create" if upload else verb, f"{service or 'pipeline'}s.{KFP}"))
    if "CoreV1Api" in source:
        for verb, kind, wide in CORE_CALL.findall(source):
            found.add(("get" if verb == "read" else verb, resource(kind or wide)))
    for verb, group, plural in CUSTOM_CALL.findall(source):
        found.add((verb, f"{plural}.{group}"))
    return found


def resource(kind: str) -> str:
    """Returns what RBAC calls a kind that a method of the client names, such as `pod_log`."""
    return "pods/log" if kind == "pod_log" else kind.replace("_", "") + "s"


def calls_of_the_code(folder: str) -> set[tuple[str, str]]:
    """What the code in a folder calls: that of `pipelines` is the command's, that of `components` the steps'."""
    return {call for file in (ROOT / folder).rglob("*.py") for call in calls_in(file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("account", ["mixtune-runner", "mixtune-submit"])
def test_the_guide_lists_every_right_and_no_other(account: str) -> None:
    assert rights_of(account)
    assert rights_in_the_guide(account) == rights_of(account)


def test_calls_are_found_in_sources() -> None:
    source = """
        api.runs.run_service_create_run, api.uploads.upload_pipeline_version,
        api.pipelines.pipeline_service_list_pipeline_versions(1)
        core = client.CoreV1Api(api)
        core.list_node(_request_timeout=1); partial(core.read_namespaced_secret, name); file.read_text()
        core.read_namespaced_persistent_volume_claim(claim)
        core.list_namespaced_pod(namespace); core.read_namespaced_pod_log(name, namespace)
        core.list_namespaced_event(namespace)
        custom.get_namespaced_custom_object(
            "kueue.x-k8s.io", "v1beta1", namespace, "localqueues", queue)
    """
    assert calls_in(source) == {
        ("create", f"runs.{KFP}"), ("create", f"pipelines.{KFP}"), ("list", f"pipelines.{KFP}"), ("list", "nodes"),
        ("get", "secrets"), ("get", "persistentvolumeclaims"), ("get", "localqueues.kueue.x-k8s.io"),
        ("list", "pods"), ("get", "pods/log"), ("list", "events"),
    }  # fmt: skip


def test_who_submits_may_do_what_the_code_calls_and_nothing_else() -> None:
    rights = {(right.verb, right.resource) for right in rights_of("mixtune-submit")}
    assert rights >= LOOKS
    assert calls_of_the_code("pipelines") - LOOKS == rights - LOOKS


def test_who_runs_may_do_what_the_steps_call_and_what_kfp_needs() -> None:
    of_kfp = {
        ("create", "workflowtaskresults.argoproj.io"), ("patch", "workflowtaskresults.argoproj.io"), ("get", "pods"),
        ("get", "configmaps"), ("get", "secrets"),
    }  # fmt: skip
    rights = {(right.verb, right.resource) for right in rights_of("mixtune-runner")}
    calls = calls_of_the_code("components")
    assert ("create", "trainjobs.trainer.kubeflow.org") in calls
    assert rights == calls | of_kfp
    without_trainer = {one["metadata"]["name"] for one in build("base") if one["kind"] == "Role"}
    assert "mixtune-trainjobs" not in without_trainer


@pytest.mark.parametrize("account", ["mixtune-runner", "mixtune-submit"])
def test_no_account_can_get_at_more_than_it_was_given(account: str) -> None:
    """Neither all secrets, nor changes to workloads, nor rights themselves."""
    for right in rights_of(account):
        kind, _, group = right.resource.partition(".")
        assert group != "rbac.authorization.k8s.io"
        assert not (kind == "secrets" and right.name == ANY), right
        changeable = ("pods", "pods/log", "events", "workflows", "workloads", "deployments", "jobs")
        assert not (kind in changeable and right.verb not in ("get", "list")), right
        assert right.verb not in ("escalate", "bind", "impersonate", "deletecollection")


def test_servers_have_no_rights() -> None:
    for account in ("mixtune-mlflow", "mixtune-postgres", "mixtune-backup", "mixtune-training"):
        assert not rights_of(account)
        assert find("overlays/trainer", "ServiceAccount", account)["automountServiceAccountToken"] is False
