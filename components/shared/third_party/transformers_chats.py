"""Functions of transformers that render chat templates; its public `apply_chat_template` does not return what both know.

The text of a chat is needed together with the parts that the template marks by `{% generation %}`, and with the special tokens
that stand in messages kept apart from those that the template writes. transformers has both, but refuses to do them at once.
Does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag that begins a part that the assistant wrote."""


@dataclass(frozen=True)
class Rendered:
    """A rendered chat.

    Attributes:
        text: the text, in which special tokens from messages are marked.
        marked: start and end of each part that the template marks as written by the assistant, in characters.
    """

    text: str
    marked: list[tuple[int, int]]


def control_tokens(tokenizer: PreTrainedTokenizerBase, tools: bool = False) -> tuple[str, ...]:
    """Returns the tokens that a message cannot write: the special ones, and the added ones that the chat template writes."""
    template = tokenizer.get_chat_template(tools=[{}] if tools else None)
    return tuple(tokenizer._get_control_tokens(template))


def compile_template(template: str) -> None:
    """Compiles a chat template, with the tags and filters that transformers adds to Jinja.

    Raises:
        jinja2.TemplateSyntaxError: if it is invalid.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    _compile_jinja_template(template)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Any],
    generation_prompt: bool,
) -> Rendered:
    """Renders a chat with the tokenizer's template.

    Args:
        messages: the messages.
        tools: descriptions of functions; empty for none.
        generation_prompt: whether to end with the beginning of a turn of the assistant.

    Raises:
        jinja2.TemplateError: if the template refuses the messages.
    """
    from transformers.utils.chat_template_utils import (
        _get_control_token_patterns,
        mark_control_tokens,
        render_jinja_template,
    )

    given = list(tools) or None
    template = tokenizer.get_chat_template(tools=given)
    pattern, _ = _get_control_token_patterns(control_tokens(tokenizer, bool(tools)))
    # Its annotations say that it returns text alone, and that the names of special tokens are lists.
    render_all: Any = render_jinja_template
    texts, parts = render_all(
        conversations=[mark_control_tokens(list(messages), pattern)],
        tools=mark_control_tokens(given, pattern),
        chat_template=template,
        return_assistant_tokens_mask=GENERATION.search(template) is not None,
        add_generation_prompt=generation_prompt,
        **tokenizer.special_tokens_map,
    )
    return Rendered(texts[0], [(start, end) for start, end in parts[0]] if parts else [])


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of rendered texts, without BOS and EOS of the tokenizer: the template writes them."""
    from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START, encode_marked_chat

    marks = (_CONTROL_TOKEN_START, _CONTROL_TOKEN_END)
    plain = [text for text in texts if not any(mark in text for mark in marks)]
    ids = iter(
        tokenizer(plain, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if plain
        else []
    )
    return [encode_marked_chat(tokenizer, text) if any(mark in text for mark in marks) else next(ids) for text in texts]
