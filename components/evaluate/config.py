"""Options of the `evaluate` step."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..shared.config import Section
from ..shared.task_kinds import Metric


class LmEval(Section):
    """Tasks of lm-evaluation-harness, measured on every candidate, `pretrained` among them: what the model could do before and
    can do after. Causal models only; needs the extra `lm-eval` where `evaluate` runs."""

    tasks: list[Annotated[str, Field(min_length=1)]] = Field([])
    """Names of tasks, groups or tags, such as `hellaswag`; none by default. The harness gets their data from the hub."""
    tasks_folder: str | None = Field(None, min_length=1)
    """Folder with task files of your own (YAML, in the harness's format). Paths in them are relative to this folder; Python
    functions that they name are run."""
    limit: int | None = Field(None, ge=1)
    """Take no more than this many examples of each task; null takes all."""
    few_shot: int | None = Field(None, ge=0)
    """Solved examples before each question; null is what the task says. A task that says 0 keeps it."""

    @field_validator("tasks")
    @classmethod
    def _each_task_once(cls, tasks: list[str]) -> list[str]:
        if len(set(tasks)) != len(tasks):
            raise ValueError("every task must stand there once")
        return tasks


class Evaluate(Section):
    """Measuring every candidate on the held-out splits of both streams."""

    metric: Metric | None = None
    """The task's main metric: accuracy or macro_f1 (classification), micro_f1 or macro_f1 (multi_label), pearson or spearman
    (regression), exact_match or token_f1 (question answering, generation), also rouge_l, bleu or chrf (generation); null is the
    first of each. All are in 0..1, BLEU and chrF as well; correlations in -1..1."""
    interpolation_alphas: list[Annotated[float, Field(gt=0, lt=1)]] = Field([0.5])
    """For each α, (1 - α) · pretrained + α · finetuned is a candidate at no training cost; an empty list makes none."""
    interpolate_mixed: bool = False
    """The same for each mixed model in the place of the fine-tuned one, as further candidates."""
    max_new_tokens: int = Field(64, ge=1)
    """Generation: longest answer, in tokens."""
    batch_size: int = Field(32, ge=1)
    """Rows or prompts in one forward pass."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Number format of the matrix products in measuring; as in training."""
    max_documents: int | None = Field(2000, ge=1)
    """Measure forgetting on no more than this many held-out documents of each split; null takes all."""

    champion: str | None = Field(None, min_length=1)
    """The model in use, which is measured too and which a candidate must not be worse than: `models:/name@alias` or
    `models:/name/version` in the MLflow registry (made by mixtune; an alias that is not there yet means none), or a model
    folder."""

    lm_eval: LmEval = LmEval()

    @model_validator(mode="after")
    def _each_alpha_once(self) -> Self:
        if len({f"{alpha:g}" for alpha in self.interpolation_alphas}) != len(self.interpolation_alphas):
            raise ValueError("every α in interpolation_alphas must stand there once (six digits count)")
        return self


class References(Section):
    """Models that are measured beside `pretrained`; nothing by default."""

    base: str | None = None
    """The base model, where it was pretrained further: a hub name or a folder."""
    revision: str | None = None
    """Hub revision of `base`."""
    champion: str | None = None
    """The model in use: `models:/name/version` or a folder."""
    fingerprint: str = ""
    """Identifies the content behind both names."""


class LmEvalStep(LmEval):
    """Tasks of lm-evaluation-harness, as `plan` hands them over."""

    fingerprint: str = ""
    """Identifies the content of `tasks_folder`."""


class EvaluateStep(Section):
    """All that one `evaluate` task reads, as `plan` hands it over."""

    max_length: int
    mask_probability: float = 0.15
    """Masked LM: share of the tokens that are masked at a time; as in training."""
    metric: Metric
    max_new_tokens: int | None
    """None for tasks with a head."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    batch_size: int
    max_documents: int | None
    interpolation_alphas: list[float] = Field([])
    """Not empty only in tasks that evaluate interpolated candidates."""
    references: References = References()
    """Set only in the task that evaluates `pretrained`."""
    lm_eval: LmEvalStep | None = None
    """None where no task is asked for, so that the other options of that section are in no cache key then."""
