"""What a training can have besides the mixed loss."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.mixed_model import MixedModel
from .budget_search import BudgetSearch
from .reference_models import ReferenceModel
from .watching import Watcher


@dataclass(frozen=True)
class TrainingVariant:
    """Optional parts of a training besides the mixed loss.

    Attributes:
        search: chooses λ for a forgetting budget, from the forgetting of the trained model.
        watch: sample on which the training is watched.
        reference: model that forgetting is measured against; None means the start model.
        start: model that the penalties pull towards.
        kl_weight: penalty on KL(start || model), a mean over the tokens of the fine-tuning stream.
        l2sp_weight: penalty on the squared distance from the start model's weights.
        lora_rank: train low-rank adapters of this rank instead of the backbone.
        lora_merge: whether the adapters become part of the weights at the end.
        osf_share: keep this fraction of each matrix's singular directions, and train the others.
        flow: weigh the labelled examples by the start model's loss on them.
    """

    search: BudgetSearch | None = None
    watch: Watcher | None = None
    reference: MixedModel | None = None
    start: ReferenceModel | None = None
    kl_weight: float = 0.0
    l2sp_weight: float = 0.0
    lora_rank: int | None = None
    lora_merge: bool = True
    osf_share: float | None = None
    flow: bool = False

    @property
    def adapted(self) -> bool:
        """Tells whether peft's modules are trained instead of the backbone's weights."""
        return self.lora_rank is not None or self.osf_share is not None

    @property
    def merges(self) -> bool:
        """Tells whether these modules are merged at the end."""
        return self.adapted and (self.lora_rank is None or self.lora_merge)
