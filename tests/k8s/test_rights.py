"""Accounts and their rights: what the code calls, and nothing else; the guide's table says the same."""

from __future__ import annotations

import importlib.util
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
PLANNED = {
    *(Right(verb, f"experiments.{KFP}") for verb in ("create", "get", "list")),
    *(Right(verb, f"pipelines.{KFP}") for verb in ("create", "get", "list")),
    *(Right(verb, f"runs.{KFP}") for verb in ("create", "get", "list", "retry", "terminate")),
    *(Right("get", "secrets", name) for name in ("mixtune-mlflow", "mixtune-checkpoints")),
    Right("get", "persistentvolumeclaims", "mixtune-checkpoints"),
    Right("list", "nodes"),
    Right("create", "selfsubjectaccessreviews.authorization.k8s.io"),
}


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
    """What the bindings of the base give an account."""
    found: set[Right] = set()
    for one in build("base"):
        if one["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            subjects = {subject["name"] for subject in one["subjects"]}
            if account in subjects:
                found |= set(granted(find("base", one["roleRef"]["kind"], one["roleRef"]["name"])))
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


def calls_of_the_code() -> set[Right]:
    """What `mixtune submit` and `check --cluster` call, as the code lists it, or as it was planned where it does not yet.

    `mixtune.pipelines.cluster.API_CALLS` holds tuples: verb, resource with its API group, and, of one object, its name.
    """
    if importlib.util.find_spec("mixtune.pipelines.cluster") is None:
        return PLANNED
    return {Right(*call) for call in importlib.import_module("mixtune.pipelines.cluster").API_CALLS}


@pytest.mark.parametrize("account", ["mixtune-runner", "mixtune-submit"])
def test_the_guide_lists_every_right_and_no_other(account: str) -> None:
    assert rights_of(account)
    assert rights_in_the_guide(account) == rights_of(account)


def test_who_submits_may_do_what_the_code_does_and_nothing_else() -> None:
    assert calls_of_the_code() == rights_of("mixtune-submit")


@pytest.mark.parametrize("account", ["mixtune-runner", "mixtune-submit"])
def test_no_account_can_get_at_more_than_it_was_given(account: str) -> None:
    """Neither secrets by and large, nor other pods, nor rights themselves."""
    for right in rights_of(account):
        kind, _, group = right.resource.partition(".")
        assert group != "rbac.authorization.k8s.io"
        assert not (kind == "secrets" and right.name == ANY), right
        assert not (kind in ("pods", "deployments", "jobs") and right.verb not in ("get",)), right
        assert right.verb not in ("escalate", "bind", "impersonate", "deletecollection")


def test_servers_have_no_rights() -> None:
    for account in ("mixtune-mlflow", "mixtune-postgres", "mixtune-backup"):
        assert not rights_of(account)
        assert find("base", "ServiceAccount", account)["automountServiceAccountToken"] is False
