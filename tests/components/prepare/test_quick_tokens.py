"""fastokens gives the tokens of the tokenizer itself, for tokenizers like those of well-known families and for any text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, processors, trainers
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from mixtune.components.prepare.quick_tokens import QuickTokenizer
from mixtune.components.prepare.tokenization import Encoder, train_tokenizer
from tests.conftest import sentences

CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CASELESS += r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How tokenizers like Llama 3's and Qwen's part a text."""
CORPUS = [
    *sentences(300),
    *["It's 2024, we'LL see: x_1 = [0, 1]\n", "我们的模型不会忘记。日本語のカタカナ 한국어 العربية हिन्दी\n"] * 30,
]
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>")
SPACES = norm.Replace(" ", "▁")


def bpe(before: Any, normalizer: Any = None, by_bytes: bool = True) -> Tokenizer:
    """A tokenizer of some hundred tokens, byte-level or with bytes for what is unknown."""
    backend = Tokenizer(
        models.BPE() if by_bytes else models.BPE(unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True)
    )
    if normalizer:
        backend.normalizer = normalizer
    if before:
        backend.pre_tokenizer = before
    names = [*SPECIAL, *([] if by_bytes else [f"<0x{byte:02X}>" for byte in range(256)])]
    alphabet = pre.ByteLevel.alphabet() if by_bytes else []
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=[(name, backend.token_to_id(name)) for name in SPECIAL[1:]]
    )
    return backend


def caseless() -> Any:
    return pre.Sequence([pre.Split(Regex(CASELESS), "isolated"), pre.ByteLevel(False, use_regex=False)])


def wrapped(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    wrap: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = wrap(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>", **options)
    return made


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    with_tokens = wrapped(bpe(pre.ByteLevel(False)), split_special_tokens=True)
    with_tokens.add_tokens([AddedToken("<|x|>", lstrip=True), AddedToken("Y!", rstrip=True, normalized=False)])
    return {
        "trained here": train_tokenizer(CORPUS, 700, 64),
        "trained here, masked": train_tokenizer(CORPUS, 700, 64, "masked_lm"),
        "GPT-2": wrapped(bpe(pre.ByteLevel(False))),
        "Llama 3": wrapped(bpe(caseless())),
        "Qwen": wrapped(bpe(caseless(), norm.NFC())),
        "Llama 2": wrapped(bpe(None, norm.Sequence([norm.Prepend("▁"), SPACES]), by_bytes=False)),
        "Gemma": wrapped(bpe(pre.Split(" ", "merged_with_previous"), SPACES, by_bytes=False)),
        "added tokens": with_tokens,
    }


@pytest.fixture(scope="module")
def quick_ones(tokenizers: dict[str, Any]) -> dict[str, QuickTokenizer | None]:
    return {name: QuickTokenizer.of(tokenizer) for name, tokenizer in tokenizers.items()}


PIECES = (
    " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200d", "\ufeff", "\x00", "\u2028", "'s", "'LL", "'ſ", "\u212a",
    "don't", "1234567", "٣٤", "Ⅷ", "def ", "__init__", "…", "<|eos|>", "<|bos|>", " <|x|>", "Y!  ", "<0x0A>", "▁", "é", "İ",
    "中文", "かな", "한국", "عرب", "हि", "👩‍👩‍👧", "\U0010ffff", "====", " \n ",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


@settings(max_examples=60)
@given(texts=st.lists(TEXTS, max_size=12), special=st.booleans())
def test_tokens_are_those_of_the_tokenizer_itself(
    tokenizers: dict[str, Any], quick_ones: dict[str, QuickTokenizer | None], texts: list[str], special: bool
) -> None:
    for name, tokenizer in tokenizers.items():
        quick = quick_ones[name]
        assert quick is not None, name
        for text in texts:
            ids = quick.ids(text, special)
            if {"ſ", "\u212a"} & set(text):
                assert ids is None
            else:
                assert ids == tokenizer(text, add_special_tokens=special)["input_ids"], name


def test_letters_of_all_kinds_of_scripts_are_encoded_the_same_way(tokenizers: dict[str, Any]) -> None:
    letters = [chr(code) for code in (*range(0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x10400))]
    text = "".join(f"a{letter}b 1{letter}2 '{letter} {letter}{letter}\n" for letter in letters)
    quick, tokenizer = QuickTokenizer.of(tokenizers["Qwen"]), tokenizers["Qwen"]
    assert quick is not None
    assert quick.ids("ſ", False) is None
    text = text.replace("ſ", "").replace("\u212a", "")
    assert quick.ids(text, False) == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_truncation_and_padding_that_a_tokenizer_was_saved_with_are_not_applied(tokenizers: dict[str, Any]) -> None:
    backend = Tokenizer.from_str(tokenizers["GPT-2"].backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    quick = QuickTokenizer.of(wrapped(backend))
    assert quick is not None
    text = "the cat sees the dog in the garden"
    assert quick.ids(text, False) == tokenizers["GPT-2"](text, add_special_tokens=False)["input_ids"]


def test_letters_on_which_regular_expressions_disagree_are_left_to_the_tokenizer(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["Llama 3"]
    texts = ["plain", "it'ſa", "", "273 \u212a"]
    assert Encoder(tokenizer, 64).ids(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["word piece", "unigram", "dropout", "a whole word", "another"])
def test_other_tokenizers_encode_by_themselves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "word piece":
        backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = norm.BertNormalizer(), pre.BertPreTokenizer()
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -2.0)], 0))
        backend.pre_tokenizer = pre.Metaspace()
    else:
        backend = bpe(pre.ByteLevel(False))
    if kind == "dropout":
        content = json.loads(backend.to_str())
        content["model"]["dropout"] = 0.1
        backend = Tokenizer.from_str(json.dumps(content))
    elif kind == "a whole word":
        backend.add_tokens([AddedToken("word", single_word=True)])
    elif kind == "another":
        import fastokens

        mine, real = bpe(pre.ByteLevel(True)).to_str(), fastokens.Tokenizer.from_json_str
        monkeypatch.setattr(fastokens, "Tokenizer", type("", (), {"from_json_str": staticmethod(lambda _: real(mine))}))
    assert QuickTokenizer.of(wrapped(backend)) is None
