"""Beginnings of a text have the tokens that they have alone, and no text is encoded for each of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from mixtune.components.prepare import chat_pieces
from mixtune.components.prepare.chat_pieces import PieceEncoder
from mixtune.components.prepare.chats import ChatEncoder
from mixtune.components.shared.data.chats import Chat
from mixtune.components.shared.third_party.transformers_chats import encode
from tests.conftest import sentences

from .chat_families import FAMILIES, tokenizer_of

ADDED = {
    "first": {},
    "lstrip": {"lstrip": True},
    "rstrip": {"rstrip": True},
    "normalized": {"normalized": True},
    "single word": {"single_word": True},
    "prepend": {},
}
"""Tokenizers in the manner of SentencePiece, and how they find their special tokens."""
PARTS = [
    "a b",
    " ",
    "\n",
    "  the cat ",
    "天气",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "[INST]",
    "<x>",
    "<x>y",
    "<bos>",
    "<",
]


@cache
def tokenizer(name: str) -> Any:
    if name in FAMILIES:
        return tokenizer_of(name)
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    if name in ("prepend", "normalized"):  # as Llama 2: each text between special tokens begins with a space
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator([*sentences(60), "a b\n\n天气"], trainer)
    wrap: Any = PreTrainedTokenizerFast
    made = wrap(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    options: dict[str, Any] = {"special": True, "normalized": False, **ADDED[name]}
    made.add_tokens([AddedToken(token, **options) for token in ("<|im_end|>", "<x>", "<x>y")])
    return made


@pytest.mark.parametrize("name", [*FAMILIES, *ADDED])
@given(parts=st.lists(st.sampled_from(PARTS), max_size=12), data=st.data())
def test_tokens_are_those_of_each_text_alone(name: str, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    ends = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
    tokens, beginnings = PieceEncoder(tokenizer(name)).encode(text, ends)
    whole, *alone = encode(tokenizer(name), [text, *(text[:end] for end in ends)])
    assert tokens == whole
    assert [tokens[:same] + rest for same, rest in beginnings] == alone


@pytest.mark.parametrize("name", ["chatml", "chatml_marked", "llama3", "mistral", "gemma"])
def test_the_text_of_a_chat_is_encoded_about_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [f"{text} " * 5 for text in sentences(40)]
    chat = Chat([{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)], [])
    counted = 0

    def counting(tokenizer: Any, texts: list[str]) -> list[list[int]]:
        nonlocal counted
        counted += sum(map(len, texts))
        return encode(tokenizer, texts)

    monkeypatch.setattr(chat_pieces, "encode", counting)
    whole, _ = ChatEncoder(tokenizer_of(name), None).encode(chat)
    assert whole is not None
    text = sum(map(len, contents)) + 40 * 60
    assert len("".join(contents)) < counted < 1.6 * text
