"""A small suite of multiple-choice questions, with which a run without network access can see what else a model forgot.

Each question is a context with four continuations, of which one is right; the model chooses the one with the highest
probability, as in lm-evaluation-harness's tasks of the type `multiple_choice`. Questions are drawn with a fixed seed, and words
from the held-out text:

    copying        a list of words twice, without its last word
    arithmetic     a sum or a difference, after two that are solved
    cloze          a sentence of the held-out text without its last word
    instructions   with a chat template only: to say, spell in capitals or choose a word
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from ..shared.measures import Measure
from ..shared.model.packing import Segment
from ..shared.serving.encoding import first_and_last

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = 100
"""Questions of each task."""
FEWEST = 20
"""A task for which the text yields fewer questions is left out."""
CHOICES = 4
SEED = 0
MAX_TEXTS = 1000
"""Documents of held-out text from which words and sentences are taken."""
_WORD = re.compile(r"\b[^\W\d_]{4,10}\b")
_SENTENCE = re.compile(r"([^.!?\n]{40,240} )([^\W\d_]{4,12})\.(?=\s|$)")


@dataclass(frozen=True)
class ChoiceQuestion:
    """A context with its possible continuations, of which the first is right."""

    task: str
    context: str
    choices: tuple[str, ...]
    chat: bool = False


def questions(texts: Sequence[str], render: Callable[[str], str] | None) -> list[ChoiceQuestion]:
    """Returns the questions of all tasks.

    Args:
        texts: held-out text.
        render: writes a message of a user as a prompt by the chat template; None without a template.
    """
    words = np.array(sorted({word.lower() for text in texts for word in _WORD.findall(text)}))
    made = {
        "copying": _copying(words, _random("copying")),
        "arithmetic": _arithmetic(_random("arithmetic")),
        "cloze": _cloze(texts, _random("cloze")),
        "instructions": iter(()) if render is None else _instructions(words, render, _random("instructions")),
    }
    found: list[ChoiceQuestion] = []
    for rows in made.values():
        some = list(islice((one for one in rows if len(set(one.choices)) == CHOICES), QUESTIONS))
        found += some if len(some) >= FEWEST else []
    return found


def chat_renderer(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str] | None:
    """Returns a function that writes a message of a user as a prompt; None if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        return None

    def render(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    return render


def _random(task: str) -> np.random.Generator:
    return np.random.default_rng([SEED, *task.encode()])


def _copying(words: np.ndarray, draw: np.random.Generator) -> Iterator[ChoiceQuestion]:
    while len(words) >= 2 * CHOICES:
        chosen = draw.choice(words, 2 * CHOICES, replace=False).tolist()
        others = draw.choice(chosen[:-1], CHOICES - 1, replace=False).tolist()
        context = f"{' '.join(chosen)}. {' '.join(chosen[:-1])}"
        yield ChoiceQuestion("copying", context, tuple(f" {word}." for word in (chosen[-1], *others)))


def _arithmetic(draw: np.random.Generator) -> Iterator[ChoiceQuestion]:
    while True:
        *solved, (asked, answer) = [_sum(draw) for _ in range(3)]
        near = [number for number in (answer + 1, answer - 1, answer + 2, answer + 10) if number >= 0][: CHOICES - 1]
        context = " ".join(f"{left} = {right}." for left, right in solved) + f" {asked} ="
        yield ChoiceQuestion("arithmetic", context, tuple(f" {number}." for number in (answer, *near)))


def _sum(draw: np.random.Generator) -> tuple[str, int]:
    small, large = sorted(draw.integers(1, 21, 2).tolist())
    return (f"{small} + {large}", small + large) if draw.random() < 0.5 else (f"{large} - {small}", large - small)


def _cloze(texts: Sequence[str], draw: np.random.Generator) -> Iterator[ChoiceQuestion]:
    sentences = [(found[1].strip(), found[2]) for text in texts for found in _SENTENCE.finditer(text)]
    endings = np.array(sorted({word for _, word in sentences}))
    if len(endings) < CHOICES:
        return
    for place in draw.permutation(len(sentences)).tolist():
        context, word = sentences[place]
        others = [one for one in draw.choice(endings, CHOICES, replace=False).tolist() if one != word][: CHOICES - 1]
        yield ChoiceQuestion("cloze", context, tuple(f" {one}." for one in (word, *others)))


def _instructions(
    words: np.ndarray, render: Callable[[str], str], draw: np.random.Generator
) -> Iterator[ChoiceQuestion]:
    while len(words) >= CHOICES:
        chosen = draw.choice(words, CHOICES, replace=False).tolist()
        first, *others = chosen
        ways = (
            (f"Answer with this one word and nothing else: {first}", (first, *others)),
            (
                f"Write this word in capital letters: {first}",
                (first.upper(), first, *(one.upper() for one in others[:2])),
            ),
            (f"Which is the last of these words: {', '.join([*others, first])}?", (first, *others)),
        )
        asked, answers = ways[int(draw.integers(len(ways)))]
        yield ChoiceQuestion("instructions", render(asked), tuple(f"{one}." for one in answers), chat=True)


@dataclass(frozen=True)
class Suite:
    """The questions as token ids.

    Attributes:
        segments: a segment for each choice; its key is 4 · (number of the question) + (number of the choice).
        tasks: the task of each question.
    """

    segments: list[Segment]
    tasks: list[str]

    @classmethod
    def of(cls, asked: Sequence[ChoiceQuestion], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Suite:
        """Encodes the questions. Those of more than `max_length` tokens are left out."""
        segments: list[Segment] = []
        tasks: list[str] = []
        for question in asked:
            first = first_and_last(tokenizer)[0]
            begin = [] if question.chat or first is None else [first]
            encoded = [
                begin + list(tokenizer(question.context + choice, add_special_tokens=False)["input_ids"])
                for choice in question.choices
            ]
            if max(map(len, encoded)) > max_length:
                continue
            same = max(1, _common(encoded))  # only what differs between the choices decides
            for number, ids in enumerate(encoded):
                key = CHOICES * len(tasks) + number
                segments.append(Segment(np.array(ids), min(same, len(ids)), key=key))
            tasks.append(question.task)
        return cls(segments, tasks)

    def measures(self, nats: np.ndarray) -> list[Measure]:
        """Returns the accuracy of each task.

        Args:
            nats: loss of each choice, by key; a question with a loss that is not finite counts as wrong.
        """
        losses = nats.reshape(-1, CHOICES)
        # A tie with a wrong choice counts as wrong: a model without any preference knows nothing.
        right = np.isfinite(losses).all(1) & (losses[:, 0] < losses[:, 1:].min(1, initial=math.inf))
        rows = []
        for task in dict.fromkeys(self.tasks):
            places = [place for place, name in enumerate(self.tasks) if name == task]
            values = right[places].astype(float)
            ids = [
                self.segments[CHOICES * place + number].tokens.tolist() for place in places for number in range(CHOICES)
            ]
            rows.append(
                Measure(
                    suite="capabilities", task=task, metric="accuracy", filter="none", value=float(values.mean()),
                    stderr=float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None,
                    examples=len(values), higher_is_better=True, few_shot=None, values=values.tolist(),
                    digest=hashlib.sha256(repr(ids).encode()).hexdigest(),
                )
            )  # fmt: skip
        return rows


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Returns the length of the longest common beginning."""
    return next(
        (place for place, ids in enumerate(zip(*sequences, strict=False)) if len(set(ids)) > 1),
        min(map(len, sequences)),
    )
