"""Options of the `finetune` step: λ = 0, on the fine-tuning stream only."""

from __future__ import annotations

from ..shared.config import Training, Watching
from ..shared.section import Section


class Finetune(Training):
    """Supervised fine-tuning (λ = 0): the baseline that every mixed model is compared with."""


class FinetuneStep(Section):
    """The configuration of the `finetune` task, which `plan` creates."""

    seed: int
    max_length: int
    mask_probability: float = 0.15
    """Masked LM: fraction of the watched text that is masked."""
    finetune: Finetune
    watch: Watching = Watching()
