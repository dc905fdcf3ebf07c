"""A model to evaluate: one model folder, or an interpolation of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..shared.artifacts import ModelCard
from ..shared.model.device import pick_device
from ..shared.model.loading import Interpolation, load_model
from ..shared.model.mixed_model import MixedModel
from ..shared.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        card: card of the candidate.
        folder: model folder; for an interpolation, that of the pretrained end.
        other: model folder of the fine-tuned end.
        alpha: weight of the fine-tuned end.
        revision: hub revision of `folder`, if that is a hub name.
        tokenizer: folder of the tokenizer, if it is not the model's own.
        ends: returns the two models of an interpolation, which all its α share.
    """

    card: ModelCard
    folder: str
    model_uri: str
    other: str | None = None
    other_uri: str | None = None
    alpha: float | None = None
    revision: str | None = None
    tokenizer: str | None = None
    ends: Callable[[], Interpolation] | None = None

    def load(self, precision: Literal["auto", "float32", "bf16"]) -> MixedModel:
        """Loads the model for evaluation."""
        if self.alpha is None or self.ends is None:
            model = load_model(self.folder, pick_device(), revision=self.revision)
        else:
            model = self.ends().at(self.alpha)
        model.precision = precision
        return model.eval()

    def words(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer."""
        return load_tokenizer(self.tokenizer or self.other or self.folder)
