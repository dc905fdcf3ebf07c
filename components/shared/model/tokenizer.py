"""A tokenizer that ends a text for a task head with EOS: for tokenizers trained here, whose EOS the model knows as an end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def append_eos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Makes the tokenizer itself put EOS behind a text, in place, so that a model in use is given what it was trained on.

    The head of classification, multi-label and regression then reads the hidden state of EOS. A base model's tokenizer is
    left as it is, and one trained here for masked LM ends a text so anyway.
    """
    from tokenizers import processors

    ends = [(str(tokenizer.bos_token), tokenizer.bos_token_id), (str(tokenizer.eos_token), tokenizer.eos_token_id)]
    template = processors.TemplateProcessing(single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer
