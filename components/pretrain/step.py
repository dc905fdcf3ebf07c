"""Pretraining on unlabelled text (λ = 1): brings in the base model and, where asked, trains it on."""

from __future__ import annotations

from pathlib import Path

from ..shared.artifacts import ArtifactLike, ModelCard
from ..shared.config import SCRATCH
from ..shared.context import Context
from ..shared.data import DataManifest, Documents
from ..shared.errors import RefusedError
from ..shared.finish_training import save_trained
from ..shared.model import MixedModel, from_scratch, load_model, load_tokenizer
from ..shared.streams import PretrainStream, mix
from ..shared.training import Result, train
from .config import PretrainStep


def run(
    config: PretrainStep,
    *,
    context: Context,
    data: ArtifactLike,
    tokenizer: ArtifactLike,
    model: ArtifactLike,
    metrics: ArtifactLike,
) -> None:
    """Makes the `pretrained` candidate.

    Args:
        data: the pretraining stream's training split.
        tokenizer: the tokenizer that the data was prepared with.
        model: output, a model folder.
        metrics: output, final losses and counts.
    """
    manifest = DataManifest.load(data.path)
    words = load_tokenizer(tokenizer.path)
    network = _base_model(config, tokenizer.path)
    result = Result()
    if config.pretrain.steps:
        stream = PretrainStream(Documents(data.path, "train"), config.model.max_length, config.seed)
        what_to_read = mix(stream, None, config.pretrain.batch_size, config.model.max_length)
        result = train(network, what_to_read, config.pretrain, 1.0, words.pad_token_id, config.seed, context)
    card = ModelCard(
        id="pretrained",
        kind="pretrained",
        mix_weight=1.0 if config.pretrain.steps else None,
        realised_mix_weight=result.realised_mix_weight if config.pretrain.steps else None,
        params=config.pretrain.model_dump(mode="json"),
        data={"pretrain": manifest.digest},
        base=_base_name(config),
        mlflow_runs={"prepare pretrain": manifest.mlflow_run or ""},
    )
    save_trained(network, words, card, result, context, model, metrics)


def _base_model(config: PretrainStep, tokenizer: str) -> MixedModel:
    if config.model.base == SCRATCH:
        return from_scratch(config.model.scratch, load_tokenizer(tokenizer), config.model.max_length, config.seed)
    network = load_model(config.model.base, revision=config.model.revision)
    positions = getattr(network.lm.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < config.model.max_length:
        raise RefusedError(
            f"model.max_length: is {config.model.max_length}, but {config.model.base} has only {positions}"
        )
    # Pretraining is on text alone; a head that the base model brings belongs to some other task.
    return MixedModel(network.lm)


def _base_name(config: PretrainStep) -> str:
    if config.model.base == SCRATCH:
        size = config.model.scratch
        return f"scratch ({size.layers} layers, {size.hidden_size} wide, {size.vocabulary_size} words)"
    name = Path(config.model.base).name if Path(config.model.base).is_dir() else config.model.base
    return f"{name}@{config.model.revision}" if config.model.revision else name
