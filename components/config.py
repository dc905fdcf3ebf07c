"""The whole configuration. Its sections are defined by the steps that read them.

Only this file and `plan` know every section. `parts` splits the configuration by step, so that a changed option re-runs only
the steps that read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from .compare.config import CompareStep, Gate
from .evaluate.config import Evaluate, EvaluateStep, LmEvalStep, References
from .finetune.config import Finetune, FinetuneStep
from .mixed.config import Mixed, MixedCandidate, MixedStep, MixedTraining, candidates
from .prepare.config import FinetuneData, PrepareStep, PretrainData, Tokenizer
from .pretrain.config import Pretrain, PretrainStep
from .register.config import RegisterStep
from .shared.config import SCRATCH, LocalPath, Model, Section, Tracking, Training, describe_problems
from .shared.errors import RefusedError
from .shared.task_kinds import TASK_KINDS


def _as_text(value: Any) -> Any:
    """Converts a number such as the 4 in `cpu: 4` to text, as Kubernetes expects it."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Cpu = Annotated[str, BeforeValidator(_as_text), Field(pattern=r"^\d+(\.\d+)?m?$")]
Memory = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(E|Ei|P|Pi|T|Ti|G|Gi|M|Mi|K|Ki)$")]


class Data(Section):
    """The data of the two streams."""

    pretrain: PretrainData
    finetune: FinetuneData


class LocalRun(Section):
    """Options of `mixtune run`, which runs the pipeline on this machine."""

    parallel: int = Field(1, ge=1, le=2)
    """Number of candidates that are trained and evaluated at the same time, each with an equal share of the processor's cores.
    KFP's local runner allows two."""


class Placement(Section):
    """Nodes and resources of the steps on a cluster. Local runs ignore this section."""

    profile: str = "cpu"
    """Name of a placement profile. A profile defines how GPU nodes are selected on one kind of cluster and which resources
    tasks request. mixtune includes `cpu`, `nvidia`, `gke`, `eks` and `aks` (`pipelines/node_pools.yaml`)."""
    profiles_file: LocalPath | None = Field(None, min_length=1)
    """YAML file with your own profiles, in the format of `pipelines/node_pools.yaml`. A profile in it replaces an included
    profile of the same name."""
    gpus: int = Field(0, ge=0, le=64)
    """GPUs of each pretrain, finetune, mixed and evaluate task."""
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
    queue: str | None = Field(None, pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Local queue of Kueue for all pods, set as the label `kueue.x-k8s.io/queue-name`. Null uses no queue."""
    gpu_retries: int = Field(2, ge=0, le=10)
    """Number of retries of each pretrain, finetune, mixed and evaluate task after a failure."""
    gpu_timeout_hours: float | None = Field(None, gt=0)
    """Maximum run time of a pretrain, finetune, mixed or evaluate pod. A pod that takes longer is stopped. Its retry resumes
    from the last checkpoint."""
    run_as_user: int | None = Field(None, ge=0)
    """User id of the containers, for clusters that require one. Null uses the user of the image."""
    run_as_group: int | None = Field(None, ge=0)
    """Group id of the containers. Null uses the group of the image."""
    checkpoint_claim: str | None = Field(None, pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")
    """Name of a PersistentVolumeClaim for checkpoints. If candidates are trained on several nodes at the same time, it needs
    the access mode ReadWriteMany."""
    checkpoint_url: str | None = Field(None, pattern=r"^[a-z0-9]+://[^?#@]+$")
    """fsspec URL for checkpoints, such as `s3://bucket/checkpoints`, instead of a claim. The credentials come from a Kubernetes
    secret. Without a claim or a URL, a training that is killed restarts from the beginning."""

    @model_validator(mode="after")
    def _one_checkpoint_location(self) -> Self:
        if self.checkpoint_claim and self.checkpoint_url:
            raise ValueError("checkpoint_claim and checkpoint_url exclude each other; give one of them")
        return self


class Config(Section):
    """The configuration of a run."""

    name: str = Field("mixtune", pattern=r"^[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?$")
    """Name of the run and of its output folder: lower-case letters, digits and hyphens. It is also the name of the registered
    model, unless `tracking.registered_model` is set."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the splits, of the order of the data, of the initial weights and of the bootstrap."""
    model: Model
    data: Data
    pretrain: Pretrain = Pretrain()
    finetune: Finetune = Finetune()
    mixed: Mixed = Mixed()
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    tracking: Tracking = Tracking()
    placement: Placement = Placement()
    run: LocalRun = LocalRun()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        problems = []
        task, metric = self.data.finetune.task, self.evaluate.metric
        kind = TASK_KINDS[task]
        if metric is not None and metric not in kind.metrics:
            problems.append(f"evaluate.metric must be one of {', '.join(kind.metrics)} for the task {task}")
        scratch = self.model.scratch
        if self.model.base == SCRATCH:
            if scratch.hidden_size % (2 * scratch.heads):
                problems.append("model.scratch.hidden_size must be an even multiple of model.scratch.heads")
            if not self.pretrain.trains:
                problems.append(
                    "pretrain.steps must be above 0 where model.base is scratch, or nothing is there to forget"
                )
            objective = self.model.objective or "causal_lm"
            if objective in kind.refused_from_scratch:
                problems.append(f"data.finetune.task is {task}, {kind.refused_from_scratch[objective]}")
        if self.seed in self.mixed.seeds:
            problems.append(f"mixed.seeds must not contain {self.seed}, the seed of the run, which would train a copy")
        stages: dict[str, Training] = {"pretrain": self.pretrain, "finetune": self.finetune, "mixed": self.mixed}
        for name, stage in stages.items():
            if not stage.trains and name != "pretrain":
                problems.append(f"{name}.steps must be above 0")
            by_steps = stage.epochs is None and stage.max_tokens is None
            if by_steps and stage.steps and stage.warmup_steps >= stage.steps:
                problems.append(f"{name}.warmup_steps must be below {name}.steps")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def load(values: Mapping[str, Any]) -> Config:
    """Validates a configuration that was read from a file or from KFP parameters.

    Raises:
        RefusedError: if there are problems; names all of them.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise RefusedError(*describe_problems(error)) from None


@dataclass(frozen=True)
class Fingerprints:
    """Digests or versions of the content that a configuration names. `plan` computes them, and they enter the cache keys."""

    pretrain: str
    finetune: str
    base: str
    champion: str = ""
    tasks_folder: str = ""


@dataclass(frozen=True)
class Parts:
    """The parts of the configuration by step. A step reads nothing else, so its part is also its cache key."""

    prepare_pretrain: PrepareStep
    prepare_finetune: PrepareStep
    pretrain: PretrainStep
    finetune: FinetuneStep
    mixed: MixedStep
    evaluate: EvaluateStep
    evaluate_pretrained: EvaluateStep
    evaluate_mixed: EvaluateStep
    interpolate: EvaluateStep
    compare: CompareStep
    register: RegisterStep
    candidates: list[MixedCandidate]


def parts(config: Config, fingerprints: Fingerprints, champion: str | None = None) -> Parts:
    """Splits a configuration into the parts that the steps read.

    Args:
        champion: the registered model in use, with its alias resolved to a version; None if there is none.
    """
    model, seed = config.model, config.seed
    scratch = model.base == SCRATCH
    if scratch and model.objective != "masked_lm":
        # Options that causal models ignore must not be part of their steps' cache keys.
        model = model.model_copy(update={"mask_probability": Model.model_fields["mask_probability"].default})
    tokenizer = Tokenizer(
        base=model.base,
        revision=model.revision,
        max_length=model.max_length,
        vocabulary_size=model.scratch.vocabulary_size if scratch else None,
        objective=(model.objective or "causal_lm") if scratch else "causal_lm",
    )
    kind = TASK_KINDS[config.data.finetune.task]
    evaluate = EvaluateStep(
        max_length=model.max_length,
        mask_probability=model.mask_probability,
        metric=config.evaluate.metric or kind.metrics[0],
        max_new_tokens=config.evaluate.max_new_tokens if kind.head is None else None,
        lm_eval=_lm_eval(config, fingerprints),
        **config.evaluate.model_dump(include={"batch_size", "max_documents", "precision"}),
    )
    alphas = config.evaluate.interpolation_alphas
    return Parts(
        prepare_pretrain=PrepareStep(
            stream="pretrain",
            seed=seed,
            tokenizer=tokenizer,
            pretrain=config.data.pretrain,
            fingerprint=f"{fingerprints.pretrain} {fingerprints.base}",
        ),
        prepare_finetune=PrepareStep(
            stream="finetune",
            seed=seed,
            tokenizer=tokenizer,
            finetune=config.data.finetune,
            fingerprint=f"{fingerprints.finetune} {fingerprints.base}",
        ),
        pretrain=PretrainStep(seed=seed, model=model, pretrain=config.pretrain, fingerprint=fingerprints.base),
        finetune=FinetuneStep(seed=seed, max_length=model.max_length, finetune=config.finetune),
        mixed=MixedStep(
            seed=seed,
            max_length=model.max_length,
            mask_probability=model.mask_probability,
            mixed=MixedTraining.model_validate(config.mixed.model_dump(include=set(MixedTraining.model_fields))),
        ),
        evaluate=evaluate,
        evaluate_pretrained=evaluate.model_copy(update={"references": _references(config, fingerprints, champion)}),
        evaluate_mixed=evaluate.model_copy(
            update={"interpolation_alphas": alphas if config.evaluate.interpolate_mixed else []}
        ),
        interpolate=evaluate.model_copy(update={"interpolation_alphas": alphas}),
        compare=CompareStep(name=config.name, seed=seed, gate=config.gate),
        register=RegisterStep(
            registered_model=config.tracking.registered_model or config.name,
            alias=config.tracking.alias,
            max_length=model.max_length,
            max_new_tokens=evaluate.max_new_tokens,
        ),
        candidates=list(candidates(config.mixed)),
    )


def _lm_eval(config: Config, fingerprints: Fingerprints) -> LmEvalStep | None:
    options = config.evaluate.lm_eval
    return LmEvalStep(**options.model_dump(), fingerprint=fingerprints.tasks_folder) if options.tasks else None


def _references(config: Config, fingerprints: Fingerprints, champion: str | None) -> References:
    brought = config.model.base != SCRATCH and config.pretrain.trains
    return References(
        base=config.model.base if brought else None,
        revision=config.model.revision if brought else None,
        champion=champion,
        fingerprint=" ".join(
            [*([fingerprints.base] if brought else []), *([fingerprints.champion] if champion else [])]
        ),
    )


HEADLINE = {
    "name": "name",
    "seed": "seed",
    "base_model": "model.base",
    "pretrain_source": "data.pretrain.source",
    "finetune_source": "data.finetune.source",
    "task": "data.finetune.task",
    "mixed_lambdas": "mixed.lambdas",
    "max_score_drop": "gate.max_score_drop",
    "max_forgetting": "gate.max_forgetting",
    "max_forgetting_share": "gate.max_forgetting_share",
    "registered_model": "tracking.registered_model",
}
"""Maps KFP parameters with a single value to their paths in the configuration."""

SECTIONS = {
    "model_options": "model",
    "pretrain_data_options": "data.pretrain",
    "finetune_data_options": "data.finetune",
    "pretrain_options": "pretrain",
    "finetune_options": "finetune",
    "mixed_options": "mixed",
    "evaluate_options": "evaluate",
    "gate_options": "gate",
    "tracking_options": "tracking",
}
"""Maps KFP parameters with a whole section, as JSON without the values in `HEADLINE`, to its path in the configuration."""

_NOT_ON_A_CLUSTER = {"tracking.uri", "tracking.experiment", "tracking.offline_when_unreachable"}


NULLABLE = frozenset({"max_forgetting", "max_forgetting_share", "registered_model"})
"""Parameters that can be null. KFP has no null, so their values are passed as text, and null as an empty text."""


def parameters(config: Config) -> dict[str, Any]:
    """Returns the KFP parameters of a configuration: the values in `HEADLINE`, and the rest of each section as JSON."""
    values = config.model_dump(mode="json")
    result: dict[str, Any] = {}
    for name, path in HEADLINE.items():
        value = _get(values, path)
        result[name] = ("" if value is None else str(value)) if name in NULLABLE else value
    headline = {*HEADLINE.values(), *_NOT_ON_A_CLUSTER}
    for name, path in SECTIONS.items():
        section = {key: value for key, value in _get(values, path).items() if f"{path}.{key}" not in headline}
        result[name] = json.dumps(section, ensure_ascii=False)
    return result


def assemble(given: Mapping[str, Any], compiled_in: str = "{}") -> dict[str, Any]:
    """Returns the configuration from KFP parameters, not validated yet. The inverse of `parameters`.

    Args:
        given: the parameters.
        compiled_in: options that are fixed in the package, as JSON: `{section: {option: value}}`.

    Raises:
        RefusedError: if a section is not a JSON object.
    """
    values: dict[str, Any] = {}
    problems = []
    for name, path in SECTIONS.items():
        try:
            section = json.loads(given.get(name) or "{}")
            if not isinstance(section, dict):
                raise ValueError("it must be a JSON object")
        except ValueError as error:
            problems.append(f"{name}: cannot be read as JSON ({error})")
            continue
        for key, value in section.items():
            _set(values, f"{path}.{key}", value)
    if problems:
        raise RefusedError(*problems)
    for name, path in HEADLINE.items():
        value = given.get(name)
        if name in NULLABLE:
            value = None if value in ("", None) else value
        _set(values, path, value)
    for section, options in json.loads(compiled_in).items():
        for key, value in options.items():
            _set(values, f"{section}.{key}", value)
    return values


def describe(path: str) -> str:
    """Returns the description of an option from the schema."""
    section: type[Section] = Config
    text: str | None = None
    for name in path.split("."):
        field = section.model_fields[name]
        text = field.description
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            section = field.annotation
            text = text or section.__doc__
    return " ".join((text or "").split())


def _get(values: Mapping[str, Any], path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        values = values.setdefault(key, {})
    values[last] = value
