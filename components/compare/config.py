"""Options of the `compare` step: the choice among the candidates, and the gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..shared.config import Section


class Gate(Section):
    """What a candidate must meet to be registered. Decided on the dev split; the test split is reported once."""

    rule: Literal["least_forgetting", "best_task_score"] = "best_task_score"
    """Which of the candidates that meet the gate is selected: the best task score, or the least forgetting."""
    max_score_drop: float = Field(0.02, ge=0)
    """The task score may be below `finetuned` by no more than this: the lower end of the interval of the paired difference
    must be above its negative."""
    max_score_drop_vs_champion: float | None = Field(None, ge=0)
    """The same against the champion, the registered model in use; null is `max_score_drop`. It applies only where there is a
    champion that has a task score; 1 or more asks nothing of a score between 0 and 1."""
    min_task_score: float | None = None
    """Lowest task score that may be registered; null sets no such limit."""
    max_forgetting: float | None = None
    """Most forgetting that may be registered, in bits per byte; null sets no such limit."""
    max_forgetting_share: float | None = Field(0.5, ge=0)
    """Most forgetting that may be registered, as a share of what fine-tuning alone forgets; null sets no such limit."""
    on_miss: Literal["skip", "fail"] = "skip"
    """What happens where no candidate meets the gate, beside that nothing is registered: `skip` ends the run well, `fail` ends
    it as failed once the report is written and on record. `mixtune run` ends with status 3 either way."""
    interval: float = Field(0.95, gt=0.5, lt=1)
    """Coverage of every interval in the report."""
    resamples: int = Field(2000, ge=200)
    """Bootstrap resamples for each interval."""

    @property
    def drop_vs_champion(self) -> float:
        """`max_score_drop_vs_champion`, or what null stands for."""
        limit = self.max_score_drop_vs_champion
        return self.max_score_drop if limit is None else limit


class CompareStep(Section):
    """All that the `compare` step reads, as `plan` hands it over."""

    name: str
    seed: int
    gate: Gate
