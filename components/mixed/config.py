"""Options of the `mixed` step: 0 < λ < 1, on both streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ..shared.config import Budget, LambdaSchedule, Training, Watch
from ..shared.section import Section, rule

NO_LOSSES = (
    "weighs examples by the start model's loss on them, and the pretrained model has no trained head for {task}; set "
    "mixed.start: finetuned, or leave it out"
)
Lambda = Annotated[float, Field(ge=0, le=1)]


def candidate_id(mix_weight: float) -> str:
    """Returns the id of the candidate with this λ, such as `mixed-0.3`."""
    return f"mixed-{mix_weight:g}"


class MixedTraining(Training):
    """Options of a mixed training that all candidates share."""

    start: Literal["pretrained", "finetuned"] = "pretrained"
    """The model that mixed fine-tuning starts from."""
    replay_share: float = Field(0.5, gt=0, lt=1)
    """Fraction of the tokens of an optimizer step that come from the pretraining stream. It is independent of λ, which is a
    weight in the loss."""
    scale: Literal["loss", "gradient"] = "loss"
    """What λ is a share of. `loss`: λ weighs the two losses, exactly. `gradient`: λ is the pretraining stream's share in the
    norm of the gradient, whatever the sizes of the two losses. Norms are measured at every tenth
    step, which takes about 10 % more time. It applies to constant λ and to schedules; a forgetting budget finds a λ of the
    loss, and pooled mixing has no λ."""


class Controls(Section):
    """Other methods and controls that are trained like the mixed candidates and compared with them. All are off by default."""

    pooled: bool = False
    """Ordinary mixing: one mean loss over the tokens of both streams, with the same replay share and the same tokens."""
    more_pretraining: bool = False
    """λ = 1 on as many tokens as the others. Shows whether more pretraining explains the result."""
    lora_ranks: list[Annotated[int, Field(ge=1)]] = Field([])
    """For each rank, a candidate with low-rank adapters (LoRA) on all linear layers instead of full training."""
    lora_budgets: list[Annotated[float, Field(ge=0)]] = Field([])
    """For each rank and each of these forgetting budgets (bits per byte), a LoRA candidate with the λ found for the budget."""
    lora_learning_rate: float | None = Field(None, gt=0, le=1)
    """Peak learning rate of the adapters; null means ten times `mixed.learning_rate`."""
    lora_merge: bool = True
    """Whether the adapters are merged into the weights at the end. With `false`, a candidate's model folder holds the adapter
    in peft's format beside the files of its base model, and is evaluated, compared and registered as such."""
    lora_4bit: bool = False
    """Whether the weights under the adapters are quantised to 4 bits (QLoRA), in training and in evaluation. Needs an NVIDIA
    GPU, the package bitsandbytes and `lora_merge: false`."""
    kl_weights: list[Annotated[float, Field(gt=0)]] = Field([])
    """For each weight, a candidate with a penalty on KL(start model || model) at the tokens of the labelled examples."""
    l2sp_weights: list[Annotated[float, Field(gt=0)]] = Field([])
    """For each weight w, a candidate with the penalty w / 2 · ||weights - start weights||² (L2-SP)."""
    osf_shares: list[Annotated[float, Field(gt=0, lt=1)]] = Field([])
    """For each share, a candidate by orthogonal subspace fine-tuning (OSF): of every matrix, this share of the singular
    directions, those with the largest singular values, stays as it is, and the others are trained."""
    osf_learning_rate: float | None = Field(None, gt=0, le=1)
    """Peak learning rate of the OSF candidates; null means `mixed.learning_rate`."""
    flow: bool = False
    """Whether to weigh each labelled example by exp(-loss / τ), with the start model's loss on it and τ the median of these
    (FLOW). Needs a start model that can do the task: the task `generation`, or `mixed.start: finetuned`."""
    lambdas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.0], min_length=1)
    """λ of the LoRA, KL, L2-SP, OSF, FLOW and self-distilled candidates. 0 is their usual use: no pretraining text."""
    generated_lambdas: list[Annotated[float, Field(gt=0, lt=1)]] = Field([])
    """For each λ, a candidate that reads text which the start model generates, instead of the pretraining text: for those who
    have none. For causal language models."""
    generated_tokens: int = Field(100_000, ge=1000, le=1_000_000_000)
    """Tokens that are generated for each of these candidates. A training that needs more reads them again."""
    self_distilled: bool = False
    """Whether to train a candidate on the start model's own version of the labelled answers (self-distillation). For the task
    `generation`, without chats."""
    rewrite_prompt: str = Field(
        "Answer the request in your own words. The reference shows what a good answer says.\n\nRequest: {prompt}\n\n"
        "Reference: {completion}\n\nAnswer:"
    )
    """Self-distillation: what the start model is asked; `{prompt}` and `{completion}` stand for those of the example."""
    sampled_lambdas: list[Annotated[float, Field(gt=0, lt=1)]] = Field([])
    """For each λ, a candidate whose streams are mixed by sampling, with weights that correct for the probabilities: λ is exact
    in expectation only."""

    @field_validator("rewrite_prompt")
    @classmethod
    def _has_both_places(cls, template: str) -> str:
        missing = [place for place in ("{prompt}", "{completion}") if place not in template]
        if missing:
            raise ValueError(f"must contain {' and '.join(missing)}")
        return template

    @rule
    def _quantised_weights_stay(self) -> Iterator[str]:
        if self.lora_4bit and self.lora_merge:
            yield "lora_4bit: needs lora_merge: false, since adapters cannot be merged exactly into weights of 4 bits"

    @rule
    def _budgets_have_ranks(self) -> Iterator[str]:
        if self.lora_budgets and not self.lora_ranks:
            yield "lora_budgets: there are no lora_ranks; set them, or leave lora_budgets out"

    @property
    def in_4_bits(self) -> bool:
        """Tells whether a candidate has quantised weights."""
        return self.lora_4bit and bool(self.lora_ranks)


class Mixed(MixedTraining):
    """Mixed fine-tuning: L = λ · L_pretrain + (1 - λ) · L_finetune, one model for each λ, schedule and forgetting budget."""

    lambdas: list[Lambda] = Field([0.1, 0.3, 0.5])
    """Weights λ of the pretraining loss, each between 0 and 1. Each is a candidate."""
    lambda_schedules: list[LambdaSchedule] = Field([])
    """λ as a function of the step, such as `{shape: linear, values: [0.5, 0.1]}`. Each is a candidate."""
    forgetting_budgets: list[Annotated[float, Field(ge=0)]] = Field([])
    """Acceptable forgetting, in bits per byte. λ is found in up to `budget.max_trainings` trainings. Each is a candidate."""
    replay_shares: list[Annotated[float, Field(gt=0, lt=1)]] = Field([])
    """Replay shares to compare: each λ between 0 and 1, each schedule and each budget is a candidate with each of these
    shares (all combinations), instead of with `replay_share`."""
    budget: Budget = Budget()
    controls: Controls = Controls()
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([])
    """Further seeds (order of the data, task head, dropout) with which each of these candidates, and fine-tuning alone, is
    trained too. They show how much the results vary by chance, and are never selected."""

    @rule
    def _quantised_weights_are_whole(self) -> Iterator[str]:
        if self.controls.in_4_bits and self.parallelism == "fsdp":
            yield "controls.lora_4bit does not work with parallelism: fsdp; use ddp or auto"

    @rule
    def _adapters_are_pulled_back_to_their_start(self) -> Iterator[str]:
        if self.controls.lora_budgets and not self.controls.lora_merge and self.start != "pretrained":
            yield (
                "controls.lora_budgets: adapters that are not merged can be pulled back to the start model only, but "
                "forgetting is measured against the pretrained one; set start to pretrained, or controls.lora_merge to true"
            )

    @rule
    def _goes_with_fsdp(self) -> Iterator[str]:
        if self.parallelism != "fsdp":
            return
        for name in ("osf_shares", "generated_lambdas", "self_distilled"):
            if getattr(self.controls, name):
                yield f"controls.{name} does not work with parallelism: fsdp; use ddp, or leave it out"

    @rule
    def _each_once(self) -> Iterator[str]:
        if len({candidate_id(weight) for weight in self.lambdas}) != len(self.lambdas):
            yield "each λ in lambdas must be listed once (they are compared to six digits)"
        elif self.controls.more_pretraining and 1.0 in self.lambdas:
            yield "controls.more_pretraining is λ = 1, which lambdas contains already; remove one of them"
        else:
            ids = [candidate.id for candidate in candidates(self)]
            if not ids:
                yield "there is no candidate; set lambdas, lambda_schedules, forgetting_budgets or controls"
            twice = sorted({name for name in ids if ids.count(name) > 1})
            if twice:
                yield f"there are several candidates {', '.join(twice)}; list each once (compared to six digits)"

    @property
    def budgets_option(self) -> str | None:
        """Returns the option that asks for forgetting budgets; None if there are none."""
        options = {"forgetting_budgets": self.forgetting_budgets, "controls.lora_budgets": self.controls.lora_budgets}
        return next((f"mixed.{name}" for name, budgets in options.items() if budgets), None)


class MixedCandidate(Section):
    """A candidate of the loop. Exactly one of λ, schedule, budget and pooling is set."""

    id: str
    name: str = ""
    """Display name."""
    mix_weight: float | None = None
    """λ."""
    schedule: LambdaSchedule | None = None
    forgetting_budget: float | None = None
    """Bits per byte."""
    budget: Budget | None = None
    pooled: bool = False
    lora_rank: int | None = None
    lora_merge: bool = True
    lora_4bit: bool = False
    learning_rate: float | None = None
    """Replaces `mixed.learning_rate`."""
    replay_share: float | None = None
    """Replaces `mixed.replay_share`."""
    kl_weight: float = 0.0
    l2sp_weight: float = 0.0
    osf_share: float | None = None
    flow: bool = False
    sampled: bool = False
    generated_tokens: int = 0
    """Tokens of replay text that the start model generates; 0 means that the pretraining text is read."""
    rewrite_prompt: str | None = None
    """Set if the start model rewrites the labelled answers."""
    seed: int | None = None
    """Replaces the configuration's seed."""
    alone: bool = False
    """Whether this is fine-tuning alone with another seed: λ = 0, from the pretrained model, with the options of `finetune`."""

    @rule
    def _one_way(self) -> Iterator[str]:
        ways = [self.mix_weight is not None, self.schedule is not None, self.forgetting_budget is not None, self.pooled]
        if sum(ways) != 1:
            yield "exactly one of mix_weight, schedule, forgetting_budget and pooled must be given"

    @rule
    def _nothing_else_reads_quantised_weights(self) -> Iterator[str]:
        if self.lora_4bit and (self.lora_rank is None or self.lora_merge or self.kl_weight or self.l2sp_weight):
            yield "lora_4bit is for adapters that are not merged, without penalties"


class MixedStep(Section):
    """The configuration of a `mixed` task, which `plan` creates; the candidate is given separately."""

    seed: int
    max_length: int
    mask_probability: float = 0.15
    mixed: MixedTraining
    watch: Watch = Watch()


def candidates(mixed: Mixed) -> Iterator[MixedCandidate]:
    """Yields the candidates that are trained in addition to `pretrained` and `finetuned`."""
    of_one_seed = list(_of_one_seed(mixed))
    yield from of_one_seed
    for seed in dict.fromkeys(mixed.seeds):
        yield MixedCandidate(
            id=f"finetuned-seed-{seed}", name=f"fine-tuning alone, seed {seed}", mix_weight=0.0, seed=seed, alone=True
        )
        for candidate in of_one_seed:
            changes = {"id": f"{candidate.id}-seed-{seed}", "name": f"{candidate.name}, seed {seed}", "seed": seed}
            yield candidate.model_copy(update=changes)


def _of_one_seed(mixed: Mixed) -> Iterator[MixedCandidate]:
    for candidate in _mixes(mixed):
        if not mixed.replay_shares or candidate.mix_weight in (0.0, 1.0):  # one stream
            yield candidate
            continue
        for share in mixed.replay_shares:
            changes = {
                "id": f"{candidate.id}-replay-{share:g}",
                "name": f"{candidate.name}, {share:.3g} of the tokens replay",
            }
            yield candidate.model_copy(update={**changes, "replay_share": share})
    yield from _controls(mixed)


def _mixes(mixed: Mixed) -> Iterator[MixedCandidate]:
    of_norm = " of the gradient norm" if mixed.scale == "gradient" else ""
    for weight in mixed.lambdas:
        scale = of_norm if 0 < weight < 1 else ""
        yield MixedCandidate(id=candidate_id(weight), name=f"mixed, λ = {weight:g}{scale}", mix_weight=weight)
    for schedule in mixed.lambda_schedules:
        values = [f"{value:g}" for value in schedule.values]
        at = "-at-" + "-".join(f"{start:g}" for start in schedule.starts) if _uneven(schedule) else ""
        yield MixedCandidate(
            id=f"mixed-{schedule.shape}-{'-'.join(values)}{at}",
            name=f"mixed, λ {schedule.shape} {' → '.join(values)}{of_norm}",
            schedule=schedule,
        )
    for budget in mixed.forgetting_budgets:
        yield _to_budget(mixed, budget)


def _to_budget(mixed: Mixed, budget: float, suffix: str = "", name: str = "mixed", **options: Any) -> MixedCandidate:
    return MixedCandidate(
        id=f"mixed-budget-{budget:g}{suffix}",
        name=f"{name}, forgetting at most {budget:g}",
        forgetting_budget=budget,
        budget=mixed.budget,
        **options,
    )


def _controls(mixed: Mixed) -> Iterator[MixedCandidate]:
    controls = mixed.controls
    if controls.pooled:
        yield MixedCandidate(id="mixed-pooled", name="pooled mixing", pooled=True)
    if controls.more_pretraining:
        yield MixedCandidate(id=candidate_id(1), name="more pretraining, λ = 1", mix_weight=1.0)
    adapters: dict[str, Any] = {
        "lora_merge": controls.lora_merge,
        "lora_4bit": controls.lora_4bit,
        "learning_rate": controls.lora_learning_rate or 10 * mixed.learning_rate,
    }
    for budget in controls.lora_budgets:
        for rank in controls.lora_ranks:
            yield _to_budget(mixed, budget, f"-lora-{rank}", f"LoRA, rank {rank}", lora_rank=rank, **adapters)
    for weight in controls.lambdas:
        base, at = candidate_id(weight), f", λ = {weight:g}"
        for rank in controls.lora_ranks:
            yield MixedCandidate(
                id=f"{base}-lora-{rank}", name=f"LoRA, rank {rank}{at}", mix_weight=weight, lora_rank=rank, **adapters
            )
        for penalty in controls.kl_weights:
            yield MixedCandidate(
                id=f"{base}-kl-{penalty:g}", name=f"KL penalty {penalty:g}{at}", mix_weight=weight, kl_weight=penalty
            )
        for penalty in controls.l2sp_weights:
            yield MixedCandidate(
                id=f"{base}-l2sp-{penalty:g}", name=f"L2-SP {penalty:g}{at}", mix_weight=weight, l2sp_weight=penalty
            )
        for share in controls.osf_shares:
            yield MixedCandidate(
                id=f"{base}-osf-{share:g}",
                name=f"OSF, {share:.3g} kept{at}",
                mix_weight=weight,
                osf_share=share,
                learning_rate=controls.osf_learning_rate,
            )
        if controls.flow:
            yield MixedCandidate(id=f"{base}-flow", name=f"FLOW{at}", mix_weight=weight, flow=True)
        if controls.self_distilled:
            yield MixedCandidate(
                id=f"{base}-self-distilled",
                name=f"self-distillation{at}",
                mix_weight=weight,
                rewrite_prompt=controls.rewrite_prompt,
            )
    for weight in controls.generated_lambdas:
        yield MixedCandidate(
            id=f"{candidate_id(weight)}-generated",
            name=f"generated replay, λ = {weight:g}",
            mix_weight=weight,
            generated_tokens=controls.generated_tokens,
        )
    for weight in controls.sampled_lambdas:
        yield MixedCandidate(
            id=f"{candidate_id(weight)}-sampled",
            name=f"sampled streams, λ = {weight:g} in expectation",
            mix_weight=weight,
            sampled=True,
        )


def _uneven(schedule: LambdaSchedule) -> bool:
    count = len(schedule.values)
    return any(abs(start - number / count) > 1e-9 for number, start in enumerate(schedule.starts))
