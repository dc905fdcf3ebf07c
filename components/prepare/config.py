"""Options of the `prepare` step: the two streams of data."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..shared.config import Objective, Section, Task
from ..shared.data.sources import PASSWORD_REFUSED, has_password
from ..shared.task_kinds import TASK_KINDS


class Stream(Section):
    """Options that both streams have."""

    section: ClassVar[str] = "data"
    source: str = Field(min_length=1)
    """A file, a glob or an fsspec URL (.jsonl, .json, .csv, .tsv, .parquet, .txt; .gz too), a folder of them, a hub
    data set as `hub:owner/name` (in full `hub:owner/name/config@revision#split`; the split is `train` unless given), or
    `embedded`: text and labels from the documentation of Python and of the installed packages."""
    dev_source: str | None = None
    """Held-out data for choices, in the same form as `source`; null cuts `dev_fraction` off `source`."""
    test_source: str | None = None
    """Held-out data for the report, in the same form as `source`; null cuts `test_fraction` off `source`."""
    dev_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the documents or examples held out for choices, where no `dev_source` is given."""
    test_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the documents or examples held out for the report, where no `test_source` is given."""
    max_documents: int | None = Field(None, ge=1)
    """Take no more than this many documents or examples of `source`, drawn by the seed; null takes all."""

    @field_validator("source", "dev_source", "test_source")
    @classmethod
    def _no_credentials(cls, source: str | None) -> str | None:
        # The configuration is stored with every run, and so would be a password in it.
        if source and has_password(source):
            raise PydanticCustomError("credentials", PASSWORD_REFUSED)
        return source

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        dev = 0.0 if self.dev_source else self.dev_fraction
        test = 0.0 if self.test_source else self.test_fraction
        if dev + test >= 1:
            raise ValueError("dev_fraction and test_fraction together must be below 1, so that training data is left")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """Column of each thing that the stream reads; how a value is read follows from what it is called here."""
        raise NotImplementedError


class PretrainData(Stream):
    """The pretraining stream: unlabelled text that stands for what the model knew."""

    section: ClassVar[str] = "data.pretrain"
    text_column: str = "text"
    """Column or JSON field that holds the text (.txt: one document a file, or a paragraph where one file is given)."""
    dev_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents held out for choices, where no `dev_source` is given."""
    test_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents held out for the report, where no `test_source` is given."""

    @property
    def columns(self) -> dict[str, str]:
        return {"text": self.text_column}


class FinetuneData(Stream):
    """The fine-tuning stream: labelled examples of the task."""

    section: ClassVar[str] = "data.finetune"
    task: Task = "classification"
    """`classification`: a text and its label. `multi_label`: a text and any number of labels. `regression`: a text and a
    number. `question_answering`: a question, a context, and the answer as it stands there. `generation`: a prompt and its
    completion."""
    text_column: str = "text"
    """Classification, multi-label and regression: column that holds the text."""
    label_column: str = "label"
    """Column that holds the label (classification), the list of labels (multi_label: a JSON list, or text in which `;`
    separates them), or the number (regression)."""
    question_column: str = "question"
    """Question answering: column that holds the question."""
    context_column: str = "context"
    """Question answering: column that holds the text in which the answer stands."""
    answers_column: str = "answers"
    """Question answering: column that holds the answer: text, a list of texts, or an object with the lists `text` and
    `answer_start`, as in SQuAD; empty where the context holds no answer."""
    prompt_column: str = "prompt"
    """Generation: column that holds the prompt."""
    completion_column: str = "completion"
    """Generation: column that holds the completion; the loss is on the completion alone."""

    @property
    def columns(self) -> dict[str, str]:
        return {role: getattr(self, option) for role, option in TASK_KINDS[self.task].columns.items()}


class Tokenizer(Section):
    """What `prepare` reads of `model`."""

    base: str
    revision: str | None
    max_length: int
    vocabulary_size: int | None
    """Entries of the tokenizer to train; null where the base model brings its own."""
    objective: Objective = "causal_lm"
    """What the tokenizer to train is for; one for masked LM has a mask token and ends every text."""


class PrepareStep(Section):
    """All that one `prepare` task reads, as `plan` hands it over."""

    stream: Literal["pretrain", "finetune"]
    seed: int
    tokenizer: Tokenizer
    pretrain: PretrainData | None = None
    finetune: FinetuneData | None = None
    fingerprint: str
    """Identifies the content of the sources, so that changed data is prepared anew and unchanged data is not."""
