"""Options of the placement on a cluster. They change no result, so no step reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .shared.config import LocalPath
from .shared.section import Section, matching, rule


def _as_text(value: Any) -> Any:
    """Converts a number such as the 4 in `cpu: 4` to text, as Kubernetes expects it."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Cpu = Annotated[
    str, BeforeValidator(_as_text), matching(r"^\d+(\.\d+)?m?$", "be a number of CPUs, such as 2, 0.5 or 500m")
]
Memory = Annotated[
    str, matching(r"^\d+(\.\d+)?(E|Ei|P|Pi|T|Ti|G|Gi|M|Mi|K|Ki)$", "be a number with a unit, such as 8Gi or 500M")
]
QueueName = Annotated[
    str,
    matching(
        r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        "be at most 63 lower-case letters, digits and hyphens, and begin and end with a letter or a digit",
    ),
]
ObjectName = Annotated[
    str,
    matching(
        r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$",
        "be at most 253 lower-case letters, digits, dots and hyphens, and begin and end with a letter or a digit",
    ),
]
CheckpointUrl = Annotated[
    str,
    matching(r"^[a-z0-9]+://[^?#@]+$", "be a URL such as s3://bucket/checkpoints, without any of the signs ?, # and @"),
]

HOURS = 500_000
"""KFP counts times in seconds, in 32 bits."""


class Placement(Section):
    """Nodes and resources of the steps on a cluster. Local runs ignore this section, besides `prepare_workers`."""

    profile: str = "cpu"
    """Name of a placement profile. A profile defines how GPU nodes are selected on one kind of cluster and which resources
    tasks request. mixtune includes `cpu`, `nvidia`, `gke`, `eks` and `aks` (`pipelines/node_pools.yaml`)."""
    profiles_file: LocalPath | None = Field(None, min_length=1)
    """YAML file with your own profiles, in the format of `pipelines/node_pools.yaml`. A profile in it replaces an included
    profile of the same name."""
    gpus: int = Field(0, ge=0, le=64)
    """GPUs of each pretrain, finetune, mixed and evaluate task."""
    nodes: int = Field(1, ge=1, le=64)
    """Nodes of each pretrain, finetune and mixed training. With more than one, the task launches a TrainJob of Kubeflow
    Trainer, whose nodes each have `gpus` GPUs, `gpu_cpu` and `gpu_memory`, and waits for it. It needs `checkpoint_claim`."""
    prepare_workers: int = Field(1, ge=1, le=256)
    """Number of pods that read and tokenize the files of a stream at the same time, at most one for each file. They have the
    resources of `prepare`, which then puts their results together; the data is the same, byte for byte. With 1, `prepare` does
    everything itself. A tokenizer that is trained here is trained, and used, after all have read."""
    cpu: Cpu | None = None
    """CPUs of a task without a GPU, such as `2` or `500m`. Null uses the value of the profile."""
    memory: Memory | None = None
    """Memory of a task without a GPU, such as `8Gi`. Null uses the value of the profile."""
    gpu_cpu: Cpu | None = None
    """CPUs of each pretrain, finetune, mixed and evaluate task. Null uses the value of the profile."""
    gpu_memory: Memory | None = None
    """Memory of each pretrain, finetune, mixed and evaluate task. Null uses the value of the profile."""
    shared_memory: Memory | None = None
    """Size of /dev/shm in each of these tasks; it counts as memory of the task. Null sets no limit besides that of the node."""
    cpu_tasks_on_gpu_nodes: bool = False
    """Allow tasks without a GPU on GPU nodes, for clusters that have no other nodes."""
    queue: QueueName | None = None
    """Local queue of Kueue for all pods, set as the label `kueue.x-k8s.io/queue-name`. Null uses no queue."""
    gpu_retries: int = Field(2, ge=0, le=10)
    """Number of retries of each pretrain, finetune, mixed and evaluate task after a failure of any kind. 0 leaves KFP's own
    retries, which are for lost pods only: preemption, deletion, a node that goes away."""
    parallel_candidates: int = Field(0, ge=0)
    """Number of mixed candidates that are trained and evaluated at the same time; 0 is no limit."""
    run_deadline_hours: float | None = Field(None, gt=0, le=HOURS)
    """Maximum time of a whole run, queueing included. A run that takes longer is stopped and counts as failed."""
    run_ttl_hours: float | None = Field(None, gt=0, le=HOURS)
    """Time after the end of a run at which its workflow and its pods are deleted. Results and logs stay in the object store.
    Null leaves it to the cluster's settings."""
    failed_run_ttl_hours: float | None = Field(None, gt=0, le=HOURS)
    """The same for a run that failed, which can be retried until then. Null means `run_ttl_hours`."""
    gpu_timeout_hours: float | None = Field(None, gt=0)
    """Maximum run time of a pretrain, finetune, mixed or evaluate pod, or of a TrainJob. One that takes longer is stopped. Its
    retry resumes from the last checkpoint."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When a node pulls the image of a step. Null leaves it to Kubernetes, which pulls a tag other than `latest`, and a digest,
    only if the node lacks it. The nodes of a TrainJob have the pull policy of the TrainingRuntime."""
    image_pull_secrets: list[ObjectName] = Field([])
    """Names of Kubernetes secrets with the credentials of the registry that the images of the steps are pulled from."""
    proxy_config_map: ObjectName | None = None
    """Name of a ConfigMap with the keys HTTP_PROXY, HTTPS_PROXY and NO_PROXY, which become environment variables of the steps.
    Keys may be missing."""
    ca_config_map: ObjectName | None = None
    """Name of a ConfigMap whose key `ca.crt` holds all certificates that the steps trust, in PEM format: those of your own
    authority, and the public ones if steps connect to public servers."""
    run_as_user: int | None = Field(None, ge=0)
    """User id of the containers, for clusters that require one. Null uses the user of the image."""
    run_as_group: int | None = Field(None, ge=0)
    """Group id of the containers. Null uses the group of the image."""
    checkpoint_claim: ObjectName | None = None
    """Name of a PersistentVolumeClaim for checkpoints. If candidates are trained on several nodes at the same time, or one
    training on several nodes, it needs the access mode ReadWriteMany."""
    checkpoint_url: CheckpointUrl | None = None
    """fsspec URL for checkpoints, such as `s3://bucket/checkpoints`, instead of a claim. The credentials come from a Kubernetes
    secret. Without a claim or a URL, a training that is killed restarts from the beginning."""

    mlflow_secret: ObjectName = "mixtune-mlflow"
    """Name of the Kubernetes secret with the address of MLflow and the credentials of the steps."""
    checkpoint_secret: ObjectName = "mixtune-checkpoints"
    """Name of the Kubernetes secret with the credentials for `checkpoint_url`."""

    @rule
    def _several_nodes_share_a_volume(self) -> Iterator[str]:
        if self.nodes > 1 and not self.checkpoint_claim:
            yield (
                f"nodes is {self.nodes}, and several nodes pass data and checkpoints through a volume; set checkpoint_claim to "
                "a claim with the access mode ReadWriteMany"
            )

    @rule
    def _one_checkpoint_location(self) -> Iterator[str]:
        if self.checkpoint_claim and self.checkpoint_url:
            yield "checkpoint_claim and checkpoint_url exclude each other; give one of them"


class GpuNodes(Section):
    """Placement of the GPU tasks, which each run can change: the field `placement` of the form. A key that is left out has the
    value of the placement profile."""

    gpus: int = Field(0, ge=0, le=64)
    """GPUs of each pretrain, finetune, mixed and evaluate task; 0 is none."""
    gpu_type: str = Field("nvidia.com/gpu", min_length=1)
    """Kubernetes resource name of a GPU."""
    node_selector: dict[str, str] = Field({})
    """Labels of the nodes that GPU tasks go to."""
    tolerations: list[dict[str, Any]] = Field([])
    """Taints that GPU tasks tolerate."""
    affinity: dict[str, Any] = Field({})
    """Node affinity of GPU tasks in Kubernetes format."""
