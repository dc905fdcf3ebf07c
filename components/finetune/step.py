"""Supervised fine-tuning (λ = 0): the baseline. Reads the labelled data only."""

from __future__ import annotations

from pathlib import Path

from ..shared.artifacts import ArtifactLike, ModelCard
from ..shared.checkpoints.resume import TrainingJob
from ..shared.data.prepared import DataManifest, Documents
from ..shared.model.device import loading_device, loads_as_stored
from ..shared.model.loading import add_task_head, load_model
from ..shared.model.masking import Masking
from ..shared.model.tokenizer import append_eos, load_tokenizer
from ..shared.running.context import Context
from ..shared.training.loop import train
from ..shared.training.mix_weight import Constant
from ..shared.training.saving import save_trained
from ..shared.training.streams import FinetuneStream, make_mix
from ..shared.training.variant import TrainingVariant
from ..shared.training.watching import Watcher, watched_digest
from .config import FinetuneStep


def run(
    config: FinetuneStep,
    *,
    context: Context,
    start: ArtifactLike,
    data: ArtifactLike,
    model: ArtifactLike,
    metrics: ArtifactLike,
) -> None:
    """Trains the `finetuned` candidate.

    Args:
        start: the pretrained model.
        data: the fine-tuning stream's training split.
        model: output, a model folder.
        metrics: output, final losses and counts.
    """
    manifest = DataManifest.load(data.path)
    before = ModelCard.load(start.path)
    tokenizer = load_tokenizer(start.path)
    if manifest.ends_with_eos:
        append_eos(tokenizer)
    assert manifest.task is not None
    mixed_model = load_model(
        start.path,
        loading_device(config.finetune),
        as_stored=loads_as_stored(config.finetune),
        attention=config.finetune.attention,
    )
    add_task_head(mixed_model, manifest.task, manifest.labels, config.seed)
    stream = FinetuneStream(Documents(data.path, "train"), config.seed, manifest.task)
    data_mix = make_mix(None, stream, config.finetune.batch_size, config.max_length)
    masking = None
    if config.watch.every_steps is not None and mixed_model.objective == "masked_lm":
        masking = Masking.of(tokenizer, config.mask_probability)
    variant = TrainingVariant(watch=Watcher.load(data.path, config.watch, manifest.task, masking, config.max_length))
    identity = {
        "config": config.model_dump(mode="json"),
        "data": manifest.digest,
        **watched_digest(data.path, config.watch),
    }
    job = TrainingJob("finetuned", identity, Path(model.path))
    result = train(
        mixed_model,
        data_mix,
        config.finetune,
        Constant(0.0),
        tokenizer.pad_token_id,
        config.seed,
        context,
        variant,
        job,
    )
    card = ModelCard(
        id="finetuned",
        kind="finetuned",
        start=before.id,
        mix_weight=0.0,
        realised_mix_weight=result.realised_mix_weight,
        has_task_head=True,
        labels=manifest.labels,
        chat=manifest.has_chats,
        params=config.finetune.model_dump(mode="json"),
        data={**before.data, "finetune": manifest.digest},
        base=before.base,
        mlflow_runs={**before.mlflow_runs, "prepare finetune": manifest.mlflow_run or ""},
    )
    save_trained(mixed_model, tokenizer, card, result, context, model, metrics, stream)
