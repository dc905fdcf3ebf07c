"""Prompts of chats, and the token that ends a turn, by the chat template of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = ()
) -> list[int]:
    """Returns the token ids of a chat that the assistant is to continue. Special tokens in messages are encoded as text."""
    return list(
        tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            return_dict=False,
        )
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the special token that ends a turn of the assistant; None without a chat template, or if it writes none."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids = list(tokenizer.apply_chat_template(chat, return_dict=False))
    except Exception:  # a template can raise anything
        return None
    added = tokenizer.added_tokens_decoder
    return next((token for token in reversed(ids) if token in added and not added[token].content.isspace()), None)
