"""Token sequences of chats, and which of their tokens are learned: the turns of the assistant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..shared.data.chats import REASONING, Chat, Message
from ..shared.errors import first_line
from ..shared.serving.chats import end_of_turn
from ..shared.third_party.transformers_chats import Rendered, Renderer, control_tokens, encode
from .chat_pieces import PieceEncoder
from .config import LongExamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_PREFIX_STABLE = (
    "the chat template is not prefix-stable: the prompt for message {number}, as generation gets it, is not the beginning of "
    "the rendered chat; give a template in model.chat_template that writes the same before an answer in both cases"
)
NO_END = (
    "the chat template ends a turn of the assistant with no special token, so that an answer would not end; give a template in "
    "model.chat_template that writes one, such as {{ eos_token }}"
)
NOTHING_MARKED = "the chat template marks nothing as generated in the last turn of the assistant; correct it"


TOO_LONG = (
    "has more than model.max_length = {} tokens; shorten it, raise model.max_length, or choose in data.finetune.long_examples "
    "what happens to such examples"
)


class InvalidChatError(Exception):
    """A chat that the template cannot render. The message continues a sentence that begins with file and line."""


@dataclass(frozen=True)
class EncodedChat:
    """A chat, or its beginning, as token ids.

    Attributes:
        tokens: (length,) token ids up to the end of the last turn.
        supervised: (length,) whether each token is learned.
        answer_from: index of the first token after the prompt for the last turn.
        num_turns: number of learned turns of the assistant.
        cut: whether something is left out to fit the maximum length.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    answer_from: int
    num_turns: int
    cut: bool

    def up_to(self, length: int) -> EncodedChat | None:
        """Returns the chat with its last turn cut; None if nothing is left of that."""
        if not self.supervised[self.answer_from : length].any():
            return None
        return replace(self, tokens=self.tokens[:length], supervised=self.supervised[:length], cut=True)


class ChatEncoder:
    """Renders and encodes chats with the template of a tokenizer.

    What is learned follows from the `{% generation %}` marks of the template. Without them it follows from what the template
    adds to the prompt for a turn: the answer, with the token that ends it and without white space behind that.

    A chat that is too long loses its oldest messages, up to a message of the user, or the end of its last turn
    (`truncate_completion`). The system message stays.

    A template can show a turn in another way when further messages follow (Qwen 3 removes its reasoning). Such a turn is
    context in the whole chat, and is learned in a sequence of its own that ends with it, as the model writes it.

    Args:
        tokenizer: tokenizer with a chat template.
        max_length: maximum tokens of a sequence; None for no maximum.
        every_turn: whether every turn of the assistant is learned, or the last one alone.
        long_examples: what happens to longer chats.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        every_turn: bool = True,
        long_examples: LongExamples = "truncate_prompt",
    ) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._every_turn, self._long_examples = every_turn, long_examples
        self._pieces = PieceEncoder(tokenizer)
        self._renderers: dict[bool, Renderer] = {}
        self._last: tuple[Chat, Rendered] | None = None

    @cached_property
    def _control(self) -> frozenset[int]:
        texts = {*control_tokens(self._tokenizer), *control_tokens(self._tokenizer, tools=True)}
        ids: Any = self._tokenizer.convert_tokens_to_ids(list(texts))
        return frozenset(ids)

    @cached_property
    def _ends(self) -> frozenset[int]:
        """The tokens that can end a turn."""
        found = (end_of_turn(self._tokenizer), self._tokenizer.eos_token_id)
        return frozenset(token for token in found if token is not None)

    def encode(self, chat: Chat) -> tuple[EncodedChat | None, list[EncodedChat]]:
        """Encodes a chat up to its last turn.

        Returns:
            The whole chat, None if it does not fit; and the sequences of the turns that are learned on their own, without those
            that do not fit. The whole chat counts as cut if any of its sequences is.

        Raises:
            InvalidChatError: if the template refuses the chat, or does not tell what to learn, or if the chat is too long and
                `long_examples` is `error`.
        """
        turns = chat.turns if self._every_turn else [chat.last_turn]
        messages, tools = self._marked(chat)
        rendered = self._render(messages, tools, False)
        self._last = (chat, rendered)
        whole, apart = self._fitted(messages, tools, turns, rendered)
        own = [self._fitted(messages[: turn + 1], tools, [turn])[0] for turn in apart]
        if whole is None or (None in own and self._long_examples == "drop"):
            return None, []
        fitting = [one for one in own if one is not None]
        cut = whole.cut or len(fitting) < len(own) or any(one.cut for one in fitting)
        return replace(whole, cut=cut), fitting

    def bytes_of(self, encoded: EncodedChat) -> int:
        """Returns the UTF-8 bytes of the text that is learned, without special tokens."""
        kept = [token for token in encoded.tokens[encoded.supervised].tolist() if token not in self._control]
        return len(str(self._tokenizer.decode(kept)).encode())

    def num_text_tokens(self, encoded: EncodedChat) -> int:
        """Returns the number of tokens that are not special."""
        return int(np.count_nonzero(np.isin(encoded.tokens, list(self._control), invert=True)))

    def num_unknown(self, encoded: EncodedChat) -> int:
        """Returns the number of tokens that are unknown to the tokenizer."""
        unknown = self._tokenizer.unk_token_id
        if unknown is None or unknown in (self._tokenizer.eos_token_id, self._tokenizer.bos_token_id):
            return 0
        return int(np.count_nonzero(encoded.tokens == unknown))

    def hidden(self, chat: Chat) -> tuple[bool, bool]:
        """Tells whether the template leaves out a message of the system or the user, and the reasoning of the last turn."""
        messages = chat.messages[: chat.last_turn + 1]
        if self._last is None or self._last[0] is not chat:
            self._last = (chat, self._render(*self._marked(chat), False))
        text = self._last[1].text.translate(_MARKS)
        said = [message["content"].strip() for message in messages if message["role"] in ("system", "user")]
        thought = next((messages[-1][name].strip() for name in REASONING if messages[-1].get(name)), "")
        return any(content not in text for content in said), thought not in text

    def _fitted(
        self, messages: list[Message], tools: list[Any], turns: list[int], rendered: Rendered | None = None
    ) -> tuple[EncodedChat | None, list[int]]:
        """Returns the chat, shortened as needed, and the indices of turns to learn apart; None if it does not fit."""
        whole, apart = self._encoded(messages, tools, turns, False, rendered)
        if self._max_length is None or len(whole.tokens) <= self._max_length:
            return whole, apart
        if self._long_examples == "error":
            raise InvalidChatError(TOO_LONG.format(self._max_length))
        if self._long_examples == "truncate_completion":
            return whole.up_to(self._max_length), apart
        found: tuple[EncodedChat | None, list[int]] = (None, [])
        head, starts = _starts(messages)
        low, high = 0, 0 if self._long_examples == "drop" else len(starts)
        while low < high:  # with fewer messages, a chat is shorter
            middle = (low + high) // 2
            start = starts[middle]
            kept = [*messages[:head], *messages[start:]]
            moved = [turn - start + head for turn in turns if turn >= start]
            encoded, apart = self._encoded(kept, tools, moved, True)
            if len(encoded.tokens) <= self._max_length:
                found, high = (encoded, [turn + start - head for turn in apart]), middle
            else:
                low = middle + 1
        return found

    def _encoded(
        self, messages: list[Message], tools: list[Any], turns: list[int], cut: bool, rendered: Rendered | None = None
    ) -> tuple[EncodedChat, list[int]]:
        whole = rendered or self._render(messages, tools, False)

        @cache
        def prompt(turn: int) -> str:
            return self._render(messages[:turn], tools, True).text

        last, spans, apart = turns[-1], [], []
        answer_from = len(prompt(last))
        if not whole.text.startswith(prompt(last)):
            raise InvalidChatError(NOT_PREFIX_STABLE.format(number=last + 1))
        if whole.marked:
            first = next((len(prompt(turn)) for turn in turns if whole.text.startswith(prompt(turn))), 0)
            spans = [(start, end) for start, end in whole.marked if start >= first and end > start]
            if not spans or spans[-1][1] <= answer_from:
                raise InvalidChatError(NOTHING_MARKED)
        else:
            for turn in turns[:-1]:
                text = self._render(messages[: turn + 1], tools, False).text
                if not text.startswith(prompt(turn)):
                    raise InvalidChatError(NOT_PREFIX_STABLE.format(number=turn + 1))
                if whole.text.startswith(text):
                    spans.append((len(prompt(turn)), len(text)))
                else:
                    apart.append(turn)
            spans.append((answer_from, len(whole.text)))
        borders = sorted({answer_from, *(place for span in spans for place in span)})
        tokens, place = self._tokens(whole.text, borders)
        supervised = np.zeros(len(tokens), bool)
        end = 0
        for first, last_character in spans:
            end = self._end(tokens, place[first], place[last_character], bool(whole.marked))
            supervised[place[first] : end] = True
        if tokens[end - 1] not in self._control:
            raise InvalidChatError(NO_END)
        supervised[0] = False  # the first token has no context
        return EncodedChat(
            np.array(tokens[:end], np.int32),
            supervised[:end],
            max(place[answer_from], 1),
            len(turns) - len(apart),
            cut,
        ), apart

    def _tokens(self, text: str, borders: Sequence[int]) -> tuple[list[int], dict[int, int]]:
        """Returns the tokens of a text, and the index of the token at each border in characters.

        A prompt is encoded alone in generation. Where a token would span the border behind it, the parts are encoded apart.
        """
        tokens, before = self._pieces.encode(text, borders)
        if all(tokens[same : same + len(rest)] == rest for same, rest in before):
            return tokens, {border: same + len(rest) for border, (same, rest) in zip(borders, before, strict=True)}
        tokens, place, start = [], {}, 0
        for border in [*borders, len(text)]:
            tokens += self._rest(text[start:border]) if start else encode(self._tokenizer, [text[:border]])[0]
            place[border], start = len(tokens), border
        return tokens, place

    def _rest(self, text: str) -> list[int]:
        """Encodes text that continues another. Some tokenizers begin each text with a space, so a line end is put before it."""
        if not text:
            return []
        line_end, ids, alone = encode(self._tokenizer, ["\n", "\n" + text, text])
        return ids[len(line_end) :] if ids[: len(line_end)] == line_end else alone

    def _end(self, tokens: Sequence[int], first: int, end: int, is_marked: bool) -> int:
        """Returns the end of a learned part: behind the token that ends the turn, which a mark can leave out."""
        ends = self._ends if is_marked else self._control
        ending = next((at for at in range(end - 1, first - 1, -1) if tokens[at] in ends), None)
        if ending is not None and self._blank(tokens[ending + 1 : end]):
            return ending + 1
        return end + 1 if is_marked and end < len(tokens) and tokens[end] in ends else end

    def _blank(self, tokens: Sequence[int]) -> bool:
        return not str(self._tokenizer.decode(list(tokens))).strip()

    def _marked(self, chat: Chat) -> tuple[list[Message], list[Any]]:
        """Returns the messages up to the last turn, and the tools, in the form that is rendered."""
        renderer = self._renderer(bool(chat.tools))
        return renderer.marked(chat.messages[: chat.last_turn + 1]), renderer.marked(chat.tools)

    def _renderer(self, has_tools: bool) -> Renderer:
        if has_tools not in self._renderers:
            self._renderers[has_tools] = Renderer(self._tokenizer, has_tools)
        return self._renderers[has_tools]

    def _render(self, messages: list[Message], tools: list[Any], generation_prompt: bool) -> Rendered:
        """Renders messages and tools that `_marked` returned."""
        try:
            return self._renderer(bool(tools)).render(messages, tools, generation_prompt)
        except Exception as error:  # templates raise errors of their own, and any other if they do not expect a message
            raise InvalidChatError(f"the chat template refuses the messages ({first_line(error)})") from None


_MARKS = {0xF0000: None, 0xF0001: None}
"""The marks that `render` puts around special tokens in messages."""


def _starts(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """Returns the number of system messages, which stay, and the messages that can be the first after them, oldest first."""
    head = next((number for number, message in enumerate(messages) if message["role"] != "system"), 0)
    return head, [number for number, message in enumerate(messages) if number > head and message["role"] == "user"]
