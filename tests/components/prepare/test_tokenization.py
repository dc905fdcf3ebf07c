"""Token sequences, to the token."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from mixtune.components.prepare.tokenization import Encoder, load_saved_tokenizer, load_tokenizer, train_tokenizer
from mixtune.components.shared.errors import RefusedError
from tests.conftest import sentences

from .prepared import tokenizer_options
from .wordpiece import bert_folder

TEXTS = [*sentences(200), "今天的天气非常好。", "今天的天气不好。"]


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_tokenizer(TEXTS, 500, 64)


def encoder(tokenizer: Any, max_length: int = 16) -> Encoder:
    return Encoder(tokenizer, max_length)


def base_model(folder: Path, vocab_size: int = 10, template: str | None = None, **special: str) -> str:
    """A base model's folder with a word-level tokenizer: `a` to `f` are 0 to 5; `template` is as `<bos> $A <eos>`."""
    vocabulary = {word: number for number, word in enumerate([*"abcdef", "<unk>", *special.values()])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None:
        named = [(token, vocabulary[token]) for token in template.split() if token in vocabulary]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=backend, unk_token="<unk>", **special).save_pretrained(folder)
    LlamaConfig(vocab_size=vocab_size).save_pretrained(folder)
    return str(folder)


def load(folder: Path, **options: Any) -> Any:
    return load_tokenizer(tokenizer_options(base=base_model(folder, **options), vocabulary_size=None))


class TestTraining:
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def test_any_text_comes_back(self, trained: Any, text: str) -> None:
        (ids,) = encoder(trained).ids([text])
        assert trained.decode(ids) == text

    def test_a_long_run_of_letters_is_trained_on_in_bounded_time(self, tmp_path: Path) -> None:
        letters = random.Random(0)
        run = "".join(letters.choices("acgt", k=400_000))
        started = time.process_time()
        tokenizer: Any = train_tokenizer([*TEXTS, run], 500, 64)
        (ids,) = encoder(tokenizer).ids([run])
        assert time.process_time() - started < 20  # 40 s without a bound
        assert tokenizer.decode(ids) == run
        chinese = "".join(letters.choices("天地人和", k=3000))
        found = tokenizer(chinese, return_offsets_mapping=True, verbose=False)
        assert tokenizer.decode(found["input_ids"][1:]) == chinese
        assert {place for low, high in found["offset_mapping"] for place in range(low, high)} == set(range(3000))

    def test_other_text_is_tokenised_as_without_a_bound(self) -> None:
        tokenizer: Any = train_tokenizer(TEXTS, 500, 64)
        plain = Backend(models.BPE())
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            min_frequency=2,
            special_tokens=["<|pad|>", "<|bos|>", "<|eos|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        plain.train_from_iterator(TEXTS, trainer)
        assert tokenizer.get_vocab() == plain.get_vocab()
        texts = [*TEXTS, "x" * 1024, " " * 1000, "天" * 300, "a\n\n b 123 " * 500]
        assert [tokenizer(text, verbose=False)["input_ids"][1:] for text in texts] == [
            plain.encode(text).ids for text in texts
        ]

    def test_names_of_special_tokens_in_a_text_are_ordinary_text_also_after_loading(
        self, trained: Any, tmp_path: Path
    ) -> None:
        trained.save_pretrained(tmp_path)
        for tokenizer in (trained, load_saved_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
            (ids,) = encoder(tokenizer).ids(["a<|eos|>b<|pad|>"])
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
        assert len(encoder(trained).ids(["the large red house"])[0]) <= 5


class TestMaskedTraining:
    @pytest.fixture(scope="class")
    def masked(self) -> Any:
        return train_tokenizer(TEXTS, 500, 64, "masked_lm")

    def test_special_tokens_stand_around_one_text_and_around_two_also_after_loading(
        self, masked: Any, tmp_path: Path
    ) -> None:
        masked.save_pretrained(tmp_path)
        for tokenizer in (masked, load_saved_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
            bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
            assert (tokenizer.cls_token_id, tokenizer.sep_token_id) == (bos, eos)
            one, two = encoder(tokenizer).ids(["the cat", "今天 a"])
            assert tokenizer("the cat")["input_ids"] == [bos, *one, eos]
            both = tokenizer("the cat", "今天 a")
            assert both["input_ids"] == [bos, *one, eos, *two, eos]
            assert both["token_type_ids"] == [0] * (len(one) + 2) + [1] * (len(two) + 1)

    def test_the_mask_is_a_token_of_its_own_and_found_in_a_text(self, masked: Any) -> None:
        special = {masked.pad_token_id, masked.bos_token_id, masked.eos_token_id, masked.mask_token_id}
        assert len(special) == 4
        assert masked.mask_token == "<|mask|>"
        assert len(masked) <= 500
        assert masked.mask_token_id in masked("the <|mask|>")["input_ids"]

    def test_documents_and_texts_end_with_eos(self, masked: Any) -> None:
        made = encoder(masked, max_length=8)
        assert made.document([70, 71]).tolist() == [made.bos, 70, 71, made.eos]
        text = "今天 abcdefgh" * 9
        (whole,) = made.ids([text], special=True)
        assert made.text(text, whole) == ([*whole[:7], made.eos], True)
        assert whole[0] == made.bos

    def test_a_tokenizer_for_a_causal_model_has_no_mask(self, trained: Any) -> None:
        assert trained.mask_token is None
        assert trained.cls_token is None
        assert "<|mask|>" not in trained.get_vocab()


class TestBase:
    def test_bert_puts_documents_between_cls_and_sep(self, tmp_path: Path) -> None:
        folder = bert_folder(tmp_path, TEXTS)
        tokenizer: Any = load_tokenizer(tokenizer_options(base=folder, vocabulary_size=None))
        made = encoder(tokenizer)
        text = "The cat sees 今天"
        (ids,) = made.ids([text])
        assert made.document(ids).tolist() == tokenizer(text)["input_ids"]
        assert made.document(ids)[0] == tokenizer.cls_token_id
        assert made.document(ids)[-1] == tokenizer.sep_token_id

    def test_tokenizer_without_bos_starts_with_eos(self, tmp_path: Path) -> None:
        made = encoder(load(tmp_path, eos_token="<eos>"))
        assert made.document([1, 2]).tolist() == [7, 1, 2, 7]

    def test_bos_and_eos(self, tmp_path: Path) -> None:
        made = encoder(load(tmp_path, bos_token="<bos>", eos_token="<eos>"))
        assert made.document([1, 2]).tolist() == [7, 1, 2, 8]

    def test_cls_and_sep_stand_in(self, tmp_path: Path) -> None:
        made = encoder(load(tmp_path, cls_token="<cls>", sep_token="<sep>"))
        assert made.document([1]).tolist() == [7, 1, 8]

    def test_neither_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RefusedError, match="neither an EOS nor a BOS token"):
            load(tmp_path)

    def test_tokenizer_larger_than_the_vocabulary_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RefusedError, match="the token <eos> the id 7, but the model has 7 embeddings"):
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
        assert encoder(load_saved_tokenizer(tmp_path / "saved")).ids(["a b f"]) == [[0, 1, 5]]


OWN: dict[str, dict[str, Any]] = {
    "trained": {},
    "nothing added, no pad": {"eos_token": "<eos>"},
    "BOS and EOS added": {"bos_token": "<bos>", "eos_token": "<eos>", "template": "<bos> $A <eos>"},
    "EOS added": {"eos_token": "<eos>", "template": "$A <eos>"},
    "CLS and SEP added": {"cls_token": "<cls>", "sep_token": "<sep>", "template": "<cls> $A <sep>"},
}


@pytest.fixture(params=OWN)
def folder(request: pytest.FixtureRequest, trained: Any, tmp_path: Path) -> Path:
    """A model's folder as people load it, its tokenizer being one of each kind."""
    if request.param == "trained":
        LlamaConfig(vocab_size=len(trained)).save_pretrained(tmp_path)
        trained.save_pretrained(tmp_path)
    else:
        base_model(tmp_path, **OWN[request.param])
    return tmp_path


class TestClassification:
    @pytest.mark.parametrize("max_length", [8, 64])
    def test_tokens_are_those_of_a_plain_call_of_the_tokenizer(self, folder: Path, max_length: int) -> None:
        plain: Any = AutoTokenizer.from_pretrained(folder)
        made = encoder(load_saved_tokenizer(folder), max_length)
        texts = ["a", "b c d", "a b c d e f a", "a b c d e f a b", "f e d c b a f e d c b a", "今天 a"]
        for text, ids in zip(texts, made.ids(texts, special=True), strict=True):
            cut = len(plain(text)["input_ids"]) > max_length
            assert made.text(text, ids) == (plain(text, truncation=True, max_length=max_length)["input_ids"], cut)

    def test_trained_tokenizer_adds_bos_alone(self, trained: Any) -> None:
        made = encoder(trained, max_length=8)
        text = "今天 abcdefgh" * 9
        (alone,), (whole,) = made.ids([text]), made.ids([text], special=True)
        assert whole == [made.bos, *alone]
        assert made.text(text, whole) == ([made.bos, *alone[:7]], True)
        assert made.text("a", [made.bos, 70]) == ([made.bos, 70], False)

    def test_just_as_long_as_fits_is_not_cut(self, tmp_path: Path) -> None:
        made = encoder(load(tmp_path, **OWN["BOS and EOS added"]), max_length=8)
        texts = ["a b c d e f", "a b c d e f a"]
        fits, longer = made.ids(texts, special=True)
        assert made.text(texts[0], fits) == ([7, 0, 1, 2, 3, 4, 5, 8], False)
        assert made.text(texts[1], longer) == ([7, 0, 1, 2, 3, 4, 5, 8], True)

    def test_text_without_any_token_is_bos(self, tmp_path: Path) -> None:
        made = encoder(load(tmp_path, eos_token="<eos>"))
        assert made.text(" ", made.ids([" "], special=True)[0]) == ([7], False)

    def test_cutting_leaves_no_trace_in_the_tokenizer(self, trained: Any) -> None:
        before = trained.backend_tokenizer.to_str()
        made = encoder(trained, max_length=8)
        (ids,) = made.ids([TEXTS[0] * 9], special=True)
        assert made.text(TEXTS[0] * 9, ids) == (ids[:8], True)
        assert trained.backend_tokenizer.to_str() == before


class TestGeneration:
    def test_prompt_is_what_a_plain_call_gives_less_the_end(self, folder: Path) -> None:
        plain: Any = AutoTokenizer.from_pretrained(folder)
        made = encoder(load_saved_tokenizer(folder))
        (prompt,) = made.ids(["a b c"], special=True)
        fitted = made.prompted(prompt, [4, 5])
        assert fitted is not None
        tokens, start, cut = fitted
        ids = plain("a b c")["input_ids"]
        own = ids[:-1] if ids[-1] in (plain.eos_token_id, plain.sep_token_id) else ids
        assert tokens == [*own, 4, 5, made.eos]
        assert (start, cut) == (len(own), False)

    def test_boundary_of_the_completion(self, trained: Any) -> None:
        made = encoder(trained)
        assert made.prompted([made.bos, 10, 11], [20, 21, 22]) == (
            [made.bos, 10, 11, 20, 21, 22, made.eos],
            3,
            False,
        )

    def test_prompt_is_cut_at_its_left_and_keeps_bos(self, trained: Any) -> None:
        made = encoder(trained, max_length=6)
        prompt = [made.bos, 10, 11, 12]
        assert made.prompted(prompt, [20, 21]) == ([made.bos, 11, 12, 20, 21, made.eos], 3, True)
        assert made.prompted(prompt, [20, 21, 22, 23]) == ([made.bos, 20, 21, 22, 23, made.eos], 1, True)

    def test_without_special_tokens_the_first_prompt_token_is_the_context(self, tmp_path: Path) -> None:
        made = encoder(load(tmp_path, eos_token="<eos>"), max_length=6)
        assert made.prompted([0, 1, 2, 3, 4], [5, 5]) == ([2, 3, 4, 5, 5, 7], 3, True)
        assert made.prompted([0, 1], [5, 5, 5, 5]) == ([1, 5, 5, 5, 5, 7], 1, True)
        assert made.prompted([0, 1], [5, 5, 5, 5, 5]) is None

    @pytest.mark.parametrize("template", [None, "$A <eos>"])
    def test_without_prompt_and_bos_the_end_stands_first(self, tmp_path: Path, template: str | None) -> None:
        made = encoder(load(tmp_path, eos_token="<eos>", template=template), max_length=6)
        (prompt,) = made.ids([""], special=True)
        assert made.prompted(prompt, [5, 5, 5, 5]) == ([7, 5, 5, 5, 5, 7], 1, False)
        assert made.prompted(prompt, [5, 5, 5, 5, 5]) is None

    def test_end_that_is_text_stays(self, tmp_path: Path) -> None:
        made = encoder(load(tmp_path, **OWN["BOS and EOS added"]))
        (prompt,) = made.ids(["a <eos>"], special=True)
        assert made.prompted(prompt, [5]) == ([7, 0, 8, 5, 8], 3, False)

    def test_completion_that_does_not_fit(self, trained: Any) -> None:
        made = encoder(trained, max_length=6)
        assert made.prompted([made.bos, 10], [20, 21, 22, 23, 24]) is None


def test_only_tokenizers_that_keep_every_byte_are_taken_at_their_word(tmp_path: Path) -> None:
    texts = sentences(30)
    byte_level = train_tokenizer(texts, 400, 32)
    assert encoder(byte_level)._is_lossless
    assert not encoder(AutoTokenizer.from_pretrained(bert_folder(tmp_path / "bert", texts)))._is_lossless
    text = "Ünïcode 你好 🙂\t\n\x00 " + texts[0]
    (ids,) = encoder(byte_level).ids([text])
    assert byte_level.decode(ids) == text
    found = encoder(byte_level).survival(text, ids)
    slow = encoder(byte_level)
    slow._is_lossless = False
    assert slow.survival(text, ids) == found
