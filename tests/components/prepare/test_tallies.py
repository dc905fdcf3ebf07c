"""What a tokenizer does not know or changes: counted by source, warned of, and refused where it is most of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from mixtune.components.prepare.chats import ChatEncoder
from mixtune.components.prepare.tokenization import Survival, train_tokenizer
from mixtune.components.shared.data.chats import Chat
from mixtune.components.shared.data.tallies import log_lines, warnings
from mixtune.components.shared.errors import RefusedError
from tests.conftest import sentences

from .chat_families import tokenizer_of
from .prepared import jsonl, prepare_finetune, prepare_pretrain, tokenizer_options
from .test_tokenization import encoder
from .wordpiece import bert_folder

CYRILLIC = "Съешь ещё этих мягких французских булок"


def latin_model(folder: Path, unknown: str | None = "<unk>") -> str:
    """A base model whose tokenizer has the letters of `sentences` only; without an unknown token, it leaves out the others."""
    backend = Backend(models.BPE(unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    names = [name for name in (unknown, "</s>", "<TOWN>") if name]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    backend.train_from_iterator(sentences(100), trainer)
    wrap: Any = PreTrainedTokenizerFast
    wrap(
        tokenizer_object=backend, unk_token=unknown, eos_token="</s>", additional_special_tokens=["<TOWN>"]
    ).save_pretrained(folder)
    LlamaConfig(vocab_size=300).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_characters_that_the_tokenizer_does_not_know(tmp_path: Path, unknown: str | None) -> None:
    options = tokenizer_options(base=latin_model(tmp_path / "base", unknown), vocabulary_size=None)
    (tmp_path / "text").mkdir()
    jsonl(tmp_path / "text" / "latin.jsonl", [{"text": text} for text in sentences(150)])
    foreign = [{"text": f"{CYRILLIC} {text}"} for text in sentences(20, seed=9)]
    jsonl(tmp_path / "text" / "cyrillic.jsonl", foreign)
    made = prepare_pretrain(tmp_path / "out", tmp_path / "text", tokenizer=options)
    rows = made.manifest.tallies
    lost = {(row.part, row.source): row.count for row in rows if row.kind == "lost_characters" and row.count}
    assert {source for _, source in lost} == {None, f"{tmp_path}/text/cyrillic.jsonl"}
    assert sum(count for (_, source), count in lost.items() if source) == 20 * len(CYRILLIC.replace(" ", ""))
    assert (made.count("unknown_tokens") > 100) == (unknown is not None)
    found = warnings(rows, "pretrain")
    assert len(found) == (2 if unknown else 1)
    assert "characters" in found[-1]
    assert f"most in {tmp_path}/text/cyrillic.jsonl" in found[-1]
    assert "do not come back from their tokens" in made.page


def test_text_that_is_mostly_unknown_is_refused(tmp_path: Path) -> None:
    options = tokenizer_options(base=latin_model(tmp_path / "base"), vocabulary_size=None)
    source = jsonl(tmp_path / "a.jsonl", [{"text": f"{CYRILLIC} {number}"} for number in range(60)])
    with pytest.raises(RefusedError) as refused:
        prepare_pretrain(tmp_path / "out", source, tokenizer=options)
    unknown, lost = refused.value.problems
    assert unknown.startswith("data.pretrain: ")
    assert "tokens" in unknown
    assert "are unknown to the tokenizer (train " in unknown
    assert lost.endswith("use a base model whose tokenizer knows this text; from 50 % on this is refused")
    assert not (tmp_path / "out" / "train").exists()


def test_a_task_in_unknown_letters_is_refused(tmp_path: Path) -> None:
    options = tokenizer_options(base=latin_model(tmp_path / "base"), vocabulary_size=None)
    text = jsonl(tmp_path / "text.jsonl", [{"text": text} for text in sentences(60)])
    pretrained = prepare_pretrain(tmp_path / "pt", text, tokenizer=options)
    task = jsonl(tmp_path / "a.jsonl", [{"text": f"{CYRILLIC} {n}", "label": "ab"[n % 2]} for n in range(60)])
    with pytest.raises(RefusedError, match=r"data\.finetune: .* are unknown to the tokenizer"):
        prepare_finetune(tmp_path / "ft", task, pretrained, tokenizer=options)


def test_case_accents_and_white_space_are_not_lost(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert_folder(tmp_path, ["über cafe straße 北京 ( ) ' ."]))
    encode = encoder(tokenizer, 64)
    for text in ("ÜBER  Café (straße)", "cafe's 北京."):
        (ids,) = encode.ids([text], special=True)
        found = encode.survival(text, ids, special=True)
        assert (found.lost, found.characters) == (0, len(text.replace(" ", "")))


def test_names_of_special_tokens_hide_no_lost_character(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    encode = encoder(AutoTokenizer.from_pretrained(latin_model(tmp_path)))
    text = "Ж unk Ж"
    (ids,) = encode.ids([text])
    assert encode.survival(text, ids) == Survival(unknown=2, tokens=len(ids), lost=2, characters=5)


def test_a_trained_tokenizer_loses_nothing(tmp_path: Path) -> None:
    rows = [{"text": f"{CYRILLIC} 🙂 {text} e\u0301"} for text in sentences(60)]
    made = prepare_pretrain(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows))
    assert log_lines(made.manifest.tallies, "pretrain") == []
    assert "tokens that are unknown to the tokenizer" in made.page


def test_labels_that_look_the_same(tmp_path: Path) -> None:
    text = jsonl(tmp_path / "text.jsonl", [{"text": text} for text in sentences(60)])
    pretrained = prepare_pretrain(tmp_path / "pt", text)
    labels = ["caf\u00e9", "cafe\u0301 ", "Caf\u00e9", "tea", "tea"]
    rows = [{"text": text, "label": labels[number % 5]} for number, text in enumerate(sentences(100, seed=1))]
    made = prepare_finetune(tmp_path / "ft", jsonl(tmp_path / "a.jsonl", rows), pretrained)
    assert made.manifest.labels == ["Caf\u00e9", "caf\u00e9", "tea"]
    (line,) = [one for one in warnings(made.manifest.tallies, "finetune") if "case" in one]
    assert line.startswith(
        "data.finetune: 20 of 100 examples (20 %) have a label that differs from another in case alone"
    )
    assert "'caf\u00e9' and 'Caf\u00e9'" in line
    assert "&#39;caf\u00e9&#39; and &#39;Caf\u00e9&#39;" in made.page
    several = [{**row, "label": [row["label"], "x"]} for row in rows]
    made = prepare_finetune(tmp_path / "m", jsonl(tmp_path / "b.jsonl", several), pretrained, task="multi_label")
    assert made.manifest.labels == ["Caf\u00e9", "caf\u00e9", "tea", "x"]
    assert made.count("case_labels") == 20


class TestReferences:
    def prepared(self, folder: Path, base: str, completions: list[str]) -> Any:
        options = tokenizer_options(base=base, vocabulary_size=None, max_length=64)
        text = jsonl(folder / "text.jsonl", [{"text": text} for text in sentences(60)])
        pretrained = prepare_pretrain(folder / "pt", text, tokenizer=options)
        rows = [
            {"prompt": prompt, "completion": completions[number % len(completions)]}
            for number, prompt in enumerate(sentences(60, seed=6))
        ]
        source = jsonl(folder / "a.jsonl", rows)
        return prepare_finetune(folder / "ft", source, pretrained, task="generation", tokenizer=options)

    def test_those_that_the_tokenizer_changes_are_counted(self, tmp_path: Path) -> None:
        base = bert_folder(tmp_path / "base", [*sentences(100), "Winter"])
        made = self.prepared(tmp_path, base, ["the cat", "The cat"])
        assert made.count("changed_references") == 30
        assert made.count("lost_characters") == 0
        (line,) = warnings(made.manifest.tallies, "finetune")
        assert line.startswith("data.finetune: 30 of 60 examples (50 %) have a completion that the tokenizer changes")

    def test_special_tokens_are_kept_and_white_space_does_not_count(self, tmp_path: Path) -> None:
        made = self.prepared(tmp_path, latin_model(tmp_path / "base"), [" the <TOWN> cat", "the  cat ", "<TOWN>"])
        assert made.count("changed_references") == 0

    @pytest.mark.parametrize("trained_here", [False, True])
    def test_a_written_eos_is_not_doubled(self, tmp_path: Path, trained_here: bool) -> None:
        rows = [{"prompt": text, "completion": "the cat"} for text in sentences(60, seed=6)]
        text = jsonl(tmp_path / "text.jsonl", [{"text": text} for text in sentences(60)])
        base = "scratch" if trained_here else latin_model(tmp_path / "base")
        options = tokenizer_options(base=base, vocabulary_size=400 if trained_here else None, max_length=64)
        pretrained = prepare_pretrain(tmp_path / "pt", text, tokenizer=options)
        eos = "<|eos|>" if trained_here else "</s>"
        made = []
        for name, completion in (("plain", "the cat"), ("eos", f"the cat{eos}")):
            source = jsonl(tmp_path / f"{name}.jsonl", [{**row, "completion": completion} for row in rows])
            made.append(prepare_finetune(tmp_path / name, source, pretrained, task="generation", tokenizer=options))
        trained = [one.documents("train") for one in made]
        ends = [{tuple(one.tokens(index).tolist()[-3:]) for index in range(len(one))} for one in trained]
        assert ends[0] == ends[1]
        records = made[1].documents("train").records()
        assert {record["completion"] for record in records} == {"the cat"}
        assert {record["bytes"] - len(record["prompt"]) for record in records} == {len("the cat")}

    def test_only_one_eos_is_removed_and_no_whole_completion(self, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        encode = encoder(AutoTokenizer.from_pretrained(latin_model(tmp_path)))
        texts = ["winter</s>", "winter</s> \n", "winter</s></s>", "</s>", "win</s>ter", "winter "]
        assert [encode.without_eos(text) for text in texts] == [
            "winter", "winter", "winter</s>", "</s>", "win</s>ter", "winter "
        ]  # fmt: skip


def test_a_language_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    base = tmp_path / "base"
    texts = [" ".join(sentences(8, seed=n)) for n in range(100)]
    known = train_tokenizer(texts, 600, 64)
    known.save_pretrained(base)
    LlamaConfig(vocab_size=len(known)).save_pretrained(base)
    (tmp_path / "text").mkdir()
    jsonl(tmp_path / "text" / "english.jsonl", [{"text": text} for text in texts])
    options = tokenizer_options(base=str(base), vocabulary_size=None)
    made = prepare_pretrain(tmp_path / "english", tmp_path / "text", tokenizer=options)
    assert made.count("many_tokens") == 0
    chinese = [f"第{n}天，天气很好，我们一起去公园散步，看见了很多美丽的花和树，大家都非常高兴。" for n in range(120)]
    jsonl(tmp_path / "text" / "chinese.jsonl", [{"text": text} for text in [*chinese, "短"]])
    made = prepare_pretrain(tmp_path / "both", tmp_path / "text", tokenizer=options)
    assert made.count("many_tokens") == 120
    assert made.count("lost_characters") == made.count("unknown_tokens") == 0
    (found,) = warnings(made.manifest.tallies, "pretrain")
    assert "120 of 220 texts (55 %) have fewer than 2 bytes per token" in found
    assert f"most in {tmp_path}/text/chinese.jsonl" in found or "train" in found


def test_a_chat_in_such_a_language() -> None:
    tokenizer = tokenizer_of("chatml")
    chats, lines = ChatEncoder(tokenizer, None), "天气很好，我们去散步。" * 8
    whole, _ = chats.encode(Chat([{"role": "user", "content": lines}, {"role": "assistant", "content": "好"}], []))
    assert whole is not None
    plain = tokenizer(["user\n" + lines, "assistant\n", "好"], add_special_tokens=False)["input_ids"]
    assert chats.num_text_tokens(whole) == sum(map(len, plain)) + 1  # the line end between the turns
