"""Mixed fine-tuning: L = λ · L_pretrain + (1 - λ) · L_finetune, one model for one λ."""

from __future__ import annotations

from ..shared.artifacts import ArtifactLike, ModelCard
from ..shared.context import Context
from ..shared.data import DataManifest, Documents
from ..shared.errors import RefusedError
from ..shared.finish_training import save_trained
from ..shared.model import load_model, load_tokenizer
from ..shared.streams import FinetuneStream, PretrainStream, mix
from ..shared.tokens import append_eos
from ..shared.training import train
from .config import Candidate, MixedStep


def run(
    config: MixedStep,
    *,
    context: Context,
    candidate: str,
    start: ArtifactLike,
    pretrain_data: ArtifactLike,
    finetune_data: ArtifactLike,
    model: ArtifactLike,
    metrics: ArtifactLike,
) -> None:
    """Makes one `mixed` candidate.

    Args:
        candidate: the candidate, as `plan` lists it (JSON).
        start: the model to start from.
        pretrain_data: the pretraining stream's training split; not read where λ = 0.
        finetune_data: the fine-tuning stream's training split; not read where λ = 1.
        model: output, a model folder.
        metrics: output, final losses and counts.
    """
    chosen = Candidate.from_json(candidate)
    weight = chosen.mix_weight
    text, labelled = DataManifest.load(pretrain_data.path), DataManifest.load(finetune_data.path)
    before = ModelCard.load(start.path)
    if before.id != config.mixed.start:
        raise RefusedError(
            f"mixed.start: is {config.mixed.start}, but this pipeline was compiled to start from {before.id}; "
            "compile it again with the new configuration"
        )
    words = load_tokenizer(start.path)
    if labelled.ends_with_eos:
        append_eos(words)
    network = load_model(start.path)
    if labelled.labels:
        network.add_head(labelled.labels, config.seed)

    pretrain = finetune = None
    if weight > 0:
        pretrain = PretrainStream(Documents(pretrain_data.path, "train"), config.max_length, config.seed)
    if weight < 1:
        classify = labelled.task == "classification"
        finetune = FinetuneStream(Documents(finetune_data.path, "train"), config.seed, classify=classify)
    what_to_read = mix(pretrain, finetune, config.mixed.batch_size, config.max_length, config.mixed.replay_share)
    result = train(network, what_to_read, config.mixed, weight, words.pad_token_id, config.seed, context)
    card = ModelCard(
        id=chosen.id,
        kind="mixed",
        start=before.id,
        mix_weight=weight,
        realised_mix_weight=result.realised_mix_weight,
        has_task_head=weight < 1 or before.has_task_head,
        labels=labelled.labels,
        params=config.mixed.model_dump(mode="json"),
        data={"pretrain": text.digest, "finetune": labelled.digest},
        base=before.base,
        mlflow_runs={**before.mlflow_runs, "prepare finetune": labelled.mlflow_run or ""},
    )
    save_trained(network, words, card, result, context, model, metrics)
