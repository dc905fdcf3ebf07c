"""Writes a trained model with its card, curves and metrics. All three training stages use it."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..artifacts import ArtifactLike, ModelCard, write_jsonl
from ..checkpoints.store import megabytes
from ..errors import MixtuneError
from ..model.adapters import is_adapted, save_adapted
from ..model.loading import load_model, weights_location
from ..model.mixed_model import MixedModel
from ..model.sharded_saving import save_sharded
from ..model.sharding import is_sharded
from ..running.context import Context
from .plain_comparison import compare_with_transformers
from .result import Result
from .streams import FinetuneStream


def save_trained(
    model: MixedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
    result: Result,
    context: Context,
    output: ArtifactLike,
    metrics: ArtifactLike,
    examples: FinetuneStream | None = None,
    start: str | None = None,
) -> None:
    """Writes a model folder. The card is written last, so that a folder with a card is complete. Only the main process writes.

    All processes call this: those of a sharded training each give their part of the weights.

    Args:
        model: afterwards without weights, if there are examples and it is not sharded.
        card: fields that are known before training; counts and times are filled in from `result`.
        output: the model artifact.
        metrics: output artifact, metrics for the KFP UI.
        examples: labelled examples that the model was trained on; the saved model is compared with plain transformers on some.
        start: folder of the model that training started from. Adapters that are not merged are saved on top of it.

    Raises:
        MixtuneError: if there is no space.
        RefusedError: if plain transformers gives other outputs.
    """
    if not card.has_task_head:
        # λ = 1 never trained the task head, and plain transformers would load it without a warning.
        model.task, model.kind, model.labels = None, None, None
    if result.main:
        Path(output.path).mkdir(parents=True, exist_ok=True)
    elif not is_sharded(model):
        return
    try:
        if start is not None and is_adapted(model):
            save_adapted(model, Path(output.path), tokenizer, *weights_location(start), result.main)
        elif is_sharded(model):
            save_sharded(model, output.path, tokenizer, result.main)
        else:
            model.save(output.path, tokenizer)
    except Exception as error:
        if "o space left" not in str(error):  # safetensors wraps errors of the file system in its own exception
            raise
        raise MixtuneError(_no_space(model, Path(output.path))) from None
    if not result.main:
        return
    if examples is not None:
        if is_sharded(model):
            model = load_model(output.path)
        compare_with_transformers(model, Path(output.path), tokenizer, examples)
    save_card(tokenizer, card, result, context, output, metrics)
    if result.checkpoints is not None:
        result.checkpoints.finish()


def _no_space(model: MixedModel, folder: Path) -> str:
    need = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    free = shutil.disk_usage(folder).free
    return (
        f"model: {folder} has no room for the trained model, which needs {megabytes(need)} where {megabytes(free)} are free; "
        "free space and run again"
    )


def save_card(
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
    result: Result,
    context: Context,
    output: ArtifactLike,
    metrics: ArtifactLike,
) -> None:
    """Writes everything except the weights, which the card can locate elsewhere. See `save_trained` for the arguments."""
    if not result.main:
        return
    trained = result.steps > 0
    card = card.model_copy(
        update={
            "tokens": result.tokens,
            "steps": result.steps,
            "realised_mix_weight": result.realised_mix_weight if trained else None,
            "pull_back": result.pull_back,
            "tried": result.tried,
            "stopped": result.stopped,
            "seconds": round(result.seconds, 2),
            "utilisation": result.utilisation,
            "device": result.device,
            "precision": result.precision,
            "mlflow_runs": {
                **{step: run for step, run in card.mlflow_runs.items() if run},
                **({context.title: context.tracker.run_id} if context.tracker.run_id else {}),
            },
        }
    )
    folder = Path(output.path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    write_jsonl(folder / "training.jsonl", result.curve)
    card.save(folder)

    last = result.curve[-1] if result.curve else {}
    numbers = {
        name: last[name]
        for name in ("loss", "loss_pretrain", "loss_finetune", "replay_share")
        if last.get(name) is not None
    }
    numbers |= {f"tokens_{stream}": count for stream, count in result.tokens.items()}
    numbers["seconds"] = card.seconds
    watched = [float(entry["watch_seconds"] or 0) for entry in result.curve if "watch_seconds" in entry]
    if watched:
        numbers["watch_seconds"] = sum(watched)
    numbers |= {name: value for name, value in card.utilisation.model_dump().items() if value is not None}
    if card.realised_mix_weight is not None:
        numbers["realised_mix_weight"] = card.realised_mix_weight
    if card.pull_back is not None:
        numbers["pull_back"] = card.pull_back
    if card.tried:
        numbers |= {"trainings": len(card.tried), "forgetting_before_pull_back": card.tried[-1].forgetting}
    metrics.metadata.update({name: float(value or 0) for name, value in numbers.items()})
    output.metadata.update({"candidate": card.id, "kind": card.kind, "mlflow_run": context.tracker.run_id or ""})
    if card.mix_weight is not None:
        output.metadata["lambda"] = card.mix_weight
    context.tracker.log_metrics({f"final_{name}": value for name, value in numbers.items()})
    for stream, digest in card.data.items():
        context.tracker.log_input(f"{stream} stream", digest, "prepare", "training")
    context.tracker.set_tags({"mixtune.candidate": card.id, "mixtune.kind": card.kind, "mixtune.base": card.base})
    context.say(
        f"{card.id}: saved after {card.steps} steps, {sum(result.tokens.values()):,} tokens, {card.seconds:.0f} s"
    )
