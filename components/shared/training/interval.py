"""What a training logs: sums over the steps since the last logged step, and the entry that they become."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .mix_weight import Weights, realised
from .streams import StepData

LogEntry = dict[str, float | int | None]


@dataclass
class Interval:
    """Sums since the last logged step. Sums over this rank's rows are reduced over all ranks when they are logged."""

    sums: dict[str, Tensor]
    steps: int = 0
    mix_weight: float | None = None
    realised: float = 0.0
    num_pretrain: int = 0
    num_finetune: int = 0
    sum_finetune: float = 0.0
    tokens_pretrain: int = 0
    tokens_finetune: int = 0
    gradients: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def copy(self) -> Interval:
        """Returns a snapshot."""
        return replace(self, sums={name: value.clone() for name, value in self.sums.items()})

    def state(self) -> dict[str, Any]:
        """Returns the state as JSON, with the elapsed time instead of the process's clock."""
        numbers = {name: value for name, value in vars(self).items() if name not in ("sums", "started")}
        sums = {name: float(value) for name, value in self.sums.items()}
        return {**numbers, "sums": sums, "seconds": time.monotonic() - self.started}

    @classmethod
    def restored(cls, state: dict[str, Any], device: torch.device) -> Interval:
        """Creates an interval from the state that `state` returned."""
        numbers = dict(state)
        sums = {
            name: torch.tensor(value, device=device, dtype=torch.float64) for name, value in numbers.pop("sums").items()
        }
        return cls(sums, started=time.monotonic() - numbers.pop("seconds"), **numbers)

    @classmethod
    def new(cls, device: torch.device) -> Interval:
        """Creates an empty interval."""
        names = ("pretrain", "finetune", "kl", "l2sp", "router_aux", "positions")
        return cls({name: torch.zeros((), device=device, dtype=torch.float64) for name in names})

    def count(self, data: StepData, mix_weight: float | None, weights: Weights) -> float:
        """Counts a step. Returns its realised λ."""
        share = realised(weights, data.num_pretrain, data.sum_finetune)
        self.steps += 1
        self.mix_weight, self.realised = mix_weight, self.realised + share
        self.num_pretrain += data.num_pretrain
        self.num_finetune += data.num_finetune
        self.sum_finetune += data.sum_finetune
        self.tokens_pretrain += data.tokens_pretrain
        self.tokens_finetune += data.tokens_finetune
        return share

    def entry(self, accelerator: Accelerator, step: int, norm: float, rates: dict[str, float]) -> LogEntry:
        """Returns means over the interval and counts for each stream, from sums over all ranks."""
        gathered = accelerator.reduce(torch.stack(list(self.sums.values())), "sum")
        sums = dict(zip(self.sums, gathered.tolist(), strict=True))
        pretrain = sums["pretrain"] / self.num_pretrain if self.num_pretrain else None
        finetune = sums["finetune"] / self.sum_finetune if self.sum_finetune else None
        share = self.realised / self.steps
        tokens = self.tokens_pretrain + self.tokens_finetune
        seconds = max(time.monotonic() - self.started, 1e-9)
        entry: LogEntry = {
            "step": step,
            "loss": share * (pretrain or 0.0) + (1 - share) * (finetune or 0.0),
            "loss_pretrain": pretrain,
            "loss_finetune": finetune,
            "mix_weight": self.mix_weight,
            "realised_mix_weight": share,
            "replay_share": self.tokens_pretrain / max(tokens, 1),
            **rates,
            "grad_norm": norm,
            "supervised_pretrain": self.num_pretrain,
            "supervised_finetune": self.num_finetune,
            "tokens_pretrain": self.tokens_pretrain,
            "tokens_finetune": self.tokens_finetune,
            "tokens_per_second": tokens / seconds,
            "padding_share": max(0.0, 1 - tokens / max(sums["positions"], 1)),
        }
        if sums["kl"]:
            entry["kl"] = sums["kl"] / max(self.tokens_finetune, 1)
        if sums["l2sp"]:
            entry["l2sp"] = sums["l2sp"] / self.steps
        if sums["router_aux"]:
            entry["router_aux_loss"] = sums["router_aux"] / self.steps
        return entry | self.gradients
