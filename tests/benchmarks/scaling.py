"""Memory and time of a mixed step while the data set grows a hundredfold.

python tests/benchmarks/scaling.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from mixtune.components.shared.data import DataManifest, Document, Documents, write_split
from mixtune.components.shared.streams import FinetuneStream, PretrainStream, mix
from tests.benchmarks.contenders import Mixtune
from tests.benchmarks.workload import DEFAULT

SCALES = (1, 10, 100)
DOCUMENTS = 2_000
STEPS_IN_BLOCK, BLOCKS = 3, 9


def write(folder: Path, stream: str, count: int) -> None:
    """A data folder of one stream, of about a hundred tokens a document."""
    draw = np.random.default_rng(0)

    def documents() -> Any:
        for number in range(count):
            tokens = draw.integers(3, DEFAULT.vocabulary, int(draw.integers(60, DEFAULT.max_length))).tolist()
            record = {"id": str(number), "source": "drawn", "bytes": 4 * len(tokens)}
            yield Document(tokens, record, 1 if stream == "pretrain" else len(tokens) - 2)

    info = write_split(folder, "train", documents())
    DataManifest(
        stream="pretrain" if stream == "pretrain" else "finetune",
        task=None if stream == "pretrain" else "generation",
        max_length=DEFAULT.max_length,
        vocabulary_size=DEFAULT.vocabulary,
        source="drawn",
        splits={"train": info},
    ).save(folder)


def anonymous_megabytes() -> float:
    """Memory that the process itself holds now, without files that are mapped into it."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def train(folder: Path) -> None:
    """Trains on a data folder, in a process of its own, and prints what it took."""
    text = PretrainStream(Documents(folder / "pretrain", "train"), DEFAULT.max_length, 0)
    labelled = FinetuneStream(Documents(folder / "finetune", "train"), 0, "generation")
    contender = Mixtune(DEFAULT, "float32", 0.3)
    contender.read(mix(text, labelled, 16, DEFAULT.max_length, 0.4))
    contender.run(2)
    seconds, tokens, peak = [], contender.tokens_per_step, 0.0
    for _ in range(BLOCKS):
        seconds.append(contender.run(STEPS_IN_BLOCK))
        peak = max(peak, anonymous_megabytes())
    rate = tokens * STEPS_IN_BLOCK / statistics.median(seconds)
    contender.stop()
    print(json.dumps({"tokens_per_second": round(rate), "peak_megabytes": round(peak)}))  # noqa: T201


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train(given.train)
        return
    figures = {}
    for scale in SCALES:
        with tempfile.TemporaryDirectory() as place:
            for stream in ("pretrain", "finetune"):
                write(Path(place) / stream, stream, scale * DOCUMENTS)
            command = [sys.executable, __file__, "--train", place]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures[scale] = {"documents": 2 * scale * DOCUMENTS, **json.loads(done.stdout.splitlines()[-1])}
        print(figures[scale], flush=True)  # noqa: T201
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
