"""What a training gives back besides the trained model."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..artifacts import Stopped, Tried, Utilisation
from ..checkpoints.store import CheckpointStore
from ..running.processes import is_main
from .interval import LogEntry


@dataclass
class Result:
    """The result of a training.

    Attributes:
        curve: one object for each logged step.
        steps: optimizer steps.
        tokens: tokens processed, by stream.
        realised_mix_weight: pretraining tokens' share of the gradient weights, averaged over the steps.
        pull_back: α of the pull back to the forgetting budget, 1 if there was none; None without a budget.
        tried: λ and forgetting of each training to a budget; empty without a budget.
        stopped: when and why the training was stopped early; None if it was not.
        seconds: wall-clock time of the loop, summed over all attempts.
        flops: model FLOPs, of all processes and attempts.
        utilisation: what the training made of its machine.
        main: whether this is the process that writes the outputs.
        checkpoints: the checkpoint store; to be marked as finished after the model is written.
    """

    curve: list[LogEntry] = field(default_factory=list)
    steps: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"pretrain": 0, "finetune": 0})
    realised_mix_weight: float = 0.0
    pull_back: float | None = None
    tried: list[Tried] = field(default_factory=list)
    stopped: Stopped | None = None
    seconds: float = 0.0
    flops: float = 0.0
    utilisation: Utilisation = field(default_factory=Utilisation)
    device: str = "cpu"
    precision: str = "float32"
    processes: int = 1
    main: bool = field(default_factory=is_main)
    checkpoints: CheckpointStore | None = None
