"""Options of the `mixed` step: λ in between, on both streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..shared.config import Budget, LambdaSchedule, Section, Training

Lambda = Annotated[float, Field(ge=0, le=1)]


def candidate_id(mix_weight: float) -> str:
    """Id of the candidate with this λ, such as `mixed-0.3`."""
    return f"mixed-{mix_weight:g}"


class MixedTraining(Training):
    """What one mixed training reads, beside what its candidate says."""

    start: Literal["pretrained", "finetuned"] = "pretrained"
    """The model that mixed fine-tuning starts from."""
    replay_share: float = Field(0.5, gt=0, lt=1)
    """Fraction of the tokens in an optimizer step that come from the pretraining stream (λ is a weight in the loss, this is
    a share of the tokens; each can be set without the other)."""


class Controls(Section):
    """Rivals and controls, trained like the mixed candidates and compared with them. All off unless asked for."""

    pooled: bool = False
    """Ordinary mixing: one mean over the tokens of both streams, at the same replay share and on the same tokens."""
    more_pretraining: bool = False
    """λ = 1 on as many tokens as the others: is it only more pretraining?"""
    lora_ranks: list[Annotated[int, Field(ge=1)]] = Field([])
    """For each rank, low-rank adapters (LoRA) on all linear layers in place of full training."""
    lora_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the adapters; null is ten times `mixed.learning_rate`."""
    kl_weights: list[Annotated[float, Field(gt=0)]] = Field([])
    """For each weight, a penalty on the divergence KL(start model || model) at the tokens of the labelled examples."""
    l2sp_weights: list[Annotated[float, Field(gt=0)]] = Field([])
    """For each weight w, a penalty w / 2 · ||weights - start weights||² (L2-SP)."""
    lambdas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.0], min_length=1)
    """λ of the LoRA, KL and L2-SP candidates; 0 is what they are usually used for: keeping without any pretraining text."""


class Mixed(MixedTraining):
    """Mixed fine-tuning: L = λ · L_pretrain + (1 - λ) · L_finetune, one model for each λ, schedule and forgetting budget."""

    lambdas: list[Lambda] = Field([0.1, 0.3, 0.5])
    """Weights λ of the pretraining loss, each between 0 and 1; every one gives a candidate."""
    lambda_schedules: list[LambdaSchedule] = Field([])
    """λ as functions of the step, such as `{shape: linear, values: [0.5, 0.1]}`; every one gives a candidate."""
    forgetting_budgets: list[Annotated[float, Field(ge=0)]] = Field([])
    """Forgetting that is acceptable, in bits per byte: λ is adapted in training so as to keep to it; every one gives a
    candidate."""
    budget: Budget = Budget()
    controls: Controls = Controls()
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([])
    """Further seeds (order of the data, task head, dropout) that every one of these candidates is trained with too; they tell
    how much chance in training moves the numbers, and are not selected."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len({candidate_id(weight) for weight in self.lambdas}) != len(self.lambdas):
            raise ValueError("every λ in lambdas must stand there once (six digits count)")
        if self.controls.more_pretraining and 1.0 in self.lambdas:
            raise ValueError("controls.more_pretraining is λ = 1, which stands in lambdas already; remove one of them")
        ids = [candidate.id for candidate in candidates(self)]
        if not ids:
            raise ValueError("there is no candidate; give lambdas, lambda_schedules, forgetting_budgets or controls")
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"there are several candidates {', '.join(twice)}; give each once (six digits count)")
        return self


class MixedCandidate(Section):
    """One candidate of the loop, as `plan` lists it. Of λ, schedule, budget and pooling it has exactly one."""

    id: str
    name: str = ""
    """In plain words."""
    mix_weight: float | None = None
    """λ."""
    schedule: LambdaSchedule | None = None
    forgetting_budget: float | None = None
    """Bits per byte."""
    budget: Budget | None = None
    pooled: bool = False
    lora_rank: int | None = None
    learning_rate: float | None = None
    """In place of `mixed.learning_rate`."""
    kl_weight: float = 0.0
    l2sp_weight: float = 0.0
    seed: int | None = None
    """In place of the configuration's."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [self.mix_weight is not None, self.schedule is not None, self.forgetting_budget is not None, self.pooled]
        if sum(ways) != 1:
            raise ValueError("exactly one of mix_weight, schedule, forgetting_budget and pooled must be given")
        return self


class MixedStep(Section):
    """All that one `mixed` task reads beside its candidate, as `plan` hands it over."""

    seed: int
    max_length: int
    mask_probability: float = 0.15
    mixed: MixedTraining


def candidates(mixed: Mixed) -> Iterator[MixedCandidate]:
    """Everything that is trained beside `pretrained` and `finetuned`."""
    of_one_seed = list(_of_one_seed(mixed))
    yield from of_one_seed
    for seed in dict.fromkeys(mixed.seeds):
        for candidate in of_one_seed:
            changes = {"id": f"{candidate.id}-seed-{seed}", "name": f"{candidate.name}, seed {seed}", "seed": seed}
            yield candidate.model_copy(update=changes)


def _of_one_seed(mixed: Mixed) -> Iterator[MixedCandidate]:
    for weight in mixed.lambdas:
        yield MixedCandidate(id=candidate_id(weight), name=f"mixed, λ = {weight:g}", mix_weight=weight)
    for schedule in mixed.lambda_schedules:
        values = [f"{value:g}" for value in schedule.values]
        at = "-at-" + "-".join(f"{start:g}" for start in schedule.starts) if _uneven(schedule) else ""
        yield MixedCandidate(
            id=f"mixed-{schedule.shape}-{'-'.join(values)}{at}",
            name=f"mixed, λ {schedule.shape} {' → '.join(values)}",
            schedule=schedule,
        )
    for budget in mixed.forgetting_budgets:
        yield MixedCandidate(
            id=f"mixed-budget-{budget:g}",
            name=f"mixed, forgetting at most {budget:g}",
            forgetting_budget=budget,
            budget=mixed.budget,
        )
    yield from _controls(mixed)


def _controls(mixed: Mixed) -> Iterator[MixedCandidate]:
    controls = mixed.controls
    if controls.pooled:
        yield MixedCandidate(id="mixed-pooled", name="pooled mixing", pooled=True)
    if controls.more_pretraining:
        yield MixedCandidate(id=candidate_id(1), name="more pretraining, λ = 1", mix_weight=1.0)
    for weight in controls.lambdas:
        base, at = candidate_id(weight), f", λ = {weight:g}"
        for rank in controls.lora_ranks:
            yield MixedCandidate(
                id=f"{base}-lora-{rank}",
                name=f"LoRA, rank {rank}{at}",
                mix_weight=weight,
                lora_rank=rank,
                learning_rate=controls.lora_learning_rate or 10 * mixed.learning_rate,
            )
        for penalty in controls.kl_weights:
            yield MixedCandidate(
                id=f"{base}-kl-{penalty:g}", name=f"KL penalty {penalty:g}{at}", mix_weight=weight, kl_weight=penalty
            )
        for penalty in controls.l2sp_weights:
            yield MixedCandidate(
                id=f"{base}-l2sp-{penalty:g}", name=f"L2-SP {penalty:g}{at}", mix_weight=weight, l2sp_weight=penalty
            )


def _uneven(schedule: LambdaSchedule) -> bool:
    count = len(schedule.values)
    return any(abs(start - number / count) > 1e-9 for number, start in enumerate(schedule.starts))
