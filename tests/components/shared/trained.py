"""Data of both streams and short trainings on them, for the tests of the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixtune.components.shared.config import Task, Training
from mixtune.components.shared.data.prepared import Documents
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.model.packing import Segment
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.training.loop import train
from mixtune.components.shared.training.mix_weight import Constant, MixWeight
from mixtune.components.shared.training.result import Result
from mixtune.components.shared.training.streams import FinetuneStream, Mix, PretrainStream, UnreadExamples, make_mix
from mixtune.components.shared.training.variant import TrainingVariant

from .tiny import ENCODERS, targets_of, tiny_masking, tiny_model, write_watched

PAD, LENGTH = 60, 32


def write_both(folder: Path, task: Task, text: int = 40, labels: int = 24) -> Path:
    """Both streams in one folder."""
    return write_watched(folder, task, text, labels)


def both(folder: Path, task: Task, weight: float | None = 0.5, masked: bool = False, batch_size: int = 8) -> Mix:
    """What an optimizer step reads where λ is `weight`; None for one that is no constant."""
    examples = Documents(folder / "labels", "train")
    masking = tiny_masking() if masked else None
    text = PretrainStream(Documents(folder / "text", "train"), LENGTH, 0, masking) if weight != 0 else None
    labelled = FinetuneStream(examples, 0, task) if weight != 1 else None
    return make_mix(
        text, labelled, batch_size, LENGTH, 0.5, UnreadExamples(len(examples), len(examples.flat) / len(examples))
    )


def settings_of(**options: object) -> Training:
    """Training options for a second's work."""
    values = {"steps": 6, "learning_rate": 1e-2, "precision": "float32", "log_every_steps": 1}
    return Training.model_validate(values | options)


def run(
    folder: Path,
    task: Task = "classification",
    architecture: str = "llama",
    weight: float | MixWeight = 0.3,
    variant: TrainingVariant | None = None,
    model: MixedModel | None = None,
    batch_size: int = 8,
    **options: object,
) -> tuple[MixedModel, Result]:
    """Trains a tiny model on both streams, or on one where λ is 0 or 1."""
    model = model or tiny_model(architecture, task=task)
    constant = weight if isinstance(weight, (int, float)) else None
    what_to_read = both(folder, task, constant, architecture in ENCODERS, batch_size)
    chosen = Constant(float(weight)) if isinstance(weight, (int, float)) else weight
    return model, train(model, what_to_read, settings_of(**options), chosen, PAD, 0, Context.for_tests(), variant)


def example(task: Task, tokens: np.ndarray) -> Segment:
    """A labelled example as the streams make it."""
    if task == "generation":
        return Segment(tokens, 2)
    second = len(tokens) // 2 if task == "question_answering" else -1
    label = int(tokens[0]) % 2 if task == "classification" else -1
    return Segment(tokens, len(tokens), label, targets=targets_of(task, tokens), second_from=second)
