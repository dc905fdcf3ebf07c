"""k8s/ as an administrator gets it: it builds, fits Kubernetes' schemas, policy, and what the code calls things."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions

from mixtune.components.placement import Placement
from mixtune.components.shared.running.context import TRACKING_KEYS
from mixtune.pipelines import placement

from .manifests import K8S, ROOT, Manifest, build, buildable, containers, environment, find, generated, pod_specs
from .tools import checkov, kubectl

BUILDS = buildable()
SCHEMAS = {
    json.loads(file.read_text())["$comment"].split()[1].partition(".")[0]: json.loads(file.read_text())
    for file in (Path(__file__).parent / "schemas").glob("*.json")
}
NEWEST = sorted(
    {".".join(version.split(".")[:2]) for version in all_versions()},
    key=lambda one: [int(part) for part in one.split(".")],
)[-3:]
CUSTOM_GROUPS = ("kueue.x-k8s.io", "kubeflow.org", "kustomize.config.k8s.io", "trainer.kubeflow.org")
COMPILED = ROOT / "pipelines" / "compiled"
# Made by `kubectl create secret`, as docs/cluster.md has it, and by Kubeflow Pipelines.
SECRETS = {
    "mixtune-postgres": {"PGUSER", "PGPASSWORD"},
    "mixtune-mlflow-server": {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"},
    "mixtune-object-store": set(placement.CHECKPOINT_KEYS),
}


def custom(manifest: Manifest) -> Any:
    """The schema of a kind that Kubernetes itself does not know."""
    return SCHEMAS.get(manifest["kind"].lower() + "s")


def with_base(name: str) -> tuple[Manifest, ...]:
    """A build together with what it is applied to."""
    return (*build("base"), *build(name)) if name.startswith("operations/") else build(name)


def test_there_is_all_that_the_guide_names() -> None:
    assert set(BUILDS) >= {
        "base",
        "overlays/local",
        "overlays/kueue",
        "overlays/multi-user",
        "overlays/trainer",
        "operations/restore",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_every_build_fits_the_newest_kubernetes(name: str) -> None:
    assert len(NEWEST) == 3
    for one in build(name):
        if one["apiVersion"].split("/")[0] in CUSTOM_GROUPS:
            schema = custom(one)
            assert schema is not None, f"no schema of {one['kind']}"
            jsonschema.validate(one, schema)
            continue
        for version in NEWEST:
            kubernetes_validate.validate(one, version, strict=True)


def test_the_check_against_schemas_sees_what_is_wrong() -> None:
    flavor = find("overlays/kueue", "ResourceFlavor", "mixtune-gpu")
    wrong = {**flavor, "spec": {**flavor["spec"], "nodeLabel": {}}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, custom(flavor))
    service = find("base", "Service", "mixtune-mlflow")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**service, "spec": {**service["spec"], "port": 1}}, NEWEST[-1], strict=True)


@pytest.mark.parametrize("name", BUILDS)
def test_no_name_is_made_twice_and_all_have_a_namespace(name: str) -> None:
    cluster_wide = {
        "Namespace",
        "PriorityClass",
        "ClusterRole",
        "ClusterRoleBinding",
        "ResourceFlavor",
        "ClusterQueue",
        "Profile",
    }
    seen = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in build(name)]
    assert len(seen) == len(set(seen))
    for kind, namespace, title in seen:
        assert (namespace is None) == (kind in cluster_wide), (kind, title)
        assert kind != "Secret", f"{title} would be in a file"


@pytest.mark.parametrize("name", BUILDS)
def test_every_name_that_is_referred_to_is_there(name: str) -> None:
    builds = with_base(name)
    there: dict[str, set[str]] = {}
    for one in builds:
        there.setdefault(one["kind"], set()).add(one["metadata"]["name"])
    for one, template in pod_specs(builds):
        spec, where = template["spec"], one["metadata"]["name"]
        assert spec["serviceAccountName"] in there["ServiceAccount"], where
        assert spec["priorityClassName"] in there["PriorityClass"], where
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        volumes |= {claim["metadata"]["name"]: {} for claim in one["spec"].get("volumeClaimTemplates", [])}
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in there["PersistentVolumeClaim"], where
            if files := volume.get("configMap"):
                assert files["name"] in there["ConfigMap"], where
        for container in containers(template):
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes), where
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in there["ConfigMap"], where
            for variable in container["env"]:
                key = variable.get("valueFrom", {}).get("secretKeyRef")
                assert key is None or key["key"] in SECRETS[key["name"]], (where, variable)
    for one in builds:
        if one["kind"].endswith("RoleBinding"):
            assert one["roleRef"]["name"] in there[one["roleRef"]["kind"]]
            for subject in one["subjects"]:
                assert subject["name"] in there["ServiceAccount"]
                assert subject["namespace"]
        if one["kind"] == "LocalQueue":
            assert one["spec"]["clusterQueue"] in there["ClusterQueue"]
        if one["kind"] == "ClusterQueue":
            named = {flavor["name"] for group in one["spec"]["resourceGroups"] for flavor in group["flavors"]}
            assert named == there["ResourceFlavor"]


def test_services_lead_to_the_ports_of_pods_and_policies_let_them_through() -> None:
    templates = {one["metadata"]["name"]: template for one, template in pod_specs(build("base"))}
    for one in build("base"):
        if one["kind"] != "Service":
            continue
        template = templates[one["metadata"]["name"]]
        assert one["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        assert one["spec"]["type"] == "ClusterIP"
        ports = {
            port["name"]: port["containerPort"]
            for container in containers(template)
            for port in container.get("ports", [])
        }
        (port,) = one["spec"]["ports"]
        assert ports[port["targetPort"]] == port["port"]
        allowed = find("base", "NetworkPolicy", one["metadata"]["name"])["spec"]
        assert allowed["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert [entry["port"] for rule in allowed["ingress"] for entry in rule["ports"]] == [port["port"]]
    settings = find("base", "ConfigMap", "mixtune-tracking")["data"]
    assert settings["PGHOST"] in templates
    assert "mixtune-mlflow.mixtune.svc:5000" in settings["ALLOWED_HOSTS"].split(",")


def test_policies_select_the_labels_that_pods_have() -> None:
    """A selector that fits no pod protects nothing and lets nothing through, without a word."""
    ours = [template["metadata"]["labels"] for _, template in pod_specs((*build("base"), *build("operations/restore")))]
    known = [*ours, placement.POD_LABELS]
    for one in build("base"):
        if one["kind"] != "NetworkPolicy":
            continue
        found = [one["spec"]["podSelector"], *all_selectors(one["spec"])]
        for selector in found:
            wanted = selector.get("matchLabels", {})
            assert any(wanted.items() <= labels.items() for labels in known), (one["metadata"]["name"], wanted)


def all_selectors(spec: Manifest) -> list[Manifest]:
    """The pods that a policy's rules name."""
    rules = [rule for way in ("ingress", "egress") for rule in spec.get(way, [])]
    peers = [peer for rule in rules for way in ("from", "to") for peer in rule.get(way, [])]
    return [peer["podSelector"] for peer in peers if "podSelector" in peer]


def test_steps_carry_the_label_that_the_policies_go_by() -> None:
    for file in COMPILED.glob("*.yaml"):
        parts = list(yaml.safe_load_all(file.read_text()))
        executors = set(parts[0]["deploymentSpec"]["executors"])
        kubernetes = parts[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        plain = {name for name, one in parts[0]["deploymentSpec"]["executors"].items() if "container" in one}
        assert plain
        assert plain <= executors
        for name in plain:
            assert placement.POD_LABELS.items() <= kubernetes[name]["podMetadata"]["labels"].items(), (file.name, name)


def test_secrets_and_claims_are_called_what_the_pipelines_call_them() -> None:
    role = find("base", "Role", "mixtune-submit")
    names = {name for rule in role["rules"] if rule["resources"] == ["secrets"] for name in rule["resourceNames"]}
    where = Placement()
    assert {where.mlflow_secret, where.checkpoint_secret} == names == {"mixtune-mlflow", "mixtune-checkpoints"}
    assert find("base", "PersistentVolumeClaim", "mixtune-checkpoints")
    guide = (ROOT / "docs" / "cluster.md").read_text()
    for secret, keys in {**SECRETS, "mixtune-mlflow": set(TRACKING_KEYS)}.items():
        made = re.search(rf"create secret generic {secret} \\?\n?(.*?)```", guide, re.DOTALL)
        assert made, secret
        given = set(re.findall(r"--from-literal=(\w+)=", made[1].partition("create secret")[0]))
        assert given <= keys, (secret, given)
        assert given >= {key for key in keys if not key.startswith("AWS_") and key != "MLFLOW_EXPERIMENT_NAME"}, secret
    assert "checkpoint_claim: mixtune-checkpoints" in guide


def test_the_queues_go_to_the_nodes_of_the_profiles() -> None:
    profiles = {name: one for name, one in placement.profiles().items() if one.accelerator}
    folder = K8S / "components/kueue/flavors"
    flavors = {file.stem: yaml.safe_load(file.read_text()) for file in folder.glob("*.yaml")}
    assert set(flavors) == set(profiles)
    queue = find("overlays/kueue", "ClusterQueue", "mixtune")
    (group,) = queue["spec"]["resourceGroups"]
    for name, profile in profiles.items():
        assert flavors[name]["spec"] == {"nodeLabels": profile.node_selector, "tolerations": profile.tolerations}, name
        assert profile.accelerator in group["coveredResources"]


def test_images_are_pinned_and_come_from_no_registry_of_packages() -> None:
    tag = json.loads((ROOT / "pipelines" / "images.json").read_text())["tag"]
    for name in BUILDS:
        for _, template in pod_specs(build(name)):
            for container in containers(template):
                image, _, version = container["image"].partition(":")
                assert re.fullmatch(r"[0-9][0-9a-z.-]+", version), container["image"]
                assert image in ("mixtune-mlflow", "postgres")
                assert image != "mixtune-mlflow" or version == tag


def test_the_claim_for_checkpoints_is_looked_at_as_a_step_would(tmp_path: Path) -> None:
    template = find("operations/checkpoints", "Job", "mixtune-checkpoints")["spec"]["template"]
    (container,) = containers(template)
    assert environment(container, "base", {}) == {"CHECKPOINTS": placement.CHECKPOINT_FOLDER}

    def looked_at(folder: Path) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": os.environ["PATH"], "CHECKPOINTS": str(folder)}
        return subprocess.run(container["command"], env=variables, capture_output=True, text=True, check=False)

    good = looked_at(tmp_path)
    assert good.returncode == 0, good.stderr
    assert "steps can write" in good.stdout
    assert list(tmp_path.iterdir()) == []
    bad = looked_at(Path("/proc"))  # where nobody can write, root no more than others
    assert bad.returncode == 1
    assert "steps cannot write to the claim: d" in bad.stderr


def test_the_servers_image_holds_what_is_tested_here() -> None:
    pins: dict[str, str] = {}
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
        pins |= dict(line.split("==") for line in lines if line)
    image = dict(
        line.split("==") for line in (ROOT / "docker/mlflow/requirements.txt").read_text().splitlines() if "==" in line
    )
    assert {"mlflow", "psycopg2-binary", "boto3", "flask-wtf"} <= set(image)
    assert image == {name: pins[name] for name in image}


def test_pods_have_no_rights_that_they_do_not_need() -> None:
    for name in BUILDS:
        for one, template in pod_specs(build(name)):
            spec, where = template["spec"], one["metadata"]["name"]
            assert spec["automountServiceAccountToken"] is False, where
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
            for container in containers(template):
                context = container["securityContext"]
                assert context["readOnlyRootFilesystem"]
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert not context["allowPrivilegeEscalation"]
                assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), where
    assert (
        find("base", "Namespace", "mixtune")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    )


EXAMPLES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_of_the_guide_build_and_change_what_they_name(number: int, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    folder = tmp_path / "k8s" / "overlays" / "ours"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(EXAMPLES[number])
    done = subprocess.run([kubectl(), "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    for one in built:
        kubernetes_validate.validate(one, NEWEST[-1], strict=True)
        assert one["kind"] != "NetworkPolicy" or "namespace" in one["metadata"]
    images = {container["image"] for _, template in pod_specs(tuple(built)) for container in containers(template)}
    assert "registry.example.com/ml/mixtune-mlflow:0.1.0" in images
    (claim,) = [one for one in built if one["metadata"]["name"] == "mixtune-checkpoints"]
    assert claim["spec"]["storageClassName"] in (ROOT / "docs" / "cluster.md").read_text()


def test_there_is_an_example_for_each_profile_with_gpus() -> None:
    assert len(EXAMPLES) == len([one for one in placement.profiles().values() if one.accelerator])


@pytest.mark.parametrize("page", ["cluster.md", "operations.md"])
def test_the_guides_name_what_there_is(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    paths = set(re.findall(r"(?<![\w/])(?:tests/)?k8s/[\w/.-]*\w", text)) - {"k8s/overlays/ours"}
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
    there = {(one["kind"].lower(), one["metadata"]["name"]) for name in BUILDS for one in build(name)}
    # Kubeflow Pipelines' own, and one that a command of the page makes.
    there |= {("service", "ml-pipeline-ui"), ("job", "backup-now")}
    named = set(re.findall(r"\b(deployment|statefulset|cronjob|job|service)/([a-z][\w-]+)", text))
    assert named
    assert named <= there


def test_yaml_is_tidy() -> None:
    command = [sys.executable, "-m", "yamllint", "--strict", "--config-file", str(ROOT / ".yamllint.yaml"), str(K8S)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_policy_checker_has_nothing_to_say(tmp_path: Path) -> None:
    for name in BUILDS:
        (tmp_path / f"{name.replace('/', '-')}.yaml").write_text(yaml.safe_dump_all(build(name)))
    command = [str(checkov()), "--directory", ".", "--framework", "kubernetes", "--output", "json", "--skip-download"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert not found["results"]["failed_checks"], [
        (one["check_id"], one["check_name"], one["resource"], one["file_path"])
        for one in found["results"]["failed_checks"]
    ]
    seen = {one["file_path"].strip("/") for one in found["results"]["passed_checks"]}
    assert seen == {f"{name.replace('/', '-')}.yaml" for name in BUILDS}
    for one in found["results"]["skipped_checks"]:
        assert len(one["check_result"]["suppress_comment"]) > 30, one["check_id"]
    assert done.returncode == 0


def test_generated_names_are_told_apart() -> None:
    assert generated("mixtune-mlflow-files-abcdefgh12") == "mixtune-mlflow-files"
    assert generated("mixtune-tracking") == "mixtune-tracking"
