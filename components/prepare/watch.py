"""Writes the sample on which trainings are watched, beside the labelled training data: `watch/`, a data folder of its own.

Training steps get no held-out split, which they would have to download as a whole. The sample holds pieces of the control text
in a random order, and some labelled examples of dev.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..shared.config import Watching
from ..shared.data.prepared import WATCH, DataManifest, Document, Documents, Split, SplitInfo, merge_splits, write_split

STREAM_ID = 3
"""Number of the stream of random numbers. It is part of the seed."""


def write_watch(train: str, heldout: str, labelled: DataManifest, text: str | None, seed: int) -> None:
    """Writes the sample.

    Args:
        train: data folder with the labelled training split; the sample becomes its folder `watch`.
        heldout: data folder with the labelled dev split.
        labelled: description of the labelled data.
        text: data folder with the control split of the pretraining text; None if there is none.
        seed: seed of the sample.
    """
    folder = Path(train) / WATCH
    shutil.rmtree(folder, ignore_errors=True)
    draw = np.random.default_rng([seed, STREAM_ID])
    splits: dict[Split, SplitInfo] = {"dev": _examples(folder, heldout, draw)}
    if text is not None and "control" in DataManifest.load(text).splits:
        splits["control"] = write_split(folder, "control", _pieces(text, draw))
    labelled.model_copy(update={"splits": splits, "notes": {}, "tallies": []}).save(folder)


def _examples(folder: Path, heldout: str, draw: np.random.Generator) -> SplitInfo:
    documents = Documents(heldout, "dev")
    kept = np.zeros(len(documents), bool)
    kept[draw.permutation(len(documents))[: _most("max_examples")]] = True
    num_bytes = np.fromiter((record["bytes"] for record in documents.iter_records()), np.int64, len(documents))
    return merge_splits(folder, "dev", [Path(heldout)], num_bytes, kept)


def _pieces(text: str, draw: np.random.Generator) -> Iterator[Document]:
    """Yields pieces of the documents, each with at most as many tokens as a training sequence.

    The bytes of a piece are its share of the document's.
    """
    documents, length = Documents(text, "control"), DataManifest.load(text).max_length
    records, offsets = documents.records(), documents.offsets
    starts = [
        (index, start) for index in range(len(documents)) for start in range(offsets[index], offsets[index + 1], length)
    ]
    left = _most("max_tokens")
    for number in draw.permutation(len(starts)):
        index, start = starts[number]
        end = min(start + length, int(offsets[index + 1]))
        learned = documents.supervised(start, end)
        if end - start < 2 or (learned is not None and not len(learned)):
            continue
        mask = None
        if learned is not None:
            mask = np.zeros(end - start, bool)
            mask[learned] = True
        share = (end - start) / (offsets[index + 1] - offsets[index])
        record = {name: records[index][name] for name in ("id", "source")}
        yield Document(
            documents.flat[start:end], {**record, "bytes": round(share * records[index]["bytes"])}, supervised=mask
        )
        left -= end - start
        if left <= 0:
            return


def _most(option: str) -> int:
    """Returns the largest value of an option of `watch`. The sample suffices for all values, so that none re-runs `prepare`."""
    return int(next(limit.le for limit in Watching.model_fields[option].metadata if hasattr(limit, "le")))
