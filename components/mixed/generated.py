"""Training data that the start model writes itself: replay text, or its own version of the labelled answers.

Replay text is sampled from the start of a text, at temperature 1, so that it follows the model's own distribution
(pseudo-rehearsal: A. Robins 1995, Catastrophic forgetting, rehearsal and pseudorehearsal), for those who have no pretraining
text. Rewritten answers are self-distillation (Z. Yang et al. 2024, Self-Distillation Bridges Distribution Gap in Language Model
Fine-Tuning, arXiv:2402.13669): the model reads the task's answer and says it in its own words, and is trained on these.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..shared.artifacts import Generation, write_jsonl
from ..shared.data.prepared import Document, Documents, write_split
from ..shared.errors import RefusedError
from ..shared.model.device import pick_device
from ..shared.model.generation import generate_ids
from ..shared.model.mixed_model import MixedModel
from ..shared.running.context import Context
from ..shared.serving.decoding import plain_text, stop_ids
from ..shared.serving.encoding import AddedTokens, first_and_last, prompt_parts
from .config import MixedCandidate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "generated.jsonl"
"""File in the model folder with what was written."""
BATCH = 32
LONGEST = 2
"""A rewritten answer may have this many times the tokens of all but the longest twentieth of the answers."""


@dataclass(frozen=True)
class OwnData:
    """Data that the start model wrote.

    Attributes:
        documents: replay text, or labelled examples.
        digest: of the documents.
        cost: what writing them took.
        folder: holds the documents as long as this object exists.
    """

    documents: Documents
    digest: str
    cost: Generation
    folder: tempfile.TemporaryDirectory[str]


@dataclass(frozen=True)
class Writer:
    """Writes with the start model. All processes take part, each with a share, and get the same result.

    Attributes:
        model: the start model; on its own device again afterwards.
        precision: of the matrix products.
        output: model folder, for `generated.jsonl`.
    """

    model: MixedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    seed: int
    precision: Literal["auto", "float32", "bf16"]
    output: Path
    context: Context

    def replay(self, num_tokens: int) -> OwnData:
        """Samples text of at least `num_tokens` tokens. A text ends with its EOS or at the maximum length."""
        first, _ = first_and_last(self.tokenizer)
        if first is None:
            raise RefusedError("mixed.controls.generated_lambdas: the tokenizer has no token that a text begins with")
        state = _processes()

        def write() -> Iterator[list[int]]:
            left = -(-num_tokens // state.num_processes)
            torch.manual_seed(int(np.random.SeedSequence([self.seed, state.process_index]).generate_state(1)[0]))
            with self.context.progress(left, "tokens", "generating") as progress:
                while left > 0:
                    prompts = [np.array([first])] * BATCH
                    made = generate_ids(
                        self.model, self.tokenizer, prompts, self.max_length - 1, BATCH, _Uncounted(), sample=True
                    )
                    texts = [[first, *tokens] for tokens in made if tokens]
                    if not texts:
                        raise RefusedError(
                            "mixed.controls.generated_lambdas: the start model's predictions are not finite"
                        )
                    read = sum(map(len, texts))
                    left -= read
                    progress.advance(read, tokens=read)
                    yield from texts

        written, seconds = self._together(write)
        stops = stop_ids(self.model.lm.generation_config, self.tokenizer)
        documents = []
        for number, tokens in enumerate(written):
            text = plain_text(self.tokenizer, tokens, stops)
            record = {"id": f"generated-{number}", "source": "generated", "bytes": len(text.encode()), "text": text}
            documents.append(Document(tokens, record))
        cost = Generation(tokens=sum(map(len, written)), documents=len(written), seconds=round(seconds, 2))
        return self._stored(documents, cost)

    def rewritten(self, examples: Documents, template: str) -> OwnData:
        """Replaces each answer by the start model's version of it, if that ends within its room; else the answer stays.

        Args:
            template: what the model is asked, with `{prompt}` and `{completion}`.
        """
        records = examples.records()
        added = AddedTokens.by(self.tokenizer)
        stops = stop_ids(self.model.lm.generation_config, self.tokenizer)
        lengths = np.diff(examples.offsets) - examples.supervised_from
        room = int(LONGEST * np.quantile(lengths, 0.95))
        _, end = first_and_last(self.tokenizer)
        state = _processes()

        def write() -> Iterator[tuple[int, list[int] | None]]:
            mine = range(state.process_index, len(records), state.num_processes)
            asked = []
            for index in mine:
                text = template.replace("{prompt}", records[index]["prompt"])
                text = text.replace("{completion}", records[index]["completion"].strip())
                first, ids = prompt_parts(self.tokenizer, added, self.tokenizer(text, verbose=False)["input_ids"])
                asked.append(np.array([*first, *ids]))
            with self.context.progress(len(asked), "prompts", "rewriting") as progress:
                made = generate_ids(self.model, self.tokenizer, asked, room, BATCH, progress)
            yield from zip(mine, made, strict=True)

        written, seconds = self._together(write)
        answers: dict[int, list[int] | None] = dict(written)
        documents, kept = [], 0
        for index, record in enumerate(records):
            tokens, start = examples.tokens(index), int(examples.supervised_from[index])
            answer = answers[index]
            ended = answer is not None and len(answer) > 1 and answer[-1] in stops
            if ended and answer is not None and start + len(answer) <= self.max_length:
                completion = plain_text(self.tokenizer, answer, stops)
                tokens = np.array([*tokens[:start], *answer[:-1], answer[-1] if end is None else end])
                record = {**record, "completion": completion, "rewritten": True}
                kept += 1
            documents.append(Document(tokens, record, supervised_from=start))
        self.context.say(
            f"self-distillation: {kept:,} of {len(records):,} answers are the start model's own; the others did not end within "
            f"{room} tokens and stay as they are"
        )
        cost = Generation(
            tokens=sum(len(answer or []) for answer in answers.values()),
            documents=len(records),
            kept=kept,
            seconds=round(seconds, 2),
        )
        return self._stored(documents, cost)

    def _together(self, write: Any) -> tuple[list[Any], float]:
        """Runs `write` in all processes, without dropout and with random states as before, and joins what they return."""
        started = time.monotonic()
        state, device, training = _processes(), self.model.device, self.model.training
        self.model.to(state.device).eval()
        self.model.precision = self.precision
        with torch.random.fork_rng([state.device] if state.device.type == "cuda" else []):
            own = list(write())
        self.model.to(device).train(training)
        return gather_object(own) if state.num_processes > 1 else own, time.monotonic() - started

    def _stored(self, documents: list[Document], cost: Generation) -> OwnData:
        folder = tempfile.TemporaryDirectory(prefix="mixtune-generated-")
        written = write_split(folder.name, "train", documents)
        if _processes().is_main_process:
            write_jsonl(self.output / FILE, (document.record for document in documents))
        return OwnData(Documents(folder.name, "train"), written.digest, cost, folder)


def own_data(
    chosen: MixedCandidate,
    examples: Documents | None,
    model: MixedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    precision: Literal["auto", "float32", "bf16"],
    output: Path,
    context: Context,
) -> OwnData | None:
    """Returns the data that the start model writes for a candidate; None if it needs none.

    Args:
        examples: labelled examples; None if they are not read.
        output: model folder.

    Raises:
        RefusedError: if the model is a masked language model, or if the examples have no completions.
    """
    if not chosen.generated_tokens and chosen.rewrite_prompt is None:
        return None
    if model.objective == "masked_lm":
        raise RefusedError(f"{chosen.id}: a masked language model writes no text; leave the candidate out")
    writer = Writer(model, tokenizer, max_length, seed, precision, output, context)
    if chosen.generated_tokens:
        return writer.replay(chosen.generated_tokens)
    assert examples is not None
    assert chosen.rewrite_prompt is not None
    if any("completion" not in record or "messages" in record for record in examples.iter_records()):
        raise RefusedError(f"{chosen.id}: self-distillation needs examples with prompts and completions, not chats")
    return writer.rewritten(examples, chosen.rewrite_prompt)


class _Uncounted:
    """Counts nothing, since texts are counted by their tokens."""

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """Does nothing."""


def _processes() -> PartialState:
    return PartialState(cpu=pick_device().type == "cpu")
