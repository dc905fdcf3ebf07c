"""What `evaluate` hands to `compare` about tasks of lm-evaluation-harness: a row for each task, metric and filter."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

HARNESS_FILE = "lm_eval.jsonl"
"""In a candidate's folder of an evaluation; a `Measure` in each row."""


class Measure(BaseModel):
    """One metric of one task, measured on one candidate."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    task: str
    metric: str
    filter: str
    """How answers were cut out of what the model wrote; `none` for most tasks."""
    value: float | None
    """None where it is not finite."""
    stderr: float | None
    """Standard error; None where the value is not a mean over examples."""
    examples: int
    higher_is_better: bool | None = None
    few_shot: int | None = None
    digest: str
    """Of the examples and their prompts."""
    values: list[float] | None
    """Of each example; None where the value is not their mean."""

    @property
    def words(self) -> str:
        """What it measures, for the head of a column."""
        return f"{self.task}, {self.metric}" + ("" if self.filter == "none" else f" ({self.filter})")

    @property
    def metric_name(self) -> str:
        """The same as a name that MLflow accepts."""
        kept = [self.task, self.metric, *([self.filter] if self.filter != "none" else [])]
        return ".".join(["lm_eval", *(re.sub(r"[^A-Za-z0-9_-]", "_", one) for one in kept)])
