"""Models of a few thousand parameters, one for each architecture that the tests hold the engine to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
)

from mixtune.components.prepare.watch import write_watch
from mixtune.components.shared.config import Task
from mixtune.components.shared.data.prepared import DataManifest, Document, write_split
from mixtune.components.shared.model.masking import Masking
from mixtune.components.shared.model.mixed_model import MixedModel

VOCABULARY_SIZE = 61
SPECIAL = {"<s>": 58, "</s>": 59, "<pad>": 60, "<mask>": 57}
ARCHITECTURES = ("llama", "gpt2", "qwen2")
BALANCE_WEIGHT = 0.5
ENCODERS = ("bert", "roberta", "modernbert")
LABELS = {"classification": ["a", "b", "c"], "multi_label": ["a", "b", "c", "d"]}


def _config(architecture: str, hidden: int) -> Any:
    """No dropout, so that two passes agree."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": 60,
    }
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ends: dict[str, Any] = {"bos_token_id": 58, "eos_token_id": 59}
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY_SIZE, n_positions=64, n_embd=hidden, n_layer=2, n_head=2,
            pad_token_id=60, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
        )  # fmt: skip
    if architecture == "qwen2":
        return Qwen2Config(num_key_value_heads=1, **sizes)
    if architecture == "bert":
        return BertConfig(max_position_embeddings=64, **no_dropout, **sizes)
    if architecture == "roberta":
        # Position ids begin behind the padding token's id, so there must be more of them.
        return RobertaConfig(max_position_embeddings=128, **ends, **no_dropout, **sizes)
    if architecture == "modernbert":
        # Local attention narrower than the tests' documents are long.
        local: dict[str, Any] = {"local_attention": 8, "global_attn_every_n_layers": 2}
        return ModernBertConfig(cls_token_id=58, sep_token_id=59, **ends, **local, **sizes)
    return LlamaConfig(**sizes)


def tiny_lm(architecture: str = "llama", seed: int = 0, attention: str = "sdpa", hidden: int = 16) -> PreTrainedModel:
    """A random language model, causal or masked."""
    config = _config(architecture, hidden)
    mapping = MODEL_FOR_MASKED_LM_MAPPING if architecture in ENCODERS else MODEL_FOR_CAUSAL_LM_MAPPING
    config._attn_implementation = attention
    torch.manual_seed(seed)
    chosen: Any = mapping[type(config)]
    lm: PreTrainedModel = chosen(config)
    return lm


def tiny_model(
    architecture: str = "llama",
    labels: list[str] | None = None,
    seed: int = 0,
    task: Task | None = None,
    attention: str = "sdpa",
    hidden: int = 16,
) -> MixedModel:
    """The same, with a head where a task, or labels to classify by, are given."""
    model = MixedModel(tiny_lm(architecture, seed, attention, hidden))
    if task is not None:
        model.add_head(task, LABELS.get(task), seed)
    elif labels:
        model.add_head("classification", labels, seed)
    return model


def mixture(kind: str = "mixtral", **changes: Any) -> MixedModel:
    """A random mixture of four experts, two for each token."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "initializer_range": 0.2,
        "pad_token_id": 60, "bos_token_id": 58, "eos_token_id": 59, "router_aux_loss_coef": BALANCE_WEIGHT,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes | changes)
    return MixedModel(AutoModelForCausalLM.from_config(config))


def tiny_tokenizer(ends: bool = False) -> PreTrainedTokenizerFast:
    """One token a word.

    Args:
        ends: puts <s> and </s> around every text, as encoders' tokenizers do.
    """
    words = {f"w{i}": i for i in range(min(SPECIAL.values()))} | SPECIAL
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 58), ("</s>", 59)]
        )
    tokenizer: Any = PreTrainedTokenizerFast
    return tokenizer(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", mask_token="<mask>",
        cls_token="<s>", sep_token="</s>",
    )  # fmt: skip


def tiny_masking(probability: float = 0.3) -> Masking:
    """Masking for the encoders."""
    return Masking.of(tiny_tokenizer(), probability)


def random_documents(count: int, seed: int, low: int = 3, high: int = 20) -> list[np.ndarray]:
    """Token ids of documents of uneven length."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, min(SPECIAL.values()), draw.integers(low, high + 1)) for _ in range(count)]


def targets_of(task: str | None, tokens: np.ndarray) -> tuple[float, ...]:
    """Targets that follow from the tokens, so that they can be learned."""
    if task == "multi_label":
        return tuple(float(bit) for bit in ((int(tokens[0]) >> shift) & 1 for shift in range(4)))
    if task == "regression":
        return (float(tokens[0]) / 32 - 1,)
    if task == "question_answering":
        start = int(tokens[0]) % len(tokens)
        return float(start), float(min(start + 1, len(tokens) - 1))
    return ()


def write_data(folder: Path, stream: str, task: Task | None, count: int = 24, seed: int = 0) -> Path:
    """A data folder with random documents in all splits."""
    labels = {"classification": ["no", "yes"]}.get(task or "", LABELS.get(task or ""))
    splits = {}
    for number, split in enumerate(("train", "dev", "test", *(["control"] if stream == "pretrain" else []))):
        documents = []
        for index, tokens in enumerate(random_documents(count, seed + number)):
            record = {"id": f"{split}-{index}", "source": "random", "bytes": 5 * len(tokens), "text": f"text {index}"}
            documents.append(
                Document(
                    tokens=tokens.tolist(),
                    record=record,
                    supervised_from=2 if task == "generation" else 1,
                    label=int(tokens[0]) % 2 if task == "classification" else -1,
                    targets=targets_of(task, tokens),
                    second_from=len(tokens) // 2 if task == "question_answering" else -1,
                )
            )
        splits[split] = write_split(folder, split, documents)  # type: ignore[arg-type]
    DataManifest(
        stream=stream, task=task, labels=labels, max_length=32, vocabulary_size=VOCABULARY_SIZE, source="random",
        splits=splits,
    ).save(folder)  # fmt: skip
    return folder


def write_watched(folder: Path, task: Task, text: int = 24, labels: int = 24) -> Path:
    """Data folders of both streams, `text` and `labels`, with the sample on which trainings are watched."""
    write_data(folder / "text", "pretrain", None, count=text)
    made = str(write_data(folder / "labels", "finetune", task, count=labels, seed=7))
    write_watch(made, made, DataManifest.load(made), str(folder / "text"), seed=0)
    return folder


def weight_of(module: Any, name: str) -> torch.Tensor:
    """A parameter by its dotted name."""
    weight: torch.Tensor = module.get_parameter(name)
    return weight
