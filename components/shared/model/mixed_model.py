"""One model for both losses: a language model and, if the task has one, a head on the same backbone.

Saved models are in Hugging Face format. A folder with a task head contains backbone, LM head and task head, so that both
`AutoModelForSequenceClassification` (or `...QuestionAnswering`) and `AutoModelForCausalLM` (or `...MaskedLM`) load their
parts from it. Shapes: B rows, L tokens in a row, H hidden size, V vocabulary, C classes, N and M selected positions, T
tokens of the fine-tuning stream.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ..config import Objective, Task
from ..errors import RefusedError
from ..serving.chats import end_of_turn
from ..serving.decoding import stop_ids
from ..task_kinds import TASK_KINDS
from ..third_party.transformers import attention_implementation
from .device import pick_device, require_compiler
from .expert_types import COEFFICIENT, has_experts
from .experts import Routing, balancing_loss, route
from .heads import HiddenStates, describe_head, make_head, on_hidden, task_logits, task_losses
from .lm_loss import can_be_chunked, chunked_losses, plain_head, sums_by_stream
from .packing import Batch
from .probing import position_offset
from .refusals import CAUSAL_ATTENTION, MASKED_WRITES_NOTHING

_TAKES_A_MASK = ("eager", "sdpa", "flex_attention")
"""Attention implementations, or beginnings of their names, to which transformers gives a mask made from the position ids."""

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


class MixedModel(nn.Module):
    """A language model and an optional task head.

    Attributes:
        lm: the language model, causal or masked.
        task: a task class of transformers without its backbone; None for generation and before the task is known.
        kind: the head's task.
        labels: names of the classes.
        objective: the language model's training objective.
        new_weights: names of LM head weights that are missing in the loaded files and are therefore random.
        balance_weight: weight of the loss that balances the experts of a mixture; None for models without experts.
        takes_token_types: whether the backbone takes token types.
        precision: number format of the matrix products when the model is evaluated.
    """

    precision: Literal["auto", "float32", "bf16"] = "auto"

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        # With a padding index, a padding token that is also EOS would get no gradient. Pure padding gets none anyway.
        embeddings: Any = lm.get_input_embeddings()
        embeddings.padding_idx = None
        self.task: PreTrainedModel | None = None
        self.kind: Task | None = None
        self.labels: list[str] | None = None
        self.objective = objective_of(lm.config)
        self.new_weights: list[str] = []
        is_mixture = has_experts(lm.config.to_dict())
        self.balance_weight: float | None = getattr(lm.config, COEFFICIENT, 0.0) if is_mixture else None
        self.takes_token_types = "token_type_ids" in inspect.signature(type(lm.base_model).forward).parameters
        self.position_offset = position_offset(lm) if self.objective == "masked_lm" else 0
        # Wrapped in a tuple, so that it is not registered as a module and its weights are not listed twice.
        self._plain = (plain_head(lm),)

    @property
    def config(self) -> PretrainedConfig:
        """Returns the language model's configuration."""
        return self.lm.config

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights."""
        return next(self.parameters()).device

    @property
    def vocabulary_size(self) -> int:
        """Returns the number of embeddings."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def attention_takes_a_mask(self) -> bool:
        """Tells whether documents are kept apart by a mask; otherwise, in FlashAttention, by their boundaries."""
        return (attention_implementation(self.config) or "eager").startswith(_TAKES_A_MASK)

    def add_head(self, kind: Task, labels: list[str] | None, seed: int) -> None:
        """Adds a new task head to the backbone, unless it has one for this task and these labels.

        `add_task_head` in `loading.py` also checks that the head can be run on packed rows.

        Raises:
            RefusedError: if models of this type have no such head.
        """
        if TASK_KINDS[kind].head is None:
            if self.objective == "masked_lm":
                raise RefusedError(MASKED_WRITES_NOTHING.format(task=kind, type=self.config.model_type))
            self.task, self.kind, self.labels = None, None, None
            return
        if self.kind == kind and self.labels == labels:
            return
        self.task = make_head(self.lm, kind, labels, seed)
        self.kind, self.labels = kind, labels

    def set_attention(self, attention: str) -> None:
        """Sets the attention implementation; `auto` leaves it unchanged.

        Raises:
            RefusedError: if it is not available, or cannot separate the documents of a packed row.
        """
        if attention == "auto":
            return
        if self.objective == "masked_lm" and attention not in ("sdpa", "eager"):
            raise RefusedError(
                CAUSAL_ATTENTION.format(option="attention", attention=attention, type=self.config.model_type)
            )
        if attention == "flex_attention":
            if pick_device().type == "cpu":
                raise RefusedError(
                    "attention: flex_attention has no backward pass on the CPU, and torch finds no GPU here; use sdpa"
                )
            require_compiler("attention: flex_attention")
        try:
            self.lm.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            # The sentences after the first are advice for developers of transformers.
            reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
            raise RefusedError(f"attention: {attention} cannot be used here ({reason}); use sdpa") from None

    def hidden(self, batch: Batch) -> Tensor:
        """Returns the last hidden states of packed rows, (B·L, H)."""
        hidden: Tensor = self._backbone(batch).last_hidden_state
        return hidden.flatten(0, 1)

    def routing(self, batch: Batch) -> Routing:
        """Counts how a mixture of experts routes the tokens of a batch."""
        return self._route(self._backbone(batch, output_router_logits=True), batch)[0]

    def _route(self, output: Any, batch: Batch) -> tuple[Routing, Tensor]:
        chosen: Any = self.config
        return route(output.router_logits, batch, chosen.num_experts_per_tok)

    def _backbone(self, batch: Batch, **wanted: bool) -> Any:
        given: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": self._positions(batch),
            **wanted,
        }
        if self.objective == "masked_lm":
            given["attention_mask"] = self._mask(batch)
            if self.takes_token_types:
                given["token_type_ids"] = batch.token_type_ids
        else:
            given["use_cache"] = False
            if not self.attention_takes_a_mask:
                # Without these, transformers looks for segments in the position ids of batches of one row
                # only: in more rows, documents would see each other. It would also look, and synchronise, in every layer.
                given |= {"cu_seq_lens_q": batch.boundaries, "cu_seq_lens_k": batch.boundaries}
                given |= {"max_length_q": batch.longest, "max_length_k": batch.longest}
        return self.lm.base_model(**given)

    def lm_logits(self, hidden_NH: Tensor) -> Tensor:
        """Returns the (N, V) logits of the given hidden states: runs only the LM head."""
        return on_hidden(self.lm, HiddenStates(hidden_NH[None])).logits[0]

    def lm_token_losses(self, batch: Batch, max_tokens: int) -> Tensor:
        """Returns the (N,) loss of each supervised token of the LM head, in nats, with the logits of `max_tokens` at once."""
        hidden = self.hidden(batch)
        parts = []
        for first in range(0, max(len(batch.lm_at), 1), max_tokens):
            at_n = slice(first, first + max_tokens)
            logits = _at_least_float32(self.lm_logits(hidden[batch.lm_at[at_n]]))
            parts.append(F.cross_entropy(logits, batch.lm_target[at_n], reduction="none"))
        return torch.cat(parts)

    def head_losses(self, batch: Batch) -> Tensor:
        """Returns the (M,) loss of the task head on each labelled segment, in nats (for regression, squared errors)."""
        assert self.kind is not None
        return task_losses(self.kind, _at_least_float32(self.task_logits(self.hidden(batch), batch)), batch)

    def finetune_logits(self, batch: Batch) -> Tensor:
        """Returns the (T, V) logits of the language model at every token of the fine-tuning stream."""
        return self.lm_logits(self.hidden(batch)[batch.finetune_at])

    def task_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Runs the task head on each labelled segment.

        Args:
            hidden: (B·L, H), of the whole batch.

        Returns:
            (M, C) logits; (M, 1) for regression; (M, longest segment, 2) logits of start and end for question answering, -inf
            after a segment's end.
        """
        assert self.task is not None
        assert self.kind is not None
        return task_logits(self.task, self.kind, self.lm.base_model, hidden, batch, self.objective == "masked_lm")

    def forward(
        self,
        batch: Batch,
        pretrain_weight: float,
        finetune_weight: float,
        kl_weight: float = 0.0,
        start_logits: Tensor | None = None,
        routing: Routing | None = None,
    ) -> dict[str, Tensor]:
        """Computes the mixed loss of one micro-batch, Σ w_i · ce_i, in one pass over both streams.

        Args:
            batch: rows of both streams.
            pretrain_weight: λ / N_pt, the weight of each supervised token of the pretraining stream.
            finetune_weight: (1 - λ) / N_ft, the weight of each supervised token (with a task head: example) of the other,
                beside the weight of its segment.
            kl_weight: weight of the divergence from the start model at each token of the fine-tuning stream.
            start_logits: (T, V) logits of the start model at these tokens; not needed if `kl_weight` is 0.
            routing: of all tokens of the step; None leaves out the loss that balances experts.

        Returns:
            `weighted`, scalar, the loss to differentiate; `pretrain` and `finetune`, scalars, Σ ce_i of each stream in nats
            (for regression, squared errors), times the weights of the segments; `kl`, scalar, Σ KL(start || model) in nats;
            `router_aux`, scalar, this micro-batch's part of the loss that balances experts, not multiplied by its weight.
        """
        output = self._backbone(batch, **({"output_router_logits": True} if routing is not None else {}))
        hidden = output.last_hidden_state.flatten(0, 1)
        weighted, pretrain, finetune = self._lm_losses(hidden[batch.lm_at], batch, pretrain_weight, finetune_weight)
        if self.kind is not None:
            losses_M = task_losses(self.kind, _at_least_float32(self.task_logits(hidden, batch)), batch)
            finetune = _weighted(losses_M, batch.label_weight).sum()
            weighted = weighted + finetune_weight * finetune
        kl = torch.zeros_like(pretrain)
        if kl_weight and start_logits is not None:
            ours = _at_least_float32(self.lm_logits(hidden[batch.finetune_at])).log_softmax(-1)
            theirs = _at_least_float32(start_logits).log_softmax(-1)
            kl = F.kl_div(ours, theirs, reduction="sum", log_target=True)
            weighted = weighted + kl_weight * kl
        balance = torch.zeros_like(pretrain)
        if routing is not None and self.balance_weight:
            balance = balancing_loss(routing, self._route(output, batch)[1])
            weighted = weighted + self.balance_weight * balance
        return {
            "weighted": weighted,
            "pretrain": pretrain.detach(),
            "finetune": finetune.detach(),
            "kl": kl.detach(),
            "router_aux": balance.detach(),
        }

    def _lm_losses(
        self, hidden_NH: Tensor, batch: Batch, pretrain_weight: float, finetune_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns Σ w_i · ce_i of the supervised tokens, and Σ ce_i of each stream."""
        (head,) = self._plain
        if head is not None and can_be_chunked(self.lm, head):
            # Filled on the device: a tensor made of Python numbers would be copied there, which synchronises.
            weight_N = torch.full_like(batch.lm_target, finetune_weight, dtype=torch.float64)
            weight_N.masked_fill_(batch.lm_pretrain, pretrain_weight)
            return chunked_losses(head, hidden_NH, batch.lm_target, weight_N, batch.lm_pretrain, batch.lm_weight)
        ce = F.cross_entropy(_at_least_float32(self.lm_logits(hidden_NH)), batch.lm_target, reduction="none")
        pretrain, finetune = sums_by_stream(_weighted(ce, batch.lm_weight), batch.lm_pretrain)
        return pretrain_weight * pretrain + finetune_weight * finetune, pretrain, finetune

    @torch.no_grad()
    def generate(self, **given: Any) -> Tensor:
        """Calls transformers' `generate` on the language model."""
        lm: Any = self.lm
        return lm.generate(**given)

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the model and its tokenizer in Hugging Face format, with safetensors."""
        state = self.lm.state_dict()
        if self.task is not None:
            state |= self.task.state_dict()
        self.lm.save_pretrained(folder, state_dict={name: value.contiguous() for name, value in state.items()})
        self.save_description(folder, tokenizer)

    def save_description(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes everything but the weights: the configurations, and the tokenizer.

        A task head is saved with a tokenizer that pads on the right: transformers gives absolute positions to padding on the
        left.
        """
        config = self.lm.config
        # Heads of causal models read the last token that is not this one. Encoders can count positions from it, so it stays.
        for part in (config, config.get_text_config()):
            if self.objective == "causal_lm" or part.pad_token_id is None:
                part.pad_token_id = tokenizer.pad_token_id
        own = self.lm.generation_config if self.objective == "causal_lm" else None
        if own is not None:
            own.pad_token_id = tokenizer.pad_token_id
        if own is not None and (tokenizer.eos_token_id is None or end_of_turn(tokenizer) is not None):
            # Completions, or turns of a chat, can end in another token than EOS, which transformers must stop at.
            own.eos_token_id = stop_ids(own, tokenizer)
        if self.task is not None and self.kind is not None:
            tokenizer.padding_side = "right"
            describe_head(config, self.kind, self.labels)
        config.architectures = [type(self.task or self.lm).__name__]  # the folder is for the head's task
        config.save_pretrained(folder)
        if self.lm.can_generate():
            self.lm.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _positions(self, batch: Batch) -> Tensor:
        """Returns the (B, L) position ids as the model computes them for each segment alone.

        Models of the RoBERTa family do not count padding tokens, even inside of a text.
        """
        if not self.position_offset:
            return batch.position_ids
        pad_id = self.position_offset - 1
        counted = (batch.input_ids != pad_id).long()
        total = counted.cumsum(1)
        before = torch.where(batch.position_ids == 0, total - counted, 0).cummax(1).values
        return (total - before) * counted + pad_id

    def _mask(self, batch: Batch) -> Any:
        """Returns an encoder's attention mask, (B, 1, L, L): tokens attend within their segment."""
        segment = (batch.position_ids == 0).cumsum(1)
        full = segment[:, None, :, None] == segment[:, None, None, :]
        text_config: Any = self.config.get_text_config()
        types = set(getattr(text_config, "layer_types", None) or ())
        if "sliding_attention" not in types:
            return self._as_attention_takes_it(full)
        at = torch.arange(segment.shape[1], device=segment.device)
        near = (at[:, None] - at[None]).abs() <= text_config.sliding_window
        return {
            "full_attention": self._as_attention_takes_it(full),
            "sliding_attention": self._as_attention_takes_it(full & near),
        }

    def _as_attention_takes_it(self, mask: Tensor) -> Tensor:
        if attention_implementation(self.config) != "eager":
            return mask
        dtype = next(self.lm.base_model.parameters()).dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _weighted(losses: Tensor, weight: Tensor | None) -> Tensor:
    return losses if weight is None else losses * weight.to(losses.dtype)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def objective_of(config: PretrainedConfig) -> Objective:
    """Returns the training objective of a model: masked tokens for encoders, the next token for all others."""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return "masked_lm" if masked else "causal_lm"
