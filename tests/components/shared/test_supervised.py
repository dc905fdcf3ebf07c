"""Documents of which some tokens are learned: written, merged, cut into windows and collated."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mixtune.components.shared.data.prepared import Document, Documents, merge_splits, write_split
from mixtune.components.shared.model.packing import collate
from mixtune.components.shared.training.streams import FinetuneStream, PretrainStream

masks = st.lists(st.lists(st.booleans(), min_size=2, max_size=12), min_size=1, max_size=6)


def documents(learned: list[list[bool]], first: int = 0) -> list[Document]:
    """Documents with the tokens 0, 1, 2, ... over all of them."""
    made = []
    for mask in learned:
        tokens = np.arange(first, first + len(mask))
        made.append(Document(tokens, {"id": str(first), "source": "s", "bytes": 1}, supervised=np.array(mask)))
        first += len(mask)
    return made


def targets_of(items: list[list[object]]) -> list[int]:
    rows = [item for item in items if item]
    return sorted(collate(rows, pad_id=0).lm_target.tolist()) if rows else []  # type: ignore[arg-type]


@given(masks, st.integers(2, 9))
def test_windows_learn_what_is_marked(learned: list[list[bool]], length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_split(folder, "train", documents(learned))
        made = Documents(folder, "train")
        stream = PretrainStream(made, length, seed=0)
        found = targets_of([list(stream.item(position)) for position in range(len(stream))])
        flat = np.concatenate([np.array(mask) for mask in learned])
        starts = {*made.offsets.tolist(), *range(0, len(flat), length)}  # tokens without context
        assert found == [place for place in np.flatnonzero(flat).tolist() if place not in starts]
        examples = FinetuneStream(made, seed=0, task="generation")
        found = targets_of([list(examples.item(position)) for position in range(len(examples))])
        assert found == [place for place in np.flatnonzero(flat).tolist() if place not in set(made.offsets.tolist())]


@given(masks, masks, st.data())
def test_merged_parts_keep_their_marks(one: list[list[bool]], two: list[list[bool]], data: st.DataObject) -> None:
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(one) + len(two), max_size=len(one) + len(two))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_split(folder / "1", "train", documents(one))
        plain = [Document([7] * len(mask), {"id": "x", "source": "s", "bytes": 1}, supervised_from=1) for mask in two]
        write_split(folder / "2", "train", plain)
        info = merge_splits(folder / "all", "train", [folder / "1", folder / "2"], np.ones(len(kept), np.int64), kept)
        everything = [*one, *([False] + [True] * (len(mask) - 1) for mask in two)]
        expected = [mask for mask, is_kept in zip(everything, kept, strict=True) if is_kept]
        assert info.supervised_tokens == sum(map(sum, expected))
        made = Documents(folder / "all", "train")
        for index, mask in enumerate(expected):
            low, high = made.offsets[index : index + 2].tolist()
            supervised = made.supervised(low, high)
            assert supervised is not None
            assert supervised.tolist() == [place for place in np.flatnonzero(mask).tolist() if place]


def test_documents_without_marks_have_no_file(tmp_path: Path) -> None:
    info = write_split(tmp_path, "train", [Document([1, 2], {"id": "x", "source": "s", "bytes": 1})])
    assert info.supervised_tokens is None
    assert Documents(tmp_path, "train").supervised(0, 2) is None
