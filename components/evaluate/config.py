"""Options of the `evaluate` step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from ..shared.config import LocalPath
from ..shared.section import Section, rule
from ..shared.task_kinds import Metric


class LmEval(Section):
    """Tasks of lm-evaluation-harness, which are measured on every candidate, including `pretrained`: what the model can do
    before and after. For causal models only; needs the extra `lm-eval` in the environment of `evaluate`."""

    tasks: list[Annotated[str, Field(min_length=1)]] = Field([])
    """Names of tasks, groups or tags, such as `hellaswag`. The harness downloads their data from the hub."""
    tasks_folder: LocalPath | None = Field(None, min_length=1)
    """Folder with your own task files (YAML in the format of the harness). Paths in them are relative to this folder. The
    Python functions that they name are executed."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of examples of each task; null means all."""
    few_shot: int | None = Field(None, ge=0)
    """Number of solved examples before each question; null means the task's own number. A task that sets 0 keeps it."""

    @field_validator("tasks")
    @classmethod
    def _each_task_once(cls, tasks: list[str]) -> list[str]:
        if len(set(tasks)) != len(tasks):
            raise ValueError("each task must be listed once")
        return tasks


class Evaluate(Section):
    """Evaluation of all candidates on the held-out splits of both streams."""

    replaced_options: ClassVar[dict[str, str]] = {
        "max_documents": "the limit is in tokens now, since documents can be long; write max_tokens, such as max_tokens: 200000"
    }

    metric: Metric | None = None
    """The task's main metric: accuracy or macro_f1 (classification), micro_f1 or macro_f1 (multi_label), pearson or
    spearman (regression), exact_match or token_f1 (question answering, generation), also rouge_l, bleu or chrf
    (generation); null means the first of each. All are in 0..1, including BLEU and chrF; correlations are in -1..1."""
    interpolation_alphas: list[Annotated[float, Field(gt=0, lt=1)]] | Literal["auto"] = Field([0.5])
    """For each α, (1 - α) · pretrained + α · finetuned is a candidate that needs no training. Empty means none. `auto` finds
    the largest α that keeps to the gate's limit on forgetting, by bisection on dev, whose text it reads about nine times."""
    interpolate_mixed: bool = False
    """Whether to interpolate `pretrained` with each mixed model too."""
    max_new_tokens: int = Field(64, ge=1, le=1_000_000)
    """Generation: maximum length of an answer, in tokens."""
    batch_size: int = Field(32, ge=1, le=1_000_000)
    """Rows or prompts in one forward pass."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Precision of the matrix products in evaluation, as in training."""
    max_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """Tokens of held-out text of each split that a model reads to measure forgetting: a sample of the windows of all documents,
    the same for all candidates and for all runs on the same data, weighted so that bits per byte stay an unbiased estimate for
    the whole split. `auto` is what 5 % of the training of a candidate costs, between 50,000 and 500,000; null means all."""
    max_examples: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """Labelled examples of each split that a model answers: a sample, the same for all candidates and for all runs on the same
    data, with the labels in the shares that they have in the split. The fewer, the wider the intervals on which the gate
    decides. `auto` is what 5 % of the training of a candidate costs, at most 50,000 and at least 10,000 (1,000 if the metric
    grades each answer: token_f1, rouge_l, bleu, chrf); null means all."""

    champion: LocalPath | None = Field(None, min_length=1)
    """The model in use. It is evaluated too, and a candidate must not be worse than it: `models:/name@alias` or
    `models:/name/version` in the MLflow registry (made by mixtune; an alias that does not exist yet means none), or a model
    folder."""

    capabilities: bool = False
    """Whether to ask causal models, before and after, some hundred multiple-choice questions that need no network: copying,
    arithmetic, the last words of sentences of the held-out text, and with a chat template simple instructions."""
    lm_eval: LmEval = LmEval()

    @rule
    def _each_alpha_once(self) -> Iterator[str]:
        alphas = self.interpolation_alphas
        if alphas != "auto" and len({f"{alpha:g}" for alpha in alphas}) != len(alphas):
            yield "each α in interpolation_alphas must be listed once (they are compared to six digits)"

    @property
    def num_alphas(self) -> int:
        """Returns the number of interpolations of `pretrained` and `finetuned`."""
        return 1 if self.interpolation_alphas == "auto" else len(self.interpolation_alphas)


class AlphaSearch(Section):
    """The gate's limits on forgetting, to which an interpolation is found."""

    max_forgetting: float | None = None
    """Bits per byte."""
    max_forgetting_share: float | None = None
    """Fraction of what fine-tuning alone forgets."""

    def limit(self, finetuned: float) -> float:
        """Returns the accepted forgetting, in bits per byte, if fine-tuning alone forgets `finetuned`."""
        share = self.max_forgetting_share
        limits = [self.max_forgetting, None if share is None else share * max(finetuned, 0.0)]
        return min(limit for limit in limits if limit is not None)


class References(Section):
    """Models that are evaluated in addition to `pretrained`."""

    base: str | None = None
    """The base model, if it was pretrained further: a hub name or a folder."""
    revision: str | None = None
    """Hub revision of `base`."""
    champion: str | None = None
    """The model in use: `models:/name/version` or a folder."""
    fingerprint: str = ""
    """Identifies the content of both models."""


class LmEvalStep(LmEval):
    """The configuration of lm-evaluation-harness, which `plan` creates."""

    fingerprint: str = ""
    """Identifies the content of `tasks_folder`."""


class EvaluateStep(Section):
    """The configuration of an `evaluate` task, which `plan` creates."""

    max_length: int
    mask_probability: float = 0.15
    """Masked LM: fraction of the tokens that are masked at a time, as in training."""
    metric: Metric
    max_new_tokens: int | None
    """None for tasks with a head."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    batch_size: int
    max_tokens: int | None
    max_examples: int | None = None
    interpolation_alphas: list[float] = Field([])
    """Empty except in tasks that evaluate interpolated candidates."""
    alpha_search: AlphaSearch | None = None
    """Set if α is to be found."""
    references: References = References()
    """Set only in the task that evaluates `pretrained`."""
    capabilities: bool = False
    lm_eval: LmEvalStep | None = None
    """None if no task is set, so that the other options of the section do not enter the cache key."""
