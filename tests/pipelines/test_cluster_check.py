"""`mixtune check --cluster` against small servers that speak Kubernetes' and KFP's API, and a real MLflow store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kubernetes import client
from typer.testing import CliRunner, Result

from mixtune.components.shared.tracking.connection import connect
from mixtune.pipelines.cli import app
from mixtune.pipelines.cluster.estimate import estimate
from mixtune.pipelines.configuration import read_config
from tests.components.shared.tiny import tiny_model, tiny_tokenizer
from tests.stores import new_store

from .kfp_server import KfpServer
from .kubernetes_server import KubernetesServer, local_queue, node

TAINT = client.V1Taint(key="nvidia.com/gpu", value="present", effect="NoSchedule")
LABELS = {"nvidia.com/gpu.present": "true"}
GPU = ("--set", "placement.profile=nvidia", "--set", "placement.gpus=2")


@pytest.fixture
def kfp() -> Iterator[KfpServer]:
    with KfpServer() as running:
        yield running


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store; to make one takes seconds."""
    uri = new_store(tmp_path_factory.mktemp("mlflow") / "mlflow.db")
    connect(uri)
    return uri


@pytest.fixture
def cluster(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    """A cluster that has everything."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with KubernetesServer() as running:
        running.write_kubeconfig(tmp_path / "kubeconfig")
        running.nodes = [node("cpu"), node("gpu", LABELS, [TAINT], gpu="4")]
        running.secrets["kubeflow", "mixtune-mlflow"] = client.V1Secret(data={"MLFLOW_TRACKING_URI": "aHR0cDovL3g="})
        yield running


def check(kfp: KfpServer | None, *arguments: str) -> Result:
    host = ("--host", kfp.url) if kfp else ()
    return CliRunner().invoke(app, ["check", "--cluster", *host, *arguments], prog_name="mixtune")


def test_a_cluster_that_has_everything(cluster: KubernetesServer, kfp: KfpServer) -> None:
    result = check(kfp, *GPU)
    assert result.exit_code == 0, result.output
    for words in (
        "ok       tasks without a GPU: 1 of 2 nodes fit one",
        "ok       GPU tasks: 1 of 2 nodes fit one",
        "ok       the secret mixtune-mlflow in kubeflow",
        "ok       KFP at",
        "ok       MLflow at",
        "estimate: at most",
        "of storage for 4 models",
    ):
        assert words in result.stdout


def test_all_that_is_missing_in_one_list(cluster: KubernetesServer, kfp: KfpServer) -> None:
    cluster.nodes, cluster.secrets = [node("small", memory="1Gi")], {}
    kfp.multi_user = True
    result = check(
        kfp, *GPU, "--set", "placement.checkpoint_claim=theirs", "--set", "placement.queue=team",
        "--set", "tracking.experiment=x",
    )  # fmt: skip
    assert result.exit_code == 2
    missing = [line for line in result.stdout.splitlines() if line.startswith("MISSING")]
    for words in (
        "tasks without a GPU: none of 1 nodes fits (1 of them: has 1Gi memory, needs 8Gi)",
        "GPU tasks: none of 1 nodes fits (1 of them: no label nvidia.com/gpu.present=true); see placement.profile",
        "the secret mixtune-mlflow does not exist in the namespace kubeflow",
        "the claim theirs does not exist",
        "the Kueue queue team does not exist",
        "--namespace: KFP at",
    ):
        assert any(words in line for line in missing), (words, missing)
    assert len(missing) == 6
    assert "6 of these must be fixed" in result.stderr


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (node("a", LABELS, [client.V1Taint(key="team", value="ours", effect="NoSchedule")], gpu="4"),
         "taint team=ours:NoSchedule is not tolerated"),
        (node("a", LABELS, [TAINT], gpu="1"), "has 1 nvidia.com/gpu, needs 2"),
        (node("a", LABELS, [TAINT], gpu="4", cpu="2"), "has 2 cpu, needs 4"),
        (node("a", LABELS, [TAINT], ready=False, gpu="4"), "taint node.kubernetes.io/not-ready:NoExecute"),
        (node("a", LABELS, [TAINT], cordoned=True, gpu="4"), "taint node.kubernetes.io/unschedulable:NoSchedule"),
        (node("a", {"nvidia.com/gpu.present": "false"}, gpu="4"), "no label nvidia.com/gpu.present=true"),
    ],
)  # fmt: skip
def test_why_no_gpu_node_fits(made: client.V1Node, told: str, cluster: KubernetesServer, kfp: KfpServer) -> None:
    cluster.nodes = [node("cpu"), made]
    result = check(kfp, *GPU)
    assert result.exit_code == 2
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("MISSING")]
    assert line.startswith("MISSING  GPU tasks: none of 2 nodes fits (")
    assert f"of them: {told}" in line


def test_resources_on_different_nodes_are_no_node(cluster: KubernetesServer, kfp: KfpServer) -> None:
    cluster.nodes = [node("cpu"), node("a", LABELS, gpu="4", cpu="1"), node("b", LABELS, gpu="1", cpu="64")]
    printed = check(kfp, *GPU).stdout
    assert "GPU tasks: none of 3 nodes fits (1 of them: no label nvidia.com/gpu.present=true; " in printed
    assert "1 of them: has 1 cpu, needs 4; 1 of them: has 1 nvidia.com/gpu, needs 2)" in printed


def test_what_is_not_compared_is_said(cluster: KubernetesServer, kfp: KfpServer, tmp_path: Path) -> None:
    own = {"accelerator": "nvidia.com/gpu", "description": "ours", "gpu_affinity": {"podAffinity": {}}}
    (tmp_path / "profiles.yaml").write_text(yaml.safe_dump({"ours": own}))
    profile = ("--set", "placement.profile=ours", "--set", f"placement.profiles_file={tmp_path / 'profiles.yaml'}")
    cluster.nodes = [node("gpu", gpu="4")]
    result = check(kfp, *profile, "--set", "placement.gpus=2")
    assert result.exit_code == 0, result.output
    assert "the gpu_affinity of the profile ours is not compared with the nodes" in result.stdout


def test_cpu_tasks_do_not_fit_on_gpu_nodes(cluster: KubernetesServer, kfp: KfpServer) -> None:
    cluster.nodes = [node("gpu", LABELS, gpu="4")]
    assert "tasks without a GPU: none of 1 nodes fits (1 of them: a GPU node)" in check(kfp, *GPU).stdout
    assert check(kfp, *GPU, "--set", "placement.cpu_tasks_on_gpu_nodes=true").exit_code == 0


def test_secrets_need_their_keys_and_claims_their_mode(cluster: KubernetesServer, kfp: KfpServer) -> None:
    cluster.secrets["kubeflow", "mixtune-mlflow"] = client.V1Secret(data={"MLFLOW_TRACKING_PASSWORD": "c2VjcmV0"})
    claim = client.V1PersistentVolumeClaim(
        spec=client.V1PersistentVolumeClaimSpec(access_modes=["ReadWriteOnce"]),
        status=client.V1PersistentVolumeClaimStatus(phase="Bound"),
    )
    cluster.claims["kubeflow", "c"] = claim
    result = check(kfp, "--set", "placement.checkpoint_claim=c")
    assert result.exit_code == 2
    assert "has no key MLFLOW_TRACKING_URI" in result.stdout
    assert "the claim c in kubeflow is not ReadWriteMany" in result.stdout
    assert "c2VjcmV0" not in result.output
    of_data = check(kfp, "--set", "data.pretrain.source=pvc://c/text", "--set", "data.finetune.source=pvc://d/labels")
    assert "the claim c in kubeflow is not ReadOnlyMany: steps that read data" in of_data.stdout
    assert "the claim d does not exist" in of_data.stdout
    claim.status.phase = "Lost"
    assert "has lost its volume" in check(kfp, "--set", "placement.checkpoint_claim=c").stdout


def test_the_users_namespace_is_looked_at(cluster: KubernetesServer) -> None:
    cluster.secrets = {("team", "mixtune-mlflow"): client.V1Secret(data={"MLFLOW_TRACKING_URI": "eA=="})}
    cluster.queues["team", "q"] = local_queue()
    with KfpServer(multi_user=True) as kfp:
        result = check(kfp, "--namespace", "team", "--set", "placement.queue=q")
    assert result.exit_code == 0, result.output
    assert "the Kueue queue q in team" in result.stdout


@pytest.mark.parametrize("kueue", [("v1beta1",), ("v1beta2", "v1beta1"), ("v1beta2",)])
def test_a_queue_without_its_cluster_queue_is_not_good(
    kueue: tuple[str, ...], cluster: KubernetesServer, kfp: KfpServer
) -> None:
    cluster.kueue = kueue
    said = "Can't submit new workloads to clusterQueue"
    cluster.queues["kubeflow", "q"] = local_queue(said, active="False")
    result = check(kfp, "--set", "placement.queue=q")
    assert result.exit_code == 2
    assert f"MISSING  the Kueue queue q in kubeflow admits no pods: {said}; see k8s/overlays/kueue" in result.stdout
    cluster.queues["kubeflow", "q"] = local_queue(active=None)
    assert "admits no pods: Kueue has not reported it as active" in check(kfp, "--set", "placement.queue=q").stdout
    cluster.queues["kubeflow", "q"] = local_queue()
    result = check(kfp, "--set", "placement.queue=q")
    assert result.exit_code == 0, result.output
    assert "ok       the Kueue queue q in kubeflow" in result.stdout


ON_NODES = ("--set", "placement.nodes=2", "--set", "placement.checkpoint_claim=c")


def test_several_nodes_need_the_trainer_and_its_runtime(cluster: KubernetesServer, kfp: KfpServer) -> None:
    cluster.claims["kubeflow", "c"] = client.V1PersistentVolumeClaim(
        spec=client.V1PersistentVolumeClaimSpec(access_modes=["ReadWriteMany"]),
        status=client.V1PersistentVolumeClaimStatus(phase="Bound"),
    )
    result = check(kfp, *ON_NODES)
    assert result.exit_code == 2
    assert "MISSING  placement.nodes: Kubeflow Trainer is not installed in this cluster" in result.stdout
    assert "Trainer" not in check(kfp).stdout
    cluster.has_trainer = True
    result = check(kfp, *ON_NODES)
    assert result.exit_code == 2
    assert "MISSING  the TrainingRuntime mixtune does not exist in the namespace kubeflow" in result.stdout
    cluster.runtimes.add(("kubeflow", "mixtune"))
    result = check(kfp, *ON_NODES)
    assert result.exit_code == 0, result.output
    assert "ok       the TrainingRuntime mixtune in kubeflow" in result.stdout
    cluster.forbidden = "trainingruntimes"
    result = check(kfp, *ON_NODES)
    assert result.exit_code == 0
    assert "?        the TrainingRuntime mixtune: not checked" in result.stdout


def test_rights_that_this_user_has_not(cluster: KubernetesServer, kfp: KfpServer) -> None:
    cluster.forbidden = "nodes|secrets"
    result = check(kfp, *GPU)
    assert result.exit_code == 0
    assert "?        nodes: not checked, since this user has no permission to list nodes" in result.stdout
    assert "this user has no permission to get secrets" in result.stdout
    kfp.forbidden = "runs"
    result = check(kfp, *GPU)
    assert result.exit_code == 4
    assert "NO REPLY --host: KFP at" in result.stdout
    assert "does not permit this user to list the runs" in result.stdout


def test_servers_that_do_not_answer(
    cluster: KubernetesServer, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cluster.broken = "nodes"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = check(kfp)
    assert result.exit_code == 4
    assert "NO REPLY KUBECONFIG: the cluster answered 503 to the request to list nodes" in result.stdout
    assert "NO REPLY MLFLOW_TRACKING_URI: no MLflow server answers at http://127.0.0.1:9" in result.stdout
    cluster.broken, cluster.token = None, "another"
    assert "the cluster rejects these credentials (401)" in check(kfp).stdout
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    result = check(None)
    assert result.exit_code == 2
    assert "NO REPLY KUBECONFIG: names no cluster" in result.stdout
    assert "MISSING  --host: is not given" in result.stdout
    assert "?        MLflow was not checked" in result.stdout


def test_gpu_hours_are_flops_over_speed() -> None:
    config = read_config(None, [
        "pretrain.steps=100", "pretrain.batch_size=10",
        "finetune.max_tokens=1000", "mixed.steps=10", "mixed.warmup_steps=0", "mixed.batch_size=5",
        "finetune.warmup_steps=0",
        "mixed.replay_share=0.5", "mixed.lambdas=[0.1,0.2]", "mixed.forgetting_budgets=[]", "model.max_length=64",
    ])  # fmt: skip
    found = estimate(config)
    assert found.tokens == 100 * 10 * 64 + 1000 + 2 * (10 * 5 * 64 * 2)
    assert found.parameters is not None
    assert found.gpu_hours == pytest.approx(6 * found.parameters * found.tokens / 100e12 / 3600)
    assert (found.trainings, found.models) == (4, 4)
    assert "assumed 100 TFLOP/s" in found.sentences[0]


def test_parameters_are_counted_in_a_local_model(tmp_path: Path) -> None:
    model = tiny_model()
    model.save(tmp_path / "base", tiny_tokenizer())
    found = estimate(read_config(None, [f"model.base={tmp_path / 'base'}", "model.max_length=32"]))
    assert found.parameters
    total = sum(one.numel() for one in model.lm.parameters())
    assert found.parameters == pytest.approx(total, rel=0.3)


@pytest.mark.parametrize(
    ("override", "told"),
    [("finetune.epochs=2", "a stage is measured in epochs"), ("model.base=owner/name", "parameters cannot be counted")],
)
def test_what_cannot_be_reckoned_is_said(override: str, told: str) -> None:
    assert told in estimate(read_config(None, [override])).sentences[0]
