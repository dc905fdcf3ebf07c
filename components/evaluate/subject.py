"""A model to measure: one folder, or two and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..shared.artifacts import ModelCard
from ..shared.model.device import pick_device
from ..shared.model.loading import interpolate, load_model
from ..shared.model.mixed_model import MixedModel
from ..shared.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        card: which candidate it is.
        folder: its model folder; for an interpolated one the pretrained end.
        other: the fine-tuned end.
        alpha: weight of the fine-tuned end.
        revision: hub revision of `folder`, where that is a name on the hub.
        tokenizer: folder of the tokenizer, where it is not the model's own.
    """

    card: ModelCard
    folder: str
    model_uri: str
    other: str | None = None
    other_uri: str | None = None
    alpha: float | None = None
    revision: str | None = None
    tokenizer: str | None = None

    def load(self, precision: Literal["auto", "float32", "bf16"]) -> MixedModel:
        """The model, ready to measure."""
        device = pick_device()
        if self.alpha is None or self.other is None:
            model = load_model(self.folder, device, revision=self.revision)
        else:
            model = interpolate(self.folder, self.other, self.alpha, device)
        model.precision = precision
        return model.eval()

    def words(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return load_tokenizer(self.tokenizer or self.other or self.folder)
