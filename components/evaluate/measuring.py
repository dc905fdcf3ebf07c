"""Evaluates one candidate on both splits of the held-out data."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..shared.artifacts import write_jsonl
from ..shared.config import Objective
from ..shared.data.prepared import Documents, Split
from ..shared.measures import HARNESS_FILE, KL_FILE, Measure
from ..shared.model.bf16_on_cpu import fast_bf16
from ..shared.model.generation import generate
from ..shared.model.masking import special_ids
from ..shared.model.mixed_model import MixedModel
from ..shared.model.packing import Segment
from ..shared.model.precision import pick_precision
from ..shared.running.context import Context, ProgressCounter
from ..shared.serving.decoding import plain_text, stop_ids
from ..shared.serving.encoding import text_ids
from ..shared.task_kinds import TASK_KINDS
from .capabilities import MAX_TEXTS, Suite, chat_renderer, questions
from .checks import check_model
from .config import EvaluateStep
from .divergence import Divergence, mean_divergence
from .examples import example_row, from_head
from .harness import Harness
from .held_out import SPLITS, HeldOut
from .likelihood import (
    batches,
    document_segments,
    example_segments,
    head_logits,
    losses,
    masked_segments,
    unpacked,
)
from .subject import Subject
from .summaries import document_rows, summarize_documents, summarize_examples
from .trivial import best_trivial_answer
from .windows import mask_passes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def measure(
    subject: Subject,
    config: EvaluateStep,
    held_out: HeldOut,
    folder: Path,
    context: Context,
    harness: Harness | None,
    divergence: Divergence | None = None,
) -> tuple[dict[str, Any], list[dict[str, str]], Objective] | None:
    """Evaluates one candidate.

    Args:
        divergence: measures the divergence from the pretrained model; None if it is not measured.

    Returns:
        Its entry in evaluation.json, the documents whose loss is not finite, and the model's training objective; None for a
        base model without a trained LM head, which has no loss.
    """
    started = time.monotonic()
    model, tokenizer = subject.load(config.precision), subject.words()
    if subject.card.kind == "base" and model.new_weights:
        context.say(f"base: has no trained language-model head ({model.new_weights[0]} is missing), so it has no loss")
        return None
    check_model(subject.card, model, tokenizer, held_out, harness is not None, config.capabilities)
    candidate = LoadedCandidate(subject, model, tokenizer, config, held_out, context)
    shutil.rmtree(folder, ignore_errors=True)
    splits: dict[str, dict[str, Any]] = {}
    not_finite: list[dict[str, str]] = []
    # Generation needs no task head, so the pretrained model can be scored on it, too.
    with_task = subject.card.has_task_head or not held_out.with_head
    with fast_bf16([model.lm], model.device, pick_precision(config.precision), backward=False):
        for split, (documents, summary) in candidate.documents().items():
            write_jsonl(folder / f"{split}.documents.jsonl", documents)
            splits[split] = {**summary, "task_score": None, "examples": 0}
            not_finite += _not_finite(subject, split, "document", documents, "nats")
        examples = (candidate.labelled() if held_out.with_head else candidate.answered()) if with_task else {}
        for split, rows in examples.items():
            write_jsonl(folder / f"{split}.examples.jsonl", rows)
            not_finite += _not_finite(
                subject, split, "example", rows, "prediction", *([] if held_out.with_head else ["nats"])
            )
            splits[split] |= summarize_examples(rows, held_out, config.metric)
            splits[split]["examples_in_split"] = held_out.examples_in_split(split)
            if subject.card.kind == "finetuned":  # `compare` needs them once
                splits[split]["trivial"] = candidate.trivial(split, rows, folder)
        asked = candidate.capabilities() if config.capabilities else []
        asked += harness.measure(model, tokenizer, context, f"{subject.card.id} lm_eval") if harness else []
        inputs = divergence.rows(model) if divergence else []
    kl = mean_divergence(inputs)
    if kl is not None:
        write_jsonl(folder / KL_FILE, inputs)
    if asked:
        write_jsonl(folder / HARNESS_FILE, (row.model_dump(mode="json") for row in asked))
    curve = Path(subject.folder) / "training.jsonl"
    if subject.alpha is None and curve.is_file():
        shutil.copyfile(curve, folder / "training.jsonl")
    entry = {
        **subject.card.model_dump(mode="json"),
        "model_uri": subject.model_uri,
        "other_uri": subject.other_uri,
        "alpha": subject.alpha,
        "splits": splits,
        "lm_eval": {row.metric_name: {"value": row.value, "stderr": row.stderr} for row in asked},
        "kl_from_pretrained": kl,
        "evaluate_seconds": round(time.monotonic() - started, 2),
        "evaluate_run": context.tracker.run_id,
    }
    return entry, not_finite, model.objective


@dataclass(frozen=True)
class LoadedCandidate:
    """A loaded candidate and its evaluation data."""

    subject: Subject
    model: MixedModel
    tokenizer: PreTrainedTokenizerBase
    config: EvaluateStep
    held_out: HeldOut
    context: Context

    def documents(self, splits: Sequence[Split] = SPLITS) -> dict[Split, tuple[list[dict[str, Any]], dict[str, Any]]]:
        """Computes the losses of the held-out text that is read, all splits in one pass.

        Returns:
            By split a row for each document that was drawn, and the summary. Losses, tokens and bytes of a row are divided by
            the probabilities with which its parts were drawn. A loss is None if it is not finite.
        """
        masked = self.model.objective == "masked_lm"
        passes = mask_passes(self.config.mask_probability) if masked else None
        samples = [
            self.held_out.draw(split, self.config.max_length, self.config.max_tokens, passes) for split in splits
        ]
        starts = np.cumsum([0, *map(len, samples)]).tolist()
        segments: list[Segment] = []
        read = []
        for split, sample, first in zip(splits, samples, starts, strict=False):
            documents = Documents(self.held_out.text_folder, split)
            if passes is not None:
                mask_id, never = int(self.tokenizer.mask_token_id), special_ids(self.tokenizer)
                made = masked_segments(documents, sample, self.config.max_length, passes, mask_id, never, first)
            else:
                made = document_segments(documents, sample, self.config.max_length, first)
            segments += made
            read.append(sum(len(segment.tokens) for segment in made))
        nats, tokens = self._losses(segments, starts[-1], "documents")
        found: dict[Split, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
        for number, (split, sample) in enumerate(zip(splits, samples, strict=True)):
            part = slice(starts[number], starts[number + 1])
            rows = document_rows(self.held_out.text_rows[split], sample, nats[part], tokens[part])
            counts = {
                "documents_in_split": sample.documents_in_split,
                "tokens_read": read[number],
                "sampled": sample.is_part,
            }
            found[split] = rows, {**summarize_documents(rows), **counts}
        return found

    def labelled(self) -> dict[Split, list[dict[str, Any]]]:
        """Predicts each example with the task head and scores it, all splits in one pass."""
        splits = self.held_out.examples
        segments, starts = self._examples(splits, with_head=True)
        work = batches(segments, self.config.max_length, self.config.batch_size)
        with self._progress(len(work), "examples") as progress:
            logits = head_logits(self.model, work, self._pad_id, progress)
            bad = [key for key, values in logits.items() if not np.isfinite(values).all()]
            again = unpacked(segments, bad, self.config.batch_size)
            logits |= head_logits(self.model, again, self._pad_id, progress)
        task, labels = self.held_out.task, self.held_out.labelled.labels or []
        return {
            split: from_head(
                task, self.config.metric, labels, examples, [logits[start + i] for i in range(len(examples))]
            )
            for (split, examples), start in zip(splits.items(), starts, strict=False)
        }

    def answered(self) -> dict[Split, list[dict[str, Any]]]:
        """Generates an answer to each prompt, scores it, and computes the loss of the reference, all splits in one pass."""
        splits = self.held_out.examples
        segments, starts = self._examples(splits, with_head=False)
        nats, tokens = self._losses(segments, starts[-1], "examples")
        parts = [
            np.split(examples.tokens(i), [int(examples.supervised_from[i])])
            for examples in splits.values()
            for i in range(len(examples))
        ]
        with self._progress(len(parts), "answers", "prompts") as progress:
            longest = self.config.max_new_tokens or 1
            prompts = [prompt for prompt, _ in parts]
            answers = generate(self.model, self.tokenizer, prompts, longest, self.config.batch_size, progress)
        stops = stop_ids(self.model.lm.generation_config, self.tokenizer)
        found: dict[Split, list[dict[str, Any]]] = {}
        for (split, examples), start in zip(splits.items(), starts, strict=False):
            rows = []
            for key, record in enumerate(examples.records(), start):
                # Decoded like the answers: tokens that repeat the completion exactly must give its text.
                reference, answer = plain_text(self.tokenizer, parts[key][1].tolist(), stops), answers[key]
                scores = {} if answer is None else self.held_out.overlap.of_example(answer, reference)
                row = example_row(record, self.held_out.task, self.config.metric, reference, answer, scores)
                rows.append({**row, **scores, "tokens": int(tokens[key]), "nats": _finite(nats[key])})
            found[split] = rows
        return found

    def capabilities(self) -> list[Measure]:
        """Asks the questions of mixtune's own suite."""
        records = islice(Documents(self.held_out.text_folder, "dev").iter_records(), MAX_TEXTS)
        texts = [record.get("text", "") for record in records]
        suite = Suite.of(questions(texts, chat_renderer(self.tokenizer)), self.tokenizer, self.config.max_length)
        nats, _ = self._losses(suite.segments, len(suite.segments), "capabilities")
        return suite.measures(nats)

    def _examples(self, splits: Mapping[Split, Documents], with_head: bool) -> tuple[list[Segment], list[int]]:
        """Returns the segments of all splits, and the key of the first example of each split, and of the end."""
        segments: list[Segment] = []
        starts = [0]
        for examples in splits.values():
            made = example_segments(examples, with_head)
            made = self._as_trained(made, examples) if with_head else made
            segments += [replace(segment, key=starts[-1] + segment.key) for segment in made]
            starts.append(starts[-1] + len(examples))
        return segments, starts

    def _as_trained(self, segments: list[Segment], examples: Documents) -> list[Segment]:
        """Encodes the texts with the champion's tokenizer if that ends them otherwise than this run's, such as with EOS."""
        if self.subject.card.kind != "champion" or TASK_KINDS[self.held_out.task].inputs != ("text",):
            return segments
        texts = [record["text"] for record in examples.records()]
        own = [text_ids(self.tokenizer, text, self.config.max_length) for text in texts]
        ends = set(self.tokenizer.all_special_ids)
        if not any(
            _differ_at_ends(ids, segment.tokens.tolist(), ends) for ids, segment in zip(own, segments, strict=True)
        ):
            return segments
        return [
            replace(segment, tokens=np.array(ids), supervised_from=len(ids))
            for ids, segment in zip(own, segments, strict=True)
        ]

    def trivial(self, split: Split, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
        """Writes the best trivial answers to the examples. Returns their name and their score."""
        records = self.held_out.examples[split].records()
        prompts = {record["id"]: record.get("prompt", "") for record in records}
        overlap = None if self.held_out.with_head else self.held_out.overlap
        best = best_trivial_answer(self.held_out.task, self.config.metric, rows, prompts, overlap)
        write_jsonl(folder / f"{split}.trivial.jsonl", best.rows)
        return {"name": best.name, "task_score": best.score}

    def _losses(self, segments: list[Segment], count: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        work = batches(segments, self.config.max_length, self.config.batch_size)
        with self._progress(len(work), what) as progress:
            nats, tokens = losses(self.model, work, count, self._pad_id, progress)
            bad = np.flatnonzero(~np.isfinite(nats))
            again = unpacked(segments, bad.tolist(), self.config.batch_size)
            nats[bad] = losses(self.model, again, count, self._pad_id, progress)[0][bad]
        return nats, tokens

    def _progress(self, total: int, what: str, unit: str = "batches") -> ProgressCounter:
        name = f"{self.subject.card.id} {what}" if self.subject.alpha is not None else what
        return self.context.progress(total, unit, name)

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)


def _differ_at_ends(ids: list[int], others: list[int], ends: set[int]) -> bool:
    return ids != others and [one for one in ids if one not in ends] == [one for one in others if one not in ends]


def _not_finite(
    subject: Subject, split: Split, what: str, rows: list[dict[str, Any]], *keys: str
) -> list[dict[str, str]]:
    """Lists the documents or examples with missing values."""
    named = {"candidate": subject.card.id, "split": split, "what": what}
    return [{**named, "id": row["id"]} for row in rows if any(row[key] is None for key in keys)]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
