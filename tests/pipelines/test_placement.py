"""Where tasks run: every executor of the compiled package, with every option."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kfp import compiler

from mixtune.components.placement import GpuNodes
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.processes import TRAINING_STEPS
from mixtune.components.shared.task_name import TaskName
from mixtune.pipelines.configuration import read_config
from mixtune.pipelines.pipeline import make_pipeline
from mixtune.pipelines.placement import CA_VARIABLES, GPU_STEPS, POD_LABELS, PROXY_KEYS, Placer, profiles
from mixtune.pipelines.step_pipelines import STEPS, make_step_pipeline
from mixtune.pipelines.trainjob import NODE_LABEL, trainjob_of

from .test_compiled import COMPILED, step_of, tasks

EVERYTHING = (
    "placement.profile=gke", "placement.gpus=4", "placement.cpu=500m", "placement.memory=3Gi", "placement.gpu_cpu=11",
    "placement.gpu_memory=99Gi", "placement.shared_memory=17Gi", "placement.queue=team-queue", "placement.gpu_retries=5",
    "placement.gpu_timeout_hours=1.5", "placement.run_as_user=1234", "placement.run_as_group=0",
    "placement.image_pull_policy=Always", "placement.image_pull_secrets=[pull-a, pull-b]",
    "placement.proxy_config_map=our-proxy", "placement.ca_config_map=our-ca", "placement.run_deadline_hours=48",
    "placement.run_ttl_hours=24", "placement.failed_run_ttl_hours=0.5", "placement.parallel_candidates=3",
    "placement.prepare_workers=4",
)  # fmt: skip


CANDIDATES = {"exec-evaluate-2": "pretrained", "exec-evaluate-3": "finetuned", "exec-evaluate-4": "interpolated"}
"""Executors of one candidate alone."""


def package_with(tmp_path: Path, *overrides: str, step: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A compiled package and its platform part."""
    config = read_config(None, overrides)
    place = Placer.cluster(config)
    pipeline = make_step_pipeline(step, config, place) if step else make_pipeline(config, place)
    compiler.Compiler().compile(pipeline, str(tmp_path / "package.yaml"))
    package, platform = yaml.safe_load_all((tmp_path / "package.yaml").read_text(encoding="utf-8"))
    return package, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return package_with(tmp_path_factory.mktemp("all"), *EVERYTHING)


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    """The one in the repository."""
    return dict(next(yaml.safe_load_all((COMPILED / "mixtune.yaml").read_text(encoding="utf-8"))))


def containers(package: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, step and executor of everything that runs a container."""
    for name, executor in package["deploymentSpec"]["executors"].items():
        if "importer" not in executor:
            component = name.removeprefix("exec-").rstrip("-0123456789")
            yield name, TaskName.step_of_component(component), executor["container"]


def test_every_executor_is_placed(everything: tuple[dict[str, Any], dict[str, Any]]) -> None:
    package, places = everything
    found = list(containers(package))
    assert len(found) == 13 + 4, "with those that read portions of each stream"
    for name, step, container in found:
        gpu, place, resources = step in GPU_STEPS, places[name], container["resources"]
        assert resources["resourceCpuLimit"] == ("11" if gpu else "500m"), name
        assert resources["resourceMemoryLimit"] == ("99Gi" if gpu else "3Gi"), name
        labels = {"app.kubernetes.io/component": step, "kueue.x-k8s.io/queue-name": "team-queue"}
        candidate = CANDIDATES.get(name)
        labels |= {"mixtune/candidate": candidate} if candidate else {}
        assert place["podMetadata"]["labels"] == POD_LABELS | labels, name
        # KFP's own format writes whole numbers as text.
        assert {key: str(value) for key, value in place["securityContext"].items()} == {
            "runAsUser": "1234", "runAsGroup": "0", "runAsNonRoot": "True",
        }, name  # fmt: skip
        assert len(place["nodeAffinity"]) == 1, name
        assert place.get("activeDeadlineSeconds") == ("5400" if gpu else None), name
        shm = [{"volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "17Gi"}]
        assert place.get("emptyDirMounts") == (shm if gpu else None), name


def test_every_executor_finds_its_registry_proxy_and_certificates(
    everything: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    package, places = everything
    for name, _, container in containers(package):
        place = places[name]
        assert place["imagePullPolicy"] == "Always", name
        assert [one["secretName"] for one in place["imagePullSecret"]] == ["pull-a", "pull-b"], name
        proxies = {
            pair["envVar"]: pair["configMapKey"]
            for one in place["configMapAsEnv"]
            if one["configMapName"] == "our-proxy" and one["optional"]
            for pair in one["keyToEnv"]
        }
        assert proxies == {spelled: key for key in PROXY_KEYS for spelled in (key, key.lower())}, name
        (volume,) = place["configMapAsVolume"]
        assert (volume["configMapName"], volume["mountPath"]) == ("our-ca", "/etc/mixtune-ca"), name
        variables = {one["name"]: one["value"] for one in container["env"]}
        assert {variables[one] for one in CA_VARIABLES} == {"/etc/mixtune-ca/ca.crt"}, name


@pytest.mark.parametrize("step", [None, "compare"])
def test_a_run_has_a_deadline_and_an_end_of_its_workflow(tmp_path: Path, step: str | None) -> None:
    package_with(tmp_path, *EVERYTHING, step=step)
    package, platform = yaml.safe_load_all((tmp_path / "package.yaml").read_text(encoding="utf-8"))
    assert platform["platforms"]["kubernetes"]["pipelineConfig"] == {
        "activeDeadlineSeconds": 48 * 3600, "resourceTtlOnCompletion": 24 * 3600, "resourceTtlOnFailure": 1800
    }  # fmt: skip
    loops = [task["iteratorPolicy"] for _, task, _ in tasks(package) if "iteratorPolicy" in task]
    assert [int(loop["parallelismLimit"]) for loop in loops] == ([] if step else [3])


@pytest.mark.parametrize("step", [None, *sorted(GPU_STEPS)])
def test_tasks_with_gpus_are_told_how_many(tmp_path: Path, step: str | None) -> None:
    """By the parameter that is their limit, in the loop too: KFP resolves it in a command, and not in environment variables."""
    package, _ = package_with(tmp_path, step=step)
    told = []
    for name, kind, container in containers(package):
        setting = [part for part in container["command"] if part.startswith("MIXTUNE_GPUS=")]
        if kind in GPU_STEPS:
            assert container["command"][:2] == ["env", *setting], name
            assert setting == [f"MIXTUNE_GPUS={container['resources']['accelerator']['resourceCount']}"], name
            told.append(name)
        else:
            assert not setting, name
    assert len(told) == (1 if step else 7)
    labels = {one["componentRef"]["name"]: one for _, one, _ in tasks(package)}
    for component, task in labels.items():  # what the placeholder refers to reaches the task
        if package["components"][component].get("executorLabel") in told:
            inputs = task["inputs"]["parameters"]
            name = "gpus" if step else "plan-pretrain_gpus" if component == "comp-pretrain" else "plan-gpus"
            assert f"pipelinechannel--{name}" in inputs, component


def test_retries(everything: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    for _, task, _ in tasks(everything[0]):
        step = step_of(task, everything[0])
        if step in GPU_STEPS:
            assert task["retryPolicy"]["maxRetryCount"] == 5
    package, _ = package_with(tmp_path, "placement.gpu_retries=0", step="mixed")
    assert not any("retryPolicy" in task for _, task, _ in tasks(package))


def source_of(reference: dict[str, Any]) -> str:
    """The parameter of the run, or the output of a task, behind what an executor refers to."""
    name = reference.get("componentInputParameter") or ""
    if "taskOutputParameter" in reference:
        return f"{reference['taskOutputParameter']['producerTask']}.{reference['taskOutputParameter']['outputParameterKey']}"
    return name.removeprefix("pipelinechannel--")


def test_affinity_of_gpu_tasks_reaches_into_the_loop_and_that_of_others_is_compiled_in(
    everything: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    package, places = everything
    for name, task, group in tasks(package):
        step = step_of(task, package)
        if step is None:
            continue
        label = package["components"][task["componentRef"]["name"]]["executorLabel"]
        reference = places[label]["nodeAffinity"][0]["nodeAffinityJson"]
        if step not in GPU_STEPS:
            assert reference["runtimeValue"]["constant"] == off_gpu_nodes("gke"), name
            continue
        inside = "plan" not in group["dag"]["tasks"]
        wanted = "plan-affinity" if inside else "plan.pretrain_affinity" if step == "pretrain" else "plan.affinity"
        assert source_of(reference) == wanted, name
        if inside:
            assert f"pipelinechannel--{wanted}" in group["inputDefinitions"]["parameters"], name


@pytest.mark.parametrize("profile", profiles())
def test_tasks_without_a_gpu_are_kept_off_gpu_nodes(profile: str) -> None:
    terms = off_gpu_nodes(profile)
    selector = profiles()[profile].node_selector
    if profile == "cpu":
        assert terms == {}
        return
    for labels, fits in ((selector, False), ({}, True), (dict.fromkeys(selector, "other"), True)):
        assert matches(terms, labels) is fits


def test_tasks_without_a_gpu_tolerate_nothing(everything: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for name, step, _ in containers(everything[0]):
        if step not in GPU_STEPS:
            assert not {"tolerations", "nodeSelector"} & set(everything[1][name]), name


def off_gpu_nodes(profile: str, *overrides: str) -> dict[str, Any]:
    """The node affinity of tasks without a GPU."""
    return Placer.cluster(read_config(None, [f"placement.profile={profile}", *overrides])).off_gpu_nodes()


def matches(affinity: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a node with these labels meets a required node affinity; as Kubernetes reads it, with `NotIn` alone."""
    terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return any(
        all(
            labels.get(one["key"]) not in one["values"]
            for one in term["matchExpressions"]
            if one["operator"] == "NotIn"
        )
        for term in terms
    )


def test_a_cluster_of_gpu_nodes_alone() -> None:
    assert off_gpu_nodes("gke", "placement.cpu_tasks_on_gpu_nodes=true") == {}


def test_affinities_are_what_kubernetes_reads() -> None:
    from kfp.kubernetes.node_affinity import validate_node_affinity

    for profile in profiles().values():
        assert validate_node_affinity(profile.off_gpu_nodes()) is None
        assert validate_node_affinity(profile.gpu_affinity) is None


def test_profiles_of_the_users(tmp_path: Path) -> None:
    own = tmp_path / "pools.yaml"
    affinity: dict[str, Any] = {"preferredDuringSchedulingIgnoredDuringExecution": []}
    own.write_text(yaml.safe_dump({
        "ours": {"description": "Our A100s.", "accelerator": "nvidia.com/mig-3g.20gb", "node_selector": {"pool": "a100"},
                 "gpu_memory": "200Gi", "gpu_affinity": affinity},
        "gke": {"description": "Ours too.", "accelerator": "nvidia.com/gpu"},
    }))  # fmt: skip
    options = [f"placement.profiles_file={own}", "placement.profile=ours", "placement.gpus=1"]
    found = Placer.cluster(read_config(None, options)).nodes
    assert (found.gpus, found.gpu_type) == (1, "nvidia.com/mig-3g.20gb")
    assert (found.node_selector, found.affinity) == ({"pool": "a100"}, affinity)
    assert profiles(own)["gke"].description == "Ours too."
    assert set(profiles()) < set(profiles(own))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("a: [", "is not valid YAML"),
        ("- a", "must hold profiles by name, found list"),
        ("ours: {description: x, gpu: 1}\nmore: {}", r"ours\.gpu.*more\.description"),
    ],
)
def test_a_file_of_profiles_that_is_wrong(text: str | None, told: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "pools.yaml").write_text(text)
    config = read_config(None, [f"placement.profiles_file={tmp_path / 'pools.yaml'}"])
    with pytest.raises(RefusedError, match=rf"(?s)placement\.profiles_file: .*{told}"):
        Placer.cluster(config)


@pytest.mark.parametrize(
    "override", ["cpu=two", "memory=8", "gpu_memory=8GB", "shared_memory=half", "queue=Team Queue", "run_as_user=-1"]
)
def test_quantities_that_kubernetes_would_refuse(override: str) -> None:
    with pytest.raises(RefusedError, match=rf"placement\.{override.split('=', maxsplit=1)[0]}"):
        read_config(None, [f"placement.{override}"])


ON_NODES = ("placement.nodes=3", "placement.checkpoint_claim=shared", "tracking.tensorboard=true")


@pytest.fixture(scope="module")
def on_nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return package_with(tmp_path_factory.mktemp("nodes"), *EVERYTHING, *ON_NODES)


def test_trainings_on_several_nodes_are_launched_from_a_small_pod(
    on_nodes: tuple[dict[str, Any], dict[str, Any]], everything: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    package, places = on_nodes
    executors = package["deploymentSpec"]["executors"]
    launching = 0
    for name, step, container in containers(package):
        env = {one["name"]: one["value"] for one in container.get("env", [])}
        fields = {one["name"] for one in places[name]["fieldPathAsEnv"]} - {"MIXTUNE_RUN_ID"}
        if step not in TRAINING_STEPS:
            assert "MIXTUNE_TRAINJOB" not in env, name
            assert fields == ({"MIXTUNE_POD_NAMESPACE"} if step == "finish" else set()), name
            assert (
                container["resources"] == everything[0]["deploymentSpec"]["executors"][name]["container"]["resources"]
            )
            continue
        launching += 1
        assert fields == {"MIXTUNE_POD_NAMESPACE", "MIXTUNE_POD_NAME"}
        assert (container["resources"]["resourceCpuLimit"], container["resources"]["resourceMemoryLimit"]) == (
            "500m",
            "3Gi",
        )
        assert "accelerator" not in container["resources"]
        assert "kueue.x-k8s.io/queue-name" not in places[name]["podMetadata"]["labels"], (
            "it would wait behind its TrainJob"
        )
        assert not {"emptyDirMounts", "activeDeadlineSeconds", "tolerations", "nodeSelector"} & set(places[name]), name
        (affinity,) = places[name]["nodeAffinity"]
        assert affinity["nodeAffinityJson"]["runtimeValue"]["constant"] == off_gpu_nodes("gke")
        told = [part.partition("=") for part in container["command"] if part.startswith("MIXTUNE_")]
        assert {name for name, _, _ in told} == {
            f"MIXTUNE_TRAINJOB_{option.upper()}" for option in GpuNodes.model_fields
        }
        for option, _, reference in told:
            value = option.removeprefix("MIXTUNE_TRAINJOB_").lower()
            plan = f"pretrain_{value}" if step == "pretrain" and value != "gpu_type" else value
            assert reference == f"{{{{$.inputs.parameters['pipelinechannel--plan-{plan}']}}}}", name
    assert launching == 3
    for _, task, group in tasks(package):
        of_step = step_of(task, package)
        assert ("retryPolicy" in task) == (of_step in GPU_STEPS)
        if of_step not in TRAINING_STEPS:
            continue
        # What the placeholders refer to reaches the task, into the loop too.
        container = executors[package["components"][task["componentRef"]["name"]]["executorLabel"]]["container"]
        for name in re.findall(r"\$\.inputs\.parameters\['(pipelinechannel--[^']+)'\]", " ".join(container["command"])):
            wanted = name.removeprefix("pipelinechannel--").replace("plan-", "plan." if of_step != "mixed" else "plan-")
            assert source_of(task["inputs"]["parameters"][name]) == wanted
            assert of_step != "mixed" or name in group["inputDefinitions"]["parameters"]


def test_a_trainjob_has_all_that_the_task_of_one_pod_has(
    on_nodes: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    package, _ = on_nodes
    in_one_pod, places = package_with(tmp_path, *EVERYTHING, *ON_NODES, "placement.nodes=1")
    for name, step, container in containers(package):
        if step not in TRAINING_STEPS:
            continue
        compiled = json.loads(next(one["value"] for one in container["env"] if one["name"] == "MIXTUNE_TRAINJOB"))
        place, alone = places[name], in_one_pod["deploymentSpec"]["executors"][name]["container"]
        spec = compiled["spec"]
        trainer = spec["trainer"]
        assert (trainer["image"], trainer["numNodes"], spec["activeDeadlineSeconds"]) == (alone["image"], 3, 5400)
        assert trainer["resourcesPerNode"] == {"limits": {"cpu": "11", "memory": "99Gi"}}
        plain = {one["name"]: one["value"] for one in trainer["env"] if "value" in one}
        assert plain == {one["name"]: one["value"] for one in alone["env"]}
        references = [
            (one["name"], next(iter(one["valueFrom"].values()))) for one in trainer["env"] if "valueFrom" in one
        ]
        sources = {(name, of["name"], of["key"], of["optional"]) for name, of in references}
        assert sources == {
            (pair["envVar"], of[f"{kind}Name"], pair[f"{kind}Key"], True)
            for kind, key in (("secret", "secretAsEnv"), ("configMap", "configMapAsEnv"))
            for of in place[key]
            for pair in of["keyToEnv"]
        }
        ((job,),) = [one["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"] for one in spec["runtimePatches"]]
        template = job["template"]["spec"]["template"]
        labels = {name: value for name, value in place["podMetadata"]["labels"].items() if "kueue" not in name}
        assert template["metadata"]["labels"] == labels | NODE_LABEL
        assert compiled["labels"] == labels | {"kueue.x-k8s.io/queue-name": "team-queue"}
        (inside,) = template["spec"]["containers"]
        assert inside["securityContext"] == {"runAsUser": 1234, "runAsGroup": 0, "runAsNonRoot": True}
        assert {mount["mountPath"]: volume for mount in inside["volumeMounts"] for volume in template["spec"]["volumes"]
                if volume["name"] == mount["name"]} == {
            "/dev/shm": {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "17Gi"}},
            "/checkpoints": {"name": "claim-0", "persistentVolumeClaim": {"claimName": "shared"}},
            "/etc/mixtune-ca": {"name": "files-0", "configMap": {"name": "our-ca"}},
        }  # fmt: skip
        assert template["spec"]["imagePullSecrets"] == [{"name": "pull-a"}, {"name": "pull-b"}]


def test_a_setting_of_a_pod_that_a_trainjob_does_not_know_is_an_error() -> None:
    settings: dict[str, Any] = {"podMetadata": {"labels": {}}, "somethingNew": {}}
    task: Any = SimpleNamespace(
        container_spec=SimpleNamespace(env={}, image="i"), platform_config={"kubernetes": settings}
    )
    with pytest.raises(AssertionError, match="somethingNew"):
        trainjob_of(task, 2, {}, None, {}, None)


@pytest.mark.parametrize("step", sorted(TRAINING_STEPS))
def test_a_training_step_alone_on_several_nodes(step: str, tmp_path: Path) -> None:
    package, _ = package_with(tmp_path, *EVERYTHING, *ON_NODES, step=step)
    ((_, _, container),) = containers(package)
    env = {one["name"]: one["value"] for one in container["env"]}
    assert env["MIXTUNE_TRAINJOB_GPU_TYPE"] == "nvidia.com/gpu"
    assert json.loads(env["MIXTUNE_TRAINJOB_AFFINITY"]) == profiles()["gke"].gpu_affinity
    told = {part.partition("=")[0] for part in container["command"] if part.startswith("MIXTUNE_")}
    assert told == {f"MIXTUNE_TRAINJOB_{option}" for option in ("GPUS", "NODE_SELECTOR", "TOLERATIONS")}


@pytest.mark.parametrize("override", [[], ["placement.checkpoint_url=s3://bucket/checkpoints"]])
def test_several_nodes_need_a_volume(override: list[str]) -> None:
    with pytest.raises(RefusedError) as refused:
        read_config(None, ["placement.nodes=2", *override])
    assert refused.value.problems == [
        "placement: nodes is 2, and several nodes pass data and checkpoints through a volume; set checkpoint_claim to a claim "
        "with the access mode ReadWriteMany"
    ]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_alone_is_placed_too(step: str, tmp_path: Path) -> None:
    package, places = package_with(tmp_path, *EVERYTHING, step=step)
    ((name, found, container),) = containers(package)
    assert found == step
    assert ("accelerator" in container["resources"]) == (step in GPU_STEPS)
    labels = {"app.kubernetes.io/component": step, "kueue.x-k8s.io/queue-name": "team-queue"}
    assert places[name]["podMetadata"]["labels"] == POD_LABELS | labels
    assert {"securityContext", "nodeAffinity", "secretAsEnv", "fieldPathAsEnv"} <= set(places[name])
    secrets = {one["secretName"] for one in places[name]["secretAsEnv"]}
    assert "mixtune-mlflow" in secrets


def test_placement_is_no_part_of_what_a_step_computes(
    everything: tuple[dict[str, Any], dict[str, Any]], package: dict[str, Any]
) -> None:
    # Images, commands and inputs enter KFP's cache key; with more memory or another queue they stay.
    placed = {name: container for name, _, container in containers(everything[0])}
    for name, step, container in containers(package):
        # `plan`, which is never cached, puts the placement on record.
        for part in ("image", "command", "args"):
            assert container.get(part) == placed[name].get(part), name
        env = [one for one in placed[name]["env"] if one["name"] not in CA_VARIABLES]  # an address, and not in the key
        assert step == "plan" or container.get("env", []) == env, name
