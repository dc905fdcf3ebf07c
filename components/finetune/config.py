"""Options of the `finetune` step: λ = 0, on the fine-tuning stream alone."""

from __future__ import annotations

from ..shared.config import Section, Training


class Finetune(Training):
    """Supervised fine-tuning (λ = 0): the baseline that every mixed model is compared with."""


class FinetuneStep(Section):
    """All that the `finetune` step reads, as `plan` hands it over."""

    seed: int
    max_length: int
    finetune: Finetune
