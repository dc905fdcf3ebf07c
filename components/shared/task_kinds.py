"""The kinds of labelled tasks: one row for each, with what the stages need to know about it. No heavy imports.

A new kind takes its row here and, if no other kind has its target or its head, an entry in the table of each stage:
`prepare/target_checks.py` (checks), `prepare/encoding.py` (tokens and targets), `shared/model/heads.py` (head and loss),
`evaluate/examples.py` (predictions), `evaluate/scores.py` (score of one example), `compare/targets.py` (format in the report).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Task = Literal["classification", "multi_label", "regression", "question_answering", "generation"]
Target = Literal["label", "labels", "number", "answers", "text"]
Head = Literal["sequence", "span"]
Objective = Literal["causal_lm", "masked_lm"]
Metric = Literal[
    "accuracy", "macro_f1", "micro_f1", "exact_match", "token_f1", "rouge_l", "bleu", "chrf", "pearson", "spearman"
]


@dataclass(frozen=True)
class TaskKind:
    """One kind of task.

    Attributes:
        columns: for each role that `prepare` reads, the option of `data.finetune` that names its column.
        inputs: roles that are the input of the model, in their order.
        target: what the model predicts: a label, a list of labels, a number, one of several accepted answers, or a text. It
            decides on the format of references and predictions.
        metrics: metrics that can be the main metric; the first is the default.
        auto_class: transformers class that loads the trained model.
        head: what the task head reads: `sequence` reads one hidden state, `span` that of every token. None if the task is
            learned by the language model itself.
        problem_type: the `problem_type` of transformers, for heads that read one hidden state.
        pipeline: the pipeline of transformers; None if it has none.
        further_metrics: metrics in the report that cannot be the main metric.
        loss_unit: unit of the training loss.
        document: name of what one prepared document is.
        must_fit: requirement that an example must meet to be kept, for messages.
        exact_duplicates: whether texts that differ in case or white space are different examples by default.
        offsets: whether `prepare` needs a tokenizer that gives the position of each token in the text.
        refused_from_scratch: objectives that a model made from scratch cannot have, with the rest of the message.
    """

    columns: Mapping[str, str]
    inputs: tuple[str, ...]
    target: Target
    metrics: tuple[Metric, ...]
    auto_class: str
    head: Head | None
    problem_type: str | None = None
    pipeline: str | None = None
    further_metrics: tuple[str, ...] = ()
    loss_unit: str = "nats per example"
    document: str = "examples"
    must_fit: str = "a text that fits into"
    exact_duplicates: bool = False
    offsets: bool = False
    refused_from_scratch: Mapping[Objective, str] = field(default_factory=dict)

    @property
    def has_label_names(self) -> bool:
        """Tells whether the data has a list of label names."""
        return self.target in ("label", "labels")


TASK_KINDS: dict[Task, TaskKind] = {
    "classification": TaskKind(
        columns={"text": "text_column", "label": "label_column"},
        inputs=("text",),
        target="label",
        metrics=("accuracy", "macro_f1"),
        auto_class="AutoModelForSequenceClassification",
        head="sequence",
        problem_type="single_label_classification",
        pipeline="text-classification",
    ),
    "multi_label": TaskKind(
        columns={"text": "text_column", "labels": "label_column"},
        inputs=("text",),
        target="labels",
        metrics=("micro_f1", "macro_f1"),
        auto_class="AutoModelForSequenceClassification",
        head="sequence",
        problem_type="multi_label_classification",
        pipeline="text-classification",
        further_metrics=("exact_match",),
        loss_unit="nats per label",
    ),
    "regression": TaskKind(
        columns={"text": "text_column", "number": "label_column"},
        inputs=("text",),
        target="number",
        metrics=("pearson", "spearman"),
        auto_class="AutoModelForSequenceClassification",
        head="sequence",
        problem_type="regression",
        pipeline="text-classification",
        further_metrics=("mae", "rmse"),
        loss_unit="squared error",
    ),
    "question_answering": TaskKind(
        columns={"question": "question_column", "context": "context_column", "answers": "answers_column"},
        inputs=("question", "context"),
        target="answers",
        metrics=("exact_match", "token_f1"),
        auto_class="AutoModelForQuestionAnswering",
        head="span",
        # transformers has no pipeline for question answering any more.
        pipeline=None,
        document="windows",
        must_fit="a question that leaves its context room in",
        exact_duplicates=True,
        offsets=True,
        refused_from_scratch={
            "causal_lm": "which a Llama from scratch has no head for; set model.objective to masked_lm"
        },
    ),
    "generation": TaskKind(
        columns={"prompt": "prompt_column", "completion": "completion_column"},
        inputs=("prompt",),
        target="text",
        metrics=("exact_match", "token_f1", "rouge_l", "bleu", "chrf"),
        auto_class="AutoModelForCausalLM",
        head=None,
        pipeline="text-generation",
        further_metrics=("rouge_1", "rouge_2"),
        loss_unit="nats per token",
        must_fit="a completion that fits into",
        exact_duplicates=True,
        refused_from_scratch={"masked_lm": "for which model.objective must be causal_lm"},
    ),
}
