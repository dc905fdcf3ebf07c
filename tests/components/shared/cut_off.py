"""A training that can be cut off and started again, as a killed process would be, inside one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixtune.components.shared.checkpoints.resume import TrainingJob
from mixtune.components.shared.config import Task
from mixtune.components.shared.model.mixed_model import MixedModel
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.tracking.tracker import Tracker
from mixtune.components.shared.training.loop import train
from mixtune.components.shared.training.mix_weight import Constant, MixWeight
from mixtune.components.shared.training.result import Result
from mixtune.components.shared.training.variant import TrainingVariant

from .tiny import ENCODERS, tiny_model
from .trained import PAD, both, settings_of, write_both

STEPS = 9
TIMES = ("tokens_per_second", "watch_seconds")


class CutOffError(Exception):
    """Stands for a kill, where the process is to live on."""


@dataclass
class Listening(Context):
    """Keeps what is said."""

    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.lines.append(line)


class Training:
    """One training that can be cut off after some steps and started again.

    Args:
        make_weight: λ, made anew for each attempt as a new process would.
        make_variant: from the start model and the data folder.
    """

    def __init__(
        self,
        folder: Path,
        task: Task = "classification",
        architecture: str = "gpt2",
        weight: float | None = 0.3,
        make_weight: Callable[[], MixWeight] | None = None,
        make_variant: Callable[[MixedModel, Path], TrainingVariant] | None = None,
        **options: object,
    ) -> None:
        self.folder = write_both(folder, task)
        self.task, self.architecture, self.weight = task, architecture, weight
        self.make_weight = make_weight or (lambda: Constant(weight or 0.0))
        self.make_variant = make_variant or (lambda model, folder: TrainingVariant())
        self.options = {"steps": STEPS, "checkpoint_steps": 2, "micro_batch_size": 2, "warmup_steps": 2, **options}
        self.lines: list[str] = []

    def run(self, cut_off_after: int | None = None, title: str = "a") -> tuple[MixedModel, Result]:
        """One attempt."""
        model = tiny_model(self.architecture, task=self.task)
        for module in model.modules():  # with dropout, so that random states matter
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        mix = both(self.folder, self.task, self.weight, self.architecture in ENCODERS)
        if cut_off_after is not None:
            object.__setattr__(mix, "step", _cutting(mix.step, cut_off_after))
        context = Listening(title="test", tracker=Tracker.off(), quiet=True, lines=self.lines)
        job = TrainingJob(title, {"candidate": title}, self.folder / "model")
        variant = self.make_variant(model, self.folder)
        done = train(model, mix, settings_of(**self.options), self.make_weight(), PAD, 0, context, variant, job)
        return model, done


def _cutting(step: Callable[[int], Any], after: int) -> Callable[[int], Any]:
    def cut(number: int) -> Any:
        if number == after:
            raise CutOffError
        return step(number)

    return cut


def equal(left: MixedModel, right: MixedModel) -> bool:
    others = dict(right.named_parameters())
    return all(torch.equal(weight, others[name]) for name, weight in left.named_parameters())


def curve(result: Result) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in result.curve]
