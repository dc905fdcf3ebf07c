"""Tokenizers with the chat templates of model families, and what they should write, written down a second time without Jinja.

The reference returns pieces: each is the name of a special token, or a text, and whether the assistant wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from mixtune.components.prepare.tokenization import train_tokenizer
from tests.conftest import sentences

TEMPLATES = Path(__file__).parent / "chat_templates"
Message = dict[str, Any]
Piece = tuple[str, bool]


@dataclass(frozen=True)
class Family:
    """One family of models."""

    tokens: tuple[str, ...]
    pieces: Callable[[Sequence[Message]], list[Piece]]
    bos: str | None
    eos: str
    template: str = ""


def chatml(messages: Sequence[Message]) -> list[Piece]:
    found: list[Piece] = []
    for turn in messages:
        is_own = turn["role"] == "assistant"
        found += [("<|im_start|>", False), (f"{turn['role']}\n", False), (turn["content"], is_own)]
        found += [("<|im_end|>", is_own), ("\n", False)]
    return found


def llama3(messages: Sequence[Message]) -> list[Piece]:
    found: list[Piece] = [("<|begin_of_text|>", False)]
    for turn in messages:
        is_own, role = turn["role"] == "assistant", "ipython" if turn["role"] == "tool" else turn["role"]
        said = json.dumps(turn["content"], ensure_ascii=False) if role == "ipython" else turn["content"].strip()
        if turn.get("tool_calls"):
            call = turn["tool_calls"][0]["function"]
            said = json.dumps({"name": call["name"], "parameters": call["arguments"]}, ensure_ascii=False)
        found += [("<|start_header_id|>", False), (role, False), ("<|end_header_id|>", False), ("\n\n", False)]
        found += [(said, is_own), ("<|eot_id|>", is_own)]
    return found


def mistral(messages: Sequence[Message]) -> list[Piece]:
    found: list[Piece] = [("<s>", False)]
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    turns = messages[bool(system) :]
    last = max(number for number, turn in enumerate(turns) if turn["role"] == "user")
    for number, turn in enumerate(turns):
        if turn["role"] == "user":
            text = f" {system if number == last else ''}{turn['content']}"
            found += [("[INST]", False), (text, False), ("[/INST]", False)]
        else:
            is_seen_so = not system or number > last  # another turn is shown with the system message when it is written
            found += [(f" {turn['content'].strip()}", is_seen_so), ("</s>", is_seen_so)]
    return found


def gemma(messages: Sequence[Message]) -> list[Piece]:
    found: list[Piece] = [("<bos>", False)]
    for turn in messages:
        is_own = turn["role"] == "assistant"
        role = "model" if is_own else turn["role"]
        found += [("<start_of_turn>", False), (f"{role}\n", False), (turn["content"].strip(), is_own)]
        found += [("<end_of_turn>", is_own), ("\n", False)]
    return found


def qwen3(messages: Sequence[Message]) -> list[Piece]:
    found: list[Piece] = []
    last = max(number for number, turn in enumerate(messages) if turn["role"] == "user")
    for number, turn in enumerate(messages):
        is_own = turn["role"] == "assistant" and number > last
        found += [("<|im_start|>", False), ("user\n" if turn["role"] == "tool" else f"{turn['role']}\n", False)]
        if is_own:
            thought = turn.get("reasoning_content", "")
            found += [("<think>", True), (f"\n{thought}\n", True), ("</think>", True), ("\n\n", True)]
        if turn["role"] == "tool":
            found += [("<tool_response>", False), (f"\n{turn['content']}\n", False), ("</tool_response>", False)]
        else:
            found.append((turn["content"], is_own))
        for call in turn.get("tool_calls", []):
            text = json.dumps(call["function"], ensure_ascii=False)
            found += [("\n", is_own), ("<tool_call>", is_own), (f"\n{text}\n", is_own), ("</tool_call>", is_own)]
        found += [("<|im_end|>", is_own), ("\n", False)]
    return found


IM = ("<|im_start|>", "<|im_end|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THOUGHTS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
FAMILIES = {
    "chatml": Family(IM, chatml, None, "<|im_end|>"),
    "chatml_marked": Family(IM, chatml, None, "<|im_end|>"),
    "llama3": Family(
        ("<|begin_of_text|>", "<|end_of_text|>", *HEADERS), llama3, "<|begin_of_text|>", "<|end_of_text|>"
    ),
    "mistral": Family(("<s>", "</s>", "[INST]", "[/INST]"), mistral, "<s>", "</s>"),
    "gemma": Family(("<bos>", "<eos>", *TURNS), gemma, "<bos>", "<eos>"),
    "qwen3": Family((*IM, *THOUGHTS), qwen3, None, "<|im_end|>"),
}
UNMARKED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Added tokens that are no special tokens, as in Qwen 3."""


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with the special tokens and the template of a family."""
    family = FAMILIES[name]
    texts = [*sentences(60), "Yes.\n\nNo.\n\n\nassistant\n user\n system\n", "好的，天气很好。", "مرحبا بالعالم"]
    tokenizer = train_tokenizer(texts, 420, 10_000)
    tokenizer.add_tokens([AddedToken(token, special=token not in UNMARKED) for token in family.tokens])
    tokenizer.eos_token, tokenizer.bos_token = family.eos, family.bos
    tokenizer.pad_token = "<|pad|>"
    tokenizer.split_special_tokens = False
    if family.bos is None:  # the trained tokenizer begins a text with BOS, which these families do not have
        tokenizer.backend_tokenizer.post_processor = None
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def reference(name: str, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """The tokens of a chat up to the end of the last turn, and which of them are learned."""
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    ids: list[int] = []
    learned: list[bool] = []
    for (is_control, is_own), pieces in groupby(family.pieces(messages), lambda one: (one[0] in family.tokens, one[1])):
        texts = [text for text, _ in pieces]
        if is_control:
            found = [tokenizer.get_vocab()[text] for text in texts]
        else:
            found = tokenizer("".join(texts), add_special_tokens=False)["input_ids"] if any(texts) else []
        ids += found
        learned += [is_own] * len(found)
    end = max(place for place, is_own in enumerate(learned) if is_own) + 1
    return ids[:end], learned[:end]
