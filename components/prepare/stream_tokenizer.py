"""The tokenizer of a stream, as `prepare` uses it: of the base model, of the pretraining stream, or one that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..shared.artifacts import ArtifactLike
from ..shared.config import Task
from ..shared.data.problems import Problems
from ..shared.errors import RefusedError
from ..shared.model.tokenizer import append_eos
from ..shared.task_kinds import TASK_KINDS
from .config import FinetuneData, PrepareStep, PretrainData
from .tokenization import Encoder, load_saved_tokenizer, load_tokenizer, set_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stream_of(config: PrepareStep) -> PretrainData | FinetuneData:
    """Returns the options of the stream that is prepared."""
    stream = config.pretrain if config.stream == "pretrain" else config.finetune
    if stream is None:
        raise RefusedError(f"{config.stream}: is required where stream is {config.stream}")
    return stream


def known_tokenizer(
    config: PrepareStep, tokenizer_in: ArtifactLike | None, problems: Problems
) -> PreTrainedTokenizerBase | None:
    """Returns the existing tokenizer, of the pretraining stream or the base model; None if it must be trained."""
    known = None
    try:
        if tokenizer_in is not None:
            known = load_saved_tokenizer(tokenizer_in.path)
        elif config.tokenizer.vocabulary_size is None:
            known = load_tokenizer(config.tokenizer)
        elif config.stream == "finetune":
            raise RefusedError(
                "tokenizer_in: is required for the fine-tuning stream; prepare the pretraining stream first"
            )
        task = task_of(config)
        if known is not None and task and TASK_KINDS[task].offsets and not known.is_fast:
            raise RefusedError(
                f"data.finetune.task: is {task}, which needs to know where in the text a token stands; the "
                f"tokenizer of {config.tokenizer.base} ({type(known).__name__}, not a fast one) does not tell. Choose another "
                "base model or task"
            )
    except RefusedError as error:
        for problem in error.problems:
            problems.add(problem)
    return known


def has_chat_template(config: PrepareStep, known: PreTrainedTokenizerBase | None) -> bool:
    """Tells whether chats can be rendered."""
    return bool(config.tokenizer.chat_template or (known is not None and known.chat_template))


def adapt(tokenizer: PreTrainedTokenizerBase, config: PrepareStep, tokenizer_in: ArtifactLike | None) -> bool:
    """Gives the tokenizer, in place, the chat template and the ending that the options ask for.

    Returns:
        Whether it appends EOS to every text.

    Raises:
        RefusedError: if the template cannot be used.
    """
    if config.tokenizer.chat_template is not None and tokenizer_in is None:
        set_chat_template(tokenizer, config.tokenizer.chat_template)
    ends_with_eos = _to_end_with_eos(config)
    if ends_with_eos:
        append_eos(tokenizer)
    return ends_with_eos


def _to_end_with_eos(config: PrepareStep) -> bool:
    """Tells whether the tokenizer should append EOS to every text, whose hidden state the task head then reads.

    Only a tokenizer trained here is changed for the task; that of a base model is not changed. A tokenizer for masked LM
    appends EOS in any case.
    """
    trained_here = config.tokenizer.vocabulary_size is not None and config.tokenizer.objective == "causal_lm"
    task = task_of(config)
    return trained_here and task is not None and TASK_KINDS[task].head == "sequence"


def encoder_of(config: PrepareStep, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Returns the encoder of the stream for a tokenizer that `adapt` has changed."""
    if config.finetune is None or config.stream != "finetune":
        return Encoder(tokenizer, config.tokenizer.max_length)
    every_turn = config.finetune.assistant_turns == "every"
    return Encoder(tokenizer, config.tokenizer.max_length, every_turn, config.finetune.long_examples)


def task_of(config: PrepareStep) -> Task | None:
    """Returns the task; None for the pretraining stream."""
    return config.finetune.task if config.stream == "finetune" and config.finetune is not None else None
