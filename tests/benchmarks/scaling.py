"""Memory and time of a mixed step while the data set grows a hundredfold.

python tests/benchmarks/scaling.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from mixtune.components.shared.data.prepared import DataManifest, Document, write_split
from tests.benchmarks.contenders import Mixtune, Running
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


def train(folder: Path) -> dict[str, int]:
    """Trains on a data folder, and tells what it took; mapped files do not count as memory."""
    running = Running(Mixtune(DEFAULT, "float32", mix_weight=0.3, data=folder))
    running.run(2)
    taken = [running.run(STEPS_IN_BLOCK) for _ in range(BLOCKS)]
    running.stop()
    rate = taken[0].tokens_per_step * STEPS_IN_BLOCK / statistics.median(one.seconds for one in taken)
    return {"tokens_per_second": round(rate), "peak_megabytes": max(one.anonymous_megabytes for one in taken)}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    figures = {}
    for scale in SCALES:
        with tempfile.TemporaryDirectory() as place:
            for stream in ("pretrain", "finetune"):
                write(Path(place) / stream, stream, scale * DOCUMENTS)
            figures[scale] = {"documents": 2 * scale * DOCUMENTS, **train(Path(place))}
        print(figures[scale], flush=True)  # noqa: T201
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
