"""Functions of transformers that render chat templates; its public `apply_chat_template` does not return what both know.

The text of a chat is needed together with the parts that the template marks by `{% generation %}`, and with the special tokens
that stand in messages kept apart from those that the template writes. transformers has both, but refuses to do them at once.
Does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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


class Renderer:
    """Renders chats with the template of a tokenizer.

    Args:
        tokenizer: the tokenizer, whose template does not change.
        has_tools: whether the chats have descriptions of functions, for which a tokenizer can have a template of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, has_tools: bool) -> None:
        from transformers.utils.chat_template_utils import _get_control_token_patterns, mark_control_tokens

        self._template = tokenizer.get_chat_template(tools=[{}] if has_tools else None)
        self.is_marked = GENERATION.search(self._template) is not None
        self._names = tokenizer.special_tokens_map
        pattern, _ = _get_control_token_patterns(control_tokens(tokenizer, has_tools))
        self._mark = partial(mark_control_tokens, control_tokens_re=pattern)

    def marked(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns messages, or descriptions of functions, with marks around the special tokens in them."""
        return list(self._mark(list(messages)))

    def render(self, messages: list[dict[str, Any]], tools: list[Any], generation_prompt: bool) -> Rendered:
        """Renders a chat.

        Args:
            messages: the messages, as `marked` returns them.
            tools: descriptions of functions, as `marked` returns them; empty for none.
            generation_prompt: whether to end with the beginning of a turn of the assistant.

        Raises:
            jinja2.TemplateError: if the template refuses the messages.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        # Its annotations say that it returns text alone, and that the names of special tokens are lists.
        render_all: Any = render_jinja_template
        texts, parts = render_all(
            conversations=[messages],
            tools=tools or None,
            chat_template=self._template,
            return_assistant_tokens_mask=self.is_marked,
            add_generation_prompt=generation_prompt,
            **self._names,
        )
        return Rendered(texts[0], [(start, end) for start, end in parts[0]] if parts else [])


def has_marks(text: str) -> bool:
    """Tells whether special tokens in messages are marked in a rendered text."""
    from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START

    return _CONTROL_TOKEN_START in text or _CONTROL_TOKEN_END in text


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of rendered texts, without BOS and EOS of the tokenizer: the template writes them."""
    from transformers.utils.chat_template_utils import encode_marked_chat

    plain = [text for text in texts if not has_marks(text)]
    ids = iter(
        tokenizer(plain, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if plain
        else []
    )
    return [encode_marked_chat(tokenizer, text) if has_marks(text) else next(ids) for text in texts]
