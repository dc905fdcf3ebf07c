"""Options of the `prepare` step: the two streams of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from ..shared.config import EMBEDDED, LocalPath, Objective, Task
from ..shared.data.claims import CLAIM, NO_CLAIM, claim_of
from ..shared.data.data_sets import is_hub
from ..shared.data.prompt_templates import PromptTemplate
from ..shared.data.records import GROUP
from ..shared.data.source_names import PASSWORD_REFUSED, has_password
from ..shared.section import Section, rule
from ..shared.task_kinds import TASK_KINDS


def _checked(source: str) -> str:
    """Refuses a source with a password: the configuration is stored with every run, and so would be the password."""
    if has_password(source):
        raise PydanticCustomError("credentials", PASSWORD_REFUSED)
    if source.startswith(CLAIM) and claim_of(source) is None:
        raise PydanticCustomError("claim", NO_CLAIM)
    return source


LongExamples = Literal["error", "drop", "truncate_prompt", "truncate_completion"]
CHAT_COLUMNS = {"messages": "messages_column", "conversations": "conversations_column", "tools": "tools_column"}
"""Options of the columns of chats, by role. Chats are read where the other columns of a stream are not there."""


class Between(Section):
    """A range of numbers in a filter."""

    min: float | None = None
    """Smallest number that is kept; null means no limit."""
    max: float | None = None
    """Largest number that is kept; null means no limit."""


class DataSource(Section):
    """One of several sources of a stream."""

    path: LocalPath = Field(min_length=1)
    """The data, in the same form as `source`; not `embedded`."""
    weight: float | None = Field(None, gt=0, le=1_000_000)
    """Share of the stream's tokens that comes from this source, relative to the weights of the others. The source that is
    scarcest by its weight is taken whole, and of the others as much as their weights ask for. All sources of a stream have
    a weight, or none has one: then all data is taken."""
    columns: dict[str, str] = Field({})
    """Columns that have another name in this source, by the option that names them, for example `text_column: body`."""
    filter: dict[str, bool | int | float | str | list[bool | int | float | str] | Between] = Field({})
    """Conditions that a record meets to be read: for each column a value, a list of values, or `min` and `max`, for example
    `{language: [en, zh], quality: {min: 0.5}}`."""
    revision: str | None = None
    """Hub data set: commit, tag or branch."""
    split: str | None = None
    """Hub data set, or folder written by `save_to_disk`: the split; null means `train`."""

    @field_validator("path")
    @classmethod
    def _no_credentials(cls, path: str) -> str:
        return _checked(path)

    @field_validator("path")
    @classmethod
    def _not_embedded(cls, path: str) -> str:
        if path == EMBEDDED:
            raise ValueError("must not be embedded, which stands in source alone")
        return path

    @rule
    def _of_the_hub(self) -> Iterator[str]:
        if self.revision is not None and not is_hub(self.path):
            yield "revision is for hub data sets only; remove it"


class Stream(Section):
    """Options of both streams."""

    section: ClassVar[str] = "data"
    source: LocalPath | None = Field(None, min_length=1)
    """A file, a glob or an fsspec URL (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt; also .gz, .bz2, .xz, .zst), a folder
    of them, a folder written by `save_to_disk`, a hub data set as `hub:owner/name` (in full
    `hub:owner/name/config@revision#split`; the split is `train` unless given; `hf://datasets/owner/name` is the same), on a
    cluster a file or folder in a volume as `pvc://claim/path`, or `embedded`: text and labels from the documentation of
    Python and of the installed packages."""
    sources: list[DataSource] = Field([], max_length=1000)
    """Several sources in place of `source`, each with its `path`, and if needed with `weight`, `columns`, `filter`, `revision`
    and `split`."""
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
    on_error: Literal["fail", "skip"] = "fail"
    """What happens to invalid records. `fail` refuses the data and names them, 20 at once; `skip` leaves them out and writes
    each with its reason to a file: `data/<stream>-quarantine.jsonl` in the output folder, `quarantine.jsonl` in the training
    data of the step, an artifact in MLflow. A file that cannot be read to its end is refused in any case."""
    near_duplicates: float | None = Field(None, ge=0.5, lt=1)
    """Similarity from which a document or example is a near-duplicate of another one and is removed: the fraction of their
    passages of five words that both have, as MinHash estimates it. 0.8 is usual. Held-out ones are kept. Null removes none."""
    min_characters: int | None = Field(None, ge=1)
    """Documents or examples of `source` with fewer characters are left out; null means no limit. Here and below, those of
    `dev_source` and `test_source` are kept."""
    max_characters: int | None = Field(None, ge=1)
    """Documents or examples of `source` with more characters are left out; null means no limit."""
    max_repetition: float | None = Field(None, gt=0, lt=1)
    """Documents or examples of `source` are left out if a larger share of their text is a repetition: of the characters, those
    in lines that stand above, or of the words, those in passages of five words that stand above. 0.2 is usual for web pages;
    source code and tables repeat more. Null means no limit."""
    group_column: str | None = Field(None, min_length=1)
    """Column whose value says what belongs together, such as an author or a conversation: records with the same value stand in
    the same split."""
    tsv_quotes: bool = False
    """Whether fields of .tsv files can stand in double quotes, as pandas and spreadsheets write fields that contain a tab, a
    quote or a line end. Otherwise a quote is a character like any other and each line is a record."""
    messages_column: str = "messages"
    """Generation and pretraining text: column with a chat, a list of messages with `role` and `content` or with `from` and
    `value`. It is read if the columns of the text, or of the prompt and the completion, are not all there."""
    conversations_column: str = "conversations"
    """The same, read if there is no column with messages either."""
    tools_column: str = "tools"
    """Chats: column with a list of the functions that the assistant can call, if there is one."""
    max_documents: int | None = Field(None, ge=1)
    """Maximum number of documents or examples of `source`, drawn with the seed; null means all."""

    @field_validator("source", "dev_source", "test_source")
    @classmethod
    def _no_credentials(cls, source: str | None) -> str | None:
        return source and _checked(source)

    @rule
    def _has_data(self) -> Iterator[str]:
        if self.source is None and not self.sources:
            yield "source is required and was not given; name the data, or several in sources"
        elif self.source is not None and self.sources:
            yield "source and sources exclude each other; move source into sources"

    @rule
    def _lengths_in_order(self) -> Iterator[str]:
        if (self.min_characters or 0) > (self.max_characters or float("inf")):
            yield f"min_characters must not exceed max_characters, which is {self.max_characters}"

    @rule
    def _weights_of_all_or_none(self) -> Iterator[str]:
        weights = [one.weight for one in self.sources]
        if None in weights and any(weights):
            yield "sources: all of them need a weight, or none"

    @rule
    def _columns_of_the_stream(self) -> Iterator[str]:
        known = [name for name in type(self).model_fields if name.endswith("_column")]
        for number, one in enumerate(self.sources):
            for name in sorted(set(one.columns) - set(known)):
                yield f"sources.{number}.columns: there is no option {name}; these are {', '.join(known)}"

    @rule
    def _leaves_something_to_train_on(self) -> Iterator[str]:
        dev = 0.0 if self.dev_source else self.dev_fraction
        test = 0.0 if self.test_source else self.test_fraction
        if dev + test >= 1:
            yield "dev_fraction and test_fraction together must be below 1, so that training data is left"

    @property
    def columns(self) -> dict[str, str]:
        """Returns the column of each role, such as `text`. The role determines how a value is read."""
        own = {role: getattr(self, option) for role, option in self.column_options.items()}
        return own | ({GROUP: self.group_column} if self.group_column is not None else {})

    @property
    def column_options(self) -> Mapping[str, str]:
        """Returns the option that names the column of each role."""
        raise NotImplementedError

    @property
    def shown(self) -> str:
        """Returns the names of the sources, for people."""
        return self.source or ", ".join(one.path for one in self.sources)

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
    control_fraction: float = Field(0.05, ge=0, lt=1)
    """Fraction of the training documents that no model is trained on, at most 1,000 documents. Trainings with a forgetting
    budget measure forgetting on them."""

    @property
    def column_options(self) -> Mapping[str, str]:
        return {"text": "text_column", **CHAT_COLUMNS}


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
    prompt_template: str | None = Field(None, min_length=1)
    """Generation: text of the prompt with names of columns in braces, such as `"{question}\\n\\n{context}"`, in place of
    `prompt_column`. Doubled braces stand for braces."""
    completion_column: str = "completion"
    """Generation: column with the completion: text, or a list of messages. The loss covers the completion only."""
    assistant_turns: Literal["every", "last"] = "every"
    """Chats: turns of the assistant that the loss covers. Evaluation answers the last one."""
    long_examples: LongExamples = "truncate_prompt"
    """What happens to examples with more than `model.max_length` tokens. `error` refuses the data and names them, `drop` leaves
    them out. `truncate_prompt` shortens what the model reads, never the completion: a prompt loses its beginning, a chat its
    oldest messages, and a text with a label or number is cut as the tokenizer cuts it, usually at its end. An example that does
    not fit even so is left out. `truncate_completion` is for generation: the completion, or the last turn of a chat, loses its
    end and EOS. Contexts of questions are split into windows in any case, so that only a question that leaves no room for its
    context is too long. All of these examples are counted."""

    @field_validator("prompt_template")
    @classmethod
    def _can_be_filled(cls, text: str | None) -> str | None:
        if text is not None:
            _ = PromptTemplate(text, "").parts
        return text

    @rule
    def _prompts_are_for_generation(self) -> Iterator[str]:
        if self.prompt_template is not None and TASK_KINDS[self.task].target != "text":
            yield "prompt_template is for the task generation; remove it"

    @rule
    def _completions_are_for_generation(self) -> Iterator[str]:
        if self.long_examples == "truncate_completion" and TASK_KINDS[self.task].target != "text":
            yield f"long_examples: {self.task} has no completions to truncate; choose error, drop or truncate_prompt"

    @property
    def column_options(self) -> Mapping[str, str]:
        kind = TASK_KINDS[self.task]
        return {**kind.columns, **CHAT_COLUMNS} if kind.target == "text" else kind.columns

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
