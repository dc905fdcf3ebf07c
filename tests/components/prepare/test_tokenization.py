"""Token sequences, to the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from mixtune.components.prepare.tokenization import Encoder, load_saved_tokenizer, load_tokenizer, train_tokenizer
from mixtune.components.shared.context import Context
from mixtune.components.shared.errors import RefusedError
from tests.conftest import sentences

from .prepared import tokenizer_options

TEXTS = [*sentences(200), "今天的天气非常好。", "今天的天气不好。"]


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_tokenizer(TEXTS, 500, 64)


def encoder(tokenizer: Any, max_length: int = 16) -> Encoder:
    return Encoder(tokenizer, max_length, Context.for_tests())


def base_model(folder: Path, vocab_size: int = 10, **special: str) -> str:
    """A base model's folder with a word-level tokenizer: `a` to `f` are 0 to 5."""
    vocabulary = {word: number for number, word in enumerate([*"abcdef", "<unk>", *special.values()])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=backend, unk_token="<unk>", **special).save_pretrained(folder)
    LlamaConfig(vocab_size=vocab_size).save_pretrained(folder)
    return str(folder)


def load(folder: Path, **options: Any) -> Any:
    return load_tokenizer(tokenizer_options(base=base_model(folder, **options), vocabulary_size=None))


class TestTraining:
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_any_text_comes_back(self, trained: Any, text: str) -> None:
        (ids,) = encoder(trained).ids([text], "")
        assert trained.decode(ids) == text

    def test_names_of_special_tokens_in_a_text_are_ordinary_text_also_after_loading(
        self, trained: Any, tmp_path: Path
    ) -> None:
        trained.save_pretrained(tmp_path)
        for tokenizer in (trained, load_saved_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
            (ids,) = encoder(tokenizer).ids(["a<|eos|>b<|pad|>"], "")
            assert not set(ids) & set(tokenizer.all_special_ids)
            assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3

    def test_same_text_gives_the_same_files(self, trained: Any, tmp_path: Path) -> None:
        trained.save_pretrained(tmp_path / "a")
        train_tokenizer(TEXTS, 500, 64).save_pretrained(tmp_path / "b")
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()

    def test_size_and_plain_use_with_transformers(self, trained: Any, tmp_path: Path) -> None:
        assert 259 < len(trained) <= 500
        trained.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        ids = loaded("the cat")["input_ids"]
        assert ids[0] == loaded.bos_token_id
        assert loaded.decode(ids, skip_special_tokens=True) == "the cat"
        assert len(encoder(trained).ids(["the large red house"], "")[0]) <= 5


class TestBase:
    def test_tokenizer_without_bos_starts_with_eos(self, tmp_path: Path) -> None:
        made = encoder(load(tmp_path, eos_token="<eos>"))
        assert made.document([1, 2]) == [7, 1, 2, 7]

    def test_bos_and_eos(self, tmp_path: Path) -> None:
        made = encoder(load(tmp_path, bos_token="<bos>", eos_token="<eos>"))
        assert made.document([1, 2]) == [7, 1, 2, 8]

    def test_cls_and_sep_stand_in(self, tmp_path: Path) -> None:
        made = encoder(load(tmp_path, cls_token="<cls>", sep_token="<sep>"))
        assert made.document([1]) == [7, 1, 8]

    def test_neither_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RefusedError, match="neither an EOS nor a BOS token"):
            load(tmp_path)

    def test_tokenizer_larger_than_the_vocabulary_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RefusedError, match="a tokenizer of 8 entries and a vocabulary of 7"):
            load(tmp_path, vocab_size=7, eos_token="<eos>")
        assert len(load(tmp_path, vocab_size=8, eos_token="<eos>")) == 8

    def test_folder_that_is_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(RefusedError, match=r"model\.base: .* has no tokenizer that can be loaded"):
            load_tokenizer(tokenizer_options(base=str(tmp_path), vocabulary_size=None))
        with pytest.raises(RefusedError, match="is no tokenizer folder"):
            load_saved_tokenizer(tmp_path)

    def test_base_tokenizer_survives_saving(self, tmp_path: Path) -> None:
        tokenizer = load(tmp_path / "base", eos_token="<eos>")
        tokenizer.save_pretrained(tmp_path / "saved")
        assert encoder(load_saved_tokenizer(tmp_path / "saved")).ids(["a b f"], "") == [[0, 1, 5]]


class TestExamples:
    def test_text_is_cut_at_its_end_and_keeps_eos(self, trained: Any) -> None:
        made = encoder(trained, max_length=6)
        assert made.text([10, 11, 12, 13]) == ([made.bos, 10, 11, 12, 13, made.eos], False)
        assert made.text([10, 11, 12, 13, 14]) == ([made.bos, 10, 11, 12, 13, made.eos], True)

    def test_boundary_of_the_completion(self, trained: Any) -> None:
        made = encoder(trained)
        assert made.prompted([10, 11], [20, 21, 22]) == ([made.bos, 10, 11, 20, 21, 22, made.eos], 3, False)

    def test_prompt_is_cut_at_its_left(self, trained: Any) -> None:
        made = encoder(trained, max_length=6)
        assert made.prompted([10, 11, 12], [20, 21]) == ([made.bos, 11, 12, 20, 21, made.eos], 3, True)
        assert made.prompted([10, 11, 12], [20, 21, 22, 23]) == ([made.bos, 20, 21, 22, 23, made.eos], 1, True)

    def test_completion_that_does_not_fit(self, trained: Any) -> None:
        assert encoder(trained, max_length=6).prompted([10], [20, 21, 22, 23, 24]) is None

    @given(st.lists(st.integers(3, 99), max_size=30), st.lists(st.integers(3, 99), min_size=1, max_size=30))
    def test_a_fitted_example_is_never_too_long_and_keeps_its_completion(
        self, trained: Any, prompt: list[int], completion: list[int]
    ) -> None:
        fitted = encoder(trained).prompted(prompt, completion)
        if fitted is None:
            assert len(completion) > 14
            return
        tokens, start, cut = fitted
        assert len(tokens) <= 16
        assert tokens[start:-1] == completion
        assert prompt[len(prompt) - (start - 1) :] == tokens[1:start]
        assert cut == (start - 1 < len(prompt))
