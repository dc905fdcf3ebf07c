"""k8s/components/trainer and the TrainJobs that refer to it: they fit the schemas and each other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from mixtune.components.shared.nodes.manifest import AT, complete, variable_of
from mixtune.components.shared.nodes.state import RUN_LABEL
from mixtune.pipelines.placement import POD_LABELS
from mixtune.pipelines.trainjob import NODE_LABEL, RUNTIME
from tests.pipelines.test_placement import EVERYTHING, ON_NODES, package_with
from tests.trainer_server import recorded

from .manifests import Manifest, build, find
from .test_manifests import NEWEST, SCHEMAS

WITH_TRAINER = "overlays/trainer"


@pytest.fixture(scope="module")
def runtime() -> Manifest:
    return find(WITH_TRAINER, "TrainingRuntime", "mixtune")


def job_of(runtime: Manifest) -> Manifest:
    """The job that a JobSet makes of the runtime."""
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job["template"]["spec"]}


@pytest.fixture(scope="module")
def trainjob(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A TrainJob with every option of the placement."""
    package, _ = package_with(tmp_path_factory.mktemp("package"), *EVERYTHING, *ON_NODES, step="finetune")
    (executor,) = [one["container"] for one in package["deploymentSpec"]["executors"].values() if "container" in one]
    compiled = json.loads(next(one["value"] for one in executor["env"] if one["name"] == "MIXTUNE_TRAINJOB"))
    affinity = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "pool", "operator": "In", "values": ["a100"]}]},
    ]}}  # fmt: skip
    at: dict[str, Any] = dict(
        zip(AT, (4, "nvidia.com/gpu", {"a": "b"}, [{"operator": "Exists"}], affinity), strict=True)
    )
    given = {variable_of(name): value if isinstance(value, str) else json.dumps(value) for name, value in at.items()}
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "w", "uid": "u"}
    return complete(compiled, "mixtune-finetune-0", "k", "finetune", "run", Path("/checkpoints/job"), [owner], given)


def test_the_job_in_the_runtime_fits_the_newest_kubernetes(runtime: Manifest) -> None:
    jsonschema.validate(runtime, SCHEMAS["trainingruntimes"])
    for version in NEWEST:
        kubernetes_validate.validate(job_of(runtime), version, strict=True)
    wrong = job_of(copy.deepcopy(runtime))
    wrong["spec"]["podFailurePolicy"]["rules"][0]["onExitCode"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, NEWEST[-1], strict=True)


def test_pods_of_trainings_have_no_rights(runtime: Manifest) -> None:
    spec = job_of(runtime)["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert find(WITH_TRAINER, "ServiceAccount", spec["serviceAccountName"])["automountServiceAccountToken"] is False
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    (container,) = spec["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_a_trainjob_fits_its_schema_and_its_runtime(trainjob: Manifest, runtime: Manifest) -> None:
    jsonschema.validate(trainjob, SCHEMAS["trainjobs"])
    wrong = copy.deepcopy(trainjob)
    wrong["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["name"] = "other"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMAS["trainjobs"])
    assert trainjob["spec"]["runtimeRef"] == RUNTIME
    assert runtime["apiVersion"] == trainjob["apiVersion"] == recorded("trainjob-complete")["apiVersion"]
    assert (runtime["kind"], runtime["metadata"]["name"]) == (RUNTIME["kind"], RUNTIME["name"])


def test_the_pods_that_come_of_both_fit_the_newest_kubernetes(trainjob: Manifest, runtime: Manifest) -> None:
    job = job_of(copy.deepcopy(runtime))
    (patch,) = trainjob["spec"]["runtimePatches"]
    (patched,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    template, change = job["spec"]["template"], copy.deepcopy(patched["template"]["spec"]["template"])
    (container,), (changed,) = template["spec"]["containers"], change["spec"].pop("containers")
    container["securityContext"] |= changed.pop("securityContext")
    trainer = trainjob["spec"]["trainer"]
    container |= changed | {name: trainer[name] for name in ("image", "command", "env")}
    container["resources"] = trainer["resourcesPerNode"]
    template["spec"] |= change.pop("spec")
    template |= change
    for version in NEWEST:
        kubernetes_validate.validate(job, version, strict=True)
    assert container["resources"]["limits"] == {"cpu": "11", "memory": "99Gi", "nvidia.com/gpu": "4"}
    assert template["spec"]["affinity"].keys() == {"nodeAffinity"}


def test_nodes_reach_each_other_and_what_every_step_reaches(trainjob: Manifest) -> None:
    (patch,) = trainjob["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    labels = job["template"]["spec"]["template"]["metadata"]["labels"]
    policy = find(WITH_TRAINER, "NetworkPolicy", "mixtune-training")["spec"]
    (incoming,), (outgoing,) = policy["ingress"], policy["egress"]
    for selector in (policy["podSelector"], incoming["from"][0]["podSelector"], outgoing["to"][0]["podSelector"]):
        assert selector["matchLabels"].items() <= labels.items()
        assert NODE_LABEL.items() <= selector["matchLabels"].items(), "the pods of steps are not selected"
    assert not {"ports"} & {*incoming, *outgoing}
    everywhere = find(WITH_TRAINER, "NetworkPolicy", "mixtune-steps")["spec"]["podSelector"]["matchLabels"]
    assert everywhere.items() <= POD_LABELS.items() <= labels.items()
    # Kueue manages the TrainJob. With the label on its pods, each of them would be a workload of its own.
    assert "kueue.x-k8s.io/queue-name" in trainjob["metadata"]["labels"]
    assert not any("kueue" in name for name in labels)
    assert RUN_LABEL in trainjob["metadata"]["labels"]


def test_the_overlay_adds_to_the_base_only() -> None:
    def named(name: str) -> set[tuple[str, str]]:
        return {(one["kind"], one["metadata"]["name"]) for one in build(name)}

    assert named("base") < named(WITH_TRAINER)
    assert named(WITH_TRAINER) - named("base") == {
        ("TrainingRuntime", "mixtune"), ("ServiceAccount", "mixtune-training"), ("Role", "mixtune-trainjobs"),
        ("RoleBinding", "mixtune-trainjobs"), ("NetworkPolicy", "mixtune-training"),
    }  # fmt: skip
