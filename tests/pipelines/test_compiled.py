"""The compiled packages: equal to what the code compiles to, and free of the ways in which KFP goes wrong silently."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler
from kubernetes import client

from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.task_name import STEPS as ALL_STEPS
from mixtune.pipelines.cli.commands import compile_pipeline
from mixtune.pipelines.cluster.rerun import compiled_in
from mixtune.pipelines.configuration import read_config
from mixtune.pipelines.generate import command_page, compile_all, configuration_page, form_page, generate
from mixtune.pipelines.images import images
from mixtune.pipelines.pipeline import make_pipeline
from mixtune.pipelines.placement import GPU_STEPS, RUN_TIME_ALONE, Placer, profiles
from mixtune.pipelines.step_pipelines import _OPTIONAL, STEPS

ROOT = Path(__file__).parents[2]
COMPILED = ROOT / "pipelines" / "compiled"


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    """The whole pipeline, without the platform part."""
    return next(yaml.safe_load_all((COMPILED / "mixtune.yaml").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def platform() -> dict[str, Any]:
    return list(yaml.safe_load_all((COMPILED / "mixtune.yaml").read_text(encoding="utf-8")))[1]


def dags(package: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and DAG of the root and of every group."""
    yield "root", package["root"]
    for name, component in package["components"].items():
        if "dag" in component:
            yield name, component


def tasks(package: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every task with its name and the group that it stands in."""
    for _, component in dags(package):
        for name, task in component["dag"]["tasks"].items():
            yield name, task, component


def step_of(task: dict[str, Any], package: dict[str, Any]) -> str | None:
    """The step that a task runs, None for a group."""
    component = package["components"][task["componentRef"]["name"]]
    label = component.get("executorLabel")
    step = None if label is None else label.removeprefix("exec-").rstrip("-0123456789")
    return None if step == "importer" else step


def test_the_packages_in_the_repository_are_what_the_code_compiles_to(tmp_path: Path) -> None:
    for path in compile_all(tmp_path):
        assert path.read_bytes() == (COMPILED / path.name).read_bytes(), "run `make compiled`"
    assert sorted(path.name for path in COMPILED.iterdir()) == sorted(path.name for path in tmp_path.iterdir())


def test_the_documentation_in_the_repository_is_what_the_schema_says() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == configuration_page(), (
        "run `make compiled`"
    )
    assert (ROOT / "docs" / "command.md").read_text(encoding="utf-8") == command_page(), "run `make compiled`"
    assert (ROOT / "docs" / "form.md").read_text(encoding="utf-8") == form_page(), "run `make compiled`"


def test_generating_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = generate(tmp_path / "one"), generate(tmp_path / "two")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_every_task_of_the_design_is_there(package: dict[str, Any]) -> None:
    found = sorted(step for _, task, _ in tasks(package) if (step := step_of(task, package)))
    assert found == sorted(
        ["plan", "prepare", "prepare", "pretrain", "finetune", "mixed", "compare", "register", "finish"]
        + 4 * ["evaluate"]
    )


def test_the_loop_goes_over_the_unnamed_output(package: dict[str, Any]) -> None:
    # A named output compiles and fails at run time, since the loop does not find it.
    loops = [task for _, task, _ in tasks(package) if "parameterIterator" in task]
    assert len(loops) == 1
    assert loops[0]["parameterIterator"]["items"]["inputParameter"] == "pipelinechannel--plan-Output"


def test_nothing_but_the_item_comes_into_the_loop_from_a_task_on_one_machine() -> None:
    # The local runner puts the item in place of any parameter that a task hands into a loop.
    local = json_format.MessageToDict(make_pipeline(read_config(None), Placer.local()).pipeline_spec)
    loop = next(task for _, task, _ in tasks(local) if "parameterIterator" in task)
    from_tasks = [name for name, one in loop["inputs"]["parameters"].items() if "taskOutputParameter" in one]
    assert from_tasks == [loop["parameterIterator"]["items"]["inputParameter"]]


def test_the_gate_asks_for_the_unnamed_output(package: dict[str, Any]) -> None:
    # A condition on a named output is silently false.
    conditions = [c for _, task, _ in tasks(package) if (c := task.get("triggerPolicy", {}).get("condition"))]
    assert len(conditions) == 1
    assert "pipelinechannel--compare-Output'] == true" in " ".join(conditions[0].split())
    verdict = package["components"]["comp-compare"]["outputDefinitions"]["parameters"]
    assert verdict["Output"]["parameterType"] == "BOOLEAN"


def test_the_selected_model_is_imported_by_its_uri(package: dict[str, Any]) -> None:
    # An output artifact with a URI of another run, where a cached model is, fails in KFP's launcher.
    outputs = package["components"]["comp-compare"]["outputDefinitions"]
    assert {"selected_uri", "other_uri"} <= set(outputs["parameters"])
    assert {one["artifactType"]["schemaTitle"] for one in outputs["artifacts"].values()}.isdisjoint({"system.Model"})
    gate = next(c for name, c in dags(package) if "register" in c["dag"]["tasks"])
    inputs = gate["dag"]["tasks"]["register"]["inputs"]["artifacts"]
    assert inputs["selected"]["taskOutputArtifact"]["producerTask"] == "importer"
    assert inputs["other"]["taskOutputArtifact"]["producerTask"] == "importer-2"
    for name in ("importer", "importer-2"):
        assert gate["dag"]["tasks"][name]["taskInfo"]["name"] == name, "a display name breaks an importer"


def test_candidates_travel_as_text(package: dict[str, Any]) -> None:
    # Whole numbers inside lists and objects arrive as floats.
    plan = package["components"]["comp-plan"]["outputDefinitions"]["parameters"]
    others = {name: one["parameterType"] for name, one in plan.items() if one["parameterType"] != "STRING"}
    assert others == {
        "Output": "LIST",
        "node_selector": "STRUCT",
        "tolerations": "LIST",
        "affinity": "STRUCT",
        "pretrain_node_selector": "STRUCT",
        "pretrain_tolerations": "LIST",
        "pretrain_affinity": "STRUCT",
    }
    mixed = package["components"]["comp-mixed"]["inputDefinitions"]["parameters"]
    assert {name: one["parameterType"] for name, one in mixed.items()} == {"candidate": "STRING", "config": "STRING"}


def test_gpu_counts_are_text_and_reach_into_the_loop(package: dict[str, Any]) -> None:
    # A count given as an int is silently no GPU; inside a group it is lost unless the channels are passed on.
    assert package["components"]["comp-plan"]["outputDefinitions"]["parameters"]["gpus"]["parameterType"] == "STRING"
    for name, task, group in tasks(package):
        if step_of(task, package) in GPU_STEPS and "plan" not in group["dag"]["tasks"]:
            inputs = group["inputDefinitions"]["parameters"]
            assert {"pipelinechannel--plan-gpus", "pipelinechannel--plan-gpu_type"} <= set(inputs), name


def test_every_executor_has_its_image_and_installs_nothing(package: dict[str, Any]) -> None:
    for name, executor in package["deploymentSpec"]["executors"].items():
        if "importer" in executor:
            continue
        container = executor["container"]
        assert container["image"] in {images().of(step) for step in ALL_STEPS}, name
        assert ":" in container["image"]
        assert not container["image"].endswith(":latest")
        assert "pip install" not in " ".join(container["command"]), name
        resources = container["resources"]
        assert {"resourceCpuLimit", "resourceMemoryLimit"} <= set(resources), name
        gpu = name.removeprefix("exec-").rstrip("-0123456789") in GPU_STEPS
        assert ("accelerator" in resources) == gpu, name


def test_plan_decides_whether_pretrain_gets_a_gpu(package: dict[str, Any], platform: dict[str, Any]) -> None:
    # With nothing to train it asks for none and stays off the nodes that have one; that is known at run time only.
    task = next(task for _, task, _ in tasks(package) if step_of(task, package) == "pretrain")
    count = task["inputs"]["parameters"]["pipelinechannel--plan-pretrain_gpus"]["taskOutputParameter"]
    assert count == {"outputParameterKey": "pretrain_gpus", "producerTask": "plan"}
    executor = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-pretrain"]
    selector, tolerations = executor["nodeSelector"]["nodeSelectorJson"], executor["tolerations"][0]["tolerationJson"]
    assert selector["taskOutputParameter"]["outputParameterKey"] == "pretrain_node_selector"
    assert tolerations["taskOutputParameter"]["outputParameterKey"] == "pretrain_tolerations"


def test_only_gpu_tasks_are_retried(package: dict[str, Any]) -> None:
    for name, task, _ in tasks(package):
        step = step_of(task, package)
        if step is not None:
            assert ("retryPolicy" in task) == (step in GPU_STEPS), name


def compiled_with(tmp_path: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Executors and their platform part of the pipeline with some options."""
    config = read_config(None, overrides)
    compiler.Compiler().compile(make_pipeline(config, Placer.cluster(config)), str(tmp_path / "package.yaml"))
    package, platform = yaml.safe_load_all((tmp_path / "package.yaml").read_text(encoding="utf-8"))
    return package["deploymentSpec"]["executors"], platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def keeps_checkpoints(name: str) -> bool:
    return name.removeprefix("exec-").rstrip("-0123456789") in {"prepare", "pretrain", "finetune", "mixed", "finish"}


def test_a_claim_for_checkpoints_is_mounted_where_work_is_resumed(tmp_path: Path) -> None:
    executors, places = compiled_with(tmp_path, "placement.checkpoint_claim=mixtune-checkpoints")
    for name, executor in executors.items():
        environment = {item["name"]: item["value"] for item in executor.get("container", {}).get("env", [])}
        mounts = places.get(name, {}).get("pvcMount", [])
        assert environment.get("MIXTUNE_CHECKPOINT_DIR") == ("/checkpoints" if keeps_checkpoints(name) else None)
        journal = "/checkpoints/undelivered" if keeps_checkpoints(name) else None
        assert environment.get("MIXTUNE_JOURNAL_DIR") == journal
        assert [mount["mountPath"] for mount in mounts] == (["/checkpoints"] if keeps_checkpoints(name) else [])
        assert all(mount["constant"] == "mixtune-checkpoints" for mount in mounts)


def test_claims_with_data_are_mounted_where_data_is_read(tmp_path: Path) -> None:
    sources = ("data.pretrain.source=pvc://corpora/web/*.jsonl", "data.finetune.source=pvc://labels/a.csv")
    executors, places = compiled_with(tmp_path, *sources, "placement.checkpoint_claim=own")
    for name, executor in executors.items():
        environment = {item["name"]: item["value"] for item in executor.get("container", {}).get("env", [])}
        mounts = {mount["constant"]: mount["mountPath"] for mount in places.get(name, {}).get("pvcMount", [])}
        reads = name.removeprefix("exec-").rstrip("-0123456789") in {"plan", "prepare"}
        assert environment.get("MIXTUNE_CLAIMS_DIR") == ("/claims" if reads else None)
        assert {claim: path for claim, path in mounts.items() if claim != "own"} == (
            {"corpora": "/claims/corpora", "labels": "/claims/labels"} if reads else {}
        )
    with pytest.raises(RefusedError, match="cannot be mounted a second time"):
        compiled_with(tmp_path, *sources, "placement.checkpoint_claim=labels")


def test_a_url_for_checkpoints_gets_its_credentials_from_a_secret(tmp_path: Path) -> None:
    executors, places = compiled_with(tmp_path, "placement.checkpoint_url=s3://bucket/checkpoints")
    for name, executor in executors.items():
        environment = {item["name"]: item["value"] for item in executor.get("container", {}).get("env", [])}
        keys = {pair["secretKey"] for one in places.get(name, {}).get("secretAsEnv", []) for pair in one["keyToEnv"]}
        url = "s3://bucket/checkpoints" if keeps_checkpoints(name) else None
        assert environment.get("MIXTUNE_CHECKPOINT_DIR") == url
        assert ("AWS_SECRET_ACCESS_KEY" in keys) == keeps_checkpoints(name)


def test_a_place_for_checkpoints_is_one_and_has_no_password_in_it() -> None:
    for value in ("s3://user:password@bucket/x", "/a/folder"):
        with pytest.raises(RefusedError, match=r"placement\.checkpoint_url"):
            read_config(None, [f"placement.checkpoint_url={value}"])
    with pytest.raises(RefusedError, match="exclude each other"):
        read_config(None, ["placement.checkpoint_url=s3://a/b", "placement.checkpoint_claim=c"])


def test_what_computes_is_cached_and_what_keeps_the_books_is_not(package: dict[str, Any]) -> None:
    for name, task, _ in tasks(package):
        step = step_of(task, package)
        if step is not None:
            cached = task.get("cachingOptions", {}).get("enableCache", False)
            assert cached == (step in {"prepare", "pretrain", "finetune", "mixed", "evaluate"}), name


def test_a_step_is_given_its_part_of_the_configuration_and_nothing_that_differs_from_run_to_run(
    package: dict[str, Any],
) -> None:
    for name, task, _ in tasks(package):
        step = step_of(task, package)
        if step not in (None, "plan", "finish"):
            parameters = set(task["inputs"]["parameters"])
            # Selector, tolerations and affinity are no inputs: they would be part of the cache key.
            parts = {"plan-gpus", "plan-gpu_type", "plan-pretrain_gpus"}
            assert {one.removeprefix("pipelinechannel--") for one in parameters if "--" in one} <= parts, name
            placement = {
                one for one in parameters if "gpu" in one or one.startswith(("accelerator_", "pipelinechannel--"))
            }
            assert parameters - placement <= {"config", "candidate"}, name


def test_every_task_learns_its_run_and_its_secret_from_the_environment(
    package: dict[str, Any], platform: dict[str, Any]
) -> None:
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(executors) == {name for name in package["deploymentSpec"]["executors"] if "importer" not in name}
    for name, executor in executors.items():
        paths = {one["name"]: one["fieldPath"] for one in executor["fieldPathAsEnv"]}
        assert paths == {"MIXTUNE_RUN_ID": "metadata.labels['pipeline/runid']"}, name
        secrets = [entry["envVar"] for one in executor["secretAsEnv"] for entry in one["keyToEnv"]]
        assert "MIXTUNE_MLFLOW_TRACKING_URI" in secrets, name
        gpu = name.removeprefix("exec-").rstrip("-0123456789") in GPU_STEPS
        for placement in ("nodeSelector", "tolerations", "emptyDirMounts", "nodeAffinity"):
            assert (placement in executor) == gpu, (name, placement)


# What KFP's own MLflow plugin puts into every task with `injectUserEnvVars: true`, as plain values.
OF_THE_PLUGIN = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)


def merged(variables: list[client.V1EnvVar]) -> dict[str, client.V1EnvVar]:
    """One entry for each name with the fields of all, as Kubernetes merges patches of a pod's environment."""
    by_name: dict[str, client.V1EnvVar] = {}
    for variable in variables:
        entry = by_name.setdefault(variable.name, client.V1EnvVar(name=variable.name))
        entry.value = entry.value or variable.value
        entry.value_from = entry.value_from or variable.value_from
    return by_name


def test_a_pod_is_valid_beside_kfps_own_mlflow_plugin(package: dict[str, Any], platform: dict[str, Any]) -> None:
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, executor in executors.items():
        plain = package["deploymentSpec"]["executors"][name]["container"].get("env", [])
        variables = [client.V1EnvVar(name=one["name"], value=one["value"]) for one in plain]
        variables += [client.V1EnvVar(name=one, value="of the plugin") for one in OF_THE_PLUGIN]
        for secret in executor["secretAsEnv"]:
            for entry in secret["keyToEnv"]:
                key = client.V1SecretKeySelector(key=entry["secretKey"])
                source = client.V1EnvVarSource(secret_key_ref=key)
                variables.append(client.V1EnvVar(name=entry["envVar"], value_from=source))
        for field in executor["fieldPathAsEnv"]:
            source = client.V1EnvVarSource(field_ref=client.V1ObjectFieldSelector(field_path=field["fieldPath"]))
            variables.append(client.V1EnvVar(name=field["name"], value_from=source))
        # The API server refuses a variable with both: "may not be specified when 'value' is not empty".
        both = [one.name for one in merged(variables).values() if one.value and one.value_from]
        assert both == [], name


def test_whether_steps_go_on_without_mlflow_is_in_their_environment_and_no_input(tmp_path: Path) -> None:
    target = tmp_path / "offline.yaml"
    compile_pipeline(None, ["tracking.offline_when_unreachable=true"], target, None, "ir")
    offline = next(yaml.safe_load_all(target.read_text(encoding="utf-8")))
    compile_pipeline(None, ["seed=0"], tmp_path / "plain.yaml", None, "ir")
    plain = next(yaml.safe_load_all((tmp_path / "plain.yaml").read_text(encoding="utf-8")))
    of_plan = plain["deploymentSpec"]["executors"]["exec-plan"]["container"]
    next(one for one in of_plan["env"] if one["name"] == "MIXTUNE_COMPILED")["value"] = compiled_in(offline)
    assert json.loads(compiled_in(offline))["tracking"] == {"offline_when_unreachable": True}
    for name, executor in offline["deploymentSpec"]["executors"].items():
        if "importer" not in name:
            container = executor["container"]
            container["env"].remove({"name": "MIXTUNE_TRACKING_OFFLINE", "value": "1"})
            if not container["env"]:
                del container["env"]
    assert offline == plain


def test_finish_always_runs_and_stands_outermost(package: dict[str, Any]) -> None:
    finish = package["root"]["dag"]["tasks"]["finish"]
    assert finish["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert any("taskFinalStatus" in one for one in finish["inputs"]["parameters"].values())


def test_the_package_is_small_and_named_for_the_cache(package: dict[str, Any]) -> None:
    assert package["pipelineInfo"]["name"] == "mixtune"
    assert (COMPILED / "mixtune.yaml").stat().st_size < 200_000


@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_a_pipeline_of_its_own(step: str) -> None:
    package = next(yaml.safe_load_all((COMPILED / f"mixtune-{step}.yaml").read_text(encoding="utf-8")))
    steps = {step_of(task, package) for _, task, _ in tasks(package)}
    assert step in steps
    names = package["root"]["inputDefinitions"]["parameters"]
    assert len(names) + len(_OPTIONAL.get(step, ())) <= 10
    placed = RUN_TIME_ALONE if step in GPU_STEPS else ()
    assert {name for name in names if not re.search("_uris?$", name)} - {"candidate"} == {"config", *placed}
    # KFP breaks importers that carry a display name of their own.
    for name, task, _ in tasks(package):
        if "importer" in name:
            assert task["taskInfo"]["name"].startswith("importer")


@pytest.mark.parametrize("profile", profiles())
def test_every_profile_compiles(profile: str, tmp_path: Path) -> None:
    from kfp import compiler

    config = read_config(None, [f"placement.profile={profile}", f"placement.gpus={0 if profile == 'cpu' else 1}"])
    compiler.Compiler().compile(make_pipeline(config, Placer.cluster(config)), str(tmp_path / "p.yaml"))
    parameters = next(yaml.safe_load_all((tmp_path / "p.yaml").read_text()))["root"]["inputDefinitions"]["parameters"]
    nodes = profiles()[profile].gpu_nodes(config.placement.gpus)
    assert parameters["placement"]["defaultValue"] == nodes.model_dump()


@pytest.mark.parametrize("step", [None, "evaluate"])
def test_manifests_for_gitops(step: str | None, tmp_path: Path) -> None:
    target = tmp_path / "manifests.yaml"
    compile_pipeline(None, (), target, step, "kubernetes")
    first = target.read_bytes()
    compile_pipeline(None, (), target, step, "kubernetes")
    assert target.read_bytes() == first
    pipeline, version = yaml.safe_load_all(first)
    name = f"mixtune-{step}" if step else "mixtune"
    assert (pipeline["kind"], pipeline["metadata"]["name"]) == ("Pipeline", name)
    assert (version["kind"], version["spec"]["pipelineName"]) == ("PipelineVersion", name)
    assert pipeline["apiVersion"] == version["apiVersion"] == "pipelines.kubeflow.org/v2beta1"
    spec, platform = yaml.safe_load_all((COMPILED / f"{name}.yaml").read_text(encoding="utf-8"))
    assert version["spec"]["pipelineSpec"] == spec
    assert version["spec"]["platformSpec"] == platform
