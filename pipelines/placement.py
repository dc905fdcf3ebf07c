"""Placement of tasks: images, node pools, resources, retries, environment. Every task passes through `Placer`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from kfp import dsl, kubernetes
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixtune.components.config import Config
from mixtune.components.form import PLACEMENT
from mixtune.components.mixed.config import MixedTraining
from mixtune.components.placement import GpuNodes, Placement
from mixtune.components.shared.checkpoints.store import CHECKPOINT_DIR
from mixtune.components.shared.data.claims import CLAIM, CLAIMS_DIR, claim_of
from mixtune.components.shared.data.sources import named_sources
from mixtune.components.shared.errors import RefusedError, first_line
from mixtune.components.shared.model.device import GPUS
from mixtune.components.shared.nodes.manifest import AT, POD_NAME, POD_NAMESPACE, TRAINJOB, variable_of
from mixtune.components.shared.running.context import ALONE, COMPILED, NODES, TRACKING_KEYS, from_secret
from mixtune.components.shared.section import describe_problems
from mixtune.components.shared.task_name import TaskName

from .images import Images, images
from .third_party.kfp import set_variable_at_run_time, take_input
from .trainjob import trainjob_of

GPU_STEPS = frozenset({"pretrain", "finetune", "mixed", "evaluate"})
# Administrative steps run every time: plan checks the sources, the others give every run its own verdict.
NEVER_CACHED = frozenset({"plan", "compare", "register", "finish"})
POD_LABELS = {"app.kubernetes.io/name": "mixtune", "app.kubernetes.io/part-of": "mixtune"}
"""Identifies the pods of mixtune's steps among those of other pipelines. The network policies in k8s/ select it."""
STEP_LABEL = "app.kubernetes.io/component"
CANDIDATE_LABEL = "mixtune/candidate"
"""For the allocation of costs. KFP itself adds the run, as `pipeline/runid`."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
CHECKPOINT_FOLDER = "/checkpoints"
CHECKPOINT_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
PROXY_KEYS = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
CA_FOLDER = "/etc/mixtune-ca"
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")
"""Read by Python's ssl (hub, web sources), by requests (MLflow), and by botocore (object stores)."""
# prepare keeps its finished shards there; finish deletes the checkpoints of a run's trainings.
CHECKPOINT_STEPS = frozenset({"prepare", "pretrain", "finetune", "mixed", "finish"})
CLAIMS_FOLDER = "/claims"
DATA_STEPS = frozenset({"plan", "prepare"})
"""Steps that read sources of data."""
RUN_TIME_ALONE = ("gpus", "node_selector", "tolerations")
"""The parameters of a step's own pipeline; type and affinity are fixed in it."""


def labels_of(name: TaskName) -> dict[str, str]:
    """Returns the labels of a task's pods. The candidates of the loop share a task, so their pods do not name the candidate."""
    candidate = {CANDIDATE_LABEL: name.candidate} if name.candidate else {}
    return POD_LABELS | {STEP_LABEL: name.step} | candidate


def described(name: str) -> str:
    """Returns the description of an option of `GpuNodes`."""
    return " ".join((GpuNodes.model_fields[name].description or "").split())


class Profile(BaseModel):
    """An entry of `node_pools.yaml`: how to select GPU nodes on one kind of cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: str
    accelerator: str | None = None
    """Kubernetes resource name of a GPU; null for CPU only."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: list[dict[str, str]] = Field(default_factory=list)
    gpu_affinity: dict[str, Any] = Field(default_factory=dict)
    """Node affinity of GPU tasks in Kubernetes format, for conditions that a selector cannot express."""
    gpu_cpu: str = "4"
    gpu_memory: str = "32Gi"
    cpu: str = "2"
    memory: str = "8Gi"

    def gpu_nodes(self, gpus: int) -> GpuNodes:
        """Returns the placement of GPU tasks."""
        return GpuNodes(
            gpus=gpus,
            gpu_type=self.accelerator or GpuNodes.model_fields["gpu_type"].default,
            node_selector=self.node_selector,
            tolerations=self.tolerations,
            affinity=self.gpu_affinity,
        )

    def off_gpu_nodes(self) -> dict[str, Any]:
        """Returns a node affinity that keeps tasks without a GPU off labelled GPU nodes. Unlabelled nodes are allowed."""
        terms = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in self.node_selector.items()]
        if not terms:
            return {}
        # A node with another value of one of the labels is not a GPU node, so the terms are alternatives.
        alternatives = [{"matchExpressions": [term]} for term in terms]
        return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": alternatives}}


def profiles(own: str | Path | None = None) -> dict[str, Profile]:
    """Returns mixtune's placement profiles and the user's.

    Args:
        own: file with the user's profiles.

    Raises:
        RefusedError: if the file is invalid; names all problems.
    """
    text = resources.files(__package__).joinpath("node_pools.yaml").read_text(encoding="utf-8")
    known = {name: Profile.model_validate(values) for name, values in yaml.safe_load(text).items()}
    if own is None:
        return known
    try:
        given = yaml.safe_load(Path(own).read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusedError(f"placement.profiles_file: {own} cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RefusedError(f"placement.profiles_file: {own} is not valid YAML ({first_line(error)})") from None
    if not isinstance(given, dict):
        raise RefusedError(f"placement.profiles_file: {own} must hold profiles by name, found {type(given).__name__}")
    problems = []
    for name, values in given.items():
        try:
            known[str(name)] = Profile.model_validate(values)
        except ValidationError as error:
            problems += [f"placement.profiles_file: {own}: {name}.{one}" for one in describe_problems(error, Profile)]
    if problems:
        raise RefusedError(*problems)
    return known


def data_claims(config: Config) -> list[str]:
    """Returns the claims that hold data of a configuration."""
    streams = (config.data.pretrain, config.data.finetune)
    claims = {claim_of(named.path) for stream in streams for named in named_sources(stream)}
    return sorted(claim for claim in claims if claim is not None)


@dataclass
class Placer:
    """Sets the placement of tasks. Called for every task of the DAG.

    Attributes:
        profile: placement of GPU tasks on a cluster; None for local runs, which have no placement.
        where: the configuration's placement.
        nodes: placement of GPU tasks that a run can change; its defaults.
        claims: claims that hold data.
        parallelism: number of candidates trained in parallel; 0 is no limit.
        offline: whether steps continue if the MLflow server does not answer.
        tensorboard: whether trainings write TensorBoard event files.
        images: images of the steps.
        alone: whether the pipeline consists of one step.
        mixed_start: the model that mixed training starts from, which shapes the DAG.
    """

    profile: Profile | None = None
    where: Placement = field(default_factory=Placement)
    nodes: GpuNodes = field(default_factory=GpuNodes)
    claims: Sequence[str] = ()
    parallelism: int = 0
    offline: bool = False
    tensorboard: bool = False
    images: Images = field(default_factory=images)
    alone: bool = False
    mixed_start: str = MixedTraining.model_fields["start"].default
    _at: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def local(cls, in_images: Images | None = None, parallel: int = 1) -> Placer:
        """Creates a placer for the local runner, which trains `parallel` candidates side by side."""
        return cls(parallelism=parallel, images=in_images or images())

    @classmethod
    def cluster(cls, config: Config, in_images: Images | None = None) -> Placer:
        """Creates a placer for a cluster from the configuration's profile.

        Raises:
            RefusedError: if there is no such profile.
        """
        where = config.placement
        known = profiles(where.profiles_file)
        if where.profile not in known:
            raise RefusedError(f"placement.profile: must be one of {', '.join(known)}, found {where.profile}")
        profile = known[where.profile]
        if where.gpus and profile.accelerator is None:
            raise RefusedError(f"placement.gpus: the profile {where.profile} has no GPUs, found {where.gpus}")
        own = {name: getattr(where, name) for name in ("cpu", "memory", "gpu_cpu", "gpu_memory")}
        profile = profile.model_copy(update={name: value for name, value in own.items() if value is not None})
        fixed: dict[str, Any] = {
            "parallelism": where.parallel_candidates,
            "offline": config.tracking.offline_when_unreachable,
            "tensorboard": config.tracking.tensorboard,
        }
        if where.checkpoint_claim in (claims := data_claims(config)):
            raise RefusedError(
                f"data: {CLAIM}{where.checkpoint_claim} is placement.checkpoint_claim, which cannot be mounted a second time; "
                "put the data or the checkpoints into another claim"
            )
        return cls(profile, where, profile.gpu_nodes(where.gpus), claims=claims, images=in_images or images(), **fixed)

    def parameters(self, step: str | None = None) -> dict[str, tuple[type, Any, str]]:
        """Returns the placement that is set at run time: parameter -> (type, default, description).

        Args:
            step: the step, if it is the only one of the pipeline. Without `plan`, nothing splits the dict.
        """
        if self.profile is None or (step and step not in GPU_STEPS):
            return {}
        values = self.nodes.model_dump()
        if step is None:
            keys = " ".join(f"`{name}`: {described(name)}" for name in values)
            return {PLACEMENT: (dict, values, f"Placement of the GPU tasks, in this run. {keys}")}
        # KFP treats an integer count as no GPU without an error, so the count is text.
        values["gpus"] = str(values["gpus"])
        return {name: (type(values[name]), values[name], described(name)) for name in RUN_TIME_ALONE}

    def run_settings(self) -> dsl.PipelineConfig | None:
        """Returns the deadline of a run and how long its workflow stays; None for local runs."""
        if self.profile is None:
            return None
        hours = {
            "active_deadline_seconds": self.where.run_deadline_hours,
            "ttl_seconds_after_finished": self.where.run_ttl_hours,
            "ttl_seconds_after_failure": self.where.failed_run_ttl_hours,
        }
        return dsl.PipelineConfig(
            **{name: max(1, round(3600 * given)) for name, given in hours.items() if given is not None}
        )

    def compiled_in(self) -> str:
        """Returns the options that are fixed in a package, as JSON, for the record and for `mixtune rerun`."""
        fixed: dict[str, Any] = {"placement": self.where.model_dump(mode="json", exclude_defaults=True)}
        tracking = {"offline_when_unreachable": self.offline, "tensorboard": self.tensorboard}
        if any(tracking.values()):
            fixed["tracking"] = {name: True for name, value in tracking.items() if value}
        if self.mixed_start != MixedTraining.model_fields["start"].default:
            fixed["mixed"] = {"start": self.mixed_start}
        return json.dumps(fixed, ensure_ascii=False, sort_keys=True)

    def off_gpu_nodes(self) -> dict[str, Any]:
        """Returns the node affinity of tasks without a GPU, which is fixed at compile time."""
        if self.profile is None or self.where.cpu_tasks_on_gpu_nodes:
            return {}
        return self.profile.off_gpu_nodes()

    def place_gpu_tasks(self, at: Mapping[str, Any]) -> None:
        """Sets the run-time placement of GPU tasks, by the names of `GpuNodes`: parameters of the run or outputs of `plan`."""
        self._at = at

    def __call__(self, task: dsl.PipelineTask, name: TaskName, at: Mapping[str, Any] | None = None) -> dsl.PipelineTask:
        """Sets a task's image and caching and, on a cluster, its placement, resources, environment and retries.

        Args:
            task: the task.
            name: its step and its subject.
            at: placement of this task, where it differs from that of the other GPU tasks.
        """
        step = name.step
        task.set_container_image(self.images.of(step))
        task.set_caching_options(step not in NEVER_CACHED)
        if step == "plan":
            task.set_env_variable(COMPILED, self.compiled_in())
        if self.profile is None:
            return task
        if name.words != step:
            task.set_display_name(name.words)
        for label, value in labels_of(name).items():
            kubernetes.add_pod_label(task, label, value)
        kubernetes.use_field_path_as_env(task, "MIXTUNE_RUN_ID", "metadata.labels['pipeline/runid']")
        kubernetes.use_secret_as_env(
            task, self.where.mlflow_secret, {key: from_secret(key) for key in TRACKING_KEYS}, optional=True
        )
        if self.alone:
            task.set_env_variable(ALONE, "1")
        elif step == "plan":
            nodes = {"gpu": self.nodes.model_dump(), "other": self.off_gpu_nodes()}
            task.set_env_variable(NODES, json.dumps(nodes, ensure_ascii=False, sort_keys=True))
        if step == "register":
            task.set_env_variable("MIXTUNE_IMAGE", self.images.of(step))  # recorded with the registered version
        if step in CHECKPOINT_STEPS:
            self._with_checkpoints(task)
        if step in DATA_STEPS and self.claims:
            for claim in self.claims:  # KFP cannot mount them read-only; the steps only read
                kubernetes.mount_pvc(task, pvc_name=claim, mount_path=f"{CLAIMS_FOLDER}/{claim}")
            task.set_env_variable(CLAIMS_DIR, CLAIMS_FOLDER)
        if self.offline:
            # An environment variable, since an input would be part of every step's cache key.
            task.set_env_variable("MIXTUNE_TRACKING_OFFLINE", "1")
        if self.tensorboard and name.trains:
            task.set_env_variable("MIXTUNE_TENSORBOARD_DIR", "/tmp/tensorboard")  # they become artifacts in MLflow
        launches = name.trains and self.where.nodes > 1
        if self.where.queue and not launches:
            kubernetes.add_pod_label(task, QUEUE_LABEL, self.where.queue)
        self._in_its_network(task)
        user, group = self.where.run_as_user, self.where.run_as_group
        if user is not None or group is not None:
            # KFP can set nothing else; it drops all capabilities by itself.
            kubernetes.set_security_context(task, user, group, run_as_non_root=None if user is None else user != 0)
        if self.where.nodes > 1 and (launches or step == "finish"):
            # `finish` deletes the TrainJobs that a stopped run has left.
            kubernetes.use_field_path_as_env(task, POD_NAMESPACE, "metadata.namespace")
        there = self.nodes.model_dump() | dict(self._at) | dict(at or {})
        if launches:
            self._on_nodes(task, there)
        if step in GPU_STEPS and not launches:
            self._on_gpu(task, there)
        else:
            task.set_cpu_limit(self.profile.cpu).set_memory_limit(self.profile.memory)
            if affinity := self.off_gpu_nodes():
                kubernetes.add_node_affinity_json(task, affinity)
        if step in GPU_STEPS and self.where.gpu_retries:
            task.set_retry(self.where.gpu_retries, backoff_duration="30s", backoff_factor=2.0)
        return task

    def _in_its_network(self, task: dsl.PipelineTask) -> None:
        """Sets how the image is pulled, the proxy and the trusted certificates. None of it is part of KFP's cache key."""
        if self.where.image_pull_policy:
            kubernetes.set_image_pull_policy(task, self.where.image_pull_policy)
        if self.where.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, self.where.image_pull_secrets)
        if self.where.proxy_config_map:
            # Some programs read one spelling, some the other.
            for keys in (PROXY_KEYS, [key.lower() for key in PROXY_KEYS]):
                of = dict(zip(PROXY_KEYS, keys, strict=True))
                kubernetes.use_config_map_as_env(task, self.where.proxy_config_map, of, optional=True)
        if self.where.ca_config_map:
            kubernetes.use_config_map_as_volume(task, self.where.ca_config_map, CA_FOLDER)
            for variable in CA_VARIABLES:
                task.set_env_variable(variable, f"{CA_FOLDER}/ca.crt")

    def _with_checkpoints(self, task: dsl.PipelineTask) -> None:
        """Uses environment and mount, which are fixed at compile time: only the claim's name is part of KFP's cache key."""
        if self.where.checkpoint_claim:
            kubernetes.mount_pvc(task, pvc_name=self.where.checkpoint_claim, mount_path=CHECKPOINT_FOLDER)
            task.set_env_variable(CHECKPOINT_DIR, CHECKPOINT_FOLDER)
            # Records that MLflow has not received outlive the pod there. finish mounts the volume too and delivers them.
            task.set_env_variable("MIXTUNE_JOURNAL_DIR", f"{CHECKPOINT_FOLDER}/undelivered")
        elif self.where.checkpoint_url:
            kubernetes.use_secret_as_env(
                task, self.where.checkpoint_secret, {key: key for key in CHECKPOINT_KEYS}, optional=True
            )
            task.set_env_variable(CHECKPOINT_DIR, self.where.checkpoint_url)

    def _on_gpu(self, task: dsl.PipelineTask, at: Mapping[str, Any]) -> None:
        assert self.profile is not None
        task.set_cpu_limit(self.profile.gpu_cpu).set_memory_limit(self.profile.gpu_memory)
        task.set_accelerator_type(at["gpu_type"]).set_accelerator_limit(at["gpus"])
        set_variable_at_run_time(task, GPUS, at["gpus"])  # the count enters the cache key by the accelerator limit
        # KFP does not pass resource parameters into a loop by itself.
        task.register_pipeline_channels([one for one in (at["gpu_type"], at["gpus"]) if not isinstance(one, str)])
        kubernetes.add_node_selector_json(task, at["node_selector"])
        kubernetes.add_toleration_json(task, at["tolerations"])
        kubernetes.add_node_affinity_json(task, at["affinity"])
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=self.where.shared_memory)
        if self.where.gpu_timeout_hours:
            kubernetes.set_timeout(task, round(self.where.gpu_timeout_hours * 3600))

    def _on_nodes(self, task: dsl.PipelineTask, at: Mapping[str, Any]) -> None:
        """Has a task launch its training on several nodes. Its own pod needs no GPU, and waits in no queue."""
        assert self.profile is not None
        where = self.where
        limits = {"cpu": self.profile.gpu_cpu, "memory": self.profile.gpu_memory}
        queue = {QUEUE_LABEL: where.queue} if where.queue else {}
        job = trainjob_of(task, where.nodes, limits, where.shared_memory, queue, where.gpu_timeout_hours)
        task.set_env_variable(TRAINJOB, json.dumps(job, ensure_ascii=False, sort_keys=True))
        kubernetes.use_field_path_as_env(task, POD_NAME, "metadata.name")
        for option in AT:
            if isinstance(at[option], str | int | list | dict):
                given = at[option] if isinstance(at[option], str) else json.dumps(at[option])
                task.set_env_variable(variable_of(option), given)
            else:
                set_variable_at_run_time(task, variable_of(option), at[option])
                take_input(task, at[option])
