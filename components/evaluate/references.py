"""Models that are evaluated besides `pretrained`: the base model before further pretraining, and the champion."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..shared.artifacts import ArtifactLike, ModelCard
from ..shared.errors import RefusedError
from ..shared.model.tokenizer import load_tokenizer
from ..shared.running.context import Context
from .config import References
from .subject import Subject


def references(config: References, pretrained: ArtifactLike, context: Context) -> Iterator[Subject]:
    """Yields the configured reference models.

    Args:
        config: names of the base model and the champion; both can be unset.
        pretrained: model folder with the tokenizer that prepared the held-out data.

    Raises:
        RefusedError: if the champion cannot be evaluated on this run's data.
        UnreachableError: if the champion is in the registry and MLflow does not answer.
    """
    if config.base is not None:
        card = ModelCard(id="base", kind="base", base=ModelCard.load(pretrained.path).base)
        yield Subject(card, config.base, config.base, revision=config.revision, tokenizer=pretrained.path)
    if config.champion is not None:
        with tempfile.TemporaryDirectory() as folder:
            place = _brought_here(config.champion, Path(folder), context)
            card = ModelCard.load(place).model_copy(
                update={"id": "champion", "kind": "champion", "name": config.champion}
            )
            _refuse_other_words(config.champion, place, pretrained)
            yield Subject(card, str(place), config.champion)


def _brought_here(champion: str, folder: Path, context: Context) -> Path:
    if not champion.startswith("models:"):
        return Path(champion)
    client = context.tracker.reach()
    if client is None:
        raise RefusedError(
            f"evaluate.champion: is {champion}, but MLFLOW_TRACKING_URI is not set; set it or name a folder"
        )
    from ..shared.tracking.registry import fetch

    context.say(f"champion: fetching {champion}")
    return fetch(client, champion, folder)


def _refuse_other_words(champion: str, place: Path, pretrained: ArtifactLike) -> None:
    """Refuses a champion with another vocabulary: the held-out data consists of token ids."""
    if load_tokenizer(place).get_vocab() != load_tokenizer(pretrained.path).get_vocab():
        raise RefusedError(
            f"evaluate.champion: {champion} has another tokenizer than this run's base model, so the two cannot be measured on "
            "the same data; leave it out, or compare their reports"
        )
