"""The whole configuration. Its sections are defined by the steps that read them.

Only this file and `plan` know every section. `parts` splits the configuration by step, so that a changed option re-runs only
the steps that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from .compare.config import CompareStep, Gate
from .evaluate.config import AlphaSearch, Evaluate, EvaluateStep, LmEvalStep, References
from .finetune.config import Finetune, FinetuneStep
from .mixed.config import NO_LOSSES, Mixed, MixedCandidate, MixedStep, MixedTraining, candidates
from .placement import Placement
from .prepare.config import FinetuneData, PrepareStep, PretrainData, Tokenizer
from .pretrain.config import Pretrain, PretrainStep
from .register.config import RegisterStep
from .shared.config import SCRATCH, Model, Tracking, Training, Watch, Watching
from .shared.errors import RefusedError
from .shared.section import Section, known, matching, read_section, rule
from .shared.task_kinds import TASK_KINDS

RunName = Annotated[
    str,
    matching(
        r"^[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?$",
        "be at most 50 lower-case letters, digits and hyphens, and begin and end with a letter or a digit",
    ),
]


class Data(Section):
    """The data of the two streams."""

    pretrain: PretrainData
    finetune: FinetuneData


class LocalRun(Section):
    """Options of `mixtune run`, which runs the pipeline on this machine."""

    parallel: int = Field(1, ge=1, le=2)
    """Number of candidates that are trained and evaluated at the same time, each with an equal share of the processor's cores.
    KFP's local runner allows two."""
    keep_interpolated: bool = False
    """Whether to write the interpolated candidates into `models/` too, which takes time and space. Otherwise only one that is
    selected is written."""


class Config(Section):
    """The configuration of a run."""

    name: RunName = "mixtune"
    """Name of the run and of its output folder: lower-case letters, digits and hyphens. It is also the name of the registered
    model, unless `tracking.registered_model` is set."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the splits, of the order of the data, of the initial weights and of the bootstrap."""
    model: Model
    data: Data
    pretrain: Pretrain = Pretrain()
    finetune: Finetune = Finetune()
    mixed: Mixed = Mixed()
    watch: Watch = Watch()
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    tracking: Tracking = Tracking()
    placement: Placement = Placement()
    run: LocalRun = LocalRun()

    @rule
    def _metric_fits(self) -> Iterator[str]:
        task, metric = self.data.finetune.task, self.evaluate.metric
        metrics = TASK_KINDS[task].metrics
        if metric is not None and metric not in metrics:
            yield f"evaluate.metric: must be one of {', '.join(metrics)} for the task {task}, found {metric}"

    @rule
    def _alpha_can_be_found(self) -> Iterator[str]:
        if self.evaluate.interpolation_alphas != "auto":
            return
        if self.gate.max_forgetting is None and self.gate.max_forgetting_share is None:
            yield (
                "evaluate.interpolation_alphas: auto finds the α that keeps to the gate's limit on forgetting, and there is "
                "none; set gate.max_forgetting or gate.max_forgetting_share, or give values of α"
            )
        if self.evaluate.interpolate_mixed:
            yield "evaluate.interpolation_alphas: auto cannot be used with interpolate_mixed; give values of α"

    @rule
    def _capabilities_are_measured(self) -> Iterator[str]:
        measured = self.evaluate.capabilities or self.evaluate.lm_eval.tasks
        if self.gate.max_capability_drop is not None and not measured:
            yield (
                "gate.max_capability_drop: no capability is measured; set evaluate.capabilities or evaluate.lm_eval.tasks, or "
                "leave the limit out"
            )

    @rule
    def _heads_fit(self) -> Iterator[str]:
        size, heads = self.model.scratch.hidden_size, self.model.scratch.heads
        if self.model.base == SCRATCH and size % (2 * heads):
            yield f"model.scratch.hidden_size: must be an even multiple of model.scratch.heads ({heads}), found {size}"

    @rule
    def _something_to_forget(self) -> Iterator[str]:
        if self.model.base == SCRATCH and not self.pretrain.trains:
            yield "pretrain.steps: must be above 0 where model.base is scratch, or nothing is there to forget"

    @rule
    def _objective_fits(self) -> Iterator[str]:
        task, objective = self.data.finetune.task, self.model.objective or "causal_lm"
        refused = TASK_KINDS[task].refused_from_scratch
        if self.model.base == SCRATCH and objective in refused:
            yield f"data.finetune.task: is {task}, {refused[objective]}"

    @rule
    def _flow_has_losses(self) -> Iterator[str]:
        task = self.data.finetune.task
        if self.mixed.controls.flow and self.mixed.start == "pretrained" and TASK_KINDS[task].head is not None:
            yield f"mixed.controls.flow: {NO_LOSSES.format(task=task)}"

    @rule
    def _answers_can_be_rewritten(self) -> Iterator[str]:
        task = self.data.finetune.task
        if self.mixed.controls.self_distilled and task != "generation":
            yield f"mixed.controls.self_distilled: needs the task generation, found {task}"

    @rule
    def _other_seeds(self) -> Iterator[str]:
        if self.seed in self.mixed.seeds:
            yield f"mixed.seeds: must not contain {self.seed}, the seed of the run, which would train a copy"

    @rule
    def _finetune_trains(self) -> Iterator[str]:
        if not self.finetune.trains:
            yield "finetune.steps: must be above 0"

    @rule
    def _mixed_trains(self) -> Iterator[str]:
        if not self.mixed.trains:
            yield "mixed.steps: must be above 0"

    @rule
    def _warm_up_of_pretrain_ends(self) -> Iterator[str]:
        yield from _warm_up_problems("pretrain", self.pretrain)

    @rule
    def _warm_up_of_finetune_ends(self) -> Iterator[str]:
        yield from _warm_up_problems("finetune", self.finetune)

    @rule
    def _warm_up_of_mixed_ends(self) -> Iterator[str]:
        yield from _warm_up_problems("mixed", self.mixed)


def _warm_up_problems(name: str, stage: Training) -> Iterator[str]:
    by_steps = stage.epochs is None and stage.max_tokens is None
    if by_steps and stage.steps and stage.warmup_steps >= stage.steps:
        yield f"{name}.warmup_steps: must be below {name}.steps ({stage.steps}), found {stage.warmup_steps}"


def load(
    values: Mapping[str, Any], check: Callable[[Config], list[str]] = lambda _: [], found: Sequence[str] = ()
) -> Config:
    """Validates a configuration that was read from a file or from KFP parameters.

    Args:
        check: finds further problems. It reads the options that are valid, and is ended by `InvalidOptionError` at others.
        found: problems that were found when the values were read.

    Raises:
        RefusedError: if there are problems; names all of them.
    """
    try:
        config, problems = read_section(Config, values)
    except RefusedError as error:
        raise RefusedError(*found, *error.problems) from None
    problems += known(lambda: check(config))
    if found or problems:
        raise RefusedError(*found, *problems)
    return config


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
    finetuned_again: MixedStep
    evaluate: EvaluateStep
    evaluate_pretrained: EvaluateStep
    evaluate_mixed: EvaluateStep
    interpolate: EvaluateStep
    compare: CompareStep
    register: RegisterStep
    candidates: list[MixedCandidate]

    def of_loop(self, candidate: MixedCandidate) -> tuple[MixedStep, EvaluateStep]:
        """Returns the parts of the two steps that train and evaluate a candidate of the loop."""
        return (self.finetuned_again, self.evaluate) if candidate.alone else (self.mixed, self.evaluate_mixed)


def parts(
    config: Config,
    fingerprints: Fingerprints,
    champion: str | None = None,
    auto_tokens: int | None = None,
    auto_examples: int | None = None,
) -> Parts:
    """Splits a configuration into the parts that the steps read.

    Args:
        champion: the registered model in use, with its alias resolved to a version; None if there is none.
        auto_tokens: what `evaluate.max_tokens: auto` stands for; None for all tokens.
        auto_examples: likewise for `evaluate.max_examples`.
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
        chat_template=model.chat_template,
    )
    kind = TASK_KINDS[config.data.finetune.task]
    evaluate = EvaluateStep(
        max_length=model.max_length,
        mask_probability=model.mask_probability,
        metric=config.evaluate.metric or kind.metrics[0],
        max_new_tokens=config.evaluate.max_new_tokens if kind.head is None else None,
        lm_eval=_lm_eval(config, fingerprints),
        max_tokens=auto_tokens if config.evaluate.max_tokens == "auto" else config.evaluate.max_tokens,
        max_examples=auto_examples if config.evaluate.max_examples == "auto" else config.evaluate.max_examples,
        **config.evaluate.model_dump(include={"batch_size", "precision", "capabilities"}),
    )
    alphas = config.evaluate.interpolation_alphas
    shared = MixedTraining.model_validate(config.mixed.model_dump(include=set(MixedTraining.model_fields)))
    # Options without effect must not be part of the steps' cache keys.
    watch = config.watch if config.watch.every_steps is not None else Watch()
    sample = Watching.model_validate(watch.model_dump(include=set(Watching.model_fields)))
    mixed = MixedStep(
        seed=seed, max_length=model.max_length, mask_probability=model.mask_probability, mixed=shared, watch=watch
    )
    alone = shared.model_copy(update={name: getattr(config.finetune, name) for name in Training.model_fields})
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
        finetune=FinetuneStep(
            seed=seed,
            max_length=model.max_length,
            finetune=config.finetune,
            **({"mask_probability": model.mask_probability, "watch": sample} if sample.every_steps is not None else {}),
        ),
        mixed=mixed,
        finetuned_again=mixed.model_copy(update={"mixed": alone, "watch": Watch(**sample.model_dump())}),
        evaluate=evaluate,
        evaluate_pretrained=evaluate.model_copy(update={"references": _references(config, fingerprints, champion)}),
        evaluate_mixed=evaluate.model_copy(
            update={"interpolation_alphas": alphas if config.evaluate.interpolate_mixed and alphas != "auto" else []}
        ),
        interpolate=evaluate.model_copy(
            update={
                "alpha_search": AlphaSearch.model_validate(
                    config.gate.model_dump(include=set(AlphaSearch.model_fields))
                )
            }
            if alphas == "auto"
            else {"interpolation_alphas": alphas}
        ),
        compare=CompareStep(name=config.name, seed=seed, gate=config.gate),
        register=RegisterStep(
            registered_model=config.tracking.registered_model or config.name,
            alias=config.tracking.alias,
            kubeflow_registry=config.tracking.kubeflow_registry,
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
