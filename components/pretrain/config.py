"""Options of the `pretrain` step: λ = 1, on the pretraining stream only."""

from __future__ import annotations

from pydantic import Field

from ..shared.config import Model, Training
from ..shared.section import Section


class Pretrain(Training):
    """Pretraining on unlabelled text (λ = 1)."""

    steps: int = Field(0, ge=0, le=100_000_000)
    """Optimizer steps; with 0, the base model is used as it is."""


class PretrainStep(Section):
    """The configuration of the `pretrain` task, which `plan` creates."""

    seed: int
    model: Model
    pretrain: Pretrain
    fingerprint: str
    """Identifies the content of the base model."""
