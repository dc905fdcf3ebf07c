"""Options of the `compare` step: the selection of a candidate, and the gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..shared.section import Section

POWER = 0.8
"""Chance that a candidate as good as fine-tuning alone is to have of meeting `max_score_drop`, where the report says how many
examples are needed."""


class Gate(Section):
    """Conditions that a candidate must meet to be registered. They are checked on the dev split; the test split is only
    reported."""

    rule: Literal["least_forgetting_of_best", "best_task_score", "least_forgetting"] = "least_forgetting_of_best"
    """Which of the candidates that meet the gate is selected. `least_forgetting_of_best`: of those whose task score is not
    measurably below the best one's, the one that forgets least. `best_task_score` and `least_forgetting` look at one quantity
    only."""
    beat_trivial: bool = True
    """Whether the candidate and fine-tuning alone must score measurably higher than the best trivial answer: the most frequent
    label or answer, the mean, an empty answer, a copy of the prompt. The lower end of the interval of the paired difference
    must be above 0."""
    max_score_drop: float = Field(0.02, ge=0, le=2)
    """Maximum drop of the task score below that of `finetuned`: the lower end of the interval of the paired difference must be
    above the negative of this value."""
    max_score_drop_vs_champion: float | None = Field(None, ge=0, le=2)
    """Maximum drop of the task score below that of the champion, the registered model in use; null means `max_score_drop`. It
    applies if there is a champion with a task score. With 1 or more, any score between 0 and 1 passes."""
    min_task_score: float | None = None
    """Minimum task score; null means no limit."""
    max_forgetting: float | None = None
    """Maximum forgetting, in bits per byte; null means no limit."""
    max_forgetting_share: float | None = Field(0.5, ge=0)
    """Maximum forgetting, as a fraction of what fine-tuning alone forgets; null means no limit."""
    max_capability_drop: float | None = Field(None, ge=0, le=1)
    """Maximum drop, below `pretrained`, of the score on any task of `evaluate.capabilities` or `evaluate.lm_eval`, if the score
    is a mean over examples; null means no limit."""
    on_miss: Literal["skip", "fail"] = "skip"
    """How the run ends if no candidate meets the gate. Nothing is registered; `skip` ends the run as succeeded, `fail` ends
    it as failed after the report is written and recorded. `mixtune run` ends with status 3 in both cases."""
    interval: float = Field(0.95, gt=0.5, lt=1)
    """Coverage of the intervals in the report."""
    resamples: int = Field(2000, ge=200, le=100_000)
    """Number of bootstrap resamples for each interval."""

    @property
    def drop_vs_champion(self) -> float:
        """Returns `max_score_drop_vs_champion`, or `max_score_drop` if it is null."""
        limit = self.max_score_drop_vs_champion
        return self.max_score_drop if limit is None else limit


class CompareStep(Section):
    """The configuration of the `compare` task, which `plan` creates."""

    name: str
    seed: int
    gate: Gate
