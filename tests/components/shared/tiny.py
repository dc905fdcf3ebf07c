"""Models of a few thousand parameters, one for each architecture that the tests hold the engine to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mixtune.components.shared.data import DataManifest, Document, write_split
from mixtune.components.shared.model import MixedModel

VOCABULARY_SIZE = 61
ARCHITECTURES = ("llama", "gpt2", "qwen2")


def tiny_lm(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random language model; no dropout, so that two passes agree."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY_SIZE, n_positions=64, n_embd=16, n_layer=2, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    if architecture == "qwen2":
        return Qwen2ForCausalLM(
            Qwen2Config(vocab_size=VOCABULARY_SIZE, num_key_value_heads=1, initializer_range=0.2, **sizes)
        )
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY_SIZE, initializer_range=0.2, **sizes))


def tiny_model(architecture: str = "llama", labels: list[str] | None = None, seed: int = 0) -> MixedModel:
    """The same, with a head where labels are given."""
    model = MixedModel(tiny_lm(architecture, seed))
    if labels:
        model.add_head(labels, seed)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = {f"w{i}": i for i in range(VOCABULARY_SIZE - 3)}
    words |= {"<s>": VOCABULARY_SIZE - 3, "</s>": VOCABULARY_SIZE - 2, "<pad>": VOCABULARY_SIZE - 1}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def random_documents(count: int, seed: int, low: int = 3, high: int = 20) -> list[np.ndarray]:
    """Token ids of documents of uneven length."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCABULARY_SIZE - 3, draw.integers(low, high + 1)) for _ in range(count)]


def write_data(folder: Path, stream: str, task: str | None, count: int = 24, seed: int = 0) -> Path:
    """A data folder with random documents in all three splits."""
    labels = ["no", "yes"] if task == "classification" else None
    splits = {}
    for number, split in enumerate(("train", "dev", "test")):
        documents = []
        for index, tokens in enumerate(random_documents(count, seed + number)):
            record = {"id": f"{split}-{index}", "source": "random", "bytes": 5 * len(tokens), "text": f"text {index}"}
            documents.append(
                Document(
                    tokens=tokens.tolist(),
                    record=record,
                    supervised_from=2 if task == "generation" else 1,
                    label=int(tokens[0]) % 2 if labels else -1,
                )
            )
        splits[split] = write_split(folder, split, documents)  # type: ignore[arg-type]
    DataManifest(
        stream=stream, task=task, labels=labels, max_length=32, vocabulary_size=VOCABULARY_SIZE, source="random",
        splits=splits,
    ).save(folder)  # fmt: skip
    return folder
