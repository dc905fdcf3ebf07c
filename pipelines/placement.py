"""Where tasks run: images, node pools, resources, retries, environment. The one helper that every task goes through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml
from kfp import dsl, kubernetes
from pydantic import BaseModel, ConfigDict, Field

from mixtune.components.config import Config
from mixtune.components.shared.checkpoints import PLACE
from mixtune.components.shared.errors import RefusedError

from .images import Images, images

GPU_STEPS = frozenset({"pretrain", "finetune", "mixed", "evaluate"})
# What keeps the books runs every time: plan looks at the sources, the others give every run a verdict of its own.
NEVER_CACHED = frozenset({"plan", "compare", "register", "finish"})
GPU_RETRIES = 2
TRACKING_KEYS = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)
CHECKPOINT_FOLDER = "/checkpoints"
CHECKPOINT_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
# finish removes what a run's trainings have left.
CHECKPOINT_STEPS = frozenset({"pretrain", "finetune", "mixed", "finish"})


class Profile(BaseModel):
    """One entry of `node_pools.yaml`: what tells GPU nodes apart on one kind of cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    accelerator: str | None = None
    """Kubernetes resource name of a GPU; null for CPU only."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: list[dict[str, str]] = Field(default_factory=list)
    gpu_cpu: str = "4"
    gpu_memory: str = "32Gi"
    cpu: str = "2"
    memory: str = "8Gi"


def profiles() -> dict[str, Profile]:
    """The placement profiles that come with mixtune."""
    text = resources.files(__package__).joinpath("node_pools.yaml").read_text(encoding="utf-8")
    return {name: Profile.model_validate(values) for name, values in yaml.safe_load(text).items()}


@dataclass
class Placer:
    """Places a task: called on every task of the DAG.

    Attributes:
        profile: where GPU tasks go on a cluster; None for local runs, where placement means nothing.
        gpus: default of the GPU count parameter.
        parallelism: candidates trained at a time; 0 is no limit.
        checkpoint_claim: claim for checkpoints.
        checkpoint_url: URL for checkpoints.
        offline: whether steps go on without an MLflow server that does not answer.
        images: which image each step runs in.
    """

    profile: Profile | None = None
    gpus: int = 0
    parallelism: int = 0
    checkpoint_claim: str | None = None
    checkpoint_url: str | None = None
    offline: bool = False
    images: Images = field(default_factory=images)
    _run_time: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def local(cls, in_images: Images | None = None) -> Placer:
        """For the local runner: one candidate at a time, since they would share the machine's cores."""
        return cls(parallelism=1, images=in_images or images())

    @classmethod
    def cluster(cls, config: Config, in_images: Images | None = None) -> Placer:
        """For a cluster, as the configuration's profile says.

        Raises:
            RefusedError: where there is no such profile.
        """
        known = profiles()
        name = config.placement.profile
        if name not in known:
            raise RefusedError(f"placement.profile: must be one of {', '.join(known)}, found {name}")
        if config.placement.gpus and known[name].accelerator is None:
            raise RefusedError(f"placement.gpus: the profile {name} has no GPUs, found {config.placement.gpus}")
        where = config.placement
        return cls(
            known[name],
            where.gpus,
            checkpoint_claim=where.checkpoint_claim,
            checkpoint_url=where.checkpoint_url,
            offline=config.tracking.offline_when_unreachable,
            images=in_images or images(),
        )

    def parameters(self) -> dict[str, tuple[type, Any, str]]:
        """Placement that is chosen at run time: name -> (type, default, description)."""
        if self.profile is None:
            return {}
        secret = f"Kubernetes secret with what opens {self.checkpoint_url}: {', '.join(CHECKPOINT_KEYS)}, as needed."
        # A count given as an int is silently no GPU at all on KFP, so it is text.
        return {
            "gpus": (str, str(self.gpus), "GPUs for each of pretrain, finetune, mixed and evaluate; 0 is none."),
            "gpu_type": (str, self.profile.accelerator or "nvidia.com/gpu", "Kubernetes resource name of a GPU."),
            "gpu_node_selector": (dict, self.profile.node_selector, "Labels of the nodes that GPU tasks go to."),
            "gpu_tolerations": (list, self.profile.tolerations, "Taints that GPU tasks tolerate."),
            "mlflow_secret": (
                str,
                "mixtune-mlflow",
                f"Kubernetes secret with {TRACKING_KEYS[0]} and, where needed, more.",
            ),
            **({"checkpoint_secret": (str, "mixtune-checkpoints", secret)} if self.checkpoint_url else {}),
        }

    def with_parameters(self, values: Mapping[str, Any]) -> None:
        """Takes the pipeline's run-time parameters."""
        self._run_time = values

    def gpu_nodes(self) -> dict[str, Any]:
        """Where GPU tasks go, for `plan`, which knows which tasks are to have one."""
        nothing: dict[str, Any] = {"gpus": "0", "gpu_node_selector": {}, "gpu_tolerations": []}
        return {name: self._run_time.get(name, value) for name, value in nothing.items()}

    def __call__(
        self, task: dsl.PipelineTask, step: str, words: str | None = None, at: Mapping[str, Any] | None = None
    ) -> dsl.PipelineTask:
        """Sets a task's image and caching and, on a cluster, its place, resources, environment and retries.

        Args:
            task: the task.
            step: name of the step that it runs.
            words: name to show, where the step's is not enough.
            at: `gpus`, `node_selector` and `tolerations` of its own, in place of the run-time parameters.
        """
        task.set_container_image(self.images.of(step))
        task.set_caching_options(step not in NEVER_CACHED)
        if self.profile is None:
            return task
        if words:
            task.set_display_name(words)
        kubernetes.use_field_path_as_env(task, "MIXTUNE_RUN_ID", "metadata.labels['pipeline/runid']")
        kubernetes.use_secret_as_env(
            task, self._run_time["mlflow_secret"], {key: key for key in TRACKING_KEYS}, optional=True
        )
        if step == "register":
            task.set_env_variable("MIXTUNE_IMAGE", self.images.of(step))  # goes on record with the registered version
        if step in CHECKPOINT_STEPS:
            self._with_checkpoints(task)
        if self.offline:
            # From the environment, since as an input it would be part of every step's cache key.
            task.set_env_variable("MIXTUNE_TRACKING_OFFLINE", "1")
        if step in GPU_STEPS:
            own = {name: self._run_time[f"gpu_{name}"] for name in ("node_selector", "tolerations")}
            self._on_gpu(task, at or {"gpus": self._run_time["gpus"], **own})
        else:
            task.set_cpu_limit(self.profile.cpu).set_memory_limit(self.profile.memory)
        return task

    def _with_checkpoints(self, task: dsl.PipelineTask) -> None:
        """By environment and mount, which are fixed at compile time; the claim's name alone enters KFP's cache key."""
        if self.checkpoint_claim:
            kubernetes.mount_pvc(task, pvc_name=self.checkpoint_claim, mount_path=CHECKPOINT_FOLDER)
            task.set_env_variable(PLACE, CHECKPOINT_FOLDER)
            # What MLflow has not got outlives the pod there, and finish, which mounts it too, delivers it.
            task.set_env_variable("MIXTUNE_JOURNAL_DIR", f"{CHECKPOINT_FOLDER}/undelivered")
        elif self.checkpoint_url:
            kubernetes.use_secret_as_env(
                task, self._run_time["checkpoint_secret"], {key: key for key in CHECKPOINT_KEYS}, optional=True
            )
            task.set_env_variable(PLACE, self.checkpoint_url)

    def _on_gpu(self, task: dsl.PipelineTask, at: Mapping[str, Any]) -> None:
        assert self.profile is not None
        task.set_cpu_limit(self.profile.gpu_cpu).set_memory_limit(self.profile.gpu_memory)
        task.set_accelerator_type(self._run_time["gpu_type"]).set_accelerator_limit(at["gpus"])
        # Inside a loop KFP does not pass resource parameters on by itself.
        task.register_pipeline_channels([self._run_time["gpu_type"], at["gpus"]])
        kubernetes.add_node_selector_json(task, at["node_selector"])
        kubernetes.add_toleration_json(task, at["tolerations"])
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory")
        task.set_retry(GPU_RETRIES, backoff_duration="30s", backoff_factor=2.0)
