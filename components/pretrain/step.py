"""Pretraining on unlabelled text (λ = 1): loads the base model and, if configured, trains it further."""

from __future__ import annotations

from pathlib import Path

from ..shared.artifacts import ArtifactLike, ModelCard
from ..shared.checkpoints.resume import TrainingJob
from ..shared.config import SCRATCH
from ..shared.data.prepared import DataManifest, Documents
from ..shared.errors import RefusedError
from ..shared.model.device import loading_device, loads_as_stored
from ..shared.model.loading import from_scratch, load_model, refuse_not_finite
from ..shared.model.masking import Masking
from ..shared.model.mixed_model import MixedModel
from ..shared.model.refusals import NO_LM_HEAD, OTHER_OBJECTIVE
from ..shared.model.tokenizer import load_tokenizer
from ..shared.running.context import Context
from ..shared.training.loop import train
from ..shared.training.mix_weight import Constant
from ..shared.training.result import Result
from ..shared.training.saving import save_card, save_trained
from ..shared.training.streams import PretrainStream, make_mix
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
    """Creates the `pretrained` candidate.

    Args:
        data: training split of the pretraining stream.
        tokenizer: tokenizer that the data was prepared with.
        model: output, a model folder. Without training it contains no weights: its card names their location.
        metrics: output, final losses and counts.
    """
    manifest = DataManifest.load(data.path)
    loaded_tokenizer = load_tokenizer(tokenizer.path)
    mixed_model = _base_model(config, tokenizer.path)
    masking = (
        Masking.of(loaded_tokenizer, config.model.mask_probability) if mixed_model.objective == "masked_lm" else None
    )
    trains = config.pretrain.trains
    card = ModelCard(
        id="pretrained",
        kind="pretrained",
        mix_weight=1.0 if trains else None,
        params=config.pretrain.model_dump(mode="json"),
        data={"pretrain": manifest.digest},
        base=_base_name(config),
        mlflow_runs={"prepare pretrain": manifest.mlflow_run or ""},
    )
    if not trains:
        _refuse_new_weights(mixed_model, config.model.base)
        where = {"weights": _absolute(config.model.base), "revision": config.model.revision}
        save_card(loaded_tokenizer, card.model_copy(update=where), Result(), context, model, metrics)
        return
    stream = PretrainStream(Documents(data.path, "train"), config.model.max_length, config.seed, masking)
    data_mix = make_mix(stream, None, config.pretrain.batch_size, config.model.max_length)
    identity = {"config": config.model_dump(mode="json"), "data": manifest.digest}
    job = TrainingJob("pretrained", identity, Path(model.path))
    result = train(
        mixed_model,
        data_mix,
        config.pretrain,
        Constant(1.0),
        loaded_tokenizer.pad_token_id,
        config.seed,
        context,
        job=job,
    )
    save_trained(mixed_model, loaded_tokenizer, card, result, context, model, metrics)


def _base_model(config: PretrainStep, tokenizer_folder: str) -> MixedModel:
    base, objective, attention = config.model.base, config.model.objective, config.pretrain.attention
    device = loading_device(config.pretrain)
    if base == SCRATCH:
        length, tokenizer = config.model.max_length, load_tokenizer(tokenizer_folder)
        return from_scratch(
            config.model.scratch, tokenizer, length, config.seed, objective or "causal_lm", attention, device
        )
    model = load_model(
        base, device, loads_as_stored(config.pretrain), revision=config.model.revision, attention=attention
    )
    refuse_not_finite(model, base)
    if objective is not None and objective != model.objective:
        of_type = {"base": base, "type": model.config.model_type, "own": model.objective}
        raise RefusedError(OTHER_OBJECTIVE.format(objective=objective, **of_type))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions - model.position_offset < config.model.max_length:
        raise RefusedError(
            f"model.max_length: is {config.model.max_length}, but {base} has only {positions - model.position_offset}"
        )
    # Pretraining uses text only; a head of the base model belongs to another task.
    model.task, model.kind, model.labels = None, None, None
    return model


def _refuse_new_weights(model: MixedModel, base: str) -> None:
    """Refuses a model without a trained LM head: its forgetting cannot be measured."""
    if model.new_weights:
        raise RefusedError(NO_LM_HEAD.format(base=base, name=model.new_weights[0]))


def _absolute(base: str) -> str:
    """Returns a name of the base model that later steps can resolve."""
    return str(Path(base).absolute()) if Path(base).is_dir() else base


def _base_name(config: PretrainStep) -> str:
    if config.model.base == SCRATCH:
        size = config.model.scratch
        return f"scratch ({size.layers} layers, {size.hidden_size} wide, {size.vocabulary_size} words)"
    name = Path(config.model.base).name if Path(config.model.base).is_dir() else config.model.base
    return f"{name}@{config.model.revision}" if config.model.revision else name
