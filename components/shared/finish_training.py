"""What the three training stages do alike when the loop has ended: write the model, its card, its curves and metrics."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .artifacts import ArtifactLike, ModelCard, write_jsonl
from .context import Context
from .model import MixedModel
from .training import Result


def save_trained(
    network: MixedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
    result: Result,
    context: Context,
    model: ArtifactLike,
    metrics: ArtifactLike,
) -> None:
    """Writes a model folder, the card last, so that a folder that has one is whole.

    Args:
        card: what is known before training; counts and times are filled in from `result`.
        model: output artifact.
        metrics: output artifact, the numbers to see in the KFP UI.
    """
    card = card.model_copy(
        update={
            "tokens": result.tokens,
            "steps": int(card.params["steps"]),
            "seconds": round(result.seconds, 2),
            "device": result.device,
            "precision": result.precision,
            "mlflow_runs": {
                **{step: run for step, run in card.mlflow_runs.items() if run},
                **({context.title: context.tracker.run_id} if context.tracker.run_id else {}),
            },
        }
    )
    folder = Path(model.path)
    folder.mkdir(parents=True, exist_ok=True)
    network.save(folder, tokenizer)
    write_jsonl(folder / "training.jsonl", result.curve)
    card.save(folder)

    last = result.curve[-1] if result.curve else {}
    numbers = {
        name: last[name]
        for name in ("loss", "loss_pretrain", "loss_finetune", "realised_mix_weight", "replay_share")
        if last.get(name) is not None
    }
    numbers |= {f"tokens_{stream}": count for stream, count in result.tokens.items()}
    numbers["seconds"] = card.seconds
    metrics.metadata.update({name: float(value or 0) for name, value in numbers.items()})
    model.metadata.update({"candidate": card.id, "kind": card.kind, "mlflow_run": context.tracker.run_id or ""})
    if card.mix_weight is not None:
        model.metadata["lambda"] = card.mix_weight
    context.tracker.log_metrics({f"final_{name}": value for name, value in numbers.items()})
    for stream, digest in card.data.items():
        context.tracker.log_input(f"{stream} stream", digest, "prepare", "training")
    context.tracker.set_tags({"mixtune.candidate": card.id, "mixtune.kind": card.kind, "mixtune.base": card.base})
    context.say(
        f"{card.id}: saved after {card.steps} steps, {sum(result.tokens.values()):,} tokens, {card.seconds:.0f} s"
    )
