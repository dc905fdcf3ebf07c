"""Loads tokenizers, and configures them to append EOS for a task head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RefusedError
from ..serving.encoding import first_and_last
from .refusals import NO_ENDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def append_eos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Configures the tokenizer, in place, to append EOS to a text, so that a deployed model gets the same input as in training.

    The head of classification, multi-label and regression then reads the hidden state of EOS. A base model's tokenizer is
    not changed. A tokenizer that mixtune trains for masked LM appends EOS in any case.
    """
    from tokenizers import processors

    ends = [(str(tokenizer.bos_token), tokenizer.bos_token_id), (str(tokenizer.eos_token), tokenizer.eos_token_id)]
    template = processors.TemplateProcessing(single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def text_ends(tokenizer: PreTrainedTokenizerBase, shown: str = "the tokenizer") -> tuple[int, int]:
    """Returns the ids of the first and the last token of a text: BOS and EOS, or what the tokenizer has instead.

    Raises:
        RefusedError: if it has neither.
    """
    bos, eos = first_and_last(tokenizer)
    if eos is None or bos is None:
        raise RefusedError(NO_ENDS.format(base=shown))
    return bos, eos


def load_tokenizer(folder: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model or tokenizer folder. Without a padding token it pads with the last token of a text.

    Raises:
        RefusedError: if there is none, or if it has neither an EOS nor a BOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RefusedError(f"{folder}: has no tokenizer that can be loaded ({reason})") from None
    if tokenizer.pad_token_id is None:
        _, last = text_ends(tokenizer, str(folder))
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(last)
    return tokenizer
