"""One model for both losses: a causal language model and, for classification, a head on the same backbone.

Saved models are in Hugging Face format. A classifier's folder holds backbone, LM head and classification head together, so
`AutoModelForSequenceClassification` and `AutoModelForCausalLM` both load from it what is theirs.
Shapes: B rows, L tokens in a row, H hidden size, V vocabulary, C classes, N and M selected positions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Scratch
from .errors import RefusedError
from .packing import Batch, Segment, collate

# Steps log to files and pods; the hub's bars and advice would bury what matters.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from safetensors import safe_open
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

HEAD_KEY = "score.weight"


class MixedModel(nn.Module):
    """A causal LM and an optional classification head.

    Attributes:
        lm: the language model.
        head: H -> C, no bias, on the hidden state of a document's last token; None for generation.
        labels: names of the classes.
        precision: number format of the matrix products where the model is measured.
    """

    precision: Literal["auto", "float32", "bf16"] = "auto"

    def __init__(self, lm: PreTrainedModel, head: nn.Linear | None = None, labels: list[str] | None = None) -> None:
        super().__init__()
        self.lm, self.head, self.labels = lm, head, labels
        text_config = lm.config.get_text_config()
        self._softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self._scale: float | None = getattr(text_config, "logit_scale", None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def add_head(self, labels: list[str], seed: int) -> None:
        """Puts a fresh classification head on the backbone, unless it has one with these labels."""
        if self.head is not None and self.labels == labels:
            return
        hidden_size = self.lm.config.get_text_config().hidden_size
        head = nn.Linear(hidden_size, len(labels), bias=False)
        generator = torch.Generator().manual_seed(seed)
        std = getattr(self.lm.config.get_text_config(), "initializer_range", 0.02)
        nn.init.normal_(head.weight, std=std, generator=generator)
        self.head, self.labels = head.to(self.device), labels

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states of packed rows, (B·L, H)."""
        output = self.lm.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)

    def lm_logits(self, hidden_NH: Tensor) -> Tensor:
        """(N, V) logits of the next token."""
        logits_NV = self.lm.get_output_embeddings()(hidden_NH)
        if self._scale is not None:
            logits_NV = logits_NV * self._scale
        if self._softcap is not None:
            logits_NV = torch.tanh(logits_NV / self._softcap) * self._softcap
        return logits_NV

    def class_logits(self, hidden_MH: Tensor) -> Tensor:
        """(M, C) logits of the classes."""
        assert self.head is not None
        return self.head(hidden_MH)

    def forward(self, batch: Batch, pretrain_weight: float, finetune_weight: float) -> dict[str, Tensor]:
        """The mixed loss of one micro-batch, Σ w_i · ce_i, in one pass over both streams.

        Args:
            batch: rows of both streams.
            pretrain_weight: λ / N_pt, for every supervised token of the pretraining stream.
            finetune_weight: (1 - λ) / N_ft, for every supervised token (classification: example) of the other.

        Returns:
            `weighted`, scalar, what is differentiated; `pretrain` and `finetune`, scalars, Σ ce_i of each stream in nats.
        """
        hidden = self.hidden(batch)
        lm_logits = _at_least_float32(self.lm_logits(hidden[batch.lm_at]))
        lm_ce = F.cross_entropy(lm_logits, batch.lm_target, reduction="none")
        pretrain = lm_ce[batch.lm_pretrain].sum()
        if self.head is None:
            finetune = lm_ce[~batch.lm_pretrain].sum()
        else:
            logits = _at_least_float32(self.class_logits(hidden[batch.class_at]))
            finetune = F.cross_entropy(logits, batch.class_target, reduction="sum")
        weighted = pretrain_weight * pretrain + finetune_weight * finetune
        return {"weighted": weighted, "pretrain": pretrain.detach(), "finetune": finetune.detach()}

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the model in Hugging Face format, in safetensors, with its tokenizer."""
        config = self.lm.config
        state = self.lm.state_dict()
        architectures = [type(self.lm).__name__]
        if tokenizer.pad_token_id is not None:
            config.pad_token_id = tokenizer.pad_token_id
        if self.head is not None and self.labels is not None:
            state[HEAD_KEY] = self.head.weight
            classifier: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
            architectures = [classifier.__name__]
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: index for index, label in enumerate(self.labels)}
            config.problem_type = "single_label_classification"
        self.lm.save_pretrained(folder, state_dict={name: value.contiguous() for name, value in state.items()})
        # save_pretrained notes the class of `lm`; the head decides what the folder is for.
        config.architectures = architectures
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def from_scratch(scratch: Scratch, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> MixedModel:
    """A new Llama with random weights, drawn by the seed."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scratch.hidden_size,
        intermediate_size=-(-scratch.hidden_size * 8 // 3 // 16) * 16,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.heads,
        max_position_embeddings=max(max_length, 512),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MixedModel(LlamaForCausalLM(config))


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> MixedModel:
    """Loads a model folder (or a hub model) with its head, where it has one.

    Raises:
        RefusedError: where it is no causal LM in safetensors, or its LM head does more than mixtune reproduces.
    """
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            str(folder), revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RefusedError(f"model.base: {folder} cannot be loaded as a causal language model ({reason})") from None
    head, labels = _load_head(Path(folder), lm.config, dtype)
    model = MixedModel(lm, head, labels).to(device)
    _check_lm_head(model, str(folder))
    _check_packing(model, str(folder))
    return model


def _load_head(folder: Path, config: Any, dtype: torch.dtype) -> tuple[nn.Linear | None, list[str] | None]:
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        with safe_open(file, framework="pt") as tensors:
            if HEAD_KEY in tensors.keys():  # noqa: SIM118 - not a mapping
                weight = tensors.get_tensor(HEAD_KEY).to(dtype)
                head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
                head.weight.data.copy_(weight)
                return head, [config.id2label[index] for index in range(weight.shape[0])]
    return None, None


@torch.no_grad()
def _check_lm_head(model: MixedModel, name: str) -> None:
    """Refuses an architecture whose logits are not what `lm_logits` computes from the hidden states.

    The LM head runs on supervised positions only, outside the model's own `forward`; this holds the two together.
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 5, device=model.device)[None] % model.lm.config.get_text_config().vocab_size
    theirs = model.lm(input_ids=ids).logits[0].float()
    hidden = model.lm.base_model(input_ids=ids, position_ids=torch.arange(4, device=ids.device)[None]).last_hidden_state
    ours = model.lm_logits(hidden[0]).float()
    model.train(was_training)
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()) + 1e-6):
        kind = model.lm.config.model_type
        raise RefusedError(f"model.base: {name} is of type {kind}, whose output layer mixtune cannot reproduce exactly")


@torch.no_grad()
def _check_packing(model: MixedModel, name: str) -> None:
    """Refuses an architecture in which a packed document sees its neighbour.

    Many read the documents' borders off the position ids (see packing.py); others, recurrent ones among them, do not.
    """
    was_training = model.training
    model.eval()
    first, second = (np.arange(start, start + 6) % model.lm.config.get_text_config().vocab_size for start in (1, 3))
    packed = model.hidden(collate([[Segment(first), Segment(second)]], 0).to(model.device))[len(first) :].float()
    alone = model.hidden(collate([[Segment(second)]], 0).to(model.device)).float()
    model.train(was_training)
    if not alone.isfinite().all():
        return  # weights that are not finite are found, and named, where a loss is computed
    if not torch.allclose(packed, alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max()) + 1e-6):
        kind = model.lm.config.model_type
        raise RefusedError(
            f"model.base: {name} is of type {kind}, in which packed documents see each other; use another architecture"
        )


@torch.no_grad()
def interpolate(
    pretrained: str | Path, finetuned: str | Path, alpha: float, device: torch.device | str = "cpu"
) -> MixedModel:
    """Weight interpolation, (1 - α) · pretrained + α · finetuned (WiSE-FT, arXiv:2109.01903).

    The task head is the fine-tuned model's, since the pretrained one has none.
    """
    model, start = load_model(finetuned, device), load_model(pretrained, device)
    # Parameters, not the state dict: that names tied weights twice, and they would be moved twice.
    theirs = dict(start.lm.named_parameters())
    for name, weight in model.lm.named_parameters():
        weight.lerp_(theirs[name].to(weight.dtype), 1 - alpha)
    return model


def load_tokenizer(folder: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or tokenizer folder; one without a padding token pads with EOS."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), revision=revision, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_precision(precision: Literal["auto", "float32", "bf16"]) -> Literal["float32", "bf16"]:
    """Turns `auto` into bf16 where the device computes it natively, else into float32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "float32"


@contextlib.contextmanager
def autocast(device: torch.device, precision: Literal["auto", "float32", "bf16"]) -> Iterator[None]:
    """Computes matrix products in the given precision."""
    with torch.autocast(device.type, torch.bfloat16, enabled=pick_precision(precision) == "bf16"):
        yield
