"""Options of the `pretrain` step: λ = 1, on the pretraining stream alone."""

from __future__ import annotations

from pydantic import Field

from ..shared.config import Model, Section, Training


class Pretrain(Training):
    """Pretraining on unlabelled text (λ = 1)."""

    steps: int = Field(0, ge=0)
    """Optimizer steps; 0 just brings in the base model."""


class PretrainStep(Section):
    """All that the `pretrain` step reads, as `plan` hands it over."""

    seed: int
    model: Model
    pretrain: Pretrain
    fingerprint: str
    """Identifies the content of the base model."""
