"""Results on tasks that `evaluate` passes to `compare`: one row for each task, metric and filter.

The tasks are those of lm-evaluation-harness and of mixtune's own suite.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

HARNESS_FILE = "lm_eval.jsonl"
"""File in a candidate's folder of an evaluation. Each row is a `Measure`."""
KL_FILE = "dev.kl.jsonl"
"""File in a candidate's folder of an evaluation: KL(pretrained ‖ candidate) on the input of each example that was read. A row
has `id`, `tokens` and `nats`, the sum over the tokens."""


class Measure(BaseModel):
    """One metric of one task, measured on one candidate."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    suite: Literal["lm_eval", "capabilities"] = "lm_eval"
    """`capabilities` is mixtune's own."""
    task: str
    metric: str
    filter: str
    """Name of the filter that extracted the answers from the generated text; `none` for most tasks."""
    value: float | None
    """None if it is not finite."""
    stderr: float | None
    """Standard error; None if the value is not a mean over examples."""
    examples: int
    higher_is_better: bool | None = None
    few_shot: int | None = None
    digest: str
    """Digest of the examples and their prompts."""
    values: list[float] | None
    """The value of each example; None if `value` is not their mean."""

    @property
    def words(self) -> str:
        """Returns the column header for this measure."""
        return f"{self.task}, {self.metric}" + ("" if self.filter == "none" else f" ({self.filter})")

    @property
    def metric_name(self) -> str:
        """Returns the measure's name in a form that MLflow accepts."""
        kept = [self.task, self.metric, *([self.filter] if self.filter != "none" else [])]
        return ".".join([self.suite, *(re.sub(r"[^A-Za-z0-9_-]", "_", one) for one in kept)])
