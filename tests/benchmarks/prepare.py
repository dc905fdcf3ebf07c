"""Measures the `prepare` step: its speed against the tokenizer alone and against the recipe of `datasets`, and its memory.

    python tests/benchmarks/prepare.py --json FILE

The text is the source code of the installed packages, in documents of about 3 kB; above its size, lines are shuffled. Every
measurement is a process of its own, and the contenders take turns:

- `tokenizer`: the tokenizer's own batch encoding of the same texts, with all cores.
- `group_texts`: the recipe of the Transformers examples: `datasets.map` of the tokenizer and of `group_texts`, with one process
  for each core, and no cache.
- `prepare`: the whole step, from the file to the data report: duplicates, splits, tokens, records.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

DOCUMENT_BYTES = 3000
VOCABULARY_SIZE = 32_000
MAX_LENGTH = 1024
BATCH = 1000
SAMPLE_SECONDS = 0.1


def documents(megabytes: int) -> Iterator[str]:
    """Yields different documents of this size in all."""
    left = megabytes * 1_000_000
    files = sorted(Path(psutil.__file__).parents[1].rglob("*.py"))
    random.Random(0).shuffle(files)
    for turn in range(1000):
        draw = random.Random(turn)
        for file in files:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            lines = [line for line in lines if len(line) < DOCUMENT_BYTES]
            if turn:
                draw.shuffle(lines)
            text = ""
            for line in lines:
                text += line
                if len(text) > DOCUMENT_BYTES:
                    yield text
                    left -= len(text.encode())
                    text = ""
                    if left <= 0:
                        return


def write_text(folder: Path, megabytes: int) -> Path:
    """Writes the documents as JSON lines, unless they are there."""
    file = folder / f"text-{megabytes}.jsonl"
    if not file.exists():
        aside = file.with_suffix(".part")
        with aside.open("w", encoding="utf-8") as out:
            for text in documents(megabytes):
                out.write(json.dumps({"text": text}) + "\n")
        aside.rename(file)
    return file


def make_tokenizer(folder: Path) -> Path:
    """Trains a tokenizer of a usual size, saved as a base model's, unless it is there."""
    saved = folder / "tokenizer"
    if not saved.exists():
        from transformers import LlamaConfig

        from mixtune.components.prepare.tokenization import train_tokenizer

        tokenizer = train_tokenizer(documents(10), VOCABULARY_SIZE, MAX_LENGTH)
        tokenizer.save_pretrained(saved)
        LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(saved)
    return saved


def run_tokenizer(file: Path, saved: Path) -> float:
    from mixtune.components.prepare.tokenization import load_saved_tokenizer

    tokenizer = load_saved_tokenizer(saved)
    texts = [json.loads(line)["text"] for line in file.open(encoding="utf-8")]
    started = time.perf_counter()
    for start in range(0, len(texts), BATCH):
        tokenizer(texts[start : start + BATCH], add_special_tokens=False, return_attention_mask=False)
    return time.perf_counter() - started


def run_group_texts(file: Path, saved: Path) -> float:
    import datasets

    from mixtune.components.prepare.tokenization import load_saved_tokenizer

    tokenizer = load_saved_tokenizer(saved)
    cores = len(os.sched_getaffinity(0))

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain(*lists)) for name, lists in examples.items()}
        total = len(joined["input_ids"]) // MAX_LENGTH * MAX_LENGTH
        result = {
            name: [ids[at : at + MAX_LENGTH] for at in range(0, total, MAX_LENGTH)] for name, ids in joined.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=file.parent) as cache:
        datasets.disable_progress_bars()
        data = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
        data = data.map(lambda rows: tokenizer(rows["text"]), batched=True, num_proc=cores, remove_columns=["text"])
        data.map(group_texts, batched=True, num_proc=cores)
        return time.perf_counter() - started


def run_prepare(file: Path, saved: Path) -> float:
    from mixtune.components.prepare.config import PrepareStep, PretrainData, Tokenizer
    from mixtune.components.prepare.step import run
    from mixtune.components.shared.artifacts import Artifact
    from mixtune.components.shared.running.context import Context

    tokenizer = Tokenizer(base=str(saved), revision=None, max_length=MAX_LENGTH, vocabulary_size=None)
    stream = PretrainData(source=str(file), dev_fraction=0.01, test_fraction=0.01)
    config = PrepareStep(stream="pretrain", seed=0, tokenizer=tokenizer, pretrain=stream, fingerprint="")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=file.parent) as out:
        outputs: Any = {name: Artifact(f"{out}/{name}") for name in ("train", "heldout", "tokenizer", "report")}
        run(config, context=Context.for_tests(), tokenizer_in=None, pretraining_data=None, **outputs)
        assert "torch" not in sys.modules
        return time.perf_counter() - started


CONTENDERS = {"tokenizer": run_tokenizer, "group_texts": run_group_texts, "prepare": run_prepare}


def measure(name: str, file: Path, saved: Path) -> tuple[float, float]:
    """Runs a contender in a process. Returns its seconds, and the peak memory of all its processes in MB."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.prepare", "--only", name, str(file), str(saved)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": str(name == "tokenizer").lower()},
    )  # fmt: skip
    peak = 0
    while process.poll() is None:
        try:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(one.memory_full_info().pss for one in tree))
        except psutil.Error:
            pass  # one has ended
        time.sleep(SAMPLE_SECONDS)
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(f"{name} ended with status {process.returncode}")
    return float(process.stdout.read().split()[-1]), peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mixtune-benchmark-prepare")
    parser.add_argument("--megabytes", type=int, default=100, help="text for the comparison of speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", default=[10, 100, 1000], help="megabytes of text")
    parser.add_argument("--only", nargs=3, metavar=("CONTENDER", "FILE", "TOKENIZER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(CONTENDERS[given.only[0]](Path(given.only[1]), Path(given.only[2])))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    saved = make_tokenizer(given.folder)
    file = write_text(given.folder, given.megabytes)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(given.rounds):
        for name in CONTENDERS:
            took, _ = measure(name, file, saved)
            seconds[name].append(took)
            print(f"round {turn + 1}: {name} {took:.1f} s, {given.megabytes / took:.2f} MB/s", flush=True)
    median = {name: statistics.median(took) for name, took in seconds.items()}
    peaks: dict[str, float] = {}
    for megabytes in given.memory:
        took, peak = measure("prepare", write_text(given.folder, megabytes), saved)
        peaks[str(megabytes)] = round(peak)
        print(f"{megabytes} MB: {took:.1f} s, peak {peak:.0f} MB", flush=True)
    result: dict[str, Any] = {
        "of_tokenizer_rate": round(median["tokenizer"] / median["prepare"], 3),
        "vs_group_texts": round(median["group_texts"] / median["prepare"], 2),
        "peak_mb": peaks,
        "seconds": {name: [round(took, 2) for took in all_of_one] for name, all_of_one in seconds.items()},
        "megabytes": given.megabytes,
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
