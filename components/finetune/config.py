"""Options of the `finetune` step: λ = 0, on the fine-tuning stream only."""

from __future__ import annotations

from ..shared.config import Training
from ..shared.section import Section


class Finetune(Training):
    """Supervised fine-tuning (λ = 0): the baseline that every mixed model is compared with."""


class FinetuneStep(Section):
    """The configuration of the `finetune` task, which `plan` creates."""

    seed: int
    max_length: int
    finetune: Finetune
