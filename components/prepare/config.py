"""Options of the `prepare` step: the two streams of data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from ..shared.config import LocalPath, Objective, Task
from ..shared.data.sources import PASSWORD_REFUSED, has_password
from ..shared.section import Section, rule
from ..shared.task_kinds import TASK_KINDS


class Stream(Section):
    """Options of both streams."""

    section: ClassVar[str] = "data"
    source: LocalPath = Field(min_length=1)
    """A file, a glob or an fsspec URL (.jsonl, .json, .csv, .tsv, .parquet, .txt; .gz too), a folder of them, a hub
    data set as `hub:owner/name` (in full `hub:owner/name/config@revision#split`; the split is `train` unless given), or
    `embedded`: text and labels from the documentation of Python and of the installed packages."""
    dev_source: LocalPath | None = None
    """Held-out data on which choices are made, in the same form as `source`. Null takes `dev_fraction` of `source`."""
    test_source: LocalPath | None = None
    """Held-out data for the report, in the same form as `source`. Null takes `test_fraction` of `source`."""
    dev_fraction: float = Field(0.1, gt=0, lt=1)
    """Fraction of the documents or examples that is held out for choices, if `dev_source` is not set."""
    test_fraction: float = Field(0.1, gt=0, lt=1)
    """Fraction of the documents or examples that is held out for the report, if `test_source` is not set."""
    duplicates: Literal["auto", "exact", "folded"] = "auto"
    """Which documents or examples count as the same, so that only the first is kept: `exact` those with the same characters,
    `folded` also those that differ in case or white space only. `auto` is `exact` for generation and question answering,
    otherwise `folded`."""
    tsv_quotes: bool = False
    """Whether fields of .tsv files can stand in double quotes, as pandas and spreadsheets write fields that contain a tab, a
    quote or a line end. Otherwise a quote is a character like any other and each line is a record."""
    messages_column: str | None = None
    """Generation and pretraining text: column with a chat, a list of messages with `role` and `content` or with `from` and
    `value`. It is read if the columns of the text, or of the prompt and the completion, are not all there. Null means
    `messages` or `conversations`."""
    tools_column: str = "tools"
    """Chats: column with a list of the functions that the assistant can call, if there is one."""
    max_documents: int | None = Field(None, ge=1)
    """Maximum number of documents or examples of `source`, drawn with the seed; null means all."""

    @field_validator("source", "dev_source", "test_source")
    @classmethod
    def _no_credentials(cls, source: str | None) -> str | None:
        # The configuration is stored with every run, and so would be a password in it.
        if source and has_password(source):
            raise PydanticCustomError("credentials", PASSWORD_REFUSED)
        return source

    @rule
    def _leaves_something_to_train_on(self) -> Iterator[str]:
        dev = 0.0 if self.dev_source else self.dev_fraction
        test = 0.0 if self.test_source else self.test_fraction
        if dev + test >= 1:
            yield "dev_fraction and test_fraction together must be below 1, so that training data is left"

    @property
    def columns(self) -> dict[str, str]:
        """Returns the column of each role, such as `text`. The role determines how a value is read."""
        raise NotImplementedError

    @property
    def chat_columns(self) -> dict[str, str]:
        """Returns the columns of chats, which are read instead of the other ones if those are not there."""
        names = {"messages": "messages", "conversations": "conversations"}
        given = names if self.messages_column is None else {"messages": self.messages_column}
        return given | {"tools": self.tools_column}

    @property
    def exact_duplicates(self) -> bool:
        """Tells whether only texts with the same characters are duplicates."""
        return self.duplicates == "exact"


class PretrainData(Stream):
    """The pretraining stream: unlabelled text that represents what the model knows."""

    section: ClassVar[str] = "data.pretrain"
    text_column: str = "text"
    """Column or JSON field with the text. In .txt, each file is a document; in a single .txt file, each paragraph is one. Data
    without this column can hold chats; the turns of the assistant are then what the model is not to forget."""
    dev_fraction: float = Field(0.05, gt=0, lt=1)
    """Fraction of the documents that is held out for choices, if `dev_source` is not set."""
    test_fraction: float = Field(0.05, gt=0, lt=1)
    """Fraction of the documents that is held out for the report, if `test_source` is not set."""

    @property
    def columns(self) -> dict[str, str]:
        return {"text": self.text_column} | self.chat_columns


class FinetuneData(Stream):
    """The fine-tuning stream: labelled examples of the task."""

    section: ClassVar[str] = "data.finetune"
    task: Task = "classification"
    """`classification`: a text and its label. `multi_label`: a text and any number of labels. `regression`: a text and a
    number. `question_answering`: a question, a context, and the answer as a span of the context. `generation`: a prompt and its
    completion."""
    text_column: str = "text"
    """Classification, multi-label and regression: column with the text."""
    label_column: str = "label"
    """Column with the label (classification), the list of labels (multi_label: a JSON list, or labels separated by `;`), or the
    number (regression)."""
    question_column: str = "question"
    """Question answering: column with the question."""
    context_column: str = "context"
    """Question answering: column with the text that contains the answer."""
    answers_column: str = "answers"
    """Question answering: column with the answer: text, a list of texts, or an object with the lists `text` and
    `answer_start`, as in SQuAD. Empty if the context does not contain an answer."""
    prompt_column: str = "prompt"
    """Generation: column with the prompt: text, or a list of messages."""
    completion_column: str = "completion"
    """Generation: column with the completion: text, or a list of messages. The loss covers the completion only."""
    assistant_turns: Literal["every", "last"] = "every"
    """Chats: turns of the assistant that the loss covers. Evaluation answers the last one."""

    @property
    def columns(self) -> dict[str, str]:
        kind = TASK_KINDS[self.task]
        own = {role: getattr(self, option) for role, option in kind.columns.items()}
        return own | self.chat_columns if kind.target == "text" else own

    @property
    def exact_duplicates(self) -> bool:
        return super().exact_duplicates or (self.duplicates == "auto" and TASK_KINDS[self.task].exact_duplicates)


class Tokenizer(Section):
    """The options of `model` that `prepare` reads."""

    base: str
    revision: str | None
    max_length: int
    vocabulary_size: int | None
    """Vocabulary size of the tokenizer to train; null if the base model has a tokenizer."""
    objective: Objective = "causal_lm"
    """Objective of the tokenizer to train. For masked LM it has a mask token and ends every text."""
    chat_template: str | None = None
    """Jinja file with the chat template; null means the tokenizer's own."""


class PrepareStep(Section):
    """The configuration of a `prepare` task, which `plan` creates."""

    stream: Literal["pretrain", "finetune"]
    seed: int
    tokenizer: Tokenizer
    pretrain: PretrainData | None = None
    finetune: FinetuneData | None = None
    fingerprint: str
    """Identifies the content of the sources: changed data is prepared anew, unchanged data comes from the cache."""
