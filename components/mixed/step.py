"""Mixed fine-tuning: L = λ · L_pretrain + (1 - λ) · L_finetune, for one candidate: λ, a schedule, a budget, or a control."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from ..shared.artifacts import ArtifactLike, ModelCard, Tried
from ..shared.checkpoints.resume import TrainingJob
from ..shared.config import Budget, Watch
from ..shared.data.prepared import DataManifest, Documents
from ..shared.errors import RefusedError
from ..shared.model.device import loading_device, loads_as_stored, pick_device
from ..shared.model.loading import add_task_head, load_model
from ..shared.model.masking import Masking
from ..shared.model.mixed_model import MixedModel
from ..shared.model.tokenizer import append_eos, load_tokenizer
from ..shared.running.context import Context
from ..shared.task_kinds import TASK_KINDS
from ..shared.training.budget_search import BudgetSearch
from ..shared.training.control import ControlText
from ..shared.training.loop import train
from ..shared.training.mix_weight import Constant, MixWeight, Pooled, Sampled, Scheduled
from ..shared.training.reference_models import ReferenceModel
from ..shared.training.result import Result
from ..shared.training.saving import save_trained
from ..shared.training.stream_gradients import GradientScaled
from ..shared.training.streams import FinetuneStream, Mix, PretrainStream, SampledMix, UnreadExamples, make_mix
from ..shared.training.variant import TrainingVariant
from ..shared.training.watching import Watcher, watched_digest
from .config import NO_LOSSES, MixedCandidate, MixedStep, MixedTraining
from .generated import own_data
from .to_budget import train_to_budget

NO_CONTROL_TEXT = (
    "data.pretrain.control_fraction: leaves no control text, on which forgetting is measured for a budget; raise it, or give "
    "more pretraining text"
)


def run(
    config: MixedStep,
    *,
    context: Context,
    candidate: str,
    start: ArtifactLike,
    pretrain_data: ArtifactLike,
    finetune_data: ArtifactLike,
    pretrained: ArtifactLike | None = None,
    model: ArtifactLike,
    metrics: ArtifactLike,
) -> None:
    """Trains one `mixed` candidate.

    Args:
        candidate: the candidate, as `plan` lists it (JSON).
        start: the model to start from.
        pretrain_data: training split of the pretraining stream; not read if λ = 0.
        finetune_data: training split of the fine-tuning stream; not read if λ = 1.
        pretrained: the pretrained model, if training starts from another one: the reference of forgetting, and the start of
            fine-tuning alone.
        model: output, a model folder.
        metrics: output, final losses and counts.
    """
    chosen = MixedCandidate.from_json(candidate)
    text, labelled = DataManifest.load(pretrain_data.path), DataManifest.load(finetune_data.path)
    if chosen.alone and pretrained is not None:  # the others start from the fine-tuned model
        start = pretrained
    before = ModelCard.load(start.path)
    if before.id != ("pretrained" if chosen.alone else config.mixed.start):
        raise RefusedError(
            f"mixed.start: is {config.mixed.start}, but this pipeline was compiled to start from {before.id}; "
            "compile it again with the new configuration"
        )
    tokenizer = load_tokenizer(start.path)
    if labelled.ends_with_eos:
        append_eos(tokenizer)
    training = config.mixed
    seed = config.seed if chosen.seed is None else chosen.seed
    if chosen.learning_rate is not None:
        head = training.head_learning_rate or training.learning_rate
        training = training.model_copy(update={"learning_rate": chosen.learning_rate, "head_learning_rate": head})
    if chosen.replay_share is not None:
        training = training.model_copy(update={"replay_share": chosen.replay_share})
    task = labelled.task
    assert task is not None
    if chosen.flow and TASK_KINDS[task].head is not None and not before.has_task_head:
        raise RefusedError(f"{chosen.id}: {NO_LOSSES.format(task=task)}")
    if chosen.forgetting_budget is not None and not chosen.lora_merge and before.kind != "pretrained":
        raise RefusedError(
            f"{chosen.id}: adapters that are not merged can be pulled back to the start model only, but forgetting is measured "
            "against another one; set mixed.start to pretrained, or mixed.controls.lora_merge to true"
        )
    device = pick_device() if chosen.lora_4bit else loading_device(training)
    # Before the training, text is generated in float32, and OSF decomposes matrices in float32.
    before_training = bool(chosen.generated_tokens or chosen.rewrite_prompt or chosen.osf_share)

    def load_start() -> MixedModel:
        found = load_model(
            start.path,
            device,
            as_stored=loads_as_stored(training) and not before_training,
            attention=training.attention,
            quantized=chosen.lora_4bit,
        )
        add_task_head(found, task, labelled.labels, seed)
        return found

    mixed_model = load_start()

    masking = Masking.of(tokenizer, config.mask_probability) if mixed_model.objective == "masked_lm" else None
    pretrain = finetune = None
    examples_read = Documents(finetune_data.path, "train") if chosen.mix_weight != 1 else None
    own = own_data(
        chosen,
        examples_read,
        mixed_model,
        tokenizer,
        config.max_length,
        seed,
        training.precision,
        Path(model.path),
        context,
    )
    if chosen.mix_weight != 0:
        text_read = own.documents if own and chosen.generated_tokens else Documents(pretrain_data.path, "train")
        pretrain = PretrainStream(text_read, config.max_length, seed, masking)
    if examples_read is not None:
        examples_read = own.documents if own and chosen.rewrite_prompt else examples_read
        finetune = FinetuneStream(examples_read, seed, task)
    examples = labelled.splits["train"]
    mix_with = partial(
        make_mix,
        finetune=finetune,
        batch_size=training.batch_size,
        max_length=config.max_length,
        replay_share=training.replay_share,
        unread=UnreadExamples(examples.documents, examples.tokens / max(examples.documents, 1)),
    )
    data_mix = mix_with(pretrain)
    steps = data_mix.steps(training)
    if chosen.sampled:
        data_mix = SampledMix.of(data_mix, steps, seed)
    watch = Watcher.load(
        finetune_data.path,
        _stopping(config.watch, chosen),
        task if finetune is not None else None,
        masking,
        config.max_length,
    )
    budget = chosen.forgetting_budget
    reference = _reference(before, start, pretrained) if budget is not None or watch is not None else start
    search, per_bit = None, _nats_per_bit(text, masked=masking is not None)
    if budget is not None:
        if "control" not in text.splits:
            raise RefusedError(NO_CONTROL_TEXT)
        options = chosen.budget or Budget()
        control_text = Documents(pretrain_data.path, "control")
        control = ControlText.plan(
            PretrainStream(control_text, config.max_length, seed, masking and masking.for_measuring()),
            options.cost,
            steps * data_mix.mean_tokens,
            config.max_length,
            tokenizer.pad_token_id,
            training.micro_batch_size,
        )
        context.say(f"control text: {len(control.windows):,} windows, {control.num_tokens.sum():,} predicted tokens")
        search = BudgetSearch(budget * per_bit, options, control, partial(_load, reference, training))
    identity = {
        "config": config.model_dump(mode="json"),
        "candidate": chosen.model_dump(mode="json"),
        "data": [text.digest, labelled.digest],
        **watched_digest(finetune_data.path, config.watch),
    }

    def train_once(model: MixedModel, mix_weight: MixWeight, job: TrainingJob) -> Result:
        if training.scale == "gradient" and data_mix.has_both and isinstance(mix_weight, Constant | Scheduled):
            mix_weight = GradientScaled(mix_weight)
        variant = TrainingVariant(
            search=search,
            watch=watch,
            reference=_load(reference, training) if reference is not start else None,
            start=ReferenceModel(model) if chosen.kl_weight or chosen.l2sp_weight else None,
            kl_weight=chosen.kl_weight,
            l2sp_weight=chosen.l2sp_weight,
            lora_rank=chosen.lora_rank,
            lora_merge=chosen.lora_merge,
            osf_share=chosen.osf_share,
            flow=chosen.flow,
        )
        # With λ = 0 a training to a budget is fine-tuning alone, which reads no text.
        mix = mix_with(None) if search is not None and mix_weight.at(0) == 0 else data_mix
        return train(model, mix, training, mix_weight, tokenizer.pad_token_id, seed, context, variant, job)

    job = TrainingJob(chosen.id, identity, Path(model.path))
    if search is None:
        result = train_once(mixed_model, _mix_weight(chosen, steps, data_mix), job)
    else:
        mixed_model, result = train_to_budget(search, mixed_model, load_start, train_once, job, context)
        result.tried = [Tried(mix_weight=one.mix_weight, forgetting=one.forgetting / per_bit) for one in search.trials]
    if own is not None:
        result.seconds += own.cost.seconds
    card = ModelCard(
        id=chosen.id,
        kind="mixed",
        name=chosen.name,
        start=before.id,
        mix_weight=chosen.mix_weight,
        forgetting_budget=chosen.forgetting_budget,
        has_task_head=finetune is not None or before.has_task_head,
        quantized=chosen.lora_4bit,
        labels=labelled.labels,
        chat=labelled.has_chats,
        params={
            **training.model_dump(mode="json"),
            "candidate": chosen.model_dump(mode="json", exclude_defaults=True, exclude={"id", "name"}),
        },
        data={
            "pretrain": own.digest if own and chosen.generated_tokens else text.digest,
            "finetune": own.digest if own and chosen.rewrite_prompt else labelled.digest,
        },
        generation=own.cost if own is not None else None,
        base=before.base,
        mlflow_runs={**before.mlflow_runs, "prepare finetune": labelled.mlflow_run or ""},
    )
    save_trained(mixed_model, tokenizer, card, result, context, model, metrics, finetune, start.path)


def _mix_weight(chosen: MixedCandidate, steps: int, mix: Mix) -> MixWeight:
    if chosen.schedule is not None:
        return Scheduled(chosen.schedule, steps)
    if chosen.pooled:
        return Pooled()
    assert chosen.mix_weight is not None
    if isinstance(mix, SampledMix):
        return Sampled(chosen.mix_weight, *mix.mean_counts())
    return Constant(chosen.mix_weight)


def _nats_per_bit(text: DataManifest, masked: bool) -> float:
    """Returns nats per predicted token that are one bit per byte, of the training split."""
    of_text = text.splits["train"]
    # A masked LM never predicts the special tokens at a document's ends; a causal LM has no loss on the first token.
    predicted = of_text.supervised_tokens
    if predicted is None:
        predicted = of_text.tokens - of_text.documents * (2 if masked else 1)
    return math.log(2) * of_text.bytes / max(predicted, 1)


def _stopping(watch: Watch, chosen: MixedCandidate) -> Watch:
    """Returns the options without a limit if the candidate controls its forgetting itself."""
    return watch if chosen.forgetting_budget is None else watch.model_copy(update={"max_forgetting": None})


def _reference(card: ModelCard, start: ArtifactLike, pretrained: ArtifactLike | None) -> ArtifactLike:
    """Returns the model that forgetting is measured against."""
    if card.kind == "pretrained":
        return start
    if pretrained is None:
        raise RefusedError(
            "pretrained: is required to measure forgetting where training starts from another model; give the pretrained model "
            "too"
        )
    return pretrained


def _load(model: ArtifactLike, training: MixedTraining) -> MixedModel:
    return load_model(
        model.path, loading_device(training), as_stored=loads_as_stored(training), attention=training.attention
    )
