"""Candidates whose training data the start model writes: replay text, and its own version of the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from mixtune.components.mixed.config import Controls, MixedCandidate
from mixtune.components.mixed.generated import Writer
from mixtune.components.shared.artifacts import ModelCard, read_jsonl
from mixtune.components.shared.data.prepared import DataManifest, Document, Documents, write_split
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.running.context import Context
from mixtune.components.shared.serving.encoding import first_and_last
from tests.components.shared.tiny import tiny_model, tiny_tokenizer
from tests.components.stages import Stages

pytestmark = pytest.mark.numeric
REPLAY = MixedCandidate(id="mixed-0.3-generated", mix_weight=0.3, generated_tokens=400)


def writer(folder: Path, seed: int, max_length: int = 32) -> Writer:
    return Writer(tiny_model(), tiny_tokenizer(), max_length, seed, "float32", folder, Context.for_tests())


def texts(documents: Documents) -> list[list[int]]:
    return [documents.tokens(index).tolist() for index in range(len(documents))]


def test_replay_text_is_drawn_from_the_models_distribution(tmp_path: Path) -> None:
    made = writer(tmp_path, 0, max_length=2).replay(8000)
    first, _ = first_and_last(tiny_tokenizer())
    drawn = texts(made.documents)
    assert {text[0] for text in drawn} == {first}
    assert len(drawn) == 4000
    with torch.no_grad():
        wanted = tiny_model().eval().lm(input_ids=torch.tensor([[first]])).logits[0, -1].softmax(-1).numpy()
    found = np.bincount([text[1] for text in drawn], minlength=len(wanted)) / len(drawn)
    assert np.abs(found - wanted).max() < 5 * np.sqrt(wanted.max() / len(drawn))
    assert wanted.max() > 2 * np.median(wanted), "or a uniform distribution would pass"


def test_the_seed_determines_the_replay_text(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    one, again, other = (writer(tmp_path, seed).replay(300) for seed in (1, 1, 2))
    assert texts(one.documents) == texts(again.documents) != texts(other.documents)
    assert one.digest == again.digest
    assert torch.equal(torch.get_rng_state(), state), "the training's own random numbers are the same as without"
    assert 300 <= one.cost.tokens == sum(map(len, texts(one.documents))) < 300 + 32 * 32


def test_generated_replay_needs_no_pretraining_text(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.pretrain()
    for file in (tmp_path / "text" / "train").iterdir():
        file.unlink()
    folder = stages.mixed(REPLAY)
    card = ModelCard.load(folder)
    assert card.realised_mix_weight == pytest.approx(0.3)
    assert card.tokens["pretrain"] > 0
    assert card.generation is not None
    assert card.generation.tokens >= 400
    assert card.seconds >= card.generation.seconds > 0
    written = list(read_jsonl(folder / "generated.jsonl"))
    assert len(written) == card.generation.documents
    assert {row["source"] for row in written} == {"generated"}


def write_prompts(folder: Path) -> None:
    """Prompts of three words, whose answer depends on the first."""
    words, draw = tiny_tokenizer(), np.random.default_rng(0)
    documents = []
    for number in range(24):
        ids = draw.integers(0, 50, 3).tolist()
        prompt, completion = words.decode(ids), ["w7 w8", "w9"][ids[0] % 2]
        tokens = [*ids, *words(completion)["input_ids"], words.eos_token_id]
        record = {"id": f"e{number}", "source": "made", "bytes": 9, "prompt": prompt, "completion": completion}
        documents.append(Document(tokens, record, supervised_from=3))
    splits: Any = {"train": write_split(folder, "train", documents)}
    DataManifest(
        stream="finetune", task="generation", max_length=32, vocabulary_size=61, source="made", splits=splits
    ).save(folder)


def test_answers_are_replaced_by_the_start_models_own_if_they_end(tmp_path: Path) -> None:
    stages = Stages(tmp_path, "generation")
    write_prompts(tmp_path / "labels")
    stages.pretrain()
    stages.finetune(steps=60)  # a model that has learned the task ends its answers
    candidate = MixedCandidate(id="mixed-0-self-distilled", mix_weight=0.0, rewrite_prompt="{prompt}")
    folder = stages.mixed(candidate, start="finetuned", folder="finetuned")
    written = list(read_jsonl(folder / "generated.jsonl"))
    examples = Documents(tmp_path / "labels", "train")
    own = [row.get("rewritten", False) for row in written]
    card = ModelCard.load(folder)
    assert card.generation is not None
    assert card.generation.kept == sum(own)
    assert sum(own) > 0
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "finetuned").eval()
    words = tiny_tokenizer()
    for row, record, is_own in zip(written, examples.records(), own, strict=True):
        assert (row["id"], row["prompt"]) == (record["id"], record["prompt"])
        if not is_own:
            assert row["completion"] == record["completion"]
            continue
        ids = words(row["prompt"])["input_ids"]
        while len(ids) < 64 and (len(ids) == 0 or ids[-1] != words.eos_token_id):
            with torch.no_grad():
                ids.append(int(plain(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert str(words.decode(ids, skip_special_tokens=True)).endswith(row["completion"])


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    stages = Stages(tmp_path, "multi_label", "masked_lm")
    stages.pretrain()
    with pytest.raises(RefusedError, match=r"mixed-0.3-generated: a masked language model writes no text"):
        stages.mixed(REPLAY)
    with pytest.raises(ValidationError, match=r"must contain \{completion\}"):
        Controls(rewrite_prompt="Say it again: {prompt}")
