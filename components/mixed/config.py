"""Options of the `mixed` step: λ in between, on both streams."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ..shared.config import Section, Training


def candidate_id(mix_weight: float) -> str:
    """Id of the candidate with this λ, such as `mixed-0.3`."""
    return f"mixed-{mix_weight:g}"


class MixedTraining(Training):
    """What one mixed training reads, beside its λ."""

    start: Literal["pretrained", "finetuned"] = "pretrained"
    """The model that mixed fine-tuning starts from."""
    replay_share: float = Field(0.5, gt=0, lt=1)
    """Fraction of the tokens in an optimizer step that come from the pretraining stream (λ is a weight in the loss, this is
    a share of the tokens; each can be set without the other)."""


class Mixed(MixedTraining):
    """Mixed fine-tuning: L = λ · L_pretrain + (1 - λ) · L_finetune, one model for each λ."""

    lambdas: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.1, 0.3, 0.5], min_length=1)
    """Weights λ of the pretraining loss, each between 0 and 1; every one gives a candidate."""

    @model_validator(mode="after")
    def _each_lambda_once(self) -> Self:
        if len({candidate_id(weight) for weight in self.lambdas}) != len(self.lambdas):
            raise ValueError("every λ in lambdas must stand there once (six digits count)")
        return self


class MixedStep(Section):
    """All that one `mixed` task reads beside its candidate, as `plan` hands it over."""

    seed: int
    max_length: int
    mixed: MixedTraining


class Candidate(Section):
    """One candidate of the loop over λ, as `plan` lists it."""

    id: str
    mix_weight: float
    """λ."""
