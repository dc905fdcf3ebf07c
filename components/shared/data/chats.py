"""Chats: lists of messages, checked and brought into one form.

Read are the conversational formats of TRL (`messages`, or `prompt` and `completion` as lists of messages, with `tools`) and
ShareGPT's `conversations` (`from` and `value`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .values import InvalidValueError, kind_of, parse_json, parse_text

NO_TEMPLATE = (
    "{section}: holds chats, but the tokenizer of {base} has no chat template; set model.chat_template to a Jinja file with "
    "one, for example that of the chat model whose format you want"
)
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""Roles in the field `from` that have other names here."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields with what an assistant thought before its answer. transformers hands each to templates under the first two names."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: messages in the form that chat templates take, each with `role` and `content`.
        tools: descriptions of the functions that the assistant can call; empty if there are none.
        learn_from: index of the first message that the assistant can learn; those before it are only read.
    """

    messages: list[Message]
    tools: list[Any]
    learn_from: int = 0

    @property
    def last_turn(self) -> int:
        """Returns the index of the last message of the assistant that is learned."""
        return self.turns[-1]

    @property
    def turns(self) -> list[int]:
        """Returns the indices of the messages of the assistant that can be learned."""
        return [
            number
            for number, message in enumerate(self.messages)
            if number >= self.learn_from and message["role"] == "assistant"
        ]

    @property
    def prompt(self) -> str:
        """Returns the text before the last turn; of a single message without its role, as a prompt would be written."""
        before = self.messages[: self.last_turn]
        tools = [json.dumps(self.tools, ensure_ascii=False)] if self.tools else []
        if len(before) == 1 and not tools:
            return text_of(before[0])
        return "\n\n".join([*tools, *(f"{message['role']}: {text_of(message)}" for message in before)])

    @property
    def completion(self) -> str:
        """Returns the text of the last turn."""
        return text_of(self.messages[self.last_turn])

    def to_json(self) -> dict[str, Any]:
        """Returns the chat as a value for JSON."""
        return {"messages": self.messages, "tools": self.tools, "learn_from": self.learn_from}


def text_of(message: Message) -> str:
    """Returns what a message says: its reasoning, its content and its tool calls."""
    reasoning = next((str(message[name]) for name in REASONING if message.get(name)), "")
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join(part for part in (reasoning, message["content"], *calls) if part)


def parse_chat(record: Mapping[str, Any], columns: Mapping[str, str]) -> Chat:
    """Returns the chat of a record.

    Args:
        record: columns of the record.
        columns: column name for the role `messages`, or for `prompt` and `completion`, and for `tools` if there is that column.

    Raises:
        InvalidValueError: if a value is invalid; the message begins with the name of the column.
    """
    learn_from = 0
    if "messages" in columns:
        messages = _messages(record[columns["messages"]], columns["messages"])
    else:
        messages = _messages(record[columns["prompt"]], columns["prompt"])
        learn_from = len(messages)
        messages += _messages(record[columns["completion"]], columns["completion"])
    chat = Chat(messages, _tools(record.get(columns.get("tools", "")), columns.get("tools", "")), learn_from)
    column = columns.get("messages", columns.get("completion", ""))
    try:
        json.dumps(chat.to_json(), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise InvalidValueError(f"{column} holds half of a surrogate pair, which is no character") from None
    except ValueError:
        raise InvalidValueError(f"{column} holds NaN or Infinity, which JSON does not have") from None
    if not chat.turns:
        raise InvalidValueError(f"{column} holds no message of the assistant")
    if chat.last_turn == 0:
        raise InvalidValueError(
            f"{column} begins with the only message of the assistant, so there is nothing to answer"
        )
    return chat


def is_chat(value: Any) -> bool:
    """Tells whether a prompt or a completion is a list of messages."""
    return isinstance(value, list)


def _messages(value: Any, column: str) -> list[Message]:
    value = parse_json(value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise InvalidValueError(f"{column} is {kind_of(value)}, not a list of messages")
    if not value:
        raise InvalidValueError(f"{column} is an empty list")
    return [_message(one, f"{column}, message {number},") for number, one in enumerate(value, start=1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise InvalidValueError(f"{where} is {kind_of(value)}, not an object with role and content")
    given = _without_nulls(value)
    if "role" not in given and "from" in given:  # ShareGPT
        given["role"], given["content"] = given.pop("from"), given.pop("value", None)
        given["role"] = SHAREGPT_ROLES.get(str(given["role"]), given["role"])
    role = given.get("role")
    if role not in ROLES:
        found = f"the role {role!r}" if isinstance(role, str) else "no role"
        raise InvalidValueError(
            f"{where} has {found}; it must be one of {', '.join(ROLES)} (or human, gpt, observation)"
        )
    if "tool_calls" in given:
        given["tool_calls"] = [_tool_call(call, where) for call in _listed(given["tool_calls"], f"{where} tool_calls")]
        if not given["tool_calls"]:
            del given["tool_calls"]
    given["content"] = _content(given.get("content"), where)
    if role in ("user", "assistant") and not given["content"].strip() and not given.get("tool_calls"):
        raise InvalidValueError(f"{where} of the {role}, is empty")
    for name in REASONING:
        if name in given and not isinstance(given[name], str):
            raise InvalidValueError(f"{where} has {name} that is {kind_of(given[name])}, not text")
    return {"role": role, "content": given.pop("content"), **{k: v for k, v in given.items() if k != "role"}}


def _content(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list):  # parts, as in the formats of models that also see pictures
        texts = []
        for part in value:
            if not isinstance(part, Mapping) or part.get("type", "text") != "text" or "text" not in part:
                kind = part.get("type") if isinstance(part, Mapping) else None
                raise InvalidValueError(f"{where} holds a part of type {kind}; only text can be learned")
            texts.append(part["text"])
        value = "".join(str(text) for text in texts)
    if isinstance(value, str) and not value.strip():
        return value
    try:
        return parse_text(value, "content")
    except InvalidValueError as problem:
        raise InvalidValueError(f"{where} has content that {problem}") from None


def _tool_call(value: Any, where: str) -> dict[str, Any]:
    """Returns a call in the form `{"type": "function", "function": {"name", "arguments"}}`, with arguments as an object."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidValueError(f"{where} has a tool call without the name of a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # as in the API of OpenAI; templates expect an object
        arguments = parse_json(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise InvalidValueError(f"{where} has a tool call whose arguments are no JSON object")
    kept = {name: value[name] for name in ("id",) if value.get(name)}
    return {"type": "function", **kept, "function": {"name": function["name"], "arguments": dict(arguments)}}


def _tools(value: Any, column: str) -> list[Any]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    tools = [_without_nulls(tool) for tool in _listed(value, column)]
    if not all(isinstance(tool, dict) for tool in tools):
        raise InvalidValueError(f"{column} holds a tool that is no object with a description of a function")
    return tools


def _listed(value: Any, what: str) -> Sequence[Any]:
    value = parse_json(value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise InvalidValueError(f"{what} is {kind_of(value)}, not a list")
    return value


def _without_nulls(value: Any) -> Any:
    """Removes fields that are null. Parquet gives every object in a column the fields of all of them."""
    if isinstance(value, Mapping):
        return {str(name): _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
