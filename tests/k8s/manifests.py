"""The manifests as kustomize builds them, and what Kubernetes makes of a container's command and environment."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from .tools import kubectl

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
Manifest = dict[str, Any]


def buildable() -> list[str]:
    """What an administrator applies: the base, every overlay, and what is there for an occasion."""
    folders = [K8S / "base", *sorted((K8S / "overlays").iterdir()), *sorted((K8S / "operations").iterdir())]
    return [str(folder.relative_to(K8S)) for folder in folders]


@functools.cache
def build(name: str) -> tuple[Manifest, ...]:
    """What kustomize makes of a folder."""
    done = subprocess.run([kubectl(), "kustomize", K8S / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower(), done.stderr
    return tuple(manifest for manifest in yaml.safe_load_all(done.stdout) if manifest)


def find(name: str, kind: str, manifest: str) -> Manifest:
    """One manifest of a build."""
    (found,) = [one for one in build(name) if one["kind"] == kind and generated(one["metadata"]["name"]) == manifest]
    return found


def generated(name: str) -> str:
    """The name of a generated ConfigMap without the hash of its content."""
    return re.sub(r"(-files)-[a-z0-9]{10}$", r"\1", name)


def pod_specs(manifests: tuple[Manifest, ...]) -> Iterator[tuple[Manifest, Manifest]]:
    """Manifests that make pods, each with the pod's template. Those of TrainJobs are completed in a run."""
    for one in manifests:
        if one["kind"] == "TrainingRuntime":
            continue
        spec = one.get("spec", {})
        if one["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if isinstance(spec.get("template"), dict):
            yield one, spec["template"]


def containers(template: Manifest) -> list[Manifest]:
    """All containers of a pod's template."""
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def environment(container: Manifest, name: str, secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The environment that Kubernetes gives a container.

    Args:
        name: the build that the ConfigMaps are of.
        secrets: what `kubectl create secret` made: secret -> key -> value.
    """
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= find(name, "ConfigMap", generated(source["configMapRef"]["name"]))["data"]
    for one in container.get("env", []):
        if "value" in one:
            found[one["name"]] = one["value"]
        elif key := one["valueFrom"].get("secretKeyRef"):
            if key["key"] in secrets[key["name"]] or not key.get("optional"):
                found[one["name"]] = secrets[key["name"]][key["key"]]
        else:
            key = one["valueFrom"]["configMapKeyRef"]
            found[one["name"]] = find(name, "ConfigMap", key["name"])["data"][key["key"]]
    return found


def command(container: Manifest, variables: Mapping[str, str]) -> list[str]:
    """The command that Kubernetes starts, with `$(NAME)` put in as the kubelet does."""
    words = [*container.get("command", []), *container.get("args", [])]
    return [re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), word) for word in words]
